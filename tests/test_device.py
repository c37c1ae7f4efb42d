"""The choice of device and precision, as far as a machine without a GPU can show it."""

import pytest
import torch

from training import device
from training.console import UserError
from training.device import has_fast_bf16, pick_device

CPU = torch.device("cpu")


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


@pytest.fixture
def machine(monkeypatch):
    """Makes torch find GPUs, and this one of several processes; returns the GPUs made current."""

    def imitate(gpus, error="CUDA error: invalid device ordinal", rank=0, processes=1):
        def zeros(*size, device):
            if device.startswith("cuda"):
                if not (int(device[-1]) < gpus and error.startswith("CUDA")):
                    raise RuntimeError(f"{error}\nCUDA kernel errors might be reported later")
                device = "cpu"
            return torch_zeros(*size, device=device)

        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(device, "world_size", lambda: processes)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch, "zeros", zeros)
        return current

    current, torch_zeros = [], torch.zeros
    return imitate


def test_a_gpu_is_used_and_made_the_current_one(machine):
    for wish, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        current = machine(gpus=2)
        assert pick(wish) == current.pop() == torch.device("cuda", index)


@pytest.mark.parametrize("processes", [1, 2])
def test_without_a_gpu_auto_takes_the_cpu_silently_and_cuda_with_a_warning(
    machine, capsys, processes
):
    machine(gpus=0, processes=processes)
    assert pick("auto") == CPU and capsys.readouterr().err == ""
    for wish in ("cuda", "cuda:1", "mps"):
        assert pick(wish) == CPU
        assert capsys.readouterr().err.startswith(f"warning: {wish[:4]}")


def test_a_gpu_that_fails_is_replaced_by_the_cpu_but_not_for_one_of_several_processes(
    machine, capsys
):
    machine(gpus=2, error="no kernel image is available")
    assert pick("cuda") == CPU
    err = capsys.readouterr().err
    assert err == "warning: cuda:0 failed: no kernel image is available: running on the CPU\n"
    machine(gpus=2, error="no kernel image is available", rank=1, processes=2)
    with pytest.raises(UserError, match="cuda:1 failed: no kernel image.*--device cpu"):
        pick("cuda")


@pytest.mark.parametrize("wish", ["auto", "cuda", "cuda:1"])
def test_each_process_uses_its_own_gpu_and_fewer_gpus_than_processes_are_an_error(machine, wish):
    for rank in (0, 1):
        machine(gpus=2, rank=rank, processes=3)
        assert pick(wish) == torch.device("cuda", rank)
    machine(gpus=2, rank=2, processes=3)
    with pytest.raises(UserError, match="cuda:2 failed: .*--device cpu"):
        pick(wish)
    assert pick("cpu") == CPU


def test_bf16_is_used_if_the_hardware_has_it(monkeypatch):
    for known in ({}, {"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda k=known: k, raising=False)
        assert pick_device("cpu", "auto") == (CPU, "bf16" if known else "fp32")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of an older torch
    assert pick_device("cpu", "auto")[1] == "fp32" and pick_device("cpu", "bf16")[1] == "bf16"
    for real in (True, False):  # a GPU may emulate it
        supported = lambda including_emulation=True, real=real: real or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert has_fast_bf16(torch.device("cuda:0")) == real


def test_fp32_is_not_rounded_to_tf32_and_deterministic_is_passed_on(machine):
    machine(gpus=1)
    for deterministic in (False, True):
        pick_device("cuda", "fp32", deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
