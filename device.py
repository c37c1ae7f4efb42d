"""Where the work is done: the device, its precision, and a stop asked for from outside."""

import signal
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Engine(NamedTuple):
    """A device that was tried, and the precision of the encoder's arithmetic on it."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    warning: str = ""  # why it is not the device that was asked for

    def place(self, network):
        """Move a network to the device, its convolutions in the layout that they gain from."""
        if self.device.type == "mps":
            return network.to(self.device)
        return network.to(self.device, memory_format=torch.channels_last)

    def autocast(self):
        """The context in which a network's forward pass has the engine's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def synchronize(self):
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def pick_engine(device="auto", precision="auto"):
    """The Engine for a wish such as "auto", "cpu", "cuda", "cuda:1" or "mps".

    What was wished for is tried by a small allocation; what fails that gives way to the CPU, with
    the reason in `warning`. `auto` takes CUDA, else MPS, else the CPU, without a warning.
    """
    warning = ""
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        reason = str(error).strip().splitlines()[0]
        warning = f"no {device} here ({reason}): running on the CPU"
        device = "cpu"
    device = torch.device(device)
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return Engine(device, precision, warning)


def has_fast_bf16(device):
    """Whether a device has bf16 arithmetic of its own; emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


class Stopped(Exception):
    """The stop that was asked for, raised where the work can be left."""


class StopFlag:
    """Whether a signal has asked for a stop; `check` is called where the work can be left."""

    signum = None

    def check(self):
        """Raise Stopped if a stop was asked for."""
        if self.signum is not None:
            raise Stopped

    @property
    def exit_status(self):
        """0, or what a shell expects of a program that the signal ended: 130, 143."""
        return 0 if self.signum is None else 128 + self.signum


@contextmanager
def stop_on_signals():
    """A StopFlag that SIGINT and SIGTERM raise; a second signal ends the program at once."""
    flag = StopFlag()
    before = {}

    def handle(signum, frame):
        flag.signum = signum
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)

    for caught in (signal.SIGINT, signal.SIGTERM):
        before[caught] = signal.signal(caught, handle)
    try:
        yield flag
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
