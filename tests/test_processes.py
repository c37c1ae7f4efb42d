"""Several processes are the same run as one, under torchrun too, and end together."""

import functools
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import conftest
import pytest
import torch
from jobs import Job
from test_train import rows

import mnist
import train
from dataset import MNISTSum
from device import Engine
from learner import evaluate, restore
from rundir import load_checkpoint

# A last batch of one image is left when 12 are taken at a time: the second process gets none of it.
IMAGES = {"train": 25, "test": 11}
FLAGS = "--recipe toy --batch-size 12 --precision fp32 --device cpu --quiet".split()


@pytest.fixture
def place(tmp_path, monkeypatch, toy_recipe):
    """The current folder, with its own small MNIST."""
    files = conftest.files_of(IMAGES)
    conftest.write_files(tmp_path / "data", files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "SHA256", conftest.digests_of(files))
    monkeypatch.setattr(train.Run, "draw", lambda run: [])
    return tmp_path


def alone(*flags):
    """The job in this process: its exit status."""
    return train.main([*FLAGS, *flags])


def close(one, two):
    """Whether two runs have the same figures, as far as floats added in another order allow."""
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        for name, value in ours.items():
            if "accuracy" in name:
                assert value == theirs[name], name
            elif "seconds" not in name:
                assert float(value) == pytest.approx(float(theirs[name]), rel=1e-4), name
    one, two = (torch.load(f"{run}/last.pt", weights_only=True)["network"] for run in (one, two))
    for name, weights in one.items():
        torch.testing.assert_close(weights, two[name], atol=1e-5, rtol=1e-3)


def test_two_processes_are_the_same_run_as_one_and_either_takes_up_the_other(place):
    (place / "job.py").write_text(
        "import sys, torch, conftest, mnist, train\n"
        f"mnist.SHA256 = {mnist.SHA256!r}\n"
        "conftest.add_toy_recipe()\n"
        "train.Run.draw = lambda run: []\n"
        "torch.set_num_threads(1)\n"
        "sys.exit(train.main())\n"
    )
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 job.py".split()
    command = [sys.executable, *torchrun, *FLAGS, "--epochs", "2", "--output-dir", "two"]
    path = f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path}
    two = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("result") == 1 and "both" in two.stdout  # the first alone prints
    assert alone("--epochs", "3", "--output-dir", "one") == 0
    assert alone("--resume", "two", "--epochs", "3") == 0
    close("one", "two")


def take_part(rank, port):
    """What makes a job one of two processes, as torchrun tells it."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in {**place, **meet}.items()})
    conftest.add_toy_recipe()


def take_part_without_mnist(rank, port):
    """The same, but the second process can't have MNIST."""
    take_part(rank, port)
    if rank:
        small = mnist.Source("synthetic", *(mnist.stand_in(part, 25) for part in IMAGES))
        mnist.load = lambda *arguments: small


@pytest.fixture
def two():
    """Starts the job as two processes: two(flag, ...) -> both."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(*flags, prepare=take_part):
        ranks = (functools.partial(prepare, rank, store.port) for rank in range(2))
        return [Job(*FLAGS[:-1], *flags, "--output-dir", "run", prepare=rank) for rank in ranks]

    return start


def test_figures_are_those_of_the_checkpoint_with_batch_norm_too(place, two):
    for job in two("--recipe", "fast", "--batch-size", "13"):
        assert job.end()[0] == 0
    state = load_checkpoint("run/last.pt")
    learner = SimpleNamespace(network=restore(state), engine=Engine(torch.device("cpu")))
    test = MNISTSum(mnist.load("mnist", "data", print).test, "test")
    for name, value in evaluate(learner, test).score().items():
        if name != "consistency":
            assert value == pytest.approx(state["history"][-1][f"test_{name}"], rel=1e-4), name


def test_processes_that_have_other_data_are_told_so(place, two):
    ends = [job.end() for job in two("--epochs", "1", prepare=take_part_without_mnist)]
    assert [end[0] for end in ends] == [1, 1]
    assert re.fullmatch("error: some processes have MNIST[^\n]+; [^\n]+\n", ends[0][2])
    assert not (place / "run").exists()


@pytest.mark.parametrize("fault", ["a process dies", "a signal"])
def test_processes_end_together_and_keep_the_last_whole_epoch(place, two, fault):
    first, second = two("--epochs", "10000")
    first.wait_for("\nepoch")
    if fault == "a process dies":
        second.signal(signal.SIGKILL)
    else:  # torchrun passes a Ctrl-C on as this
        for job in (first, second):
            job.signal(signal.SIGTERM)
    status, _, err = first.end()
    assert second.end()[0] != 0
    # After a signal, the first may see the second go before it looks for the signal.
    left = "^error: a process of this run failed: .*; go on with --resume run"
    stopped = "^stopped: " if fault == "a signal" else left
    assert status in (1, 143) and re.search(f"{stopped}|{left}", err, re.MULTILINE), err
    assert "Traceback" not in err
    done = len(torch.load("run/last.pt", weights_only=True)["history"])
    assert done >= 1
    assert alone("--resume", "run", "--epochs", str(done + 1)) == 0
    assert len(rows("run")) == done + 1


@pytest.mark.parametrize("world, batch", [(2, 3), (4, 100)])
def test_batch_norm_needs_two_images_in_each_process(world, batch):
    recipe = train.resolve_recipe(train.parse_train("", ["--batch-size", str(batch)])[0])
    with pytest.raises(train.UsageError, match=f"in {world} processes"):
        train.count_steps(recipe, 6 * batch + 7 * (batch > 7), world)
    assert train.count_steps(recipe, 6 * batch, 1) == 6
