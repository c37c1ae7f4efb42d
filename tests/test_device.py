"""The device that is taken, as far as a machine without it can show."""

import pytest
import torch

from device import DeviceError, pick_engine


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which no more is there than what is asked before the first tensor."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return taken


def use(monkeypatch, **place):
    """Let torchrun tell this process of its place."""
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("wish, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_taken_as_the_current_one(gpus, wish, index):
    engine = pick_engine(wish)
    assert (engine.device, engine.fell_back) == (torch.device("cuda", index), False)
    assert gpus == [index] and engine.precision == "bf16"


def test_each_process_takes_its_own_gpu(gpus, monkeypatch):
    use(monkeypatch, RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert pick_engine("auto").device == torch.device("cuda:1")
    assert gpus == [1]


def test_processes_without_a_gpu_for_each_take_the_cpu(gpus, monkeypatch):
    use(monkeypatch, RANK=0, WORLD_SIZE=3, LOCAL_RANK=0, LOCAL_WORLD_SIZE=3)
    engine = pick_engine("cuda")
    assert engine.device.type == "cpu" and engine.fell_back and "fewer GPUs" in engine.reason


def test_a_gpu_without_room_gives_way_to_the_cpu_but_not_in_one_process_of_several(
    gpus, monkeypatch
):
    def full(*size, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    assert pick_engine("cuda").device.type == "cpu"
    use(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    with pytest.raises(DeviceError, match="cuda:1 failed: out of memory; "):
        pick_engine("cuda")
