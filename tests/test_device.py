"""The choice of device and precision, as far as a machine without a GPU can show it."""

import pytest
import torch

from training import device
from training.console import UserError
from training.device import has_fast_bf16, pick_device

CPU = torch.device("cpu")
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


def pick(name):
    return pick_device(name, "fp32")[0]


def set_gpus(monkeypatch, count):
    """Make torch find so many GPUs; returns a list of those that are made the current one."""
    current = []

    def zeros(*size, device=None, **options):
        if torch.device(device or "cpu").type == "cuda" and torch.device(device).index >= count:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be")
        return ZEROS(*size, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", zeros)
    return current


def set_process(monkeypatch, rank, processes):
    """Make this one of several processes."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(device, "world_size", lambda: processes)


@pytest.mark.parametrize("wish, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_used_and_made_the_current_one(monkeypatch, wish, index):
    current = set_gpus(monkeypatch, 2)
    assert pick(wish) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


@pytest.mark.parametrize("processes", [1, 2])
def test_without_a_gpu_auto_takes_the_cpu_silently_and_cuda_with_a_warning(
    monkeypatch, capsys, processes
):
    set_gpus(monkeypatch, 0)
    set_process(monkeypatch, 0, processes)
    assert pick("auto") == CPU and capsys.readouterr().err == ""
    for wish in ("cuda", "cuda:1", "mps"):
        assert pick(wish) == CPU
        assert capsys.readouterr().err.startswith("warning: no ")


class Unusable:
    def __add__(self, other):
        raise RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported later")


def out_of_memory(size, device):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    "zeros, cause", [(out_of_memory, "out of memory"), (lambda size, device: Unusable(), NO_KERNEL)]
)
def test_a_gpu_that_fails_is_replaced_by_the_cpu_but_not_for_one_of_several_processes(
    monkeypatch, capsys, zeros, cause
):
    set_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert pick("cuda") == CPU
    assert capsys.readouterr().err == f"warning: cuda:0 failed: {cause}: running on the CPU\n"
    set_process(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=f"cuda:1 failed: {cause}.*--device cpu"):
        pick("cuda")


@pytest.mark.parametrize("wish", ["auto", "cuda", "cuda:1"])
def test_each_process_uses_its_own_gpu_and_fewer_gpus_than_processes_are_an_error(
    monkeypatch, wish
):
    set_gpus(monkeypatch, 2)
    for rank in (0, 1):
        set_process(monkeypatch, rank, 3)
        assert pick(wish) == torch.device("cuda", rank)
    set_process(monkeypatch, 2, 3)
    with pytest.raises(UserError, match="cuda:2 failed: .*--device cpu"):
        pick(wish)
    assert pick("cpu") == CPU


CAPABILITIES = [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)]


@pytest.mark.parametrize("capabilities, fast", CAPABILITIES)
def test_a_cpu_uses_bf16_if_it_is_fast(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_device("cpu", "auto") == (CPU, "bf16" if fast else "fp32")
    assert pick_device("cpu", "bf16") == (CPU, "bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of an older torch
    assert pick_device("cpu", "auto") == (CPU, "fp32")


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_uses_bf16_unless_it_would_be_emulated(monkeypatch, supported):
    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert has_fast_bf16(torch.device("cuda:0")) == supported


def test_fp32_is_not_rounded_to_tf32_and_deterministic_is_passed_on(monkeypatch):
    set_gpus(monkeypatch, 1)
    for deterministic in (False, True):
        pick_device("cuda", "fp32", deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
