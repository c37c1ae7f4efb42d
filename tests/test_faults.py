"""Fault injection: a run survives interruptions and damaged files, or is refused in one line.

pytest tries a sample. All tries take minutes and print a table:

    python tests/test_faults.py
"""

import dataclasses
import functools
import io
import itertools
import os
import random
import re
import signal
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import torch
from jobs import Job
from test_train import FAST, one_line, read_json, refused, rows, without_seconds

import dataset
import synthetic
import train
from model import build_model
from recipes import RECIPES
from training import files
from training.checkpoint import LAST, load_checkpoint

ALL = "TRY_ALL_FAULTS" in os.environ  # set by `main`
RUN = [*FAST, "--epochs", 6, "--val-size", 400, "--output-dir", "run"]


def tries(some, every):
    """A mark: run the test with this number of seeds."""
    return pytest.mark.parametrize("seed", range(every if ALL else some))


def plain(value):
    """The content of a checkpoint in a form that == compares, without times."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not re.search("seconds|^time$", str(k))}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def saved(directory="run"):
    """What a run leaves, without times: checkpoints, file names, metrics, results."""
    checkpoints = [plain(load_checkpoint(path)) for path in sorted(Path(directory).glob("*.pt"))]
    for checkpoint in checkpoints:
        del checkpoint["flags"]["data_dir"]  # each test has its own
    names, test = sorted(os.listdir(directory)), read_json(directory)["test"]
    return checkpoints, names, without_seconds(directory), test


class Reference(NamedTuple):
    """RUN without faults."""

    saved: tuple
    checkpoint: bytes
    seconds: float
    writes: int  # number of files that it writes


@functools.cache
def uninterrupted():
    assert Job("--bogus").end()[0] == 2  # the first process takes longer
    start = time.monotonic()
    job = Job(
        *RUN, "--output-dir", "reference", prepare=functools.partial(fail_in_write, None, None)
    )
    assert job.end()[0] == 0
    seconds, writes = time.monotonic() - start, int(Path("writes").read_text())
    return Reference(saved("reference"), Path("reference", LAST).read_bytes(), seconds, writes)


def assert_continues():
    """Repeat RUN with --resume; the end is that of the uninterrupted run."""
    status, _, err = Job(*RUN, "--resume").end()
    assert (status, err) == (0, "")
    assert saved() == uninterrupted().saved


def fail_in_write(fail, number, share=0):
    """Call `fail` in the write of that number, when this share of the file is written."""
    numbers = itertools.count(1)

    class File(io.FileIO):
        def write(self, content):
            count = next(numbers)
            Path("writes").write_text(str(count))
            if count != number:
                return super().write(content)
            super().write(content[: int(share * len(content))])
            fail()

    files.open = File


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", [kill, no_space])
@tries(2, 30)
def test_a_kill_9_or_a_full_disk_during_a_write(workdir, fault, seed):  # each in turn
    draw = random.Random(seed)
    share = draw.choice([0, draw.random(), 1])
    number = 1 + (17 + 11 * seed) % uninterrupted().writes
    job = Job(*RUN, prepare=functools.partial(fail_in_write, fault, number, share))
    status, _, err = job.end()
    assert status == (137 if fault is kill else 1)
    assert fault is kill or one_line(err) and "No space left" in err, err
    assert_continues()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@tries(1, 25)
def test_a_signal_at_a_random_time(workdir, signum, seed):
    seconds = uninterrupted().seconds
    job = Job(*RUN)
    time.sleep(random.Random(seed).uniform(0, seconds))
    started = job.printed() != ""
    job.signal(signum)
    status, out, err = job.end()
    if started and status and signum != signal.SIGKILL:
        assert status == 128 + signum and "Traceback" not in err, err
        assert Path("run", LAST).exists() == ("resume   python" in out)
    assert_continues()


@tries(1, 5)
def test_four_processes_that_create_a_directory(workdir, seed):
    ends = [job.end() for job in [Job(*FAST, "--dry-run") for _ in range(4)]]
    assert [(status, err) for status, _, err in ends] == [(0, "")] * 4
    assert len({out.splitlines()[-1] for _, out, _ in ends}) == 4 == len(os.listdir("runs"))


# In this process, with few images


@pytest.fixture
def few(job, monkeypatch):
    """The job with few images, in batches of ten."""

    def load(*args):
        source = load_data(*args)
        for part, count in ((source.train, 20), (source.test, 10)):
            part.data, part.targets = part.data[:count], part.targets[:count]
        return source

    load_data, make = train.load_data, synthetic.synthetic_mnist
    monkeypatch.setattr(train, "load_data", load)
    monkeypatch.setattr(synthetic, "synthetic_mnist", lambda split, count: make(split, 20))
    return functools.partial(job, "--batch-size", 10, "--device", "cpu")


def interrupt_at(monkeypatch, number):
    """Ctrl-C before the nth step, evaluation or write of the next run; returns their counter."""
    numbers = itertools.count(1)

    def interrupting(function):
        def interrupted(*args):
            if next(numbers) == number:
                signal.raise_signal(signal.SIGINT)
            return function(*args)

        return interrupted

    for owner, name in ((dataset.MNISTSum, "batch"), (train, "evaluate"), (os, "replace")):
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    return numbers


SIMILAR = {"outer-product", "shared-trunk-slow", "concat-linear"}  # have a state as others


def toy_with_dropout():
    return torch.nn.Sequential(torch.nn.Dropout(0.2), conftest.toy())


@pytest.mark.parametrize("recipe", [*(name for name in RECIPES if name not in SIMILAR), "dropout"])
@pytest.mark.parametrize("val_size", [0, 10] if ALL else [10])
def test_interruptions_until_a_run_is_finished(few, monkeypatch, recipe, val_size):
    dropout = dataclasses.replace(conftest.TOY, encoder=toy_with_dropout)
    monkeypatch.setitem(RECIPES, "dropout", dropout)
    flags = ["--recipe", recipe, "--epochs", 2 + 4 * ALL, "--val-size", val_size]
    with monkeypatch.context() as patch:
        events = interrupt_at(patch, None)
        assert few(*flags, "--output-dir", "reference")[0] == 0
    draw, status = random.Random(recipe), 130
    per_epoch = (next(events) - 1) // len(rows("reference"))
    while status == 130:
        with monkeypatch.context() as patch:
            interrupt_at(patch, draw.randint(1, 2 * per_epoch))
            status, out, err = few(*flags, "--output-dir", "run", "--resume")
        assert status == 0 or status == 130 and "Traceback" not in err
        if status == 130 and out:  # else it was interrupted before it began
            assert Path("run", LAST).exists() == ("resume   python" in out)
    assert saved() == saved("reference")


CHANGES = """
--recipe default; --seed 1; --val-size 10; --addends once; --dataset synthetic; --lr 0.5;
--batch-size 5; --head OuterProduct; --unseen-pairs 10; --deterministic; --dry-run;
--output-dir other; --epochs 1
"""


def test_resuming_as_another_experiment(few):
    assert few("--recipe", "fast", "--epochs", 2, "--output-dir", "run")[0] == 0
    before = saved()
    for change in CHANGES.split(";"):
        refused(few, 2, "--resume", "run", *change.split())
    assert saved() == before


def exploding(step, total_steps):
    return 1.0 if step < 2 else 1e30


def test_a_loss_that_becomes_nan(few, monkeypatch):
    recipe = dataclasses.replace(RECIPES["concat-mlp"], schedule=exploding)
    monkeypatch.setitem(RECIPES, "exploding", recipe)
    for _ in range(2):
        status, out, err = few(*"--recipe exploding --epochs 2 --output-dir run --resume".split())
        assert status == 1 and one_line(err) and "NaN" in err and "start a new run" in err
        assert len(rows("run")) == 1


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def flip(old, place, draw):
    """The bytes with another value at `place`."""
    return old[:place] + bytes([old[place] ^ draw.randint(1, 255)]) + old[place + 1 :]


def edited(edit):
    """A harm below that saves what `edit` returns for the old checkpoint."""
    return lambda path, old, draw: torch.save(edit(torch.load(io.BytesIO(old))), path)


def other_network(checkpoint):
    network = build_model(RECIPES["default"].encoder, RECIPES["default"].head)
    return checkpoint | {"network": network.state_dict()}


def other_shapes(checkpoint):
    for state in checkpoint["optimizer"]["state"].values():
        state.update({name: value.flatten()[:1] for name, value in state.items()})
    return checkpoint


# What can replace a file: name -> function(path, old content, random numbers)
HARMS = {
    "truncated": lambda path, old, draw: path.write_bytes(old[: draw.randrange(len(old))]),
    "extended": lambda path, old, draw: path.write_bytes(old + draw.randbytes(9)),
    "flipped": lambda path, old, draw: path.write_bytes(flip(old, draw.randrange(len(old)), draw)),
    "replaced": lambda path, old, draw: path.write_bytes(draw.randbytes(len(old))),
    "empty": lambda path, old, draw: path.touch(),
    "unreadable": lambda path, old, draw: path.touch(0o000),
    "directory": lambda path, old, draw: path.mkdir(),
    "dangling link": lambda path, old, draw: path.symlink_to("nowhere"),
    "endless link": lambda path, old, draw: path.symlink_to(path.name),
}
FOREIGN = {
    "malicious": edited(lambda state: Malicious()),
    "list": edited(lambda state: [1, 2]),
    "only weights": edited(lambda state: state["network"]),
    "older": edited(lambda state: {k: v for k, v in state.items() if k != "format"}),
    "other recipe": edited(lambda state: state | {"flags": state["flags"] | {"recipe": "gone"}}),
    "other network": edited(other_network),
    "no optimizer": edited(lambda state: state | {"optimizer": {"state": {}}}),
    "other shapes": edited(other_shapes),
}
FILES = [f"{p}-{k}-ubyte" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("name", FILES if ALL else FILES[:1])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_data_file(few, data_dir, harm, name):
    path = data_dir / "MNIST" / "raw" / name
    old = path.read_bytes()
    path.unlink()
    HARMS[harm](path, old, random.Random(name))
    refused(few, 1, "--recipe", "fast", "--dataset", "mnist")
    assert not Path("runs").exists()


def assert_refused_or_equal(job):
    """The checkpoint in `run` is refused in one line, or equal to that of RUN."""
    status, out, err = job("--resume", "run")
    if status == 0:
        expected = torch.load(io.BytesIO(uninterrupted().checkpoint))
        assert plain(load_checkpoint("run")) == plain(expected)
    else:
        assert status in (1, 2) and out == "" and one_line(err), err
    assert not Path("executed").exists()


@pytest.mark.parametrize("harm", HARMS | FOREIGN)
def test_a_file_that_is_not_a_checkpoint(job, harm):
    for directory in ("run", "runs/harmed", "runs/good"):
        path = Path(directory, LAST)
        path.parent.mkdir(parents=True)
        if directory == "runs/good":
            path.write_bytes(uninterrupted().checkpoint)
        else:
            (HARMS | FOREIGN)[harm](path, uninterrupted().checkpoint, random.Random(0))
    assert_refused_or_equal(job)
    status, out, err = job("--resume", "--eval-only")  # skips it in the list of runs
    assert status == 0 and out.startswith("run      runs/") and "Traceback" not in err, err


@tries(15, 1000)
def test_a_damaged_checkpoint(job, seed):
    old, draw = uninterrupted().checkpoint, random.Random(seed)
    anywhere = draw.randrange(len(old))
    with zipfile.ZipFile(io.BytesIO(old)) as archive:
        header = draw.choice(archive.infolist()).header_offset + draw.randrange(64)
        index = draw.randrange(archive.start_dir, len(old))
    flipped = [flip(old, place, draw) for place in (anywhere, header, index)]
    Path("run").mkdir()
    Path("run", LAST).write_bytes([*flipped, old[:anywhere], old + draw.randbytes(9)][seed % 5])
    assert_refused_or_equal(job)


VALID = """
--recipe fast default; --epochs 1 5000; --batch-size 5 8 20; --lr 0.01 1e-9; --unseen-pairs 0 75;
--head OuterProduct; --optimizer SGD; --val-size 0 10; --seed 0 4294967295; --dataset auto mnist;
--data-dir data elsewhere; --device auto cuda:99; --precision fp32; --output-dir here ünï;
--resume runs/none; --eval-only; --deterministic; --dry-run; --bogus; stray
"""
ODD = "0|-1|2.5|nan|-inf|1e400|0x10|٣|é😀|\a\x1b[31m|a\tb|--|-|=|%s|~".split("|")
ODD += ["", " ", "9" * 400, "a" * 300]
PATHS = ["..", "/", "a/b", "../a", "\\"]  # not for flags that may write there


@tries(25, 600)
def test_a_random_command_line(few, tmp_path, monkeypatch, seed):
    """Random flags, most with a valid value, some with an odd one or none."""
    draw, line = random.Random(seed), ["--dry-run", "--quiet"]
    for flag, *valid in draw.choices([flag.split() for flag in VALID.split(";")], k=seed % 6):
        odd = ODD if flag in ("--output-dir", "--data-dir") else ODD + PATHS
        values = draw.choices([valid, odd, []], [5, 4, 1])[0]
        line += [flag, *draw.choices(values, k=min(1, len(values)))]
    monkeypatch.setenv("HOME", str(tmp_path))  # for ~
    siblings = set(tmp_path.parent.iterdir())
    status, out, err = few(*line)
    if status == 0:
        assert out.startswith("result") and "error: " not in err
    else:
        assert status in (1, 2) and out == "" and one_line(err), err
    assert set(tmp_path.parent.iterdir()) == siblings


class Table:
    """A pytest plugin that counts the outcomes of each test function."""

    def __init__(self):
        self.counts = {}

    def pytest_runtest_logreport(self, report):
        fault = re.search(r"::test_(\w+)", report.nodeid)[1].replace("_", " ")
        if report.when == "call" or report.failed:
            self.counts.setdefault(fault, Counter())[report.outcome] += 1

    def __str__(self):
        lines = ["| fault | tries | survived | lost |", "| --- | ---: | ---: | ---: |"]
        for fault, count in self.counts.items():
            survived, lost = count["passed"], count["failed"]
            lines.append(f"| {fault} | {survived + lost} | {survived} | {lost} |")
        return "\n".join(lines)


def main():
    """Try all faults; returns pytest's exit status, which is 1 if a try was lost."""
    os.environ["TRY_ALL_FAULTS"] = "1"
    table = Table()
    status = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", __file__], plugins=[table])
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
