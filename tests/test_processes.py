"""Several processes are the same run as one, under torchrun too, and end together."""

import functools
import os
import re
import signal
import subprocess
import sys

import conftest
import pytest
import torch
from jobs import Job
from test_train import rows

import mnist
import train

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


@pytest.mark.parametrize("fault", ["a process dies", "a signal"])
def test_processes_end_together_and_keep_the_last_whole_epoch(place, fault):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    flags = [*FLAGS[:-1], "--epochs", "10000", "--output-dir", "run"]
    first, second = (
        Job(*flags, prepare=functools.partial(take_part, rank, store.port)) for rank in range(2)
    )
    first.wait_for("\nepoch")
    if fault == "a process dies":
        second.signal(signal.SIGKILL)
    else:  # torchrun passes a Ctrl-C on as this
        for job in (first, second):
            job.signal(signal.SIGTERM)
    status, _, err = first.end()
    assert second.end()[0] != 0
    # After a signal, the first may see the second go before it looks for the signal.
    left = "^error: another process of this run has ended; "
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
