"""Training and evaluation on a GPU without one, on fake tensors, which have a device but no values.

Operations on tensors of different devices fail as on a GPU, except that indices and tensors
without dimensions may be on the CPU. What needs a driver is replaced: the backward pass and the
optimizer's step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import train
from dataset import MNISTSum
from model import build_model
from recipes import RECIPES

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ < "2.11",
    reason="needs torch 2.11 or newer with CUDA support; 2.6 needs a driver even for fake tensors",
)
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
AFFINE = 10, 0.1, 0.1, 10
# One recipe for each encoder and each head.
NAMES = (
    "default fast tiny outer-product concat-mlp shared-trunk concat-linear-fixed added added-fixed"
)


def item(tensor):
    assert tensor.device == CPU  # else the host would wait for the GPU
    return 0.0


def devices(tensors):
    return {tensor.device for tensor in tensors}


@pytest.mark.parametrize("name", NAMES.split())
def test_all_is_computed_on_the_gpu_and_only_the_results_come_back(name, monkeypatch):
    recipe, computed, features, logits = RECIPES[name], [], [], []
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: computed.append(loss))
    monkeypatch.setattr(getattr(torch.optim, recipe.optimizer), "step", lambda self: None)
    with FakeTensorMode():
        data = torch.zeros(600, 28, 28, dtype=torch.uint8)
        mnist = SimpleNamespace(data=data, targets=torch.zeros(600).long())
        dataset = MNISTSum(mnist, "train", affine=AFFINE, device=GPU)
        with GPU:  # fake weights cannot be moved
            model = build_model(recipe.encoder, recipe.head)
        model.encoder.register_forward_pre_hook(lambda module, args: computed.extend(args))
        model.encoder.register_forward_hook(lambda *call: features.append(call[-1]))
        model.head.register_forward_hook(lambda *call: logits.extend(call[-1]))
        autocast = partial(torch.autocast, "cuda", torch.bfloat16)
        optimizer = train.make_optimizer(model, recipe)
        progress = SimpleNamespace(update=lambda: None)
        steps = train.train_epoch(model, optimizer, dataset, recipe, 1, autocast, progress)
        predictions = train.evaluate(model, {"test": dataset}, autocast, 0.0, None)["test"]
    assert devices([*computed, *features, *logits, *model.parameters()]) == {GPU}
    assert {output.dtype for output in features} == {torch.bfloat16}
    assert {output.dtype for output in logits} == {torch.float32}
    assert devices([steps, *predictions[:3]]) == {CPU}
