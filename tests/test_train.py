"""Whole runs of train.py: what they print, which files they leave, and how they fail."""

import csv
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import conftest
import pytest
import torch
from conftest import TOY, TRAIN_IMAGES
from jobs import Job
from PIL import Image

import dataset
import train
from handwriting.predictor import load_model
from recipes import RECIPES
from training import device, metrics, plots
from training.augment import Affine
from training.synthetic import synthetic_mnist

PLOTS = "loss accuracy addition confusion_matrix predictions mistakes".split()
PLOTS = [f"{name}.png" for name in PLOTS]
FAST = ["--recipe", "fast", "--batch-size", 100, "--device", "cpu"]
METRICS = "digit_loss sum_loss digit_objective sum_objective digit_accuracy sum_accuracy".split()
COLUMNS = ["epoch", "lr", *(f"train_{name}" for name in METRICS)]
COLUMNS += [f"test_{name}" for name in [*METRICS, "both_accuracy", "consistency"]]
COLUMNS += ["train_seconds", "test_seconds"]
RESULTS = "recipe dataset note seed epochs device precision processes threads parameters versions"


def rows(directory):
    with open(Path(directory, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(directory):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(directory)]


def read_json(directory, name="results.json"):
    return json.loads(Path(directory, name).read_text())


def weights(directory):
    return torch.load(Path(directory, "last.pt"))["network"]


def assert_equal_runs(one, two):
    """Two runs have the same metrics and weights, to the bit."""
    assert without_seconds(one) == without_seconds(two)
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def one_line(err):
    """Whether stderr ends with the only line of an error; warnings may come before it."""
    return re.fullmatch(r"((?!error: |Traceback)\S[^\n]*\n)*error: [^\n]+\n", err) is not None


def interrupt_in(monkeypatch, module, name, number=1):
    """Ctrl-C the nth time that a function is called."""

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, interrupted)


def test_training_in_another_thread(job):
    with ThreadPoolExecutor() as pool:
        future = pool.submit(job, "--recipe", "fast", "--dry-run", "--quiet")
    assert future.result()[0] == 0


def test_a_run_finds_its_data_from_another_directory_or_is_told_where_it_is(
    job, workdir, monkeypatch
):
    assert job(*FAST, "--quiet", "--output-dir", "run")[0] == 0
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    result = job("--resume", "../run", "--eval-only")
    assert result[::2] == (0, "")
    assert result[1].startswith("run      ../run/last.pt, epoch 1\nresult   test: digit ")
    (workdir / "data").rename("moved")
    assert job("--resume", "../run", "--eval-only", "--data-dir", "moved") == result
    status, out, err = job("--resume", "../run", "--eval-only")
    assert (status, out) == (1, "") and one_line(err)


def test_output_and_files_of_a_run(job_with_plots):
    status, out, err = job_with_plots(*FAST, "--epochs", 3)
    assert (status, err) == (0, "")
    files = {*PLOTS, "last.pt", "args.json", "metrics.csv", "results.json"}
    files |= {"mistakes.csv", "log.txt"}
    assert {path.name for path in Path("runs/fast").iterdir()} == files

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
    assert 0 < results["train_seconds"] < results["total_seconds"]
    assert "/" not in json.dumps(results)  # no paths

    args = read_json("runs/fast", "args.json")
    assert {*args} == {"command", *RESULTS.split(), "flags"}
    assert args["command"].endswith("--epochs 3") and args["recipe"]["epochs"] == 3

    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert f"digit {100 * results['test']['digit_accuracy']:.2f} %" in lines[-2]
    assert [line for line in lines if "runs/" in line] == ["run      runs/fast", lines[-1]]
    assert lines[-1] == "saved    runs/fast"
    for name in PLOTS:
        with Image.open(f"runs/fast/{name}") as plot:
            assert plot.width == 1500 and plot.convert("L").getextrema()[0] < 100

    checkpoint = torch.load("runs/fast/last.pt", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2, 3]
    assert len(checkpoint["curve"]) == 3 * TRAIN_IMAGES / 100
    assert not load_model("runs/fast")[0].training


def test_log_txt_has_the_commands_and_all_lines_of_each_invocation(job):
    _, first, _ = job(*FAST)
    _, second, _ = job("--resume", "runs/fast", "--epochs", 2)
    log = Path("runs/fast/log.txt").read_text()
    commands = [line.split(maxsplit=1)[1] for line in log.splitlines() if "train.py" in line]
    assert commands == [
        "python train.py --recipe fast --batch-size 100 --device cpu",
        "python train.py --resume runs/fast --epochs 2",
    ]
    assert log.count(read_json("runs/fast")["versions"]["torch"]) == 2
    assert {*first.splitlines(), *second.splitlines()} <= {*log.splitlines()}
    assert log.index(commands[1]) > log.index("saved ")
    assert read_json("runs/fast", "args.json")["command"] == commands[1]


def test_quiet_prints_one_line(job):
    status, out, err = job(*FAST, "--dry-run", "--quiet")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("result   test: ") and "DRY RUN" in out


MORE = {
    "dropout": dataclasses.replace(TOY, encoder=conftest.toy_with_dropout),
    "two members": dataclasses.replace(RECIPES["fast"], members=2),
}


@pytest.mark.parametrize("name", [*RECIPES, *MORE])
def test_every_recipe_repeats_and_resumes_bit_for_bit(job, monkeypatch, name):
    recipe = (RECIPES | MORE)[name]
    monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, clean_epochs=0))
    monkeypatch.setattr(train, "DRY_RUN_IMAGES", 10)
    flags = "--dry-run --batch-size 4 --val-size 0 --epochs 2 --quiet --device cpu".split()
    flags = ["--recipe", name, *flags, "--output-dir"]
    assert job(*flags, "one")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, dataset.MNISTSum, "batch", number=3 * recipe.members + 2)
        assert job(*flags, "two")[0] == 130
    assert len(rows("two")) == 1
    torch.manual_seed(5)
    assert job("--resume", "two", "--quiet")[0] == 0
    assert_equal_runs("one", "two")


def test_the_first_member_is_trained_like_a_single_network_and_the_second_differently(
    job, monkeypatch
):
    monkeypatch.setitem(RECIPES, "two", MORE["two members"])
    assert job(*FAST, "--epochs", 2, "--output-dir", "one")[0] == 0
    assert job(*FAST, "--epochs", 2, "--recipe", "two", "--output-dir", "two")[0] == 0
    first, second = (member.state_dict() for member in load_model("two")[0].members)
    assert all(torch.equal(value, first[name]) for name, value in weights("one").items())
    assert not torch.equal(first["head.sum.weight"], second["head.sum.weight"])
    single, both = (rows(run)[-1] for run in ("one", "two"))
    assert float(both["test_digit_loss"]) != float(single["test_digit_loss"])


def test_runs_with_different_seeds_differ(job):
    for seed in (0, 1):
        job(*FAST, "--seed", seed, "--output-dir", f"seed{seed}")
    assert without_seconds("seed0") != without_seconds("seed1")


def test_the_last_epochs_are_not_augmented(job, monkeypatch):
    images, train_epoch = {}, train.train_epoch

    def spy(model, optimizer, dataset, recipe, epoch, *rest):
        images[epoch] = dataset[0][0]
        return train_epoch(model, optimizer, dataset, recipe, epoch, *rest)

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
    status, out, _ = job(*FAST, "--epochs", 4, "--val-size", 150, "--lr", 2, "--precision", "fp32")
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


def test_a_directory_with_any_file_is_refused(job):
    for name in ("last.pt", "notes.txt"):
        Path(f"with {name}").mkdir()
        Path(f"with {name}", name).write_text("mine")
        status, out, err = job(*FAST, "--output-dir", f"with {name}")
        assert (status, out) == (1, "") and one_line(err)
        assert Path(f"with {name}", name).read_text() == "mine"
        assert len(os.listdir(f"with {name}")) == 1


def test_synthetic_digits_are_marked_everywhere(job, workdir, monkeypatch):
    monkeypatch.setattr(dataset, "synthetic_mnist", lambda split, _: synthetic_mnist(split, 200))
    titles = []
    monkeypatch.setattr(plots, "run_figures", lambda *args: titles.append(args[-2]) or {})
    (workdir / "data").rename("mnist")
    status, out, err = job(*FAST)
    assert status == 0 and "NOT MNIST" in err and "NOT MNIST" in titles[0]
    assert "NOT MNIST" in out.split("result")[1]
    results = read_json("runs/fast")
    assert results["dataset"] == "synthetic" and "NOT MNIST" in results["note"]
    shutil.rmtree("data")
    (workdir / "mnist").rename("data")  # a run never changes its dataset
    for flags in ("", "--data-dir data"):
        status, out, err = job("--resume", "runs/fast", "--eval-only", *flags.split())
        assert status == 0 and "NOT MNIST" in out, err


def test_a_directory_that_is_given_has_mnist_or_is_an_error(job, workdir, monkeypatch):
    for flags in (["--data-dir", "nowhere"], ["--dataset", "mnist", "--data-dir", "nowhere"]):
        status, out, err = job(*FAST, *flags)
        assert (status, out) == (1, "") and one_line(err)
        assert f"in {os.path.abspath('nowhere')}" in err
    assert not any(path.is_file() for path in Path("nowhere").rglob("*"))
    assert not Path("runs").exists()
    monkeypatch.setenv("HOME", str(workdir))
    status, out, _ = job(*FAST, "--dry-run", "--data-dir", "~/data")
    assert status == 0 and "mnist: " in out


USAGE = """
--epochs 0; --epochs 2.5; --epochs many; --epochs 5001; --batch-size -1; --lr nan; --lr 0;
--weight-decay 11; --seed -1; --seed 4294967296; --val-size 600; --dataset cifar; --device tpu;
--precision fp16; --recipe none; --epoch 3; --bogus; stray; --eval-only;
--resume x --output-dir y; --batch-size 1; --val-size 599; --recipe concat-mlp --batch-size 601
"""


@pytest.mark.parametrize("flags", [*map(str.strip, USAGE.split(";"))])
def test_wrong_usage_is_one_line_and_status_2(job, flags):
    status, out, err = job(*flags.split())
    assert (status, out) == (2, "") and one_line(err), err
    assert os.listdir() == ["data"]


def test_a_last_batch_of_one_image_is_left_out(job):  # batch normalization fails on it
    assert job("--recipe", "fast", "--batch-size", 599, "--device", "cpu")[0] == 0


# Resume


def test_a_run_whose_recipe_has_changed_is_neither_continued_nor_evaluated(job, monkeypatch):
    assert job(*FAST, "--output-dir", "run")[0] == 0
    for change in ({"lr": 0.5}, {"optimizer": "Adam"}, {"encoder": conftest.toy}, None):
        if change:
            changed = dataclasses.replace(RECIPES["fast"], **change)
            monkeypatch.setitem(RECIPES, "fast", changed)
        else:
            monkeypatch.delitem(RECIPES, "fast")
        for flags in (["--epochs", 2], ["--eval-only"]):
            status, out, err = job("--resume", "run", *flags)
            assert (status, out) == (2, "") and one_line(err), err
    monkeypatch.undo()


def test_a_recipe_may_get_another_description_and_number_of_epochs(job, monkeypatch):
    assert job(*FAST, "--output-dir", "run")[0] == 0
    changed = dataclasses.replace(RECIPES["fast"], description="faster", epochs=2)
    monkeypatch.setitem(RECIPES, "fast", changed)
    assert job("--resume", "run")[0] == 0 and len(rows("run")) == 2


def test_the_precision_is_kept_unless_a_flag_changes_it(job, toy_recipe, monkeypatch):
    def resume(*flags):
        epochs = len(rows("runs/toy")) + 1
        assert job("--resume", "runs/toy", "--epochs", epochs, *flags)[0] == 0
        return read_json("runs/toy")["precision"]

    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    job("--recipe", "toy", "--batch-size", 100, "--device", "cpu", "--epochs", 1)
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: True)
    assert resume() == "fp32" and resume("--precision", "bf16") == "bf16" and resume() == "bf16"


def test_bare_resume_continues_the_latest_unfinished_run(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in(patch, metrics, "epoch_line")
        assert job(*FAST, "--epochs", 2, "--output-dir", "runs/unfinished")[0] == 130
    for flags in ("--output-dir runs/finished", "--dry-run"):
        assert job(*FAST, *flags.split())[0] == 0
    for i, name in enumerate(["unfinished", "finished", "fast-dry-run"]):
        os.utime(f"runs/{name}/last.pt", (i, i))
    quiet = job("--resume", "", "--eval-only")  # what a shell makes of "$RUN" if it is not set
    assert quiet[0] == 0 and quiet[1] == job("--resume", "runs/finished", "--eval-only")[1]
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch")
        out = job("--resume", "")[1]
    assert out.endswith("\nresume   python train.py --resume runs/unfinished\n")
    assert "saved    runs/unfinished\n" in job("--resume")[1]
    status, out, err = job("--resume")
    assert (status, out) == (1, "") and one_line(err)
    assert "saved    runs/unfinished\n" in job("--resume", "--epochs", 3)[1]


def test_results_belong_to_the_last_checkpoint_when_an_extension_is_interrupted(job, monkeypatch):
    assert job(*FAST)[0] == 0
    results = Path("runs/fast/results.json").read_bytes()
    assert job("--resume", "runs/fast")[0] == 0  # nothing is left to train
    assert Path("runs/fast/results.json").read_bytes() == results
    with monkeypatch.context() as patch:
        interrupt_in(patch, metrics, "epoch_line")
        assert job("--resume", "runs/fast", "--epochs", 3)[0] == 130
    assert len(rows("runs/fast")) == 2 and not Path("runs/fast/results.json").exists()
    assert job("--resume", "runs/fast")[0] == 0
    assert read_json("runs/fast")["epochs"] == 3


def test_the_printed_command_continues_an_interrupted_extension(job, monkeypatch):
    assert job(*FAST)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch")
        status, out, _ = job("--resume", "runs/fast", "--epochs", 3)
    assert status == 130
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["resume", "python", "train.py"] and job(*command[3:])[0] == 0
    assert read_json("runs/fast")["epochs"] == 3


def test_a_directory_that_is_replaced_during_training_is_left_alone(job, monkeypatch):
    def replace(*args):
        if Path("run/last.pt").exists():
            Path("run").rename("renamed")
            Path("run").mkdir()
            Path("run/results.json").write_text("mine")
        return evaluate(*args)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", replace)
    status, _, err = job(*FAST, "--epochs", 3, "--output-dir", "run")
    assert status == 1 and one_line(err)
    assert Path("run/results.json").read_text() == "mine" and os.listdir("run") == ["results.json"]
    assert len(rows("renamed")) == 1


# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_the_last_complete_epoch_and_its_plots(workdir, signum):
    job = Job(*FAST, "--epochs", 1000, "--output-dir", "my run")
    job.wait_for("epoch    2/1000")
    time.sleep(0.1)
    job.signal(signum)
    status, out, err = job.end()
    assert status == 128 + signum and re.fullmatch(r"interrupted [^\n]*\d+/1000\n", err), err
    checkpoint = torch.load("my run/last.pt", weights_only=True)
    epochs = len(checkpoint["history"])
    assert 2 <= epochs < 1000 and epochs - len(rows("my run")) in (0, 1)  # if it came between both
    assert Path("my run/loss.png").exists()
    assert not Path("my run/results.json").exists()
    assert out.endswith("\nresume   python train.py --resume 'my run'\n")


def ignore_signals():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as nohup, or & in a script
        signal.signal(signum, signal.SIG_IGN)


def test_signals_that_are_ignored_from_the_start_stay_ignored(workdir):
    job = Job(*FAST, "--epochs", 5, prepare=ignore_signals)
    job.wait_for("epoch 2/5")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        job.signal(signum)
    status, out, err = job.end()
    assert (status, err) == (0, "") and "epoch 5/5" in out


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(job, monkeypatch):
    interrupt_in(monkeypatch, train, "train_epoch")
    status, out, err = job(*FAST)
    assert status == 130 and re.fullmatch("interrupted [^\n]*0/1[^\n]*\n", err)
    assert not Path("runs/fast").exists() and "resume" not in out and "saved" not in out


@pytest.mark.parametrize("flags", [FAST, ["--resume", "run", "--eval-only"]])
def test_ctrl_c_is_one_line_if_there_is_nothing_to_resume(job, monkeypatch, flags):
    assert job(*FAST, "--quiet", "--output-dir", "run")[0] == 0
    interrupt_in(monkeypatch, train, *["load_data"] if flags is FAST else ["evaluate"])
    status, out, err = job(*flags)
    assert (status, out) == (130, "") and re.fullmatch("[^\n]*interrupted\n", err)


# Terminal and environment


def test_out_of_memory_is_one_line_that_offers_to_resume(job, monkeypatch):
    def allocate(*args):  # more than there can be
        return torch.empty(2**60, dtype=torch.uint8)

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")
    assert job(*FAST, "--output-dir", "run")[0] == 0
    for fail in (allocate, Mock(side_effect=gpu), Mock(side_effect=MemoryError)):
        monkeypatch.setattr(train, "train_epoch", fail)
        status, _, err = job("--resume", "run", "--epochs", 2)
        assert status == 1 and one_line(err) and "--resume run" in err, err


def test_file_systems_without_locks_and_without_fsync(job, monkeypatch):
    no_locks, no_fsync = OSError(errno.ENOLCK, "No locks available"), OSError(errno.EINVAL, "")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=no_locks))
    monkeypatch.setattr(os, "fsync", Mock(side_effect=no_fsync))
    status, _, err = job(*FAST)
    assert status == 0 and re.fullmatch("warning: [^\n]*No locks available[^\n]*\n", err)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "I/O error")))
    assert job(*FAST)[0] == 1


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
    assert job(*FAST, "--dry-run")[0] == 0


def act_as_in_a_cluster():
    os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")


def test_variables_of_a_cluster_without_torchrun_are_those_of_a_single_process(workdir):
    job = Job(*FAST, "--dry-run", "--output-dir", "run", prepare=act_as_in_a_cluster)
    status, out, err = job.end()
    assert (status, err) == (0, "") and "result" in out
    assert read_json("run")["processes"] == 1


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no MNIST directory")
def test_fast_reaches_its_accuracies_on_mnist(monkeypatch, tmp_path):
    monkeypatch.undo()  # the digests of MNIST
    flags = ["--recipe", "fast", "--dataset", "mnist", "--data-dir", os.environ["MNIST_DIR"]]
    assert train.main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    test = read_json(tmp_path / "run")["test"]
    assert test["digit_accuracy"] >= 0.9915 and test["sum_accuracy"] >= 0.9915
