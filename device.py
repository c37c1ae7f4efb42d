"""Where work is done: device, precision, processes that share it, and a stop from outside."""

import os
import signal
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

# What torchrun tells each process of its place, and what holds without it.
PLACE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0}


class DeviceError(Exception):
    """This process's device can't be used; the message says what to do."""


class Engine(NamedTuple):
    """A device that was tried, its precision, and this process's place among those that share.

    A single process is rank 0 of a world of 1.
    """

    device: torch.device
    precision: str = "fp32"  # of the encoder's arithmetic, or "bf16"
    rank: int = 0
    world: int = 1
    reason: str = ""  # why this device
    fell_back: bool = False  # it is not the one that was asked for

    def place(self, network):
        """A network moved to the device, its convolutions in the layout that they gain from."""
        if self.world > 1 and self.device.type == "cuda":
            network = SyncBatchNorm.convert_sync_batchnorm(network)
        if self.device.type == "mps":
            return network.to(self.device)
        return network.to(self.device, memory_format=torch.channels_last)

    def replicate(self, network):
        """The network as one of `world` replicas whose gradients are averaged: or as it is."""
        return network if self.world == 1 else DistributedDataParallel(network)

    def add_up(self, tensor):
        """A tensor summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, network):
        """Rank 0's running statistics for all: between two steps each process has its own."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def abort(self):
        """Give up what is under way among processes, which may have stopped at different steps.

        A GPU would else wait for it, and with it all that reads from there, and the group's end.
        """
        if self.world > 1:
            dist.group.WORLD.abort()

    def agrees(self, value):
        """Whether all processes have this value."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values == [value] * self.world

    def autocast(self):
        """The context in which a network's forward pass has the engine's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def joined(self):
        """The processes that torchrun started, joined; nothing for a single one."""
        if self.world == 1:
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        yield
        dist.destroy_process_group()  # not after an error: the others might never come to it


def pick_engine(device="auto", precision="auto", deterministic=False):
    """The Engine for a wish such as "auto", "cpu", "cuda", "cuda:1" or "mps".

    What was wished for is tried by a small allocation; what fails that gives way to the CPU. `auto`
    takes CUDA, else MPS, else the CPU. Under torchrun each process of a machine has its own GPU.

    Raises:
        DeviceError: one of several processes has no use of its GPU; the others would wait for it.
    """
    rank, world, local, neighbours = (int(os.environ.get(*place)) for place in PLACE.items())
    reason, fell_back = "as asked", False
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and world == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
        reason = "no GPU here" if device == "cpu" else "found here"
    if device == "cuda" or device.startswith("cuda") and world > 1:
        device = f"cuda:{local}"
    try:
        if device.startswith("cuda") and torch.cuda.device_count() < neighbours:
            raise RuntimeError(f"fewer GPUs than the {neighbours} processes")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        reason, fell_back = f"{device} failed: {str(error).strip().splitlines()[0]}", True
        if world > 1 and torch.cuda.device_count() >= neighbours:
            raise DeviceError(f"{reason}; mend that, or give --device cpu") from error
        device = "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuBLAS reads it at its start, and is deterministic only with it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says
    # On MPS the gradient of pooling has no deterministic form, which is worth a warning, no more.
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type == "mps")
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return Engine(device, precision, rank, world, reason, fell_back)


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


NEVER = StopFlag()  # for work that nothing but the signal itself is to stop


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
