"""Learning, against the same thing written out plainly."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mnist
import model
from dataset import MNISTSum
from device import NEVER, Engine
from learner import Learner, evaluate, restore, smoothed, train_epoch
from recipes import Recipe, constant
from rundir import RunError

pytestmark = pytest.mark.usefixtures("toy_recipe")
BAR = SimpleNamespace(update=lambda: None, disable=True)
ENGINE = Engine(torch.device("cpu"))
PLAIN = Recipe(
    about="",
    encoder="toy",
    join="concat-mlp",
    epochs=1,
    batch_size=4,
    lr=0.05,
    optimizer="SGD",
    schedule=constant,
    digit_weight=0.5,
    sum_weight=2.0,
    label_smoothing=0.1,
)


@pytest.fixture(scope="module")
def dataset():
    return MNISTSum(mnist.stand_in("train", 10), "train")


def test_two_steps_are_those_of_a_plain_loop(dataset):
    learner = Learner.build(PLAIN, ENGINE, seed=3)
    torch.manual_seed(3)
    network = ENGINE.place(model.build(PLAIN.encoder, PLAIN.join))
    optimizer = torch.optim.SGD(network.parameters(), lr=PLAIN.lr)
    losses = []
    for _, (image, digit, addend, total) in dataset.batches(4):
        digit_log_probs, sum_log_probs = network(image, addend)
        losses.append([F.cross_entropy(digit_log_probs, digit).item()])
        losses[-1].append(F.cross_entropy(sum_log_probs, total).item())
        loss = 0.5 * F.cross_entropy(digit_log_probs, digit, label_smoothing=0.1)
        loss = loss + 2.0 * F.cross_entropy(sum_log_probs, total, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    record = train_epoch(learner, dataset, 0, 3, NEVER, BAR)
    assert record[:, 4].tolist() == [4, 4, 2]
    torch.testing.assert_close(record[:, :2], torch.tensor(losses).double())
    for ours, theirs in zip(learner.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_is_that_of_cross_entropy(smoothing):
    log_probs = torch.randn(7, 19, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    target = torch.arange(7)
    ours = smoothed(
        F.nll_loss(log_probs, target), log_probs, 7, SimpleNamespace(label_smoothing=smoothing)
    )
    theirs = F.cross_entropy(log_probs, target, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


def test_evaluation_pairs_each_image_with_every_addend(dataset, monkeypatch):
    learner = Learner.build(PLAIN, ENGINE, seed=0)
    monkeypatch.setattr("learner.EVAL_BATCH", 3)  # 10 images: the last batch is not full
    predictions = evaluate(learner, dataset)
    assert torch.equal(predictions.digits, dataset.digits)
    learner.network.eval()
    for index in (0, 9):
        for addend in (0, 7):
            one_hot = F.one_hot(torch.tensor([addend]), 10).float()
            image = dataset.normalised(torch.tensor([index]))
            with torch.no_grad():
                digit, total = learner.network(image, one_hot)
            found = (
                predictions.digit_log_probs[index, addend],
                predictions.sum_log_probs[index, addend],
            )
            torch.testing.assert_close(found, (digit[0], total[0]), atol=1e-5, rtol=1e-4)


def test_what_is_restored_is_the_network_that_was_trained(dataset):
    recipe = replace(PLAIN, encoder="small")
    learner = Learner.build(recipe, ENGINE, seed=0)
    first = {name: value.clone() for name, value in learner.network.state_dict().items()}
    train_epoch(learner, dataset, 0, 3, NEVER, BAR)
    restored = restore({"recipe": recipe.as_plain(), **learner.state()})
    assert not restored.training
    for name, value in learner.network.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
        assert not torch.equal(first[name], value), name


def test_a_state_of_another_network_is_refused():
    learner = Learner.build(PLAIN, ENGINE, seed=0)
    other = Learner.build(replace(PLAIN, encoder="small"), ENGINE, seed=0)
    with pytest.raises(RunError, match="another network"):
        learner.load(other.state())
