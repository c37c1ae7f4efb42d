"""Whole runs of train.py: what they print, which files they leave, and what they refuse."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from conftest import TRAIN_IMAGES
from PIL import Image

import dataset
import synthetic
import train
from dataset import draw_unseen
from handwriting.predictor import load_model
from published.models import ConcatLinear
from recipes import RECIPES, Recipe
from training import plots
from training.checkpoint import load_checkpoint

PLOTS = "loss accuracy addition confusion_matrix predictions mistakes numbers".split()
PLOTS = [f"{name}.png" for name in PLOTS]
FAST = ["--recipe", "fast", "--batch-size", 100, "--device", "cpu"]
METRICS = "digit_loss sum_loss digit_accuracy sum_accuracy".split()
COLUMNS = ["epoch", "lr", *(f"train_{name}" for name in METRICS)]
COLUMNS += [f"test_{name}" for name in [*METRICS, "both_accuracy", "consistency"]]
COLUMNS += ["train_seconds"]
RESULTS = "command flags recipe parameters device processes threads versions test train_seconds"


def rows(directory):
    with open(Path(directory, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(directory):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(directory)]


def read_json(directory, name="results.json"):
    return json.loads(Path(directory, name).read_text())


def weights(directory):
    return load_checkpoint(directory)["network"]


def assert_equal_runs(one, two):
    """Two runs have the same metrics and weights, to the bit."""
    assert without_seconds(one) == without_seconds(two)
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def one_line(err):
    """Whether stderr ends with the only line of an error; warnings may come before it."""
    return re.fullmatch(r"((?!error: |Traceback)\S[^\n]*\n)*error: [^\n]+\n", err) is not None


def refused(job, status, *flags):
    """The line of the error with which a job fails before it prints anything else."""
    found, out, err = job(*flags)
    assert (found, out) == (status, "") and one_line(err), err
    return err


def interrupt_in(monkeypatch, module, name, number=1):
    """Ctrl-C the nth time that a function is called."""

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, interrupted)


def recorded_pairs(monkeypatch):
    """The pairs of digit and addend that are trained on, a set that grows."""

    def record(self, indices):
        _, digit, addend, total = items = batch(self, indices)
        pairs.update(zip(digit.tolist(), addend.argmax(dim=1).tolist(), strict=True))
        assert torch.equal(total, digit + addend.argmax(dim=1))
        return items

    pairs, batch = set(), dataset.MNISTSum.batch
    monkeypatch.setattr(dataset.MNISTSum, "batch", record)
    return pairs


def test_output_and_files_of_a_run(job_with_plots):
    status, out, err = job_with_plots(*FAST, "--epochs", 3)
    assert (status, err) == (0, "")
    files = "last.pt args.json metrics.csv results.json mistakes.csv log.txt".split()
    assert {path.name for path in Path("runs/fast").iterdir()} == {*PLOTS, *files}

    history = rows("runs/fast")
    assert list(history[0]) == COLUMNS
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in history for value in row.values())
    assert float(history[-1]["train_digit_loss"]) < float(history[0]["train_digit_loss"])
    results = read_json("runs/fast")
    assert {*results} == {*RESULTS.split()} and results["flags"]["dataset"] == "mnist"
    for name in [*METRICS, "both_accuracy", "consistency"]:
        assert results["test"][name] == float(history[-1][f"test_{name}"])
    assert read_json("runs/fast", "args.json").items() <= results.items()
    assert results["command"].endswith("--epochs 3")

    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert f"digit {100 * results['test']['digit_accuracy']:.2f} %" in lines[-2]
    assert [line for line in lines if "runs/" in line] == ["run      runs/fast", lines[-1]]
    for name in PLOTS:
        with Image.open(f"runs/fast/{name}") as plot:
            assert plot.width == 1500 and plot.convert("L").getextrema()[0] < 100
    checkpoint = torch.load("runs/fast/last.pt", weights_only=True)
    assert len(checkpoint["history"]) == 3 and len(checkpoint["curve"]) == 3 * TRAIN_IMAGES / 100


def test_log_txt_has_all_lines_of_each_invocation(job):
    _, first, _ = job(*FAST)
    _, second, _ = job("--resume", "runs/fast", "--epochs", 2)
    assert Path("runs/fast/log.txt").read_text() == first + second
    command = read_json("runs/fast", "args.json")["command"]
    assert command == "python train.py --resume runs/fast --epochs 2"


def test_quiet_prints_one_line_and_a_dry_run_is_short_and_marked(job):
    status, out, err = job("--dry-run", "--quiet", "--epochs", 50, "--batch-size", 100)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("result   test: ") and "DRY RUN" in out
    assert len(rows("runs/default-dry-run")) == 2
    assert "300 train" in Path("runs/default-dry-run/log.txt").read_text()


def test_32_images_can_be_memorized(job, monkeypatch):
    few = torch.arange(32)
    monkeypatch.setattr(train, "split_indices", lambda count, val_size, seed: (few, few[:0]))
    flags = "--epochs 90 --batch-size 32 --addends once --precision fp32 --device cpu --quiet"
    still = "--rotate 0 --translate 0 --scale 0 --shear 0"
    assert job("--recipe", "fast", *flags.split(), *still.split())[0] == 0
    last = rows("runs/fast")[-1]
    assert last["train_digit_accuracy"] == last["train_sum_accuracy"] == "1.0"


def test_best_pt_is_the_best_on_the_validation_split(job):
    status, out, _ = job(
        *FAST, "--epochs", 4, "--val-size", 150, "--lr", 0.3, "--precision", "fp32"
    )
    assert status == 0 and "450 train, 150 val, 200 test" in out
    accuracies = [float(row["val_both_accuracy"]) for row in rows("runs/fast")]
    best = accuracies.index(max(accuracies)) + 1
    checkpoint = torch.load("runs/fast/best.pt", weights_only=True)
    assert len(checkpoint["history"]) == best < 4


# Unseen pairs


def test_unseen_pairs_are_never_trained_on_also_after_resuming(job, monkeypatch):
    for directory, seed in (("one", 0), ("two", 3)):
        unseen = {*map(tuple, draw_unseen(50, seed).nonzero().tolist())}
        flags = ["--unseen-pairs", 50, "--seed", seed, "--val-size", 100, "--epochs", 4]
        flags = [*FAST, *flags, "--output-dir", directory]
        for command in (flags, ["--resume", directory]):
            with monkeypatch.context() as patch:
                if command is flags:
                    interrupt_in(patch, train, "train_epoch", number=3)
                pairs = recorded_pairs(patch)
                job(*command)
            assert not pairs & unseen and len(pairs) > 45
        checkpoint = load_checkpoint(directory)
        assert len(checkpoint["history"]) == 4 and checkpoint["recipe"]["unseen_pairs"] == 50
    pairs = recorded_pairs(monkeypatch)
    assert job(*FAST, "--epochs", 2)[0] == 0 and len(pairs) == 100


def test_seen_and_unseen_pairs_are_reported_apart(job_with_plots):
    status, out, _ = job_with_plots(*FAST, "--unseen-pairs", 30, "--val-size", 100)
    assert status == 0
    (row,), results = rows("runs/fast"), read_json("runs/fast")["test"]
    epoch = next(line for line in out.splitlines() if line.startswith("epoch"))
    for split in ("val", "test"):
        for part in ("seen", "unseen"):
            value = float(row[f"{split}_{part}_sum_accuracy"])
            assert 0 <= value <= 1 and f"{100 * value:.2f} %" in epoch.split(f"  {split} ")[-1]
            assert split == "val" or results[f"{part}_sum_accuracy"] == value
    seen, unseen = (results[f"{part}_sum_accuracy"] for part in ("seen", "unseen"))
    assert seen != unseen and min(seen, unseen) <= results["sum_accuracy"] <= max(seen, unseen)


# Settings of a recipe as flags


def test_settings_that_flags_replace_are_used_saved_and_resumed(job, monkeypatch):
    settings = {"label_smoothing": 0, "head": "ConcatLinear", "optimizer": "SGD", "rotate": 0}
    settings |= {"batch_size": 64, "addends": "once", "schedule": "constant", "sum_weight": 0.5}
    given = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    used, train_epoch = [], train.train_epoch

    def spy(model, optimizer, dataset, recipe, *rest):
        head = type(model.head).__name__
        used.append((head, type(optimizer).__name__, recipe.label_smoothing, recipe.batch_size))
        return train_epoch(model, optimizer, dataset, recipe, *rest)

    monkeypatch.setattr(train, "train_epoch", spy)
    flags = ["--recipe", "fast", "--device", "cpu", "--drop-last", *itertools.chain(*given)]
    assert job(*flags, "--output-dir", "run")[0] == 0
    assert job("--resume", "run", "--epochs", 2)[0] == 0
    assert used == [("ConcatLinear", "SGD", 0, 64)] * 2
    recipe = load_checkpoint("run")["recipe"]
    assert recipe.items() >= {**settings, "drop_last": True}.items()
    assert {row["lr"] for row in rows("run")} == {"0.01"}  # of "constant"
    assert type(load_model("run")[0].head).__name__ == "ConcatLinear"
    assert job("--resume", "run", "--epochs", 3, "--no-drop-last")[0] == 2


USAGE = """
--epochs 0; --epochs 2.5; --epochs many; --batch-size -1; --lr nan; --seed 4294967296;
--val-size 600; --dataset cifar; --device tpu; --recipe none; --epoch 3; --bogus; stray;
--eval-only; --resume x --output-dir y; --batch-size 1; --val-size 599;
--recipe concat-mlp --batch-size 601;
--unseen-pairs 76; --label-smoothing 1; --head toy; --optimizer sgd; --schedule =; --std 0;
--data-dir=; --output-dir=
"""


@pytest.mark.parametrize("flags", [*map(str.strip, USAGE.split(";"))])
def test_wrong_usage_is_one_line_and_status_2(job, flags):
    refused(job, 2, *flags.split())
    assert os.listdir() == ["data"]


# Data


def test_synthetic_digits_are_marked_everywhere(job, workdir, monkeypatch):
    make, titles = synthetic.synthetic_mnist, []
    monkeypatch.setattr(synthetic, "synthetic_mnist", lambda split, _: make(split, 200))
    monkeypatch.setattr(plots, "run_figures", lambda *args: titles.append(args[-1]) or [])
    (workdir / "data").rename("mnist")
    status, out, err = job(*FAST)
    assert status == 0 and "NOT MNIST" in err and "NOT MNIST" in titles[0]
    assert "NOT MNIST" in out.split("result")[1]
    assert read_json("runs/fast")["flags"]["dataset"] == "synthetic"
    shutil.rmtree("data", ignore_errors=True)
    (workdir / "mnist").rename("data")  # a run never changes its dataset
    for flags in ("", "--data-dir data"):
        status, out, err = job("--resume", "runs/fast", "--eval-only", *flags.split())
        assert status == 0 and "NOT MNIST" in out, err


def test_a_directory_that_is_given_has_mnist_or_is_an_error(job, workdir, monkeypatch):
    Path("file").touch()
    for name in ("nowhere", "file"):
        assert os.path.abspath(name) in refused(job, 1, *FAST, "--data-dir", name)
    assert not any(path.is_file() for path in Path("nowhere").rglob("*"))
    assert not Path("runs").exists()
    monkeypatch.setenv("HOME", str(workdir))
    status, out, _ = job(*FAST, "--dry-run", "--data-dir", "~/data", "--output-dir=~/run")
    assert status == 0 and "mnist: " in out and not Path("~").exists()
    assert job("--resume=~/run", "--eval-only")[0] == 0 and Path("run/last.pt").exists()


# Terminal and environment


def test_variables_of_a_cluster_without_torchrun_are_those_of_a_single_process(job, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    status, out, err = job(*FAST, "--dry-run", "--output-dir", "run")
    assert (status, err) == (0, "") and "result" in out
    assert read_json("run")["processes"] == 1


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no MNIST directory")
def test_fast_reaches_its_accuracies_on_mnist(monkeypatch, tmp_path):
    monkeypatch.undo()  # the digest of MNIST
    flags = ["--recipe", "fast", "--dataset", "mnist", "--data-dir", os.environ["MNIST_DIR"]]
    assert train.main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    test = read_json(tmp_path / "run")["test"]
    assert test["digit_accuracy"] >= 0.9915 and test["sum_accuracy"] >= 0.9915


def test_without_a_writable_directory_for_matplotlib_the_error_names_the_variable(workdir):
    code = "import sys, tempfile\ndef fail(*args, **options): raise OSError('read-only')\n"
    code += "tempfile.mkdtemp = fail\nimport train\nsys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--dataset", "synthetic", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(conftest.ROOT), "MPLCONFIGDIR": "/dev/null/x"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "MPLCONFIGDIR" in result.stderr.splitlines()[-1]


class OwnHead(ConcatLinear):
    pass


def test_own_recipes_and_their_parts_are_offered_by_help(job, monkeypatch, capsys):
    own = {"encoder": conftest.toy, "head": OwnHead, "epochs": 1, "batch_size": 100, "lr": 0.1}
    monkeypatch.setitem(RECIPES, "own", Recipe(description="own", **own))
    with pytest.raises(SystemExit) as end:
        job("--help")
    text = capsys.readouterr().out
    assert not end.value.code and {"toy", "OwnHead"} <= {*re.findall(r"\w+", text)}
    for name in (field.name for field in dataclasses.fields(Recipe) if field.name != "description"):
        assert f"--{name.replace('_', '-')}" in text
    assert job("--recipe", "own", "--quiet")[0] == 0
    assert job(*FAST, "--head", "OwnHead", "--quiet")[0] == 0


def unflattened():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU())


def test_an_encoder_that_does_not_flatten_is_one_line(job, monkeypatch):
    recipe = dataclasses.replace(RECIPES["fast"], encoder=unflattened)
    monkeypatch.setitem(RECIPES, "unflattened", recipe)
    assert "must return (B, F)" in refused(job, 1, "--recipe", "unflattened")
    assert os.listdir() == ["data"]


def test_a_compiled_model_is_trained_and_saved_as_the_network_itself(job, monkeypatch):
    calls, move_model = [], train.move_model

    def backend(graph, inputs):
        return lambda *args: calls.append(torch.is_grad_enabled()) or graph(*args)

    def compiled(model, device):
        return torch.compile(move_model(model, device), backend=backend)

    flags = [*FAST, "--precision", "fp32", "--epochs", 2, "--dry-run", "--output-dir"]
    assert job(*flags, "plain")[0] == 0
    monkeypatch.setattr(train, "move_model", compiled)
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch", number=2)
        assert job(*flags, "compiled")[0] == 130
    assert calls.count(True) == 3  # batches
    assert job("--resume", "compiled")[0] == 0 and calls.count(True) == 6
    assert_equal_runs("plain", "compiled")
    network = load_model("compiled")[0].state_dict()
    assert all(torch.equal(value, network[name]) for name, value in weights("plain").items())
