"""Several processes under torchrun are the same run as one, and end together."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, digests_of, files_of, write_files
from test_train import rows

import mnist
import train

# A last batch of one image is left when 12 are taken at a time: the second process gets none of it.
IMAGES = {"train": 25, "test": 11}
FLAGS = "--recipe concat-mlp --batch-size 12 --precision fp32 --quiet".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with its own small MNIST, in which every process finds the same recipe."""
    files = files_of(IMAGES)
    write_files(tmp_path / "data", files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "SHA256", digests_of(files))
    whole = "dataclasses.replace(cli.RECIPES['concat-mlp'], drop_last=False)"
    (tmp_path / "job.py").write_text(
        "import dataclasses, os, sys, torch, cli, mnist, train\n"
        f"mnist.SHA256 = {digests_of(files)!r}\n"
        f"cli.RECIPES['concat-mlp'] = {whole}\n"
        "train.Run.draw = lambda run: []\n"
        "torch.set_num_threads(1)\n"
        "open('pid' + os.environ.get('RANK', ''), 'w').write(str(os.getpid()))\n"
        "sys.exit(train.main())\n"
    )
    return tmp_path


@pytest.fixture
def start(place):
    """start(processes, flag, ...) -> Popen of the job, by torchrun unless it is one process."""
    started = []

    def run(processes, *flags):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(processes)] if processes > 1 else [sys.executable]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += ["job.py", *FLAGS, *flags]
        started.append(subprocess.Popen(command, cwd=place, env=environment, **pipes))
        return started[-1]

    yield run
    for one in started:
        one.kill()
        one.communicate()


def wait_for(path, seconds=60):
    """Wait till a file is there; the time that this may take is bounded."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


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


def test_two_processes_are_the_same_run_as_one_and_either_takes_up_the_other(start):
    two = start(2, "--epochs", "2", "--output-dir", "two")
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert out.count("result") == 1 and "both" in out  # the first process alone prints
    one = start(1, "--epochs", "3", "--output-dir", "one")
    assert one.wait(timeout=120) == 0
    more = start(1, "--resume", "two", "--epochs", "3")
    assert more.wait(timeout=120) == 0
    close("one", "two")


@pytest.mark.parametrize("fault", ["a process dies", "a signal"])
def test_processes_end_together_and_keep_the_last_whole_epoch(start, place, fault):
    job = start(2, "--epochs", "10000", "--output-dir", "run")
    wait_for(place / "run" / "last.pt")
    if fault == "a signal":
        job.send_signal(signal.SIGINT)
    else:
        os.kill(int((place / "pid1").read_text()), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    assert re.search("^(stopped|error): ", err, re.MULTILINE), err  # whichever it sees first
    if fault == "a process dies":
        assert "SIGKILL" in err  # torchrun's own report
    done = len(torch.load("run/last.pt", weights_only=True)["history"])
    assert done >= 1
    more = start(1, "--resume", "run", "--epochs", str(done + 1))
    assert more.wait(timeout=120) == 0
    assert len(rows("run")) == done + 1


@pytest.mark.parametrize("world, batch", [(2, 3), (4, 100)])
def test_batch_norm_needs_two_images_in_each_process(world, batch):
    recipe = train.resolve_recipe(train.parse_train("", ["--batch-size", str(batch)])[0])
    with pytest.raises(train.UsageError, match=f"in {world} processes"):
        train.count_steps(recipe, 6 * batch + 7 * (batch > 7), world)
    assert train.count_steps(recipe, 6 * batch, 1) == 6
