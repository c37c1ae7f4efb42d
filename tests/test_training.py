"""Training and evaluation against plain loops."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn.functional as F

import train
from dataset import MNISTSum
from model import build_model
from published.models import ConcatMLP
from recipes import RECIPES, Recipe
from synthetic import synthetic_mnist
from training.recipe import constant

PROGRESS = SimpleNamespace(update=lambda: None)
FP32 = partial(torch.autocast, "cpu", enabled=False)
PLAIN = Recipe(
    description="",
    encoder=conftest.toy,
    head=ConcatMLP,
    epochs=1,
    batch_size=4,
    lr=0.05,
    optimizer="SGD",
    momentum=0.5,
    weight_decay=0.1,
    schedule=constant,
    digit_weight=0.5,
    sum_weight=2.0,
    label_smoothing=0.1,
)


@pytest.fixture(scope="module")
def dataset():
    return MNISTSum(synthetic_mnist("train", 10), "train")


def build(recipe):
    torch.manual_seed(3)
    model = build_model(recipe.encoder, recipe.head)
    return model, train.make_optimizer(model, recipe)


def smooth(classes):
    """A smoothed label."""
    return 0.9 * torch.eye(classes)[0] + 0.1 / classes


def test_an_epoch_is_that_of_a_plain_loop(dataset):
    (model, optimizer), (reference, _) = build(PLAIN), build(PLAIN)
    steps = train.train_epoch(model, optimizer, dataset, PLAIN, 1, FP32, PROGRESS)
    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}
    reference_optimizer = torch.optim.SGD(reference.parameters(), **options)
    rows = []
    for batch in dataset.batches(4):
        image, digit, addend, total = dataset.batch(batch)
        digit_log_probs, sum_log_probs = reference(image, addend)
        outputs = [(digit_log_probs, digit), (sum_log_probs, total)]
        smoothed = [F.cross_entropy(*output, label_smoothing=0.1) for output in outputs]
        lowest = [F.cross_entropy((s / s.sum()).log(), s) for s in map(smooth, (10, 19))]
        row = [loss - low for loss, low in zip(smoothed, lowest, strict=True)] + [
            (output.argmax(1) == label).float().mean() for output, label in outputs
        ]
        rows.append([len(batch) * value.item() for value in row] + [len(batch)])
        reference_optimizer.zero_grad()
        (0.5 * smoothed[0] + 2 * smoothed[1]).backward()
        reference_optimizer.step()
    assert [row[-1] for row in rows] == [4, 4, 2]
    torch.testing.assert_close(steps.float(), torch.tensor(rows))
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


def test_evaluation_pairs_each_image_with_every_addend_and_does_not_change_the_model(
    dataset, monkeypatch
):
    model, _ = build(RECIPES["fast"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(train, "EVAL_BATCH", 3)  # 10 images: the last batch is not full
    predictions = train.evaluate(model, {"test": dataset}, FP32, 0.0, None)["test"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(predictions.digits, dataset.digits)
    for index, addend in ((0, 0), (0, 7), (9, 0), (9, 7)):
        image = dataset.normalized(torch.tensor([index]))
        with torch.no_grad():
            expected = model(image, F.one_hot(torch.tensor([addend]), 10).float())
        for ours, theirs in zip(predictions[:2], expected, strict=True):
            torch.testing.assert_close(ours[index, addend], theirs[0], atol=1e-5, rtol=1e-4)
