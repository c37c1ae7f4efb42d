"""The CUDA path without a GPU, on fake tensors: these have a shape and a device, but no values.

Operations on tensors of different devices fail as on a GPU, except that indices and tensors
without dimensions may be on the CPU. What needs values or a driver is replaced: moving a model,
the backward pass (zero gradients), the optimizer's step, the metrics, and saving.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import train
from model import build_model
from recipes import RECIPES
from training import plots
from training.checkpoint import restore
from training.metrics import TRAIN_METRICS, Predictions
from training.run import Run

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ < "2.11",
    reason="needs torch 2.11 or newer with CUDA support; 2.6 needs a driver even for fake tensors",
)
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """Makes every new tensor a fake one; there is a GPU that supports bf16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with FakeTensorMode():
        yield


def devices(values):
    """The devices of all tensors among the values."""
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def build_on(device, recipe):
    """A model built on a device, because fake weights cannot be moved."""
    with device:
        return build_model(recipe.encoder, recipe.head)


def zero_gradients(parameters):
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def fake_mnist(*args):
    data, targets = torch.zeros(12_000, 28, 28, dtype=torch.uint8), torch.zeros(12_000).long()
    part = SimpleNamespace(data=data, targets=targets)
    return SimpleNamespace(name="mnist", train=part, test=part)


# One recipe for each encoder and each head.
NAMES = (
    "default fast tiny outer-product concat-mlp shared-trunk concat-linear-fixed added added-fixed"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_fake_run_computes_on_the_gpu_and_reports_from_the_cpu(name, workdir, monkeypatch):
    """train.py with two epochs of three batches, and an evaluation after each."""
    computed, features, logits, reported = [], [], [], []

    def move_model(model, device):
        model = build_on(device, RECIPES[name])
        computed.extend(model.parameters())
        model.encoder.register_forward_pre_hook(lambda module, args: computed.extend(args))
        model.encoder.register_forward_hook(lambda *call: features.append(call[-1]))
        model.head.register_forward_hook(lambda *call: logits.extend(call[-1]))
        return model

    def item(tensor):
        assert tensor.device == CPU  # else the host would wait for the GPU
        return 0.0

    def train_metrics(steps, epoch):
        reported.append(steps)
        return {f"train_{metric}": 0.5 for metric in TRAIN_METRICS}, []

    def eval_metrics(predictions):
        reported.extend(predictions)
        return dict.fromkeys([*TRAIN_METRICS, "both_accuracy", "consistency"], 0.5)

    monkeypatch.setattr(train, "load_data", fake_mnist)
    monkeypatch.setattr(train, "draw_unseen", lambda *args: torch.zeros(10, 10).bool())
    monkeypatch.setattr(train, "move_model", move_model)
    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: computed.append(loss))
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    monkeypatch.setattr(train, "train_metrics", train_metrics)
    monkeypatch.setattr(Predictions, "metrics", eval_metrics)
    monkeypatch.setattr(Predictions, "mistakes", lambda *args: [])
    monkeypatch.setattr(plots, "run_figures", lambda *args: reported.extend(args) or [])
    monkeypatch.setattr(Run, "save_epoch", lambda *args: None)
    flags = "--device cuda --dry-run --epochs 2 --unseen-pairs 30 --quiet"
    assert train.main(["--recipe", name, *flags.split()]) == 0

    assert devices(computed) == devices(features) == devices(logits) == {GPU}
    assert {output.dtype for output in features} == {torch.bfloat16}
    assert {output.dtype for output in logits} == {torch.float32}
    assert devices(reported) == {CPU}
    results = json.loads(Path("runs", f"{name}-dry-run", "results.json").read_text())
    assert (results["device"], results["flags"]["precision"]) == ("cuda:0", "bf16")


@pytest.mark.parametrize("saved_on, loaded_on", [(CPU, GPU), (GPU, CPU)])
def test_fake_optimizer_state_moves_to_the_device_of_the_weights(saved_on, loaded_on):
    recipe = RECIPES["default"]
    saved, loaded = (build_on(device, recipe) for device in (saved_on, loaded_on))
    optimizer, resumed = (train.make_optimizer(model, recipe) for model in (saved, loaded))
    zero_gradients(saved.parameters())
    optimizer.step()
    checkpoint = {"network": saved.state_dict(), "optimizer": optimizer.state_dict()}
    restore(checkpoint, loaded, resumed)
    for parameter in loaded.parameters():
        assert devices([parameter, *resumed.state[parameter].values()]) == {loaded_on}
    zero_gradients(loaded.parameters())
    resumed.step()
