"""The whole job, as its users run it: what it prints, what it leaves, how it fails."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOY, TRAIN_IMAGES
from jobs import Job
from PIL import Image

import mnist
import plots
import train
from cli import exit_status
from dataset import Affine
from locks import CAN_LOCK, folder_lock
from recipes import RECIPES
from rundir import RunDir

FAST = ["--recipe", "fast", "--batch-size", 100, "--device", "cpu"]
PICTURES = ["loss", "accuracy", "confusion_matrix", "predictions", "mistakes"]
COLUMNS = (
    "epoch,lr,train_digit_loss,train_sum_loss,train_digit_accuracy,train_sum_accuracy,"
    "test_digit_loss,test_sum_loss,test_digit_accuracy,test_sum_accuracy,test_both_accuracy,"
    "train_seconds,test_seconds"
).split(",")


def rows(folder):
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(folder)]


def result(folder):
    return json.loads(Path(folder, "results.json").read_text())


def one_line(text):
    """Whether a text is a single error line that says what is wrong and what to do."""
    return re.fullmatch(r"error: [^\n]+; [^\n]+\n", text) is not None


def test_a_run_leaves_everything_that_is_promised(drawing_job):
    status, out, err = drawing_job(*FAST, "--epochs", 3)
    assert status == 0
    folder = Path("runs/fast")
    names = {"args.json", "metrics.csv", "results.json", "last.pt", *(f"{p}.png" for p in PICTURES)}
    assert {path.name for path in folder.iterdir()} == names

    history = rows(folder)
    assert list(history[0]) == COLUMNS
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    for row in history:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert all(0 <= float(row[name]) <= 1 for name in COLUMNS if "accuracy" in name)
    assert float(history[-1]["train_digit_loss"]) < float(history[0]["train_digit_loss"])

    results = result(folder)
    assert results["recipe"] == "fast" and results["dataset"] == "mnist" and results["epochs"] == 3
    assert results["seed"] == 0 and results["device"] == "cpu" and results["note"] == ""
    assert results["parameters"] > 0 and results["versions"]["torch"] == torch.__version__
    for name in ("digit_loss", "sum_loss", "digit_accuracy", "sum_accuracy", "both_accuracy"):
        assert results["test"][name] == float(history[-1][f"test_{name}"])
    assert 0 <= results["test"]["consistency"] <= 1
    assert 0 < results["train_seconds"] < results["total_seconds"]
    assert "/" not in json.dumps(results)  # no paths

    saved = json.loads((folder / "args.json").read_text())
    assert "--epochs 3" in saved["command"] and saved["flags"]["seed"] == 0
    assert saved["threads"] == torch.get_num_threads() and saved["recipe"]["epochs"] == 3

    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    shown = f"{100 * results['test']['digit_accuracy']:.2f} %"
    assert any(line.startswith("result") and shown in line for line in lines)
    for name in PICTURES:
        assert f"picture  runs/fast/{name}.png" in lines
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width == 1500 and picture.convert("L").getextrema()[0] < 100
    assert lines[-1] == "run      runs/fast" == [x for x in lines if x.startswith("run ")][0]
    assert err == ""


def test_a_checkpoint_holds_plain_types_and_tensors(job):
    job(*FAST, "--epochs", 2)
    state = torch.load("runs/fast/last.pt", weights_only=True)
    assert [row["epoch"] for row in state["history"]] == [1, 2]
    assert len(state["curve"]) == 2 * TRAIN_IMAGES / 100
    network = train.model.build(state["recipe"]["encoder"], state["recipe"]["join"])
    network.load_state_dict(state["network"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_repeats_to_the_bit(job, monkeypatch, name):
    monkeypatch.setattr(train, "DRY_IMAGES", 10)
    flags = f"--recipe {name} --dry-run --batch-size 4 --val-size 20 --epochs 1 -q".split()
    flags += ["--device", "cpu"]
    for folder in ("one", "two"):
        status, _, err = job(*flags, "--output-dir", folder)
        assert (status, err) == (0, "")
    assert without_seconds("one") == without_seconds("two")
    one, two = (torch.load(f"{x}/last.pt", weights_only=True) for x in ("one", "two"))
    assert all(torch.equal(v, two["network"][k]) for k, v in one["network"].items())


def test_the_clean_epochs_come_last(job, monkeypatch):
    images = {}

    def see(learner, dataset, *rest):
        images[dataset.epoch] = dataset[0][0]
        return train_epoch(learner, dataset, *rest)

    train_epoch = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", see)
    augmented = dataclasses.replace(RECIPES["fast"], affine=Affine(9, 0.1, 0.1, 9), clean_epochs=2)
    monkeypatch.setitem(RECIPES, "fast", augmented)
    job(*FAST, "--epochs", 4, "--quiet")
    assert not images[1].equal(images[3]) and not images[2].equal(images[3])
    assert images[3].equal(images[4])


def test_another_seed_is_another_run(job):
    for seed in (0, 1):
        job(*FAST, "--seed", seed, "--output-dir", f"seed{seed}")
    assert without_seconds("seed0") != without_seconds("seed1")


def test_32_images_are_learned_by_heart(job, monkeypatch):
    few = torch.arange(32)
    monkeypatch.setattr(train, "split_off", lambda count, val_size, seed: (few, few[:0]))
    flags = "--recipe fast --epochs 30 --batch-size 32 --addends once --quiet --precision fp32"
    assert job(*flags.split())[0] == 0
    last = rows("runs/fast")[-1]
    assert last["train_digit_accuracy"] == last["train_sum_accuracy"] == "1.0"


def test_a_validation_split_is_reported_and_chooses_best(job):
    status, out, _ = job(*FAST, "--epochs", 4, "--val-size", 150, "--lr", 0.02)
    assert status == 0 and "450 train, 150 val, 200 test" in out
    history = rows("runs/fast")
    validated = [float(row["val_both_accuracy"]) for row in history]
    best = torch.load("runs/fast/best.pt", weights_only=True)
    assert len(best["history"]) == validated.index(max(validated)) + 1
    assert {f"val_{name}" for name in ("digit_loss", "sum_loss")} < set(history[0])


def test_folders_are_never_overwritten(job):
    for _ in range(3):
        assert job(*FAST, "--dry-run")[0] == 0
    assert job(*FAST, "--name", "mine", "--dry-run")[0] == 0
    names = {"fast-dry-run", "fast-dry-run-2", "fast-dry-run-3", "mine-dry-run"}
    assert {path.name for path in Path("runs").iterdir()} == names
    before = Path("runs/fast-dry-run/results.json").read_bytes()
    status, out, err = job(*FAST, "--output-dir", "runs/fast-dry-run")
    assert (status, out) == (1, "") and one_line(err) and "holds a run" in err
    assert Path("runs/fast-dry-run/results.json").read_bytes() == before


@pytest.mark.parametrize("left", [None, b""])
def test_a_folder_whose_run_got_no_checkpoint_is_used_again(job, monkeypatch, left):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        assert job(*FAST, "--output-dir", "run")[0] == 130
    if left is not None:  # killed yet earlier
        Path("run/args.json").write_bytes(left)
    Path("run/.last.pt.tmp").write_bytes(b"half")
    assert job(*FAST, "--seed", 7, "--output-dir", "run")[0] == 0
    assert result("run")["seed"] == 7 and not Path("run/.last.pt.tmp").exists()


FOREIGN = [
    {"args.json": "{}"},
    {"args.json": "[1, 2]"},
    {"args.json": "text"},
    {"args.json": "", "notes.txt": "mine"},
    {"args.json": "", "best.pt": ""},
    {"last.pt": "mine"},
]


@pytest.mark.parametrize("files", FOREIGN, ids=str)
def test_a_folder_with_other_files_is_left_as_it_is(job, files):
    Path("run").mkdir()
    for name, content in files.items():
        Path("run", name).write_text(content)
    status, out, err = job(*FAST, "--output-dir", "run")
    assert (status, out) == (1, "") and one_line(err) and "holds a run" in err
    assert {path.name: path.read_text() for path in Path("run").iterdir()} == files


@pytest.mark.skipif(not CAN_LOCK, reason="this system can't lock folders")
def test_a_folder_whose_run_lives_is_not_taken(job):
    Path("run").mkdir()
    Path("run/args.json").touch()
    with folder_lock("run", wait=False):
        status, out, err = job(*FAST, "--output-dir", "run")
    assert (status, out) == (1, "") and one_line(err) and "another process" in err


def test_a_run_that_takes_a_folder_while_another_begins_does_not_harm_it(job, monkeypatch):
    def overtaken(*args):
        with monkeypatch.context() as patch:
            patch.setattr(train, "headlines", headlines)
            assert job(*FAST, "--seed", 7, "--output-dir", "run")[0] == 0
        return headlines(*args)

    headlines = train.headlines
    monkeypatch.setattr(train, "headlines", overtaken)
    status, _, err = job(*FAST, "--output-dir", "run")
    assert status == 1 and one_line(err) and "holds a run" in err
    assert result("run")["seed"] == 7


def test_a_dry_run_goes_the_whole_way_and_says_what_it_is(job):
    status, out, _ = job("--dry-run", "--epochs", 50, "--batch-size", 100)
    assert status == 0
    results = result("runs/default-dry-run")
    assert "DRY RUN" in results["note"] and results["epochs"] == 2
    assert "300 train, 200 test" in out and "DRY RUN" in out
    assert len(rows("runs/default-dry-run")) == 2


def test_synthetic_digits_are_marked_wherever_they_show(drawing_job, monkeypatch):
    small = mnist.stand_in
    monkeypatch.setattr(mnist, "stand_in", lambda part, count: small(part, count // 100))
    titles = []
    figure = plots._figure
    monkeypatch.setattr(
        plots, "_figure", lambda title, **size: titles.append(title) or figure(title, **size)
    )
    monkeypatch.setattr(RunDir, "save_figure", lambda self, name, figure: name)  # takes long
    status, out, err = drawing_job(*FAST, "--dry-run", "--data-dir", "nowhere")
    assert status == 0 and "NOT MNIST" in err
    assert "NOT MNIST" in out.split("result")[1]
    results = result("runs/fast-dry-run")
    assert results["dataset"] == "synthetic" and "NOT MNIST" in results["note"]
    assert len(titles) == len(PICTURES) and all("NOT MNIST" in title for title in titles)


def test_quiet_prints_the_result_alone(job):
    status, out, err = job(*FAST, "--quiet")
    kinds = {line.split()[0] for line in out.splitlines()}
    assert (status, err, kinds) == (0, "", {"result", "run"})


def test_a_missing_device_gives_way_to_the_cpu_with_the_reason(job):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    status, out, err = job(*FAST, "--device", "cuda", "--dry-run")
    assert status == 0 and "device   cpu" in out
    assert err.startswith("warning: ") and "cuda" in err.lower() and err.count("\n") == 1


USAGE = [
    ["--epochs", "0"],
    ["--epochs", "2.5"],
    ["--epochs", "many"],
    ["--batch-size", "-1"],
    ["--lr", "nan"],
    ["--lr", "0"],
    ["--weight-decay", "11"],
    ["--seed", "-1"],
    ["--seed", str(2**32)],
    ["--val-size", "600"],
    ["--dataset", "cifar"],
    ["--device", "tpu"],
    ["--precision", "fp16"],
    ["--recipe", "none"],
    ["--name", "a/b"],
    ["--name", ".."],
    ["--name", ""],
    ["--output-dir", ""],
    ["--name", "a", "--output-dir", "b"],
    ["--epoch", "3"],
    ["--bogus"],
    ["stray"],
    ["--batch-size", "599"],
    ["--batch-size", "1"],
    ["--recipe", "concat-mlp", "--batch-size", "601"],
]


@pytest.mark.parametrize("flags", USAGE, ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(job, flags):
    status, out, err = job(*flags)
    assert (status, out) == (2, "") and one_line(err), err
    assert not Path("runs").exists() and not Path("b").exists()


@pytest.mark.parametrize("change", ["--seed 1", "--batch-size 599"])
def test_what_a_resumed_run_refuses_is_one_line(job, change):
    assert job(*FAST)[0] == 0
    status, out, err = job("--resume", "runs/fast", "--lr", 0.5, *change.split())
    assert (status, out) == (2, "") and one_line(err), err


@pytest.mark.parametrize("column", [{"optimizer": "RMSprop"}, {"optimizer_options": {"eps": 0.1}}])
def test_a_row_that_was_changed_in_the_table_is_another_experiment(
    job, toy_recipe, monkeypatch, column
):
    assert job("--recipe", "toy", "--epochs", 1)[0] == 0
    monkeypatch.setitem(RECIPES, "toy", dataclasses.replace(TOY, **column))
    status, _, err = job("--resume", "runs/toy", "--epochs", 2)
    assert status == 2 and one_line(err) and "another experiment" in err, err


def test_a_refused_number_comes_with_its_legal_range(job):
    assert "from 1 to 100000" in job("--epochs", "0")[2]


def test_a_batch_of_one_is_fine_without_batch_norm(job, toy_recipe):
    assert job("--recipe", "toy", "--dry-run", "--batch-size", 1)[0] == 0


@pytest.mark.parametrize("place", ["/dev/full", "file"])
def test_an_output_folder_that_cannot_be_is_one_line(job, place):
    Path("file").touch()
    status, _, err = job(*FAST, "--output-dir", f"{place}/sub")
    assert status == 1 and one_line(err), err


def test_a_damaged_file_is_one_line(job, data_dir):
    path = data_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    status, out, err = job(*FAST)
    assert (status, out) == (1, "") and one_line(err) and path.name in err


def test_a_loss_that_breaks_ends_the_run_and_keeps_the_epochs_before(job, toy_recipe, monkeypatch):
    def breaks(step, total_steps):
        return 1e38 if step > 7 else 1.0

    monkeypatch.setitem(RECIPES, "toy", dataclasses.replace(TOY, schedule=breaks))
    few = torch.arange(120)
    monkeypatch.setattr(train, "split_off", lambda count, val_size, seed: (few, few[:0]))
    status, out, err = job("--recipe", "toy", "--batch-size", 20, "--epochs", 3)
    assert status == 1 and one_line(err)
    assert re.search(r"NaN or infinite at step [34] of 6 in epoch 2", err)
    assert [row["epoch"] for row in rows("runs/toy")] == ["1"]
    state = torch.load("runs/toy/last.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["network"].values())
    assert not Path("runs/toy/results.json").exists()


def test_ctrl_c_keeps_the_last_whole_epoch_and_its_pictures(workplace):
    job = Job(*FAST, "--epochs", 1000, "--name", "my run", draw=train.Run.draw)
    job.wait_for("epoch    2/1000")
    time.sleep(0.1)
    job.signal(signal.SIGINT)
    status, out, err = job.end()
    assert status == 130, err
    assert re.search(r"stopped: \d+ of 1000 epochs", err) and "Traceback" not in err
    run = workplace / "runs/my run"
    history = rows(run)
    state = torch.load(run / "last.pt", weights_only=True)
    assert 2 <= len(history) == len(state["history"]) < 1000
    for name in PICTURES:
        Image.open(run / f"{name}.png").load()
    assert not (run / "results.json").exists()
    hint = re.search("^resume   python train.py (.*)$", out, re.MULTILINE)[1]
    assert shlex.split(hint) == ["--resume", "runs/my run"]
    assert "\r" not in err  # no bar where there is no terminal


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(job, monkeypatch):
    begin = train.train_epoch
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(train, "train_epoch", lambda *rest: interrupt() or begin(*rest))
    status, out, err = job(*FAST)
    assert (status, err) == (130, "stopped: 0 of 1 epochs are done\n")
    assert not Path("runs/fast").exists() and out.count("runs/fast") == 1


def test_figures_are_those_of_the_last_checkpoint_when_more_epochs_were_stopped(job, monkeypatch):
    assert job(*FAST)[0] == 0
    before = Path("runs/fast/results.json").read_bytes()
    made = Path("runs/fast/args.json").read_bytes()
    assert job("--resume", "runs/fast", "--lr", 0.5)[0] == 0  # nothing is left to train
    assert Path("runs/fast/results.json").read_bytes() == before
    assert Path("runs/fast/args.json").read_bytes() == made
    with monkeypatch.context() as patch:
        patch.setattr(train, "epoch_line", lambda *row: signal.raise_signal(signal.SIGINT) or "")
        assert job("--resume", "runs/fast", "--epochs", 3)[0] == 130
    assert len(rows("runs/fast")) == 2 and not Path("runs/fast/results.json").exists()
    assert job("--resume", "runs/fast", "--epochs", 3)[0] == 0
    assert result("runs/fast")["epochs"] == 3


def test_figures_are_those_of_the_last_checkpoint_when_it_was_all_that_was_written(
    job, monkeypatch
):
    def killed_after(rundir, name, state):
        save(rundir, name, state)
        raise SystemExit

    assert job(*FAST)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        save = RunDir.save_checkpoint
        patch.setattr(RunDir, "save_checkpoint", killed_after)
        job("--resume", "runs/fast", "--epochs", 2)
    assert job("--resume", "runs/fast")[0] == 0
    assert len(rows("runs/fast")) == 2 == result("runs/fast")["epochs"]


@pytest.mark.parametrize(
    "name, number, advice",
    [
        ("args.json", 1, "begin the run again"),
        ("last.pt", 1, "begin the run again"),
        ("last.pt", 2, "go on with --resume runs/fast"),
    ],
)
def test_what_to_do_after_a_failed_write_can_be_done(job, monkeypatch, name, number, advice):
    numbers, write = itertools.count(1), RunDir.write

    def fails(rundir, file, content):
        failing = file == name and next(numbers) == number
        write(rundir, f"{file}/none" if failing else file, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write", fails)
        status, _, err = job(*FAST, "--epochs", 2)
    assert status == 1 and one_line(err) and err.endswith(f"; mend that and {advice}\n"), err
    again = [*FAST, "--epochs", 2] if "again" in advice else advice.split()[-2:]
    assert job(*again)[0] == 0


def test_ctrl_c_while_the_pictures_are_drawn_leaves_nothing_to_resume(job, monkeypatch):
    monkeypatch.setattr(train.Run, "draw", lambda run: signal.raise_signal(signal.SIGINT) or [])
    status, out, err = job(*FAST)
    assert (status, err) == (130, "")
    assert "result   test: " in out and "resume" not in out
    assert result("runs/fast")["epochs"] == 1


def test_an_interruption_when_all_is_done_denies_nothing(job, monkeypatch):
    def interrupted(text):
        if text.startswith("run "):  # the last line
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "say", interrupted)
    status, _, err = job(*FAST, "--quiet")
    assert (status, err) == (130, "error: interrupted; run it again\n")
    assert result("runs/fast")["epochs"] == 1


def test_an_unforeseen_failure_is_told_as_it_is(capsys):
    def fail():
        raise PermissionError(13, "Permission denied", "a file")

    assert exit_status(fail) == 1
    assert capsys.readouterr().err == "error: a file: Permission denied; mend that and try again\n"


def show_on(terminal):
    """Let stderr be a terminal."""
    os.dup2(os.open(terminal, os.O_RDWR), 2)


def test_a_bar_on_a_terminal_goes_when_it_is_done(workplace):
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


def test_a_torchvision_that_does_not_fit_is_one_line(job, monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if re.match(r"mnist$|torchvision\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    status, out, err = job("--dry-run")
    assert status == 1 and out == "" and one_line(err) and "pip install" in err


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with MNIST")
def test_fast_reaches_its_figures_on_mnist(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()  # MNIST's own digests
    monkeypatch.setattr(train.Run, "draw", lambda self: [])
    folder = tmp_path / "run"
    data = os.environ["MNIST_DIR"]
    flags = ["--recipe", "fast", "--dataset", "mnist", "--data-dir", data, "-q"]
    assert train.main([*flags, "--output-dir", str(folder)]) == 0
    test = result(folder)["test"]
    assert test["digit_accuracy"] >= 0.9885 and test["sum_accuracy"] >= 0.9880
