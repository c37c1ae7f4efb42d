"""The choice of device and precision, as far as a machine without a GPU can show it."""

import os
import re
from pathlib import Path

import pytest
import test_processes
import torch

from support import distributed
from support.device import pick_device, pick_precision
from support.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ZEROS = torch.zeros
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch):
    """What `pick_device` changes in torch and in the environment is undone after a test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def set_gpus(patch, count):
    """Make torch find so many GPUs; returns a list of those that are made the current one."""
    current = []

    def zeros(*size, device=None, **options):
        if not count and str(device).startswith("cuda"):
            raise AssertionError("Torch not compiled with CUDA enabled")
        return ZEROS(*size, **options)

    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "set_device", current.append)
    patch.setattr(torch, "zeros", zeros)
    return current


@pytest.fixture
def gpus(monkeypatch):
    return set_gpus(monkeypatch, 2)


def set_process(monkeypatch, rank, processes, others=()):
    """Make this one of several processes on a machine; the others gather the values `others`."""
    for name, value in {"RANK": rank, "WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, str(value))
        monkeypatch.setenv(f"LOCAL_{name}", str(value))
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, *(others or [value])])


@pytest.mark.parametrize("wish, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_used_and_made_the_current_one(gpus, wish, index):
    assert pick_device(wish)[0] == torch.device("cuda", index)
    assert gpus == [torch.device("cuda", index)]


def test_without_a_gpu_auto_takes_the_cpu_silently_and_cuda_says_why(monkeypatch, capsys):
    set_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto")[0] == CPU
    assert capsys.readouterr().err == ""
    assert pick_device("cuda")[0] == CPU
    assert "cuda:0 failed: " in capsys.readouterr().err


class Unusable:
    def __add__(self, other):
        raise RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported later")


def out_of_memory(size, device):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    "zeros, cause", [(out_of_memory, "out of memory"), (lambda size, device: Unusable(), NO_KERNEL)]
)
def test_a_gpu_that_fails_is_replaced_by_the_cpu_but_not_for_one_of_several_processes(
    gpus, monkeypatch, capsys, zeros, cause
):
    monkeypatch.setattr(torch, "zeros", zeros)
    chosen, reason = pick_device("cuda")
    assert chosen == CPU and reason == f"cuda:0 failed: {cause}"
    assert capsys.readouterr().err == f"warning: {reason}; running on the CPU\n"
    set_process(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=f"cuda:1 failed: {cause}.*--device cpu"):
        pick_device("cuda")


def test_each_process_uses_its_own_gpu(gpus, monkeypatch):
    set_process(monkeypatch, 1, 2)
    assert pick_device("auto")[0] == torch.device("cuda:1")
    assert gpus == [torch.device("cuda:1")]


@pytest.mark.parametrize("wish", ["auto", "cuda", "cuda:1"])
def test_fewer_gpus_than_processes_are_an_error(gpus, monkeypatch, wish):
    set_process(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="3 processes on this machine, but 2 GPUs.*--device cpu"):
        pick_device(wish)
    assert pick_device("cpu")[0] == CPU


@pytest.mark.parametrize("count, others", [(2, ["cpu"]), (0, ["cuda"])])
def test_gpus_for_only_some_of_the_processes_are_an_error(monkeypatch, count, others):
    set_gpus(monkeypatch, count)
    set_process(monkeypatch, 0, 2, others)
    with pytest.raises(UserError, match="--device cpu") as error:
        pick_device("auto")
    assert error.value.shared  # every process finds the same


def test_processes_without_any_gpu_use_the_cpu(monkeypatch):
    set_gpus(monkeypatch, 0)
    set_process(monkeypatch, 0, 2, ["cpu"])
    assert pick_device("cuda")[0] == pick_device("auto")[0] == CPU


two, workdir = test_processes.two, test_processes.workdir


def share_a_gpu(rank):
    set_gpus(pytest.MonkeyPatch(), 1)


def lack_a_gpu(rank):
    """Rank 1 runs on another machine, which has no GPU."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    set_gpus(pytest.MonkeyPatch(), 1 - rank)


@pytest.mark.parametrize("fault", [share_a_gpu, lack_a_gpu])
def test_two_real_processes_agree_that_their_gpus_do_not_suffice(two, fault):
    jobs = two("--device", "auto", fault=fault)
    (first, _, err), (second, _, nothing) = [job.end() for job in jobs]
    assert (first, second, nothing) == (1, 1, "")
    assert re.fullmatch("error: [^\n]* GPU[^\n]*--device cpu\n", err), err
    assert not Path("run").exists()


CAPABILITIES = [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")]


@pytest.mark.parametrize("capabilities, precision", CAPABILITIES)
def test_a_cpu_uses_bf16_if_it_is_fast(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precision("auto", CPU) == precision


@pytest.mark.parametrize("query, precision", [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_an_old_torch_is_asked_for_bf16_if_it_can_tell(monkeypatch, query, precision):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    if query is not None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: query, raising=False)
    assert pick_precision("auto", CPU) == precision


@pytest.mark.parametrize("supported, precision", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_uses_bf16_unless_it_would_be_emulated(monkeypatch, supported, precision):
    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert pick_precision("auto", GPU) == precision


def test_a_requested_precision_is_used_and_must_be_the_same_everywhere(monkeypatch):
    assert pick_precision("bf16", CPU) == "bf16" and pick_precision("fp32", GPU) == "fp32"
    set_process(monkeypatch, 0, 2, ["fp32"])
    assert pick_precision("fp32", CPU) == "fp32"
    with pytest.raises(UserError, match="--precision fp32"):
        pick_precision("bf16", CPU)


def test_fp32_is_not_rounded_to_tf32_and_deterministic_is_passed_on():
    for deterministic in (True, False):
        pick_device("cpu", deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
