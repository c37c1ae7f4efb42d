"""The benchmarks measure what they say."""

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dataset
import train
from benchmarks import common, gpu, heads, seeds
from dataset import NUM_DIGITS
from model import OuterProduct
from recipes import RECIPES


def test_flops_are_six_times_the_multiply_adds():
    # Each output of a layer times the inputs that it is computed from.
    by_hand = 20 * 20 * 16 * 5 * 5 + 8 * 8 * 48 * 16 * 3 * 3 + 768 * 256 + 256 * 10 + 100 * 19
    recipe = replace(RECIPES["fast"], head=OuterProduct)
    assert common.training_flops(recipe) == 6 * by_hand * recipe.epochs * 60_000


@pytest.fixture
def commands(workdir, monkeypatch, job):
    """Runs train.py in this process, with the small MNIST; a list of the flags it was given."""
    called = []

    def run(command, **options):
        assert command[1] == str(common.ROOT / "train.py")
        called.append(command[2:])
        with redirect_stdout(io.StringIO()):
            return SimpleNamespace(returncode=train.main(command[2:]))

    monkeypatch.setattr(seeds, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    return called


def read_rows(name):
    return json.loads((common.BENCHMARKS / name).read_text())["rows"]


def test_variations_are_compared_over_equal_seeds_and_not_repeated(commands, capsys):
    argv = ["--recipe", "fast", "--seeds", "2", "--vary", "--label-smoothing 0"]
    argv += ["--vary", "--head ConcatMLP --lr 0.1", "--", "--dry-run", "--val-size", "50"]
    assert seeds.main([*argv, "--unseen-pairs", "50"]) == 0
    base, smoothing, head = (rows := read_rows("seeds.json")).values()
    assert list(rows) == ["fast", "--label-smoothing 0", "--head ConcatMLP --lr 0.1"]
    changes = {"val_size": 50, "unseen_pairs": 50}
    assert base["settings"] == RECIPES["fast"].as_plain() | changes
    assert smoothing["settings"] == base["settings"] | {"label_smoothing": 0}
    assert head["settings"] == base["settings"] | {"head": "ConcatMLP", "lr": 0.1}
    assert len(commands) == 6 and len({tuple(command) for command in commands}) == 6
    for row in rows.values():
        both, unseen = row["each"]["both"], row["metrics"]["unseen_sum"]
        assert row["metrics"]["both"]["mean"] == pytest.approx(sum(both) / 2)
        assert unseen["n"] == 2 and unseen["min"] <= unseen["mean"]
    text = common.compared(head["each"]["both"], base["each"]["both"])
    printed = capsys.readouterr().out
    assert text in printed and len(re.findall(r"\| [+-]\d+\.\d+ ± \d", printed)) == 2
    assert seeds.main([*argv, "--unseen-pairs", "50"]) == 0 and len(commands) == 6
    assert read_rows("seeds.json") == rows


def test_train_py_runs_in_a_process_and_its_last_results_are_read(workdir, monkeypatch, capsys):
    (workdir / "train.py").write_text(
        f"import sys\nsys.path[0] = {str(common.ROOT)!r}\nimport dataset, train\n"
        f"dataset.SHA256 = {dataset.SHA256!r}\nsys.exit(train.main())\n"
    )
    monkeypatch.setattr(common, "ROOT", workdir)
    assert seeds.main(shlex.split("--recipe fast --seeds 1 -- --dry-run --epochs 2")) == 0
    row = read_rows("seeds.json")["fast"]
    (path,) = common.BENCHMARKS.glob("seeds/*/seed-0/results.json")
    test = json.loads(path.read_text())["test"]
    for output in ("digit", "sum", "both"):
        assert row["each"][output] == [test[f"{output}_accuracy"]]
    assert row["each"]["consistency"] == [test["consistency"]] and row["dataset"] == "mnist"
    assert row["metrics"]["sum"]["sd"] is None and "(" not in capsys.readouterr().out


def test_runs_of_other_code_flags_and_machines_are_kept_apart(workdir, monkeypatch):
    names = {path.relative_to(common.ROOT).as_posix() for path in seeds.CODE}
    assert names >= {"train.py", "recipes.py", "training/metrics.py", "published/models.py"}
    file = workdir / "train.py"
    file.write_text("old")
    monkeypatch.setattr(seeds, "CODE", [file])
    paths = [seeds.directory([]), seeds.directory(["--lr", "0.1"])]
    file.write_text("new")
    paths.append(seeds.directory([]))
    monkeypatch.setattr(common, "machine", lambda: "another one")
    assert len({*paths, seeds.directory([])}) == 4


def test_it_stops_if_the_code_changes_or_a_run_fails(commands, workdir, monkeypatch, capsys):
    file = workdir / "train.py"
    file.write_text("old")
    monkeypatch.setattr(seeds, "CODE", [file])
    argv = shlex.split("--recipe fast --seeds 2 -- --dry-run")
    trained = train.main
    monkeypatch.setattr(train, "main", lambda argv: file.write_text("new") and trained(argv))
    assert seeds.main(argv) == 1 and len(commands) == 1
    assert "the code has changed" in capsys.readouterr().err
    monkeypatch.setattr(train, "main", lambda argv: 1)
    assert seeds.main(argv) == 1
    assert re.search("failed: .*--seed 0", capsys.readouterr().err)


WRONG = ["--vary=--lr=-1", "--vary '--val-size 100'", "--vary '--seed 1'", "-- --epochs 0"]


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_refused_before_training(flags, commands, capsys):
    assert seeds.main(shlex.split(flags)) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not commands


@pytest.mark.parametrize(
    "pairs, share", [([(3, 5)], 1), ([(9, 9)], 0), ([(9, 9), (3, 5)], 0.5), ([(3, 5), (5, 3)], 1)]
)
def test_the_limit_is_the_share_of_pairs_that_follow(pairs, share):
    unseen = torch.zeros(NUM_DIGITS, NUM_DIGITS).bool()
    unseen[tuple(zip(*pairs, strict=True))] = True
    assert heads.limit(unseen) == share  # 9 + 9 is the only pair with the sum 18


def test_heads_and_recipes_are_compared_by_unseen_pairs(commands, capsys):
    argv = shlex.split("--seeds 2 --networks ComplexNumbers added --unseen 0 70 -- --dry-run")
    assert heads.main(argv) == 0 and len(commands) == 8
    results = json.loads((common.BENCHMARKS / "heads.json").read_text())
    adds, published = results["rows"].values()
    assert adds["ComplexNumbers, 70 unseen"]["settings"]["encoder"] == "shallow"
    assert published["added, 0 unseen"]["settings"] == RECIPES["added"].as_plain() | {"epochs": 2}
    shown = adds["ComplexNumbers, 0 unseen"]["metrics"]["sum"]
    hidden = adds["ComplexNumbers, 70 unseen"]["metrics"]["unseen_sum"]
    cells = ["`ComplexNumbers`", common.percent(shown), common.percent(hidden)]
    assert f"| {' | '.join(cells)} |\n" in capsys.readouterr().out


def test_the_gpu_benchmark(commands):
    flags = ["--dry-run", "--device", "cpu", "--batch-size", "100"]
    assert gpu.main(["--recipes", "fast", "--", *flags]) == 0
    (row,) = read_rows("gpu.json").values()
    assert row["bit_identical"] and row["slowdown"] > 0 and row["gpu_idle"] is None
    assert row["product_fraction"] > 0 and row["step_seconds"] > 0
    assert row["images_per_second"] * row["step_seconds"] == pytest.approx(100)  # the batch size
