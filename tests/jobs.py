"""train.py as a process, forked from one that has imported everything already."""

import contextlib
import functools
import itertools
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest
import torch
from torchvision.datasets import MNIST
from tqdm import tqdm

import dataset
import train
from training import plots


@functools.cache
def forkserver():
    """A multiprocessing context whose processes have this module imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


def child(flags, log, mnist, prepare):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT), number)
    dataset.SHA256, MNIST.mirrors, MNIST.resources = mnist  # as patched by the test
    plots.run_figures = lambda *args: []  # takes long
    tqdm.set_lock(threading.RLock())  # its own is shared between processes and survives a kill
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if pytest runs with &
    if prepare:
        prepare()
    os._exit(train.main(flags))


def run_script(launcher, *flags, environment):
    """Run train.py with the small MNIST in a new interpreter, with the options `launcher`."""
    Path("job.py").write_text(
        "import sys, conftest, dataset, train\n"
        f"dataset.SHA256 = {dataset.SHA256!r}\n"
        "train.RECIPES['toy'] = conftest.TOY\n"
        "conftest.pytest_configure()\n"
        "sys.exit(train.main())\n"
    )
    command = [sys.executable, *launcher, "job.py", *map(str, flags)]
    path = f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **options)


class Job:
    """train.py as a process in the current directory; `prepare` is called in it first."""

    numbers = itertools.count()

    def __init__(self, *flags, prepare=None):
        self.log = Path(f"job{next(self.numbers)}").absolute()
        mnist = dataset.SHA256, MNIST.mirrors, MNIST.resources
        args = [str(flag) for flag in flags], self.log, mnist, prepare
        self.process = forkserver().Process(target=child, args=args, daemon=True)
        self.process.start()

    def printed(self, name="out"):
        path = self.log.with_suffix(f".{name}")
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, name="out"):
        deadline = time.monotonic() + 120
        while text not in self.printed(name):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def signal(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)

    def end(self):
        """Wait for the process; returns its exit status, as in a shell, stdout and stderr."""
        self.process.join(120)
        code = self.process.exitcode
        return code if code >= 0 else 128 - code, self.printed(), self.printed("err")
