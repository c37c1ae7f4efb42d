"""Several processes train the same run as one, and end together."""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from jobs import Job, run_script
from test_train import read_json, rows, weights

import dataset
import synthetic
import train
from handwriting.predictor import load_model
from recipes import RECIPES
from synthetic import synthetic_mnist
from training import device
from training.checkpoint import load_checkpoint
from training.console import UserError

IMAGES = {"train": 28, "test": 11}  # the second process evaluates fewer than the first
FLAGS = "--recipe toy --batch-size 12 --precision fp32 --device cpu".split()
TORCHRUN = "torchrun --standalone --nproc-per-node 2 train.py".split()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with an even smaller MNIST."""
    files, digest = conftest.small_mnist(*IMAGES.values())
    conftest.write_mnist(tmp_path / "data", files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "SHA256", digest)


def set_rank(rank, port, fault):
    """Make this process one of two, as torchrun does; `fault` is called with the rank."""
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    store |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in {**ranks, **store}.items()})
    RECIPES["toy"] = conftest.TOY
    fault(rank)


@pytest.fixture
def two(workdir):
    """Starts a run of two processes: two(flag, ...) -> both jobs."""
    options = {"is_master": True, "wait_for_workers": False}
    stores = []  # one for each start, as a used one has the keys of its processes

    def start(*flags, fault=id):
        stores.append(torch.distributed.TCPStore("127.0.0.1", 0, **options))
        ranks = [functools.partial(set_rank, rank, stores[-1].port, fault) for rank in range(2)]
        return [Job(*FLAGS, "--output-dir", "run", *flags, prepare=rank) for rank in ranks]

    return start


def test_two_processes_of_torchrun_continue_the_run_of_one_and_one_theirs(job, toy_recipe):
    for epochs, directory in ((3, "one"), (1, "runs/two")):
        assert job(*FLAGS, "--epochs", epochs, "--output-dir", directory)[0] == 0
    torchrun = ["-m", "torch.distributed.run", *TORCHRUN[1:-1]]
    notebook = {"MPLBACKEND": "missing"}  # a backend that is not installed here
    two = run_script(torchrun, "--resume", "--epochs", 2, environment=notebook)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("result") == 1  # only rank 0 prints
    assert re.search("warning: [^\n]*process", two.stderr), two.stderr
    assert read_json("runs/two")["processes"] == 2
    status, _, err = job("--resume", "--epochs", 3)
    assert status == 0 and re.fullmatch("warning: [^\n]*process[^\n]*\n", err)
    assert job("--resume", "--epochs", 4)[2] == ""  # it is one process again
    # Equal up to the order of float additions.
    for ours, theirs in zip(rows("one"), rows("runs/two")[:3], strict=True):
        for name, value in ours.items():
            if "accuracy" in name:
                assert value == theirs[name], name
            elif "seconds" not in name:
                assert float(value) == pytest.approx(float(theirs[name]), rel=1e-4), name
    assert job("--resume", "one", "--epochs", 4)[0] == 0
    for name, ours in weights("one").items():
        torch.testing.assert_close(ours, weights("runs/two")[name], atol=1e-5, rtol=1e-3)


def test_the_report_of_torchrun_ends_with_the_line_of_the_error(workdir):
    torchrun = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN[1:-1]]
    command = [*torchrun, conftest.ROOT / "train.py", "--bogus"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode and os.listdir() == ["data"]
    assert "error: " in result.stderr.strip("=-\n ").splitlines()[-1], result.stderr


def record_pairs(rank):
    def record(self, indices):
        _, digit, addend, _ = items = batch(self, indices)
        with open(f"pairs{rank}", "a") as file:
            for pair in zip(digit.tolist(), addend.argmax(1).tolist(), strict=True):
                print(*pair, file=file)
        return items

    batch = dataset.MNISTSum.batch
    dataset.MNISTSum.batch = record


def test_no_process_trains_on_an_unseen_pair(two):
    for flags in (["--unseen-pairs", 50, "--epochs", 6], ["--resume", "--epochs", 12]):
        assert [job.end()[0] for job in two(*flags, fault=record_pairs)] == [0, 0]
    unseen = {
        f"{digit} {addend}" for digit, addend in dataset.draw_unseen(50, 0).nonzero().tolist()
    }
    for rank in range(2):
        pairs = Path(f"pairs{rank}").read_text().splitlines()
        assert len(pairs) == 12 * IMAGES["train"] / 2 and not unseen & {*pairs}
    assert 0 <= float(rows("run")[-1]["test_unseen_sum_accuracy"]) <= 1


def test_metrics_are_those_of_the_checkpoint_with_batch_norm(two):
    for job in two("--recipe", "fast", "--batch-size", 14):
        status, _, err = job.end()
        assert status == 0, err
    model, checkpoint = load_model("run")
    test = dataset.MNISTSum(dataset.load_data("mnist", "data").test, "test")
    autocast = functools.partial(torch.autocast, "cpu", enabled=False)
    options = checkpoint["recipe"]["label_smoothing"], None
    metrics = train.evaluate(model, {"test": test}, autocast, *options)["test"].metrics()
    for name in ("digit_loss", "sum_loss", "both_accuracy"):
        assert metrics[name] == pytest.approx(checkpoint["history"][-1][f"test_{name}"], rel=1e-4)


def differ(rank):
    """Only rank 1 has MNIST, and bf16 in hardware."""

    device.has_fast_bf16 = lambda device: rank == 1
    synthetic.synthetic_mnist = lambda split, count: synthetic_mnist(split, 20)
    if rank == 0:
        dataset.download = lambda *args: False


def test_the_first_process_chooses_dataset_and_precision_for_both(two):
    assert [job.end()[0] for job in two("--precision", "auto", fault=differ)] == [0, 0]
    flags = read_json("run")["flags"]
    assert (flags["dataset"], flags["precision"]) == ("synthetic", "fp32")


def fail_to_build(rank):
    def fail(*parts):
        raise UserError("no memory for the model")

    if rank == 1:
        train.build_model = fail


def test_an_error_of_one_process_is_one_line(two):
    other, failed = two("--epochs", 1000, fault=fail_to_build)
    status, _, err = failed.end()
    assert status == 1 and re.fullmatch("error: [^\n]+\n", err), err
    other.signal(signal.SIGTERM)  # as torchrun does
    assert other.end()[0] != 0
    assert not os.path.exists("run/last.pt")


@pytest.mark.parametrize("fault", ["a process dies", "a signal"])
def test_processes_end_together_and_keep_the_last_complete_epoch(two, job, toy_recipe, fault):
    first, second = two("--epochs", 5000)
    first.wait_for("\nepoch")
    if fault == "a process dies":
        second.signal(signal.SIGKILL)
        assert first.end()[0] != 0
    else:  # torchrun sends this for Ctrl-C
        for process in (first, second):
            process.signal(signal.SIGTERM)
        status, out, err = first.end()
        printed = shlex.split(out.splitlines()[-1])
        assert status == 143 and printed == ["resume", *TORCHRUN, "--resume", "run"], err
    assert second.end()[0] != 0
    epochs = len(load_checkpoint("run")["history"]) + 1
    assert job("--resume", "run", "--epochs", epochs)[0] == 0
    assert len(rows("run")) == epochs
