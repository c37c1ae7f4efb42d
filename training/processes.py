"""The processes that torchrun starts: their ranks, and what they exchange. Also works for one."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from training.console import rank


def connect():
    """Connect the processes, if torchrun has started this one: CPUs over Gloo, GPUs over NCCL."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))


def close():
    """Disconnect the processes; all must call it."""
    if dist.is_initialized():
        # torch 2.6 hangs if one of Gloo's threads still needs the interpreter to free a tensor.
        time.sleep(0.1)
        dist.destroy_process_group()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(function, *args):
    """Call a function on rank 0; returns its result on all ranks."""
    values = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def replicate(model):
    """The model with gradients averaged over the processes, if there are several."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:  # SyncBatchNorm does not run on CPUs
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)
