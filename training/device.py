"""The device and the precision of a run, and the model on it."""

import os
from functools import partial

import numpy as np
import torch
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from training import distributed
from training.console import warn
from training.errors import UserError


def pick_device(args):
    """The device for `--device`, and the autocast context for `--precision`.

    If the device does not work, the CPU is used with a warning. Under torchrun each process has
    its own GPU, or all use the CPU if there is no GPU; else UserError. Stores in `args` what was
    picked, so that a resumed run has the same precision.
    """
    np.finfo(np.float64)  # NumPy 1.x warns if this is first called with denormals flushed
    torch.set_flush_denormal(True)  # where ReLUs stay off, Adam's averages become denormal: slow
    several, name = distributed.world_size() > 1, args.device
    if name == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" or (name.startswith("cuda") and several):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if several else 0}"
    if problem := device_problem(name):
        if several and torch.cuda.device_count():
            raise UserError(f"{problem}; fix this or pass --device cpu")
        warn(f"warning: {problem}: running on the CPU")
        name, args.device = "cpu", "auto"  # a resumed run need not repeat the warning
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuBLAS reads this when it starts, and is deterministic only with it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    # On MPS the gradient of pooling has no deterministic form: warn instead of failing.
    torch.use_deterministic_algorithms(args.deterministic, warn_only=device.type == "mps")
    if args.precision == "auto":
        fast = distributed.from_rank_0(has_fast_bf16, device)
        args.precision = "bf16" if fast else "fp32"
    bf16 = args.precision == "bf16"
    return device, partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def device_problem(name):
    """Run a first operation on a device; returns why it cannot be used, "" if it can."""
    if name.startswith("cuda") and not torch.cuda.device_count():
        return "no GPU found"
    if name == "mps" and not torch.backends.mps.is_available():
        return "no MPS device found"
    try:
        (torch.zeros(1, device=name) + 1).cpu()  # the addition needs a kernel built for this GPU
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        return f"{name} failed: {str(error).strip().splitlines()[0]}"
    return ""


def has_fast_bf16(device):
    """Whether a device has bf16 arithmetic in hardware. Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions know nothing
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def move_model(model, device):
    """Move a model to a device, in the memory layout in which convolutions are fastest."""
    layout = {} if device.type == "mps" else {"memory_format": torch.channels_last}
    return model.to(device, **layout)


def replicate(model):
    """The model with gradients averaged over the processes, if there are several."""
    if distributed.world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:  # SyncBatchNorm does not run on CPUs
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def broadcast_buffers(model):
    """Copy rank 0's buffers to all: between steps each process has its own running statistics."""
    if distributed.world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
