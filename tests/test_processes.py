"""Several processes train the same run as one, and end together."""

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from jobs import Job
from test_train import rows

import dataset
import train
from inference.predictor import load_model
from recipes import RECIPES
from support import device, rundir
from support.errors import UserError
from support.synthetic import synthetic_mnist

# In batches of 12, the last has one image: the second process gets none of it.
IMAGES = {"train": 25, "test": 11}
FLAGS = "--recipe toy --batch-size 12 --precision fp32 --device cpu".split()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with an even smaller MNIST."""
    mnist = conftest.mnist_files(*IMAGES.values())
    conftest.write_mnist(tmp_path / "data", mnist)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "SHA256", conftest.sha256_digests(mnist))


def set_rank(rank, port, fault):
    """Make this process one of two, as torchrun does; `fault` is called with the rank."""
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    store |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in {**ranks, **store}.items()})
    RECIPES["toy"] = conftest.TOY
    fault(rank)


def no_fault(rank):
    pass


@pytest.fixture
def two(workdir):
    """Starts a run of two processes: two(flag, ...) -> both jobs."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(*flags, fault=no_fault):
        ranks = [functools.partial(set_rank, rank, store.port, fault) for rank in range(2)]
        return [Job(*FLAGS, "--output-dir", "run", *flags, prepare=rank) for rank in ranks]

    return start


def assert_close(one, two):
    """Two runs have the same metrics and weights, up to the order of float additions."""
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        for name, value in ours.items():
            if "accuracy" in name:
                assert value == theirs[name], name
            elif "seconds" not in name:
                assert float(value) == pytest.approx(float(theirs[name]), rel=1e-4), name
    one, two = (torch.load(f"{run}/last.pt")["network"] for run in (one, two))
    for name, weights in one.items():
        torch.testing.assert_close(weights, two[name], atol=1e-5, rtol=1e-3)


def test_torchrun_trains_the_same_run_and_one_process_continues_it(job, toy_recipe):
    Path("job.py").write_text(
        "import sys, torch, conftest, dataset, train\n"
        "from support import plots\n"
        f"dataset.SHA256 = {dataset.SHA256!r}\n"
        "train.RECIPES['toy'] = conftest.TOY\n"
        "plots.run_figures = lambda *args: {}\n"
        "torch.set_num_threads(1)\n"
        "sys.exit(train.main())\n"
    )
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 job.py".split()
    command = [sys.executable, *torchrun, *FLAGS, "--epochs", "2", "--output-dir", "two"]
    path = f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path}
    two = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("result") == 1  # only rank 0 prints
    assert job(*FLAGS, "--epochs", 3, "--output-dir", "one")[0] == 0
    assert job("--resume", "two", "--epochs", 3)[0] == 0
    assert_close("one", "two")


def test_metrics_are_those_of_the_checkpoint_with_batch_norm(two):
    for job in two("--recipe", "fast", "--batch-size", 13):
        assert job.end()[0] == 0
    model, checkpoint = load_model("run")
    test = dataset.MNISTSum(dataset.load_data("mnist", "data").test, "test")
    autocast = functools.partial(torch.autocast, "cpu", enabled=False)
    for name, value in train.evaluate(model, test, autocast).metrics().items():
        if name != "consistency":
            assert value == pytest.approx(checkpoint["history"][-1][f"test_{name}"], rel=1e-4), name


def damage_mnist(rank):
    if rank == 1:
        dataset.SHA256 = dict.fromkeys(dataset.SHA256, "")


def remove_mnist(rank):
    if rank == 1:
        digits = [synthetic_mnist(split, count) for split, count in IMAGES.items()]
        train.load_data = lambda *args: dataset.Source("synthetic", *digits)


def differ_in_bf16(rank):
    device.has_fast_bf16 = lambda device: rank == 1


def fail_to_build(rank):
    def fail(*parts):
        raise UserError("no memory for the model")

    if rank == 1:
        train.build_model = fail


ERRORS = [
    ("", fail_to_build, 1, "rank 1: no memory"),
    ("", damage_mnist, 1, "rank 1: .*damaged"),
    ("--output-dir data/MNIST/raw/train-labels-idx1-ubyte", no_fault, 1, "rank 0: cannot create"),
    ("", remove_mnist, 1, "only some of the processes have MNIST"),
    ("--precision auto", differ_in_bf16, 1, "only some of the processes have fast bf16"),
    ("--bogus", no_fault, 2, ".*--bogus"),
    ("--recipe fast --batch-size 3", no_fault, 2, "--batch-size 3 .*batch normalization"),
]


@pytest.mark.parametrize("flags, fault, status, message", ERRORS)
def test_an_error_before_training_is_printed_once(two, flags, fault, status, message):
    (first, _, err), (second, _, nothing) = [job.end() for job in two(*flags.split(), fault=fault)]
    assert (first, second, nothing) == (status, status, "")
    assert re.fullmatch(f"error: {message}[^\n]*\n", err), err
    assert not Path("run").exists()


def diverge(rank):
    def epoch_metrics(*args):
        return {"digit_loss": float("nan")}, []

    train.metrics.epoch_metrics = epoch_metrics


def test_an_error_of_all_processes_during_training_is_printed_once(two):
    (_, _, err), (status, _, nothing) = [job.end() for job in two(fault=diverge)]
    assert (status, nothing) == (1, "") and re.fullmatch("error: the loss .* NaN [^\n]*\n", err)


def resume_the_other_run(rank):
    name = ("one", "other")[rank]
    rundir.checkpoint_to_resume = lambda args: Path(name, "last.pt")


def test_the_first_process_chooses_the_run_to_resume(two, job, toy_recipe):
    for name, lr in (("one", 0.01), ("same", 0.01), ("other", 0.1)):
        assert job(*FLAGS, "--epochs", 1, "--output-dir", name, "--lr", lr)[0] == 0
    flags = ["--resume", "--epochs", 2, "--output-dir", ""]
    ends = [process.end() for process in two(*flags, fault=resume_the_other_run)]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert job("--resume", "same", "--epochs", 2)[0] == 0
    assert_close("one", "same")


def fail_to_write(rank):
    def fail(*paths):
        raise PermissionError(13, "Permission denied")

    if rank == 0:
        os.replace = fail


def test_an_error_of_one_process_during_training_ends_both(two):
    ends = [job.end() for job in two(fault=fail_to_write)]
    for (status, _, err), message in zip(
        ends, ("0: cannot write", "1: another process"), strict=True
    ):
        assert status == 1 and re.fullmatch(f"error: rank {message}[^\n]*\n", err), err


@pytest.mark.parametrize("fault", ["a process dies", "a signal"])
def test_processes_end_together_and_keep_the_last_complete_epoch(two, job, toy_recipe, fault):
    first, second = two("--epochs", 10000)
    first.wait_for("\nepoch")
    if fault == "a process dies":
        second.signal(signal.SIGKILL)
    else:  # torchrun sends this for Ctrl-C
        for process in (first, second):
            process.signal(signal.SIGTERM)
    status, _, err = first.end()
    assert second.end()[0] != 0
    # The first process may notice the end of the second before its own signal.
    message = "error: rank 0: another process .*; resume with: python train.py --resume run"
    message += "|interrupted after epoch" if fault == "a signal" else ""
    assert status in (1, 143) and re.match(message, err) and "Traceback" not in err, err
    epochs = len(torch.load("run/last.pt")["history"]) + 1
    assert job("--resume", "run", "--epochs", epochs)[0] == 0
    assert len(rows("run")) == epochs
