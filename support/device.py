"""The device and the precision of a run."""

import os

import torch

from support import distributed
from support.console import warn
from support.errors import UserError


def pick_device(requested="auto", deterministic=False):
    """Choose the device for "auto", "cpu", "cuda", "cuda:N" or "mps"; returns it and the reason.

    If it does not work, the CPU is used with a warning. Under torchrun each process has its own
    GPU, or all use the CPU if no machine has a GPU; else UserError.
    """
    several = distributed.world_size() > 1
    name, reason = requested, "as requested"
    if requested == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        reason = "no GPU found" if name == "cpu" else "GPU found"
    if name == "cuda" or (name.startswith("cuda") and several):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    failure = device_error(name)
    if failure and several and torch.cuda.device_count():
        raise UserError(f"{name} failed: {failure}; fix this or pass --device cpu")
    if failure:
        name, reason = "cpu", f"{name} failed: {failure}"
    device = torch.device(name)
    message = "some processes have a GPU and others do not; pass --device cpu"
    distributed.require_equal(device.type, message)
    if failure:
        warn(f"warning: {reason}; running on the CPU")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuBLAS reads this when it starts, and is deterministic only with it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    # On MPS the gradient of pooling has no deterministic form: warn instead of failing.
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type == "mps")
    return device, reason


def device_error(name):
    """Run a first operation on a device; returns why it cannot be used, "" if it can."""
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name.startswith("cuda") and 0 < gpus < processes:
        return f"{processes} processes on this machine, but {gpus} GPU{'s' * (gpus > 1)}"
    try:
        (torch.zeros(1, device=name) + 1).cpu()  # the addition needs a kernel built for this GPU
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        return str(error).strip().splitlines()[0]
    return ""


def pick_precision(requested, device):
    """Resolve "auto" to "bf16" where the device has fast bf16, else "fp32"; equal on all ranks."""
    if requested == "auto":
        requested = "bf16" if has_fast_bf16(device) else "fp32"
    message = "only some of the processes have fast bf16; pass --precision fp32"
    distributed.require_equal(requested, message)
    return requested


def has_fast_bf16(device):
    """Whether a device has bf16 arithmetic in hardware. Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = cpu_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def cpu_capabilities():
    """What PyTorch knows about the processor, as a dict; older versions know less, or nothing."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    query = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return {"avx512_bf16": query()} if query else {}


def move_model(model, device):
    """Move a model to a device, in the memory layout in which convolutions are fastest."""
    layout = {} if device.type == "mps" else {"memory_format": torch.channels_last}
    return model.to(device, **layout)
