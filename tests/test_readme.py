"""The documentation is true: commands parse, code runs, tables come from the results."""

import inspect
import json
import re
import shlex
import subprocess
import tomllib
from unittest.mock import patch

import pytest
from conftest import ROOT

import demo
import predict
import recipes
import train
from benchmarks import gpu, heads, photographs, published_systems, seeds
from benchmarks.common import parse_flags
from recipes import RECIPES
from training.console import Parser
from training.flags import train_parser

DOCS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "published/README.md", "results/README.md", "tests/README.md")
}
README = DOCS["README.md"]
BLOCKS = re.findall(r"```\w*\n(.*?)```", "".join(DOCS.values()), re.DOTALL)
BENCHMARKS = (gpu, heads, photographs, published_systems, seeds)
PARSERS = {
    "train.py": parse_flags,
    "predict.py": predict.parse_args,
    "demo.py": demo.parse_args,
    **{module.__name__: module.parse_args for module in BENCHMARKS},
    "tests/test_faults.py": Parser().parse_args,  # has no flags
}
COMMANDS = sorted(
    {
        tuple(shlex.split(call.split("#")[0].replace("python -m ", "python "))[1:])
        for block in [*BLOCKS, *(module.__doc__ for module in (train, predict, demo, *BENCHMARKS))]
        for line in block.splitlines()
        for call in line.split("&&")
        if re.match(r"\s*(\S*/)?python (-m benchmarks|(\w+/)?\w+\.py)", call)
    }
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command):
    script, *argv = command
    args = PARSERS[script](argv)
    for flags in [getattr(args, "flags", []), *getattr(args, "vary", [])]:  # of train.py
        parse_flags(flags)


def test_the_requested_command_is_documented():
    assert ("train.py", "--epochs", "20", "--device", "cuda") in COMMANDS
    assert "python train.py --epochs 20 --device cuda" in README


def test_flags_that_are_named_exist():
    named = set(re.findall(r"`(--[a-z-]+)", "".join(DOCS.values()))) - {"--torch-backend"}  # of uv
    known = train_parser("", RECIPES).format_help() + seeds.__doc__
    assert [flag for flag in named if not re.search(rf"{flag}\b", known)] == []


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
    printed, shown = (
        re.sub(r"\d[\d.,]*", "N", re.sub("bf16|fp32", "PRECISION", text)) for text in (out, shown)
    )
    assert status == 0 and printed == shown


def mean_and_sd(summary):
    sd = f" ({100 * summary['sd']:.3f})" if summary["n"] > 1 else ""
    return f"{100 * summary['mean']:.3f}{sd}"


def read_row(path, name):
    """A recipe's row in a file of benchmarks.seeds, which must be of today's recipe."""
    row = json.loads((ROOT / "results" / path).read_text())["rows"][name]
    today = RECIPES[name].as_plain()
    assert row["settings"] | {"description": ""} == today | {"description": ""}
    return row


@pytest.mark.parametrize("name", ["default", "fast", "tiny"])
def test_result_tables_come_from_the_benchmark(name):
    row = read_row(f"{name}.json", name)
    assert (row["dataset"], row["precision"]) == ("mnist", "bf16")
    digit, total = row["metrics"]["digit"], row["metrics"]["sum"]
    cells = [f"{row['settings']['epochs']}", f"{row['parameters']:,}"]
    cells += [f"{row['training_flops']:.1e}".replace("e+", "e"), f"{digit['n']}"]
    cells += [mean_and_sd(digit), mean_and_sd(total)]
    assert f"| `--recipe {name}` | {' | '.join(cells)} |" in README
    help_line = f"{name:<8} {row['settings']['epochs']:>3} epoch"
    consistent = f"{100 * row['metrics']['consistency']['mean']:.3f}"
    cells = [f"{digit['n']}", mean_and_sd(digit), mean_and_sd(total), consistent]
    assert f"| `{name}` | {' | '.join(cells)} | `{name}.json` |" in DOCS["results/README.md"]
    accuracies = f"{100 * digit['mean']:.2f} / {100 * total['mean']:.2f} %"
    (line,) = (line for line in train.__doc__.splitlines() if line.startswith(f"  {help_line}"))
    assert accuracies in line


def test_other_tables_come_from_the_benchmarks():
    tables = {"heads*.json": heads.table, "systems*.json": heads.table}
    tables["photographs*.json"] = photographs.table
    for pattern, table in tables.items():
        for path in (ROOT / "results").glob(pattern):
            text = table(json.loads(path.read_text()))
            assert any(text in doc for doc in DOCS.values()), path
    assert published_systems.table() in DOCS["published/README.md"]


def test_the_share_of_unseen_pairs_is_that_of_the_benchmark():
    row = json.loads((ROOT / "results" / "default-unseen-70.json").read_text())["rows"]["default"]
    assert row["settings"] == RECIPES["default"].as_plain() | {"unseen_pairs": 70}
    assert f"{100 * row['metrics']['unseen_sum']['mean']:.2f}%" in README


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
