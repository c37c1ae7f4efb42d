"""The CUDA path without a GPU, on fake tensors: these have a shape and a device, but no values.

Operations on tensors of different devices fail as on a GPU, except that indices and tensors
without dimensions may be on the CPU. What needs values or a driver is replaced: moving a model,
the backward pass (zero gradients), SGD's step, the metrics, and saving.
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
from training import checkpoint as checkpoints
from training import metrics, plots
from training.metrics import TRAIN_METRICS
from training.run import Run

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ < "2.11",
    reason="needs torch 2.11 or newer with CUDA support; 2.6 needs a driver even for fake tensors",
)
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
METRICS = [*TRAIN_METRICS, "both_accuracy", "consistency"]
EACH_RECIPE = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """Makes every new tensor a fake one; there is a GPU that supports bf16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with FakeTensorMode():
        yield


def devices(values):
    """The devices of all tensors among the values."""
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def build_on(device, recipe):
    """A model built on a device, because fake weights cannot be moved."""
    with device:
        return build_model(recipe.encoder, recipe.head, recipe.members)


def zero_gradients(parameters):
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def fake_mnist():
    sets = []
    for count in (12_000, 1_000):
        data, targets = torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count).long()
        sets.append(SimpleNamespace(data=data, targets=targets))
    return SimpleNamespace(name="mnist", train=sets[0], test=sets[1])


@EACH_RECIPE
def test_fake_dataset_is_on_the_gpu(name):
    recipe, flags = RECIPES[name], SimpleNamespace(seed=0, dry_run=False)
    train_set, eval_sets = train.make_datasets(fake_mnist(), recipe, flags, GPU)
    train_set.set_epoch(2)
    for part in (train_set, *eval_sets.values()):
        order = part.order()
        tensors = [part.images, part.digits, part.addends, part.matrices, order]
        assert devices([*tensors, part.normalized(order[:3])]) == {GPU}
    assert (train_set.matrices is None) == (recipe.affine is None)
    indices = train_set.batches(recipe.batch_size)[0]
    batch = train_set.batch(indices)
    assert devices([indices, *batch]) == {GPU} and len(batch[0]) == recipe.batch_size


@EACH_RECIPE
def test_fake_run_computes_on_the_gpu_and_reports_from_the_cpu(name, workdir, monkeypatch):
    """train.py with two epochs of three batches, and an evaluation after each."""
    parameters, features, logits, plotted, saved = [], [], [], [], []

    def move_model(model, device):
        model = build_on(device, RECIPES[name])
        parameters.extend(model.parameters())
        for member in model.members:
            member.encoder.register_forward_hook(lambda *call: features.append(call[-1]))
            member.head.register_forward_hook(lambda *call: logits.extend(call[-1]))
        return model

    def backward(loss):
        assert (loss.device, loss.dtype, loss.shape) == (GPU, torch.float32, ())
        zero_gradients(parameters)

    def epoch_metrics(steps, epoch, label_smoothing):
        assert (steps.device, steps.dtype, steps.shape) == (CPU, torch.float64, (3, 7))
        return dict.fromkeys(TRAIN_METRICS, 0.5), [(float(epoch), 0.5, 0.5)]

    def prediction_metrics(predictions, label_smoothing=0.0):
        assert devices(predictions) == {CPU}
        assert [part.shape for part in predictions[:3]] == [(200, 10, 10), (200, 10, 19), (200,)]
        return dict.fromkeys(METRICS, 0.5)

    def save_checkpoint(run, file):
        saved.append(run.model.state_dict())

    monkeypatch.setattr(train, "load_data", lambda *args: fake_mnist())
    monkeypatch.setattr(train, "move_model", move_model)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: None)
    monkeypatch.setattr(metrics, "epoch_metrics", epoch_metrics)
    monkeypatch.setattr(metrics.Predictions, "metrics", prediction_metrics)
    monkeypatch.setattr(metrics.Predictions, "mistakes", lambda *args: [])
    monkeypatch.setattr(plots, "run_figures", lambda *args: plotted.extend(args) or {})
    monkeypatch.setattr(Run, "save_checkpoint", save_checkpoint)
    assert train.main(["--recipe", name, "--device", "cuda", "--dry-run"]) == 0

    assert devices(parameters) == devices(features) == devices(logits) == {GPU}
    assert {output.dtype for output in features} == {torch.bfloat16}
    assert {output.dtype for output in logits} == {torch.float32}
    assert devices([*plotted, *plotted[2]]) == {CPU}
    results = json.loads(Path("runs", f"{name}-dry-run", "results.json").read_text())
    assert (results["device"], results["precision"]) == ("cuda:0", "bf16")
    assert devices(saved[-1].values()) == {GPU}


@pytest.mark.parametrize("saved_on, loaded_on", [(CPU, GPU), (GPU, CPU)])
def test_fake_optimizer_state_moves_to_the_device_of_the_weights(saved_on, loaded_on):
    recipe = RECIPES["default"]
    saved, loaded = (build_on(device, recipe) for device in (saved_on, loaded_on))
    optimizer, resumed = (train.make_optimizer(model, recipe) for model in (saved, loaded))
    zero_gradients(saved.parameters())
    optimizer.step()
    checkpoint = {"network": saved.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoints.restore(checkpoint, loaded, resumed)
    for parameter in loaded.parameters():
        assert devices([parameter, *resumed.state[parameter].values()]) == {loaded_on}
    zero_gradients(loaded.parameters())
    resumed.step()
