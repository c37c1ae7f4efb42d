"""A training run survives whatever happens to it.

pytest tries a part of this; all of it takes minutes, and prints a table:

    python tests/test_faults.py
"""

import functools
import io
import itertools
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import zipfile
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401 (it puts the program's folder on the path: this is a script, too)
import pytest
import test_mnist
import torch
from jobs import Job
from test_train import FAST, one_line, result, rows, without_seconds

import device
import mnist
import model
import rundir
import train
from recipes import RECIPES
from rundir import LAST, load_checkpoint

resource = pytest.importorskip("resource", reason="processes have no limits here")
mirror = test_mnist.mirror

ALL = "TRY_ALL_FAULTS" in os.environ  # set by `main`
RUN = [*FAST, "--epochs", 6, "--val-size", 400, "--output-dir", "run", "--device", "cpu"]
SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])


def tries(some, every):
    """A mark: the test is tried with so many seeds."""
    return pytest.mark.parametrize("seed", range(every if ALL else some))


def plain(value):
    """A checkpoint's state as what can be compared, without the seconds."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if "seconds" not in str(k)}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def kept(folder="run"):
    """All that a run leaves, without the seconds: checkpoints, files' names, rows, figures."""
    states = [plain(load_checkpoint(path)) for path in sorted(Path(folder).glob("*.pt"))]
    return states, sorted(os.listdir(folder)), without_seconds(folder), result(folder)["test"]


class Whole(NamedTuple):
    """RUN when nothing happens to it."""

    kept: tuple
    checkpoint: bytes
    seconds: float  # that it takes
    writes: int  # files that it writes


@functools.cache
def uninterrupted():
    assert Job("--bogus").end()[0] == 2  # the first process takes longer
    began = time.monotonic()
    assert Job(*RUN, prepare=functools.partial(kill_in_write, None, None)).end()[0] == 0
    seconds, writes = time.monotonic() - began, int(Path("writes").read_text())
    checkpoint = Path("run", LAST).read_bytes()
    os.rename("run", "whole")
    return Whole(kept("whole"), checkpoint, seconds, writes)


def assert_goes_on():
    """RUN was interrupted; it goes on to its end, which is that of the uninterrupted run."""
    begun = Path("run", LAST).exists()
    status, _, err = Job("--resume", "run").end() if begun else Job(*RUN).end()
    assert (status, err) == (0, "")
    assert kept() == uninterrupted().kept


def draw_long(run):
    """In place of `Run.draw`: no picture, but a process that is there till a file "end" is."""
    print("drawing", flush=True)
    while not Path("end").exists():
        time.sleep(0.01)
    print("drawn", flush=True)
    return []


@tries(2, 30)
def test_kill_9_at_a_random_moment(workplace, seed):
    seconds = uninterrupted().seconds
    job = Job(*RUN, draw=draw_long)
    time.sleep(random.Random(seed).uniform(0, seconds))
    job.signal(signal.SIGKILL)
    assert job.end()[0] == 137
    assert_goes_on()


def kill_in_write(number, share):
    """A harm: kill -9 in the process's write of that number, when a share of it is done."""
    numbers = itertools.count(1)

    class File(io.FileIO):
        def write(self, content):
            done = next(numbers)
            Path("writes").write_text(str(done))
            if done != number:
                return super().write(content)
            super().write(content[: int(share * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)

    rundir.open = File


@tries(2, 30)
def test_kill_9_within_a_write(workplace, seed):
    draw = random.Random(seed)
    share = draw.choice([0, draw.random(), 1])
    number = 1 + (17 + 11 * seed) % uninterrupted().writes  # each in turn
    assert Job(*RUN, prepare=functools.partial(kill_in_write, number, share)).end()[0] == 137
    assert list(Path("run").glob(".*.tmp"))
    assert_goes_on()


@SIGNALS
@tries(1, 20)
def test_a_signal_at_a_random_moment(workplace, signum, seed):
    seconds = uninterrupted().seconds
    job = Job(*RUN)
    time.sleep(random.Random(seed).uniform(0, seconds))
    begun = job.printed() != ""
    job.signal(signum)
    status, _, err = job.end()
    if begun:
        done = Path("run", "results.json").exists()
        assert status == 128 + signum or status == 0 and done
        assert "Traceback" not in err, err
    assert_goes_on()


@SIGNALS
@tries(1, 5)
def test_a_second_signal_ends_it_at_once(workplace, signum, seed):
    job = Job(*RUN, draw=draw_long)
    job.wait_for(f"epoch {seed + 1}/6")
    job.signal(signum)
    job.wait_for("drawing")
    job.signal(signum)
    status, out, _ = job.end()
    assert status == 128 + signum and "drawn" not in out
    assert_goes_on()


def fill_disk(name, number):
    """A harm: from the write of that number of a file on, there is room for half of it."""
    numbers, write = itertools.count(1), rundir.RunDir.write

    def limited(self, file, content):
        if file == name and next(numbers) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, resource.RLIM_INFINITY))
        write(self, file, content)

    rundir.RunDir.write = limited


@tries(2, 18)
def test_a_full_disk(workplace, seed):
    name = [LAST, "loss.png", "metrics.csv", "best.pt", "results.json", "args.json"][seed % 6]
    number = 1 if name in ("loss.png", "results.json", "args.json") else 1 + seed // 6
    status, _, err = Job(*RUN, prepare=functools.partial(fill_disk, name, number)).end()
    assert status == 1 and one_line(err) and name in err, err
    assert_goes_on()


def fill_log():
    """A harm: what stdout is written to is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_below_the_log(workplace):
    status, _, err = Job(*RUN, prepare=fill_log).end()
    assert status == 1 and one_line(err) and "No space left" in err, err
    assert_goes_on()


@tries(1, 5)
def test_four_processes_download_once(workplace, mirror, monkeypatch, seed):
    get, asked = mirror.do_GET, []

    def slow_get(handler):
        asked.append(handler.path)
        time.sleep(0.1)
        get(handler)

    monkeypatch.setattr(mirror, "do_GET", slow_get)
    flags = [*FAST, "--dry-run", "--dataset", "mnist", "--data-dir", "new"]
    ends = [job.end() for job in [Job(*flags) for _ in range(4)]]
    assert all(status == 0 and "downloading" in err for status, _, err in ends)
    assert len(asked) <= 2 * len(mnist.SHA256)  # torchvision asks twice for a file
    assert {path.name for path in Path("new/MNIST/raw").iterdir()} == set(mnist.SHA256)


@tries(1, 5)
def test_four_processes_choose_four_folders(workplace, seed):
    ends = [job.end() for job in [Job(*FAST, "--dry-run", "--name", "mine") for _ in range(4)]]
    assert [(status, err) for status, _, err in ends] == [(0, "")] * 4
    assert len({out.splitlines()[-1] for _, out, _ in ends}) == 4 == len(os.listdir("runs"))


@tries(1, 5)
def test_of_two_processes_in_a_folder_one_works(workplace, seed):
    assert Job(*RUN, prepare=functools.partial(kill_in_write, 10, 0.5)).end()[0] == 137
    jobs = [Job("--resume", "run", draw=draw_long) for _ in range(2)]
    assert wait([job.process.sentinel for job in jobs], 120)  # till one of them has ended
    Path("end").touch()
    (works, _, _), (refused, _, err) = sorted(job.end() for job in jobs)
    assert (works, refused) == (0, 1) and one_line(err) and "another process" in err, err
    assert_goes_on()


# Runs in this process, of few images.


@pytest.fixture
def few(job, monkeypatch):
    """The job on the first images of MNIST, or of the stand-in, in batches of ten."""

    def load(*args):
        source = load_all(*args)
        for part, count in ((source.train, 20), (source.test, 10)):
            part.data, part.targets = part.data[:count], part.targets[:count]
        return source

    load_all, stand_in = mnist.load, mnist.stand_in
    monkeypatch.setattr(mnist, "load", load)
    monkeypatch.setattr(mnist, "stand_in", lambda part, count: stand_in(part, 20))
    return functools.partial(job, "--batch-size", 10, "--device", "cpu")


def stop_at(monkeypatch, look):
    """Stop the next run, as by Ctrl-C, when it looks for the nth time whether it should stop."""
    looks = itertools.count(1)

    def check(flag):
        if next(looks) == look:
            flag.signum = signal.SIGINT
            raise device.Stopped

    monkeypatch.setattr(device.StopFlag, "check", check)
    return looks


EPOCHS = 6 if ALL else 2
ALIKE = {"shared-trunk-slow", "concat-linear"}  # in what is kept, to recipes that are tried
STOPPED = [name for name in RECIPES if name not in ALIKE]
CASES = list(itertools.product(STOPPED, [0, 10]))
SOME_CASES = [("default", 10), ("fast", 0), ("toy", 0)]


@pytest.mark.parametrize("recipe, val_size", CASES if ALL else SOME_CASES)
@pytest.mark.usefixtures("toy_recipe")
def test_a_stop_within_and_after_each_epoch(few, monkeypatch, recipe, val_size):
    monkeypatch.setattr(train, "REDRAW_SECONDS", math.inf)  # or a slow run alone has a loss.png
    flags = ["--recipe", recipe, "--epochs", EPOCHS, "--val-size", val_size]
    looks = stop_at(monkeypatch, None)
    assert few(*flags, "--output-dir", "whole")[0] == 0
    an_epoch, draw = next(looks) // EPOCHS, random.Random(0)
    command = [*flags, "--output-dir", "run"]
    for epoch, within in itertools.product(range(1, EPOCHS + 1), [True, False]):
        look = draw.randint(2, an_epoch) if within else an_epoch + 1
        stop_at(monkeypatch, look + (epoch > 1))  # a run that goes on looks once before
        assert few(*command)[0] == (130 if within or epoch < EPOCHS else 0)
        if epoch > 1 or not within:  # else nothing was kept, and the folder is free
            assert len(load_checkpoint(Path("run", LAST))["history"]) == epoch - within
            command = ["--resume", "run"]
    assert kept() == kept("whole")


def test_a_finished_run_is_evaluated_and_extended(few):
    out = few("--recipe", "fast", "--epochs", 2, "--output-dir", "run")[1]
    status, figures, err = few("--resume", "run", "--eval-only")
    assert (status, err) == (0, "") and figures.rstrip() in out
    before = without_seconds("run")
    status, _, err = few("--resume", "run", "--epochs", 4)
    assert status == 0 and re.fullmatch("note: --epochs is now 4, .*\n", err)
    assert without_seconds("run")[:2] == before and len(rows("run")) == 4


CHANGES = "--recipe default,--seed 1,--val-size 10,--addends once,--dataset synthetic".split(",")


@pytest.mark.parametrize("change", CHANGES)
def test_another_experiment_is_refused(few, change):
    assert few("--recipe", "fast", "--output-dir", "run")[0] == 0
    before = kept()
    status, out, err = few("--resume", "run", *change.split())
    assert (status, out) == (2, "") and one_line(err), err
    assert kept() == before


@pytest.mark.parametrize("batch_size", [10, 5] if ALL else [10])  # at the epoch's end, within it
def test_a_loss_that_becomes_nan(few, batch_size):
    few = functools.partial(few, "--batch-size", batch_size)
    assert few("--recipe", "concat-mlp", "--epochs", 1, "--output-dir", "run")[0] == 0
    before = kept()
    status, _, err = few("--resume", "run", "--epochs", 2, "--lr", 100)
    assert status == 1 and "NaN" in err and one_line(err.splitlines(keepends=True)[-1])
    assert kept() == before
    assert few("--resume", "run", "--epochs", 2, "--lr", 0.001)[0] == 0 and len(rows("run")) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there(few):
    status, _, err = few("--recipe", "fast", "--device", "cuda", "--output-dir", "run")
    assert status == 0 and re.fullmatch("warning: .*cuda.*: running on the CPU\n", err)
    assert few("--recipe", "fast", "--output-dir", "cpu")[0] == 0
    assert without_seconds("run") == without_seconds("cpu")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def flip(old, place, draw):
    """Bytes of which the one at `place` is another."""
    return old[:place] + bytes([old[place] ^ draw.randint(1, 255)]) + old[place + 1 :]


def saved(make):
    """A harm below: a torch.save of what `make` makes of the state in the old bytes."""
    return lambda path, old, draw: torch.save(make(torch.load(io.BytesIO(old))), path)


# What can be in a file's place: name -> function(path, its old bytes, random numbers).
HARMS = {
    "truncated": lambda path, old, draw: path.write_bytes(old[: draw.randrange(len(old))]),
    "extended": lambda path, old, draw: path.write_bytes(old + draw.randbytes(9)),
    "flipped": lambda path, old, draw: path.write_bytes(flip(old, draw.randrange(len(old)), draw)),
    "replaced": lambda path, old, draw: path.write_bytes(draw.randbytes(len(old))),
    "empty": lambda path, old, draw: path.touch(),
    "unreadable": lambda path, old, draw: path.touch(0o000),
    "folder": lambda path, old, draw: path.mkdir(),
    "dangling link": lambda path, old, draw: path.symlink_to("nowhere"),
    "endless link": lambda path, old, draw: path.symlink_to(path.name),
}
FOREIGN = {
    "pickle": lambda path, old, draw: path.write_bytes(pickle.dumps(Malicious())),
    "zip": lambda path, old, draw: zipfile.ZipFile(path, "w").close(),
    "malicious": saved(lambda state: Malicious()),
    "malicious part": saved(lambda state: state | {"curve": Malicious()}),
    "list": saved(lambda state: [1, 2]),
    "empty dict": saved(lambda state: {}),
    "weights alone": saved(lambda state: state["network"]),
    "other network": saved(
        lambda state: state | {"network": model.build("compact", "outer").state_dict()}
    ),
    "other recipe": saved(lambda state: state | {"flags": state["flags"] | {"recipe": "gone"}}),
    "other types": saved(lambda state: state | {"flags": None, "history": None}),
}


@pytest.mark.parametrize("name", sorted(mnist.SHA256))
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_data_file(few, data_dir, harm, name):
    path = data_dir / "MNIST" / "raw" / name
    old = path.read_bytes()
    path.unlink()
    HARMS[harm](path, old, random.Random(name))
    status, out, err = few("--recipe", "fast", "--dataset", "mnist")
    assert (status, out) == (1, "") and one_line(err.splitlines(keepends=True)[-1]), err
    assert name in err and not Path("runs").exists()


def assert_refused_or_equal(job):
    """The checkpoint in the folder "run" is refused in one line, or as good as RUN's."""
    status, out, err = job("--resume", "run", "--eval-only")
    if status == 0:
        assert plain(load_checkpoint(Path("run", LAST))) == uninterrupted().kept[0][-1]
    else:
        assert status in (1, 2) and out == "" and one_line(err), err
        assert "mend that and try again" not in err  # an OSError that nobody thought of
    assert not Path("executed").exists()


@pytest.mark.parametrize("harm", HARMS | FOREIGN)
def test_what_is_no_checkpoint(job, harm):
    Path("run").mkdir()
    (HARMS | FOREIGN)[harm](Path("run", LAST), uninterrupted().checkpoint, random.Random(0))
    assert_refused_or_equal(job)


@tries(30, 1000)
def test_a_damaged_checkpoint(job, seed):
    old, draw = uninterrupted().checkpoint, random.Random(seed)
    anywhere = draw.randrange(len(old))
    with zipfile.ZipFile(io.BytesIO(old)) as archive:
        header = draw.choice(archive.infolist()).header_offset + draw.randrange(64)
        directory = draw.randrange(archive.start_dir, len(old))
    flipped = [flip(old, place, draw) for place in (anywhere, header, directory)]
    Path("run").mkdir()
    Path("run", LAST).write_bytes([*flipped, old[:anywhere], old + draw.randbytes(9)][seed % 5])
    assert_refused_or_equal(job)


SOUND = """
--recipe fast default; --epochs 1 100000; --batch-size 5 8 20; -b 10; --lr 0.01 1e-9;
--weight-decay 0 0.1; --addends each-epoch once; --val-size 0 10; --seed 0 4294967295;
--dataset auto mnist synthetic; --data-dir data elsewhere; --device auto cpu cuda:99;
--precision auto fp32; --output-dir here; --name mine ünï; --resume runs/none; --eval-only;
--deterministic; --dry-run; --bogus; stray
"""
ODD = "0|-1|2.5|nan|-inf|1e400|0x10|٣|é😀|\udcff|\a\x1b[31m|a\tb|a\nb|--|-|=|%s|~".split("|")
ODD += ["", " ", "9" * 400, "a" * 300]
PLACES = ["..", "/", "a/b", "../a", "\\"]  # not for flags that may well write there


def command_line(draw):
    """Random flags, most of them with a sound value, some with an odd one or none."""
    line, flags = [], [flag.split() for flag in SOUND.split(";")]
    for flag, *sound in draw.choices(flags, k=draw.randint(0, 5)):
        odd = ODD if flag in ("--output-dir", "--data-dir") else ODD + PLACES
        values = draw.choices([sound, odd, []], [5, 4, 1])[0]
        line += [flag, *draw.choices(values, k=min(1, len(values)))]
    return [*line, "--dry-run", "--quiet"]


@tries(40, 600)
def test_a_random_command_line(few, tmp_path, seed):
    beside = set(tmp_path.parent.iterdir())
    status, out, err = few(*command_line(random.Random(seed)))
    if status == 0:
        assert out.startswith("result") and "error: " not in err
    else:
        assert status in (1, 2) and out == ""
        assert re.fullmatch(r"((?!error: )[^\n]+\n)*error: [^\n]+; [^\n]+\n", err), err
        assert "mend that and try again" not in err  # an OSError that nobody thought of
    assert set(tmp_path.parent.iterdir()) == beside


class Table:
    """A plugin of pytest's that counts: a row a test function, a try each of its cases."""

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
    status = pytest.main(["-q", "-p", "no:cacheprovider", __file__], plugins=[table])
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
