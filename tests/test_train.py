"""Whole runs of train.py: what they print, which files they leave, and how they fail."""

import csv
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TOY, TRAIN_IMAGES
from jobs import Job
from PIL import Image

import dataset
import train
from inference.predictor import load_model
from recipes import RECIPES
from support import device, plots, rundir
from support.augment import Affine
from support.cli import exit_status
from support.synthetic import synthetic_mnist

FAST = ["--recipe", "fast", "--batch-size", 100, "--device", "cpu"]
COLUMNS = (
    "epoch,lr,train_digit_loss,train_sum_loss,train_digit_accuracy,train_sum_accuracy,"
    "test_digit_loss,test_sum_loss,test_digit_accuracy,test_sum_accuracy,test_both_accuracy,"
    "train_seconds,test_seconds"
).split(",")
RESULTS = "recipe dataset note seed epochs device precision processes threads parameters versions"


def rows(directory):
    with open(Path(directory, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(directory):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(directory)]


def read_json(directory, name="results.json"):
    return json.loads(Path(directory, name).read_text())


def one_line(err):
    """Whether stderr ends with the only line of an error; warnings may come before it."""
    return re.fullmatch(r"((?!error: |Traceback)\S[^\n]*\n)*error: [^\n]+\n", err) is not None


def interrupt_in(monkeypatch, module, name):
    """Ctrl-C each time a function is called."""
    function = getattr(module, name)
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(module, name, lambda *args: interrupt() or function(*args))


def test_training_in_another_thread(job):
    with ThreadPoolExecutor() as pool:
        future = pool.submit(job, "--recipe", "fast", "--dry-run", "--quiet")
    assert future.result()[0] == 0


def test_a_run_finds_its_data_from_another_directory(job, workdir, monkeypatch):
    assert job("--recipe", "fast", "--quiet", "--output-dir", "run")[0] == 0
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    status, out, err = job("--resume", "../run", "--eval-only")
    assert (status, err) == (0, "") and out.startswith("result   test: digit ")


def test_a_run_from_another_machine_uses_the_data_here(job, workdir):
    (workdir / "data").rename("theirs")
    assert job(*FAST, "--output-dir", "run", "--data-dir", "theirs")[0] == 0
    (workdir / "theirs").rename("data")
    status, out, err = job("--resume", "run", "--eval-only")
    assert status == 0 and out.startswith("result   test: digit ")
    assert re.fullmatch("warning: --data-dir is now .*data, was .*theirs\n", err)


def test_a_run_of_a_changed_recipe_is_evaluated_but_not_continued(job, monkeypatch):
    assert job(*FAST, "--output-dir", "run", "--epochs", 2)[0] == 0
    result = job("--resume", "run", "--eval-only")
    changed = dataclasses.replace(RECIPES["fast"], optimizer="Adam", affine=None, epochs=1, lr=0.5)
    monkeypatch.setitem(RECIPES, "fast", changed)
    assert job("--resume", "run", "--eval-only") == result
    assert job("--resume", "run", "--epochs", 3)[0] == 2
    monkeypatch.setitem(RECIPES, "fast", dataclasses.replace(changed, mean=0.5))
    assert job("--resume", "run", "--eval-only")[0] == 2


def test_output_and_files_of_a_run(job_with_plots):
    status, out, err = job_with_plots(*FAST, "--epochs", 3)
    assert (status, err) == (0, "")
    assert {path.name for path in Path("runs/fast").iterdir()} == {*rundir.RUN_FILES} - {"best.pt"}

    history = rows("runs/fast")
    assert list(history[0]) == COLUMNS
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    for row in history:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert all(0 <= float(row[name]) <= 1 for name in COLUMNS if "accuracy" in name)
    assert float(history[-1]["train_digit_loss"]) < float(history[0]["train_digit_loss"])

    results = read_json("runs/fast")
    assert {*results} == {*RESULTS.split(), "test", "train_seconds", "total_seconds"}
    assert results["dataset"] == "mnist" and results["epochs"] == 3 and results["note"] == ""
    assert results["precision"] in ("fp32", "bf16")
    for name in ("digit_loss", "sum_loss", "digit_accuracy", "sum_accuracy", "both_accuracy"):
        assert results["test"][name] == float(history[-1][f"test_{name}"])
    assert 0 <= results["test"]["consistency"] <= 1
    assert 0 < results["train_seconds"] < results["total_seconds"]
    assert "/" not in json.dumps(results)  # no paths

    args = read_json("runs/fast", "args.json")
    assert {*args} == {"command", *RESULTS.split(), "flags", "calls"}
    assert args["command"].endswith("--epochs 3") and args["recipe"]["epochs"] == 3

    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert f"digit {100 * results['test']['digit_accuracy']:.2f} %" in lines[-2]
    assert [line for line in lines if "runs/" in line] == ["run      runs/fast", lines[-1]]
    assert lines[-1] == "saved    runs/fast"
    for name in rundir.PLOTS:
        with Image.open(f"runs/fast/{name}") as plot:
            assert plot.width == 1500 and plot.convert("L").getextrema()[0] < 100

    checkpoint = torch.load("runs/fast/last.pt", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2, 3]
    assert len(checkpoint["curve"]) == 3 * TRAIN_IMAGES / 100
    assert not load_model("runs/fast")[0].training


def test_quiet_prints_one_line(job):
    status, out, err = job(*FAST, "--dry-run", "--quiet")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("result   test: ") and "(DRY RUN" in out


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_repeats_bit_for_bit(job, monkeypatch, name):
    monkeypatch.setattr(train, "DRY_RUN_IMAGES", 10)
    flags = f"--recipe {name} --dry-run --batch-size 4 --val-size 20 --epochs 1 -q --device cpu"
    for directory in ("one", "two"):
        assert job(*flags.split(), "--output-dir", directory)[0] == 0
    assert without_seconds("one") == without_seconds("two")
    one, two = (torch.load(f"{run}/last.pt")["network"] for run in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_runs_with_different_seeds_differ(job):
    for seed in (0, 1):
        job(*FAST, "--seed", seed, "--output-dir", f"seed{seed}")
    assert without_seconds("seed0") != without_seconds("seed1")


def test_the_last_epochs_are_not_augmented(job, monkeypatch):
    images, train_epoch = {}, train.train_epoch

    def spy(model, optimizer, dataset, *rest):
        images[dataset.epoch] = dataset[0][0]
        return train_epoch(model, optimizer, dataset, *rest)

    monkeypatch.setattr(train, "train_epoch", spy)
    augmented = dataclasses.replace(RECIPES["fast"], affine=Affine(9, 0.1, 0.1, 9), clean_epochs=2)
    monkeypatch.setitem(RECIPES, "fast", augmented)
    job(*FAST, "--epochs", 4, "--quiet")
    assert not images[1].equal(images[3]) and not images[2].equal(images[3])
    assert images[3].equal(images[4])


def test_32_images_can_be_memorized(job, monkeypatch):
    few = torch.arange(32)
    monkeypatch.setattr(train, "split_indices", lambda count, val_size, seed: (few, few[:0]))
    flags = "--recipe fast --epochs 40 --batch-size 32 --addends once --quiet --precision fp32"
    assert job(*flags.split())[0] == 0
    last = rows("runs/fast")[-1]
    assert last["train_digit_accuracy"] == last["train_sum_accuracy"] == "1.0"


def test_best_pt_is_the_best_on_the_validation_split(job):
    status, out, _ = job(*FAST, "--epochs", 4, "--val-size", 150, "--lr", 0.7)
    assert status == 0 and "450 train, 150 val, 200 test" in out
    accuracies = [float(row["val_both_accuracy"]) for row in rows("runs/fast")]
    best = accuracies.index(max(accuracies)) + 1
    checkpoint = torch.load("runs/fast/best.pt", weights_only=True)
    assert len(checkpoint["history"]) == best < 4


def test_a_dry_run_is_short_and_marked(job):
    status, out, _ = job("--dry-run", "--epochs", 50, "--batch-size", 100)
    assert status == 0 and "300 train, 200 test" in out and "DRY RUN" in out
    results = read_json("runs/default-dry-run")
    assert "DRY RUN" in results["note"] and results["epochs"] == 2


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "args.json", "loss.png"])
def test_a_directory_with_any_file_of_a_run_is_refused(job, name):
    Path("run").mkdir()
    Path("run", name).write_text("mine")
    status, out, err = job(*FAST, "--output-dir", "run")
    assert (status, out) == (1, "") and one_line(err) and "holds a run" in err
    assert Path("run", name).read_text() == "mine" and len(os.listdir("run")) == 1


def test_a_directory_of_a_run_killed_before_its_first_checkpoint_is_used_again(job):
    Path("run").mkdir()
    Path("run/.best.pt.tmp").write_text("part of a file")
    assert job(*FAST, "--output-dir", "run")[0] == 0 and not Path("run/.best.pt.tmp").exists()


def test_a_run_that_started_earlier_in_the_same_directory_is_kept(job, monkeypatch):
    def overtaken(args):
        monkeypatch.setattr(rundir, "create_directory", create)
        assert job(*FAST, "--seed", 7, "--output-dir", "run")[0] == 0
        return create(args)

    create = rundir.create_directory
    monkeypatch.setattr(rundir, "create_directory", overtaken)
    status, _, err = job(*FAST, "--output-dir", "run")
    assert status == 1 and one_line(err) and "holds a run" in err
    assert read_json("run")["seed"] == 7


def test_synthetic_digits_are_marked_everywhere(job, monkeypatch):
    monkeypatch.setattr(dataset, "synthetic_mnist", lambda split, _: synthetic_mnist(split, 200))
    titles = []
    monkeypatch.setattr(plots, "run_figures", lambda *args: titles.append(args[-2]) or {})
    status, out, err = job(*FAST, "--data-dir", "nowhere")
    assert status == 0 and "NOT MNIST" in err and "NOT MNIST" in titles[0]
    assert "NOT MNIST" in out.split("result")[1]
    results = read_json("runs/fast")
    assert results["dataset"] == "synthetic" and "NOT MNIST" in results["note"]
    status, _, err = job("--resume", "runs/fast", "--epochs", 2, "--data-dir", "data")
    assert status == 0 and re.search("--data-dir .*stays on synthetic digits, NOT MNIST", err)
    assert read_json("runs/fast")["dataset"] == "synthetic"


def test_missing_mnist_is_explained_and_nothing_is_created(job):
    status, out, err = job(*FAST, "--dataset", "mnist", "--data-dir", "nowhere")
    assert (status, out) == (1, "") and one_line(err)
    path = re.escape(os.path.abspath("nowhere"))
    assert re.search(f"place .* in {path}/MNIST/raw and pass --data-dir {path}$", err)
    assert os.listdir() == ["data"]


USAGE = """
--epochs 0; --epochs 2.5; --epochs many; --batch-size -1; --lr nan; --lr 0; --weight-decay 11;
--seed -1; --seed 4294967296; --val-size 600; --dataset cifar; --device tpu; --precision fp16;
--recipe none; --epoch 3; --bogus; stray; --eval-only; --resume x --output-dir y;
--recipe fast --batch-size 599; --recipe fast --batch-size 1; --recipe concat-mlp --batch-size 601
"""


@pytest.mark.parametrize("flags", [*map(str.strip, USAGE.split(";"))])
def test_wrong_usage_is_one_line_and_status_2(job, flags):
    status, out, err = job(*flags.split())
    assert (status, out) == (2, "") and one_line(err), err
    assert os.listdir() == ["data"]


def test_a_batch_of_one_image_is_trained_on_if_the_network_can(job):
    assert job("--epochs", 1, "--batch-size", 599, "--device", "cpu")[0] == 0


# Resume


@pytest.mark.parametrize("change", ["--batch-size 599", "--epochs 1"])
def test_a_refused_change_is_one_line_and_status_2(job, change):
    assert job(*FAST, "--epochs", 2)[0] == 0
    status, out, err = job("--resume", "runs/fast", "--lr", 0.5, *change.split())
    assert (status, out) == (2, "") and one_line(err), err


def test_a_changed_column_of_the_recipe_is_named(job, toy_recipe, monkeypatch):
    assert job("--recipe", "toy", "--epochs", 1)[0] == 0
    adam = {"optimizer": "Adam", "optimizer_options": {}}
    for columns, expected in ((adam, 2), ({"label_smoothing": 0.5}, 0)):
        monkeypatch.setitem(RECIPES, "toy", dataclasses.replace(TOY, **columns))
        status, _, err = job("--resume", "runs/toy", "--epochs", 2)
        assert status == expected and f"recipe column {next(iter(columns))} is" in err, err


def test_each_invocation_is_recorded(job):
    job(*FAST)
    first = read_json("runs/fast", "args.json")
    job("--resume", "runs/fast", "--epochs", 3)
    second = read_json("runs/fast", "args.json")
    assert second["calls"] == [*first["calls"], {**second["calls"][1], "first_epoch": 2}]
    for args in (first, second):
        common = ("command", "device", "precision", "threads", "versions")
        assert {name: args[name] for name in common}.items() <= args["calls"][-1].items()
    assert second["command"] == "python train.py --resume runs/fast --epochs 3"
    assert {name for name in first if first[name] != second[name]} == {
        "command",
        "recipe",
        "epochs",
        "flags",
        "calls",
    }


def test_the_precision_is_kept_unless_a_flag_changes_it(job, toy_recipe, monkeypatch):
    def resume(*flags):
        status, _, err = job("--resume", "runs/toy", "--epochs", len(rows("runs/toy")) + 1, *flags)
        assert status == 0
        return err, read_json("runs/toy")

    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    job("--recipe", "toy", "--batch-size", 100, "--device", "cpu", "--epochs", 1)
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: True)
    err, results = resume()
    assert (results["precision"], results["note"]) == ("fp32", "") and "precision" not in err
    err, results = resume("--precision", "bf16")
    assert "--precision is now bf16, was fp32" in err
    assert (results["precision"], results["note"]) == (
        "bf16",
        "fp32 from epoch 1, bf16 from epoch 3",
    )


def test_bare_resume_continues_the_latest_unfinished_run(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in(patch, train.metrics, "epoch_line")
        assert job(*FAST, "--epochs", 2, "--output-dir", "runs/unfinished")[0] == 130
    for flags in ("--output-dir runs/finished", "--dry-run"):
        assert job(*FAST, *flags.split())[0] == 0
    for i, name in enumerate(["unfinished", "finished", "fast-dry-run"]):
        os.utime(f"runs/{name}/last.pt", (i, i))
    quiet = job("--resume", "--eval-only")
    assert quiet[0] == 0 and quiet[1] == job("--resume", "runs/finished", "--eval-only")[1]
    assert "saved    runs/unfinished\n" in job("--resume")[1]
    status, out, err = job("--resume")
    assert (status, out) == (1, "") and one_line(err) and "no unfinished run" in err
    assert "saved    runs/unfinished\n" in job("--resume", "--epochs", 3)[1]


def test_results_belong_to_the_last_checkpoint_when_an_extension_is_interrupted(job, monkeypatch):
    assert job(*FAST)[0] == 0
    files = {name: Path("runs/fast", name).read_bytes() for name in ("results.json", "args.json")}
    status, out, _ = job("--resume", "runs/fast", "--lr", 0.5)
    assert status == 0 and out.startswith("nothing left to train after epoch 1/1\n")
    assert all(Path("runs/fast", name).read_bytes() == old for name, old in files.items())
    with monkeypatch.context() as patch:
        interrupt_in(patch, train.metrics, "epoch_line")
        assert job("--resume", "runs/fast", "--epochs", 3)[0] == 130
    assert len(rows("runs/fast")) == 2 and not Path("runs/fast/results.json").exists()
    assert job("--resume", "runs/fast")[0] == 0
    assert read_json("runs/fast")["epochs"] == 3


def test_results_belong_to_the_last_checkpoint_when_nothing_else_was_written(job, monkeypatch):
    assert job(*FAST)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rundir.RunDir, "save_derived", lambda self, checkpoint: sys.exit())
        train.main([str(flag) for flag in [*FAST, "--output-dir", "run"]])
    assert job("--resume", "run")[0] == 0
    assert len(rows("run")) == 1 == read_json("run")["epochs"]


def test_the_printed_command_continues_an_interrupted_extension(job, monkeypatch):
    assert job(*FAST)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch")
        status, out, _ = job("--resume", "runs/fast", "--epochs", 3, "--lr", 0.001)
    assert status == 130
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["resume", "python", "train.py"] and job(*command[3:])[0] == 0
    results, args = read_json("runs/fast"), read_json("runs/fast", "args.json")
    assert results["epochs"] == 3 and args["recipe"]["lr"] == 0.001


# Ctrl-C


def test_ctrl_c_keeps_the_last_complete_epoch_and_its_plots(workdir):
    job = Job(*FAST, "--epochs", 1000, "--output-dir", "my run", run_figures=plots.run_figures)
    job.wait_for("epoch    2/1000")
    time.sleep(0.1)
    job.signal(signal.SIGINT)
    status, out, err = job.end()
    assert status == 130 and re.fullmatch(r"interrupted after epoch \d+/1000\n", err), err
    checkpoint = torch.load("my run/last.pt", weights_only=True)
    assert 2 <= len(rows("my run")) == len(checkpoint["history"]) < 1000
    for name in rundir.PLOTS:
        Image.open(f"my run/{name}").load()
    assert not Path("my run/results.json").exists()
    assert out.endswith("\nresume   python train.py --resume 'my run'\n")


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(job, monkeypatch):
    interrupt_in(monkeypatch, train, "train_epoch")
    status, out, err = job(*FAST)
    assert (status, err) == (130, "interrupted after epoch 0/1; nothing was saved\n")
    assert not Path("runs/fast").exists() and "resume" not in out and "saved" not in out


def test_ctrl_c_before_training_is_one_line(job, monkeypatch):
    interrupt_in(monkeypatch, train, "load_data")
    assert job(*FAST) == (130, "", "interrupted\n")


def test_ctrl_c_while_plots_are_drawn_leaves_nothing_to_resume(job, monkeypatch):
    interrupt_in(monkeypatch, plots, "run_figures")
    status, out, err = job(*FAST)
    assert (status, err) == (130, "")
    assert "result   test: " in out and "resume" not in out
    assert read_json("runs/fast")["epochs"] == 1


# Terminal and environment


def test_debug_shows_the_traceback_of_an_unexpected_error(monkeypatch, capsys):
    @exit_status
    def fail(argv):
        raise PermissionError(13, "Permission denied", "file")

    assert fail([]) == 1 and "file: Permission denied" in (err := capsys.readouterr().err)
    assert one_line(err)
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(PermissionError):
        fail([])


def test_an_error_of_another_file_leaves_stdout_open(monkeypatch, capsys):
    @exit_status
    def fail(argv):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *args: pytest.fail("stdout was closed"))
        assert fail([]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_too_little_gpu_memory_is_one_line(job, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")
    monkeypatch.setattr(train, "train_epoch", Mock(side_effect=error))
    status, _, err = job(*FAST)
    assert status == 1 and one_line(err) and "try a smaller --batch-size" in err


def show_on(terminal):
    """Make the terminal stderr."""
    os.dup2(os.open(terminal, os.O_RDWR), 2)


def test_the_progress_bar_disappears_when_it_is_done(workdir):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    job = Job(*FAST, "--epochs", 2, prepare=partial(show_on, os.ttyname(theirs)))
    status, out, _ = job.end()
    os.set_blocking(ours, False)
    shown = os.read(ours, 100_000)
    os.close(ours)
    os.close(theirs)
    assert status == 0 and out.count("\nepoch") == 2
    assert b"epoch 1/2" in shown and shown.endswith(b"\r") and b"\n" not in shown


def test_a_closed_stderr(job, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert job("--dry-run", "--dataset", "synthetic")[0] == 0


def test_a_torchvision_that_does_not_fit_is_one_line(job, monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if re.match(r"torchvision\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    status, out, err = job("--dry-run")
    assert (status, out) == (1, "") and one_line(err) and "pip install" in err


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no MNIST directory")
def test_fast_reaches_its_accuracies_on_mnist(monkeypatch, tmp_path):
    monkeypatch.undo()  # the digests of MNIST
    flags = ["--recipe", "fast", "--dataset", "mnist", "--data-dir", os.environ["MNIST_DIR"]]
    assert train.main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    test = read_json(tmp_path / "run")["test"]
    assert test["digit_accuracy"] >= 0.9915 and test["sum_accuracy"] >= 0.9915
