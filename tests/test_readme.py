"""The README says what is so: its commands parse, and its tables are those of the program."""

import collections
import json
import re
import shlex
import subprocess
import sys
from unittest.mock import ANY

import photographs
import pytest
import seeds
from conftest import ROOT

import model
import train
from cli import train_parser
from recipes import RECIPES

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(call.split("#")[0])[2:]
    for block in [*BLOCKS, train.__doc__]
    for line in block.splitlines()
    for call in line.split("&&")
    if re.match(r"\s*(\S*/)?python train\.py", call)
]


def flag_table():
    """The rows of the table that stands under "Flags": flag -> what is said of it."""
    section = README.split("## Flags")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|$", section, re.MULTILINE)
    return {flags.replace("`", ""): text for flags, text in rows}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_its_commands_parse(command):
    args = train_parser("").parse_args(command)
    assert args.recipe in RECIPES


def test_there_are_commands_to_parse():
    assert len(COMMANDS) >= 6
    assert shlex.split("--epochs 20 --device cuda") in COMMANDS


def test_its_scripts_start():
    """Each imports all that it needs, from its own folder's place on the path."""
    scripts = sorted(set(re.findall(r"python ((?:benchmarks|results|tests)/\w+\.py)", README)))
    assert len(scripts) == 5
    start = "import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2])"
    commands = [[sys.executable, "-c", start, (ROOT / name).parent, name] for name in scripts]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in processes] == [0] * len(scripts)


def test_its_flag_table_is_what_help_says():
    told = {}
    for action in train_parser("")._actions:
        name = ", ".join(action.option_strings)
        values = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
        takes = action.nargs != 0
        told[name if not takes or not values else f"{name} {values}"] = action.help
    told.pop("-h, --help")
    assert flag_table() == told


def test_its_recipe_table_has_every_recipe_and_its_size():
    section = README.split("## Recipes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) ", section, re.MULTILINE)
    networks = {name: model.build(row.encoder, row.join) for name, row in RECIPES.items()}
    sizes = {name: f"{model.count_parameters(network):,}" for name, network in networks.items()}
    assert rows == list(sizes.items())


@pytest.mark.parametrize("name", ["default", "fast", "tiny"])
def test_its_result_table_is_what_the_benchmark_wrote(name):
    row = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"][name]
    assert row["settings"].items() >= dict(RECIPES[name].as_plain(), about=ANY).items()
    digit, total, _, consistent = row["figures"].values()
    spread = [f"{100 * head['mean']:.3f} ({100 * head['sd']:.3f})" for head in (digit, total)]
    cells = [f"{row['settings']['epochs']}", f"{row['parameters']:,}"]
    cells += [f"{row['training_flops']:.1e}".replace("e+", "e"), f"{digit['n']}", *spread]
    cores = {1: "one core", 2: "two cores"}[row["threads"]]
    seconds = f"{row['median_train_seconds']:,.0f} on {cores}"
    cells += [f"{100 * consistent['mean']:.3f}", seconds]
    flags = "" if name == "default" else f" --recipe {name}"
    assert f"| `python train.py{flags}` | {' | '.join(cells)} |\n" in README


def ablations():
    """The rows of each benchmark that compares some: name -> row by name. A user's own is none."""
    paths = set((ROOT / "results").glob("*.json")) - set((ROOT / "results").glob("mine*"))
    every = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: kept["rows"] for name, kept in every.items() if len(kept.get("rows", ())) > 1}


@pytest.mark.parametrize("name", sorted(ablations()))
def test_the_tables_of_ablations_are_what_the_benchmark_wrote(name):
    shown = README + (ROOT / "results" / "search.md").read_text()
    assert seeds.comparison(ablations()[name]) in shown


def test_its_table_of_photographs_is_what_the_benchmark_wrote(capsys):
    kept = json.loads((ROOT / "results" / "photographs.json").read_text())
    totals = collections.Counter()
    for name, row in kept["right"].items():
        photographs.print_row(name, row, kept["count"])
        totals.update(row)
    every = kept["count"] * len(kept["right"])
    photographs.print_row(f"of {every}", totals, every)
    assert capsys.readouterr().out in README


def test_files_and_modules_that_it_names_exist():
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_ci_runs_the_test_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("eval "))
    told = subprocess.check_output(["bash", "-c", f"echo {line[5:]}"], cwd=ROOT, text=True)
    assert told in BLOCKS and told.endswith(" -m pytest\n")
