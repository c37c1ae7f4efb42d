"""The device and the precision of a run."""

import os

import torch

from training.console import UserError, warn
from training.processes import from_rank_0, world_size


def pick_device(name, precision, deterministic=False):
    """The torch.device for `--device`, and "bf16" or "fp32" for `--precision`.

    If the device does not work, the CPU is used with a warning. Under torchrun each process has
    its own GPU, or all use the CPU if there is no GPU; else UserError.
    """
    torch.set_flush_denormal(True)  # where ReLUs stay off, Adam's averages become denormal: slow
    several = world_size() > 1
    if name == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" or (name.startswith("cuda") and several):
        name = f"cuda:{os.environ['LOCAL_RANK'] if several else 0}"
    try:
        (torch.zeros(1, device=name) + 1).cpu()  # the addition needs a kernel built for this GPU
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        problem = f"{name} failed: {str(error).strip().splitlines()[0]}"
        if several and torch.cuda.device_count():
            raise UserError(f"{problem}; fix this or pass --device cpu") from error
        warn(f"warning: {problem}: running on the CPU")
        name = "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if deterministic:
        # cuBLAS reads this when it starts, and is deterministic only with it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # On MPS the gradient of pooling has no deterministic form: warn instead of failing.
        torch.use_deterministic_algorithms(True, warn_only=device.type == "mps")
    if precision == "auto":
        precision = "bf16" if from_rank_0(has_fast_bf16, device) else "fp32"
    return device, precision


def has_fast_bf16(device):
    """Whether a device has bf16 arithmetic in hardware. Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions know nothing
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def move_model(model, device):
    """Move a model to a device, in the memory layout in which convolutions are fastest."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)
