"""The documentation is true: commands parse, code runs, tables come from the results."""

import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from unittest.mock import patch

import pytest
from conftest import ROOT

import demo
import predict
import recipes
import train
from benchmarks import gpu, photographs, published_systems, seeds, speed
from recipes import RECIPES
from training.cli import Parser, train_parser

DOCS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "published/README.md", "results/README.md", "tests/README.md")
}
README = DOCS["README.md"]
BLOCKS = re.findall(r"```\w*\n(.*?)```", "".join(DOCS.values()), re.DOTALL)
PARSERS = {
    "train.py": train_parser().parse_args,
    "predict.py": predict.parse_args,
    "demo.py": demo.parse_args,
    "benchmarks.seeds": seeds.parse_args,
    "benchmarks.speed": speed.parse_args,
    "benchmarks.gpu": gpu.parse_args,
    "benchmarks.photographs": photographs.parse_args,
    "benchmarks.published_systems": published_systems.parse_args,
    "tests/test_faults.py": Parser().parse_args,  # has no flags
}
COMMANDS = sorted(
    {
        tuple(shlex.split(call.split("#")[0].replace("python -m ", "python "))[1:])
        for block in [
            *BLOCKS,
            train.__doc__,
            predict.__doc__,
            demo.__doc__,
            photographs.__doc__,
            seeds.__doc__,
            speed.__doc__,
            gpu.__doc__,
        ]
        for line in block.splitlines()
        for call in line.split("&&")
        if re.match(r"\s*(\S*/)?python (-m benchmarks|(\w+/)?\w+\.py)", call)
    }
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command):
    script, *argv = command
    args = PARSERS[script](argv)
    if flags := getattr(args, "flags", None):  # of train.py, after --
        PARSERS["train.py"](flags)


def test_the_requested_command_is_documented():
    assert ("train.py", "--epochs", "20", "--device", "cuda") in COMMANDS
    assert "python train.py --epochs 20 --device cuda" in README


def test_scripts_start():
    """Each benchmark imports what it needs."""
    names = [name for name in PARSERS if name.startswith("benchmarks")]
    assert len(names) == 5
    commands = [[sys.executable, "-c", f"import {name}"] for name in names]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in processes] == [0] * len(names)


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_code_runs(job):
    """The new recipe, and the script that loads a trained model."""
    _, new_recipe, script = python_blocks()
    with patch.dict(RECIPES):
        exec(new_recipe, dict(vars(recipes)))
        *_, name = RECIPES
        assert job("--recipe", name, "--epochs", 1)[0] == 0
        names = {}
        exec(script, names)
    assert (names["digit_probs"].shape, names["sum_probs"].shape) == ((2, 10), (2, 19))


def test_the_training_step_that_is_shown_is_the_one_that_runs():
    step = python_blocks()[0]
    assert step.count("\n") == 8
    assert step in inspect.getsource(train.train_epoch).replace("\n        ", "\n")


def test_the_first_run_prints_what_is_shown(job):
    status, out, _ = job("--recipe", "fast", "--device", "cpu")
    (shown,) = (block for block in BLOCKS if block.startswith("device "))
    form = re.sub(r"\d[\d.,]*", "N", shown).replace("bf16", "fpN").replace("fpN", "PRECISION")
    printed = re.sub(r"\b(bf16|fp32)\b", "PRECISION", out)
    assert status == 0
    assert re.sub(r"\d[\d.,]*", "N", printed).replace("thread\n", "threads\n") == re.sub(
        r"\d[\d.,]*", "N", re.sub(r"\b(bf16|fp32)\b", "PRECISION", shown)
    ), form


def mean_and_sd(summary):
    return f"{100 * summary['mean']:.3f} ({100 * summary['sd']:.3f})"


def read_row(path, name):
    """A recipe's row in a file of benchmarks.seeds, which must be of today's recipe."""
    row = json.loads((ROOT / "results" / path).read_text())["rows"][name]
    today = RECIPES[name].as_plain()
    # The encoders had other names, and recipes no members.
    same = row["settings"].keys() & today.keys() - {"description", "encoder"}
    assert {key: row["settings"][key] for key in same} == {key: today[key] for key in same}
    return row


@pytest.mark.parametrize("name", ["default", "fast", "tiny"])
def test_result_tables_come_from_the_benchmark(name):
    row = read_row(f"{name}.json", name)
    assert (row["dataset"], row["precision"]) == ("mnist", "bf16")
    digit, total = row["metrics"]["digit"], row["metrics"]["sum"]
    cells = [f"{row['settings']['epochs']}", f"{row['parameters']:,}"]
    cells += [f"{row['training_flops']:.1e}".replace("e+", "e"), f"{digit['n']}"]
    seconds = {1: f"{row['median_train_seconds']:,.0f} on one core"}  # number of threads -> cell
    seconds[2] = f"{row['median_train_seconds']:.3g}"
    cells += [mean_and_sd(digit), mean_and_sd(total), seconds[row["threads"]]]
    assert f"| `--recipe {name}` | {' | '.join(cells)} |\n" in README
    help_line = f"{name:<8} {row['settings']['epochs']:>3} epoch"
    consistent = f"{100 * row['metrics']['consistency']['mean']:.3f}"
    cells = [f"{digit['n']}", mean_and_sd(digit), mean_and_sd(total), consistent, cells[-1]]
    assert f"| `{name}` | {' | '.join(cells)} | `{name}.json` |" in DOCS["results/README.md"]
    accuracies = f"{100 * digit['mean']:.2f} / {100 * total['mean']:.2f} %"
    (line,) = (line for line in train.__doc__.splitlines() if line.startswith(f"  {help_line}"))
    assert accuracies in line


def test_the_help_names_every_recipe():
    assert all(re.search(rf"\b{name}\b", train.__doc__) for name in RECIPES)


def test_other_tables_come_from_the_benchmarks():
    heads = json.loads((ROOT / "results" / "heads.json").read_text())
    assert seeds.comparison(heads["rows"]) in DOCS["results/README.md"]
    for path in (ROOT / "results").glob("photographs*.json"):
        assert photographs.table(json.loads(path.read_text())) in DOCS["results/README.md"], path
    assert published_systems.table() in DOCS["published/README.md"]


@pytest.mark.parametrize("doc", DOCS)
def test_files_that_are_named_exist(doc):
    directory = (ROOT / doc).parent
    for name in re.findall(r"\]\((?!http)(.*?)\)", DOCS[doc]):
        assert (directory / name).exists(), name
    for name in re.findall(r"`((?:\w+/)?\w+\.py)`", DOCS[doc]):
        assert (ROOT / name).is_file() or (directory / name).is_file(), name


def test_ci_runs_the_test_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("eval "))
    shown = subprocess.check_output(["bash", "-c", f"echo {line[5:]}"], cwd=ROOT, text=True)
    assert any(shown in block for block in BLOCKS) and shown.endswith(" -m pytest\n")


def test_uv_installs_what_pip_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "uv run train.py" in README
    assert project["dependencies"] == (ROOT / "requirements.txt").read_text().split()
