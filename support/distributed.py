"""The processes that torchrun starts: their ranks, and what they exchange. Also works for one."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from support.errors import UserError

_gpu_group = None  # the NCCL group for tensors on GPUs; without it the default group, Gloo
_setting_up = True  # until `finish_setup` all ranks make the same calls to `all_gather`


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def init_process_group():
    """Connect the processes, if there are several, over Gloo, which needs no GPU."""
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))


def all_gather(value, error=""):
    """The values of all ranks. If one has an error (see `share_error`), all raise UserError."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, (value, error))
    values, errors = zip(*gathered, strict=True)
    if any(errors):
        by_rank = [f"rank {i}: {error}" for i, error in enumerate(errors) if error]
        raise UserError(errors[0] if len(set(errors)) == 1 else "; ".join(by_rank), shared=True)
    return list(values)


def require_equal(value, message):
    """Raise UserError with the message on all ranks if their values differ."""
    if len(set(all_gather(value))) > 1:
        raise UserError(message, shared=True)


def share_error(message):
    """The message to print for an error of this rank, and whether rank 0 prints it for all."""
    if not dist.is_initialized():
        return message, True
    if _setting_up:
        try:  # the other ranks wait in the next `all_gather`: end them too
            all_gather(None, message)
        except UserError as error:
            return str(error), True
        except RuntimeError:  # another process has died
            pass
    return f"rank {rank()}: {message}", False


def finish_setup(device):
    """Wait for all ranks. From here on they exchange tensors on their devices."""
    global _setting_up, _gpu_group
    all_gather("ready")
    if world_size() > 1 and device.type == "cuda":
        _gpu_group = dist.new_group(backend="nccl")
    _setting_up = False


def replicate(model):
    """The model with gradients averaged over the processes, if there are several."""
    if world_size() == 1:
        return model
    if _gpu_group:  # SyncBatchNorm does not run on CPUs
        model = SyncBatchNorm.convert_sync_batchnorm(model, _gpu_group)
    return DistributedDataParallel(model, process_group=_gpu_group)


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_gpu_group)
    return tensor


def broadcast_buffers(model):
    """Copy rank 0's buffers to all: between steps each process has its own running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0, group=_gpu_group)


def abort():
    """Cancel pending collectives: ranks may stop at different steps, and a GPU would wait."""
    if world_size() > 1:
        group = _gpu_group or dist.group.WORLD
        if not hasattr(group, "abort"):  # torch 2.6: NCCL can be aborted, Gloo cannot
            group = group._get_backend(torch.device("cuda" if _gpu_group else "cpu"))
        getattr(group, "abort", lambda: None)()


def close():
    """Leave the process group. Only if all ranks do, so not after an error of a single rank."""
    if dist.is_initialized():
        # torch 2.6 hangs if one of Gloo's threads still needs the interpreter to free a tensor.
        time.sleep(0.1)
        dist.destroy_process_group()
