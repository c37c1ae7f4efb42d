"""The real job as a process, forked from one that has imported all of it already."""

import contextlib
import functools
import itertools
import multiprocessing.forkserver
import os
import threading
import time
from pathlib import Path

import conftest
import pytest
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import mnist
import plots  # noqa: F401 (else each process would import it)
import train


@functools.cache
def processes():
    """The context of processes that are forked from one that has imported all this already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system can't fork processes")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


def draw_quickly(run):
    """In place of `Run.draw`: a single picture, an empty one."""
    return [run.rundir.save_figure("loss.png", Figure((1, 1)))]


def child(flags, log, files, draw, prepare):
    """The job as a process, with the digests and mirrors of the test that started it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT), number)
    mnist.SHA256, mnist.MNIST.mirrors, mnist.MNIST.resources = files
    train.Run.draw = draw
    tqdm.set_lock(threading.RLock())  # its own would outlive a kill here
    torch.set_num_threads(1)
    if prepare:
        prepare()
    os._exit(train.main(flags))


class Job:
    """The job as a process, started in the current folder; `prepare` is called in it first."""

    numbers = itertools.count()

    def __init__(self, *flags, draw=draw_quickly, prepare=None):
        self.log = Path(f"job{next(self.numbers)}").absolute()
        files = mnist.SHA256, mnist.MNIST.mirrors, mnist.MNIST.resources
        arguments = [str(flag) for flag in flags], self.log, files, draw, prepare
        self.process = processes().Process(target=child, args=arguments, daemon=True)
        self.process.start()

    def printed(self, name="out"):
        path = self.log.with_suffix(f".{name}")
        return path.read_text() if path.exists() else ""

    def wait_for(self, text):
        deadline = time.monotonic() + 120
        while text not in self.printed():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def signal(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)

    def end(self):
        """Wait for it: the exit status that a shell would see, stdout, stderr."""
        self.process.join(120)
        code = self.process.exitcode
        return code if code >= 0 else 128 - code, self.printed(), self.printed("err")
