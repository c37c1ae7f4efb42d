"""Training and evaluation against plain loops, and checkpoints of models."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn.functional as F

import train
from dataset import MNISTSum
from handwriting.predictor import load_model
from model import build_model
from published.models import ConcatMLP
from recipes import RECIPES, Recipe, constant
from training.errors import UserError
from training.synthetic import synthetic_mnist

PROGRESS = SimpleNamespace(update=lambda: None)
FP32 = partial(torch.autocast, "cpu", enabled=False)
FLAGS = ["--recipe", "fast", "--batch-size", 300, "--device", "cpu", "--output-dir", "run"]
PLAIN = Recipe(
    description="",
    encoder=conftest.toy,
    head=ConcatMLP,
    epochs=1,
    batch_size=4,
    lr=0.05,
    optimizer="SGD",
    schedule=constant,
    loss_weight=0.5,
    label_smoothing=0.1,
)


@pytest.fixture(scope="module")
def dataset():
    return MNISTSum(synthetic_mnist("train", 10), "train")


def build(recipe):
    torch.manual_seed(3)
    model = build_model(recipe.encoder, recipe.head)
    return model, train.make_optimizer(model, recipe)


def test_an_epoch_is_that_of_a_plain_loop(dataset):
    (model, optimizer), (reference, _) = build(PLAIN), build(PLAIN)
    steps = train.train_epoch(model, optimizer, dataset, PLAIN, 1, FP32, PROGRESS)
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    rows = []
    for batch in dataset.order().split(4):
        image, digit, addend, total = dataset.batch(batch)
        digit_log_probs, sum_log_probs = reference(image, addend)
        outputs = [(digit_log_probs, digit), (sum_log_probs, total)]
        smoothed = [F.cross_entropy(*output, label_smoothing=0.1) for output in outputs]
        row = [*(F.cross_entropy(*output) for output in outputs), *smoothed]
        row += [(output.argmax(1) == label).float().mean() for output, label in outputs]
        rows.append([len(batch) * value.item() for value in row] + [len(batch)])
        reference_optimizer.zero_grad()
        (0.5 * sum(smoothed)).backward()
        reference_optimizer.step()
    assert [row[-1] for row in rows] == [4, 4, 2]
    torch.testing.assert_close(steps, torch.tensor(rows).double())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_learning_rate_follows_the_schedule_over_all_epochs(dataset):
    rates = []
    recipe = replace(PLAIN, epochs=5, schedule=lambda step, total: rates.append((step, total)) or 0)
    model, optimizer = build(recipe)
    before = [parameter.clone() for parameter in model.parameters()]
    train.train_epoch(model, optimizer, dataset, recipe, 4, FP32, PROGRESS)
    assert rates == [(9, 15), (10, 15), (11, 15)]
    assert all(map(torch.equal, before, model.parameters()))  # the learning rate is 0


def test_evaluation_pairs_each_image_with_every_addend(dataset, monkeypatch):
    model, _ = build(PLAIN)
    monkeypatch.setattr(train, "EVAL_BATCH", 3)  # 10 images: the last batch is not full
    predictions = train.evaluate(model, dataset, FP32)
    assert torch.equal(predictions.digits, dataset.digits)
    for index in (0, 9):
        for addend in (0, 7):
            image = dataset.normalized(torch.tensor([index]))
            with torch.no_grad():
                digit, total = model(image, F.one_hot(torch.tensor([addend]), 10).float())
            ours = (
                predictions.digit_log_probs[index, addend],
                predictions.sum_log_probs[index, addend],
            )
            torch.testing.assert_close(ours, (digit[0], total[0]), atol=1e-5, rtol=1e-4)


def test_evaluation_does_not_change_the_model(dataset):
    model, _ = build(RECIPES["fast"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.evaluate(model, dataset, FP32)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_model_of_a_run_is_loaded_from_its_directory_or_checkpoint(job):
    job(*FLAGS)
    for path in ("run", "run/last.pt"):
        model, checkpoint = load_model(path)
        assert not model.training and len(checkpoint["history"]) == 1
        for name, value in model.state_dict().items():
            assert torch.equal(checkpoint["network"][name], value)
    test_set = MNISTSum(synthetic_mnist("test", 200), "test")
    metrics = train.evaluate(model, test_set, FP32).metrics()
    for name in ("digit_accuracy", "sum_accuracy"):
        assert metrics[name] == pytest.approx(checkpoint["history"][0][f"test_{name}"], abs=0.01)


def test_a_model_is_not_loaded_if_the_recipe_has_another_network_now(job, monkeypatch):
    def wider():
        return torch.nn.Sequential(encoder(), torch.nn.Linear(256, 300))

    encoder = RECIPES["fast"].encoder
    wider.__name__ = encoder.__name__
    job(*FLAGS)
    for change in ({"encoder": conftest.toy}, {"head": ConcatMLP}, {"members": 2}):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="^[^\n]*$"):
            patch.setitem(RECIPES, "fast", replace(RECIPES["fast"], **change))
            load_model("run")
    monkeypatch.setitem(RECIPES, "fast", replace(RECIPES["fast"], encoder=wider))
    with pytest.raises(UserError, match="^[^\n]*$"):
        load_model("run")
    monkeypatch.delitem(RECIPES, "fast")
    with pytest.raises(UserError, match="^[^\n]*$"):
        load_model("run")


def test_a_run_from_a_gpu_continues_on_the_cpu(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:  # files written on a GPU name it for each tensor
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        assert job(*FLAGS)[0] == 0
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load("run/last.pt")
    model, _ = load_model("run")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert job("--resume", "run", "--epochs", 2)[0] == 0
    assert job("--resume", "run", "--eval-only")[0] == 0
