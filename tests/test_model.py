"""The networks: shapes, gradients, and what the heads can represent; and the schedules."""

import math

import pytest
import torch
import torch.nn.functional as F

import model
from published import models as published
from recipes import RECIPES
from training.recipe import constant, one_cycle

OURS = [RECIPES[name].encoder for name in ("fast", "default", "tiny")]
ENCODERS = [*OURS, published.seven_conv, published.six_conv]
ENCODERS += [published.two_conv, published.two_conv_fc]
HEADS = [model.OuterProduct, *(recipe.head for recipe in RECIPES.values())]
HEADS = list(dict.fromkeys(HEADS))


def batch(count=4):
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(count, 1, 28, 28, generator=draw)
    addend = F.one_hot(torch.randint(10, (count,), generator=draw), 10).float()
    return image, addend


def build(encoder, head):
    torch.manual_seed(0)
    return model.build_model(encoder, head)


def assert_log_probabilities(predictions):
    """They are those of the digits and sums of four images."""
    for log_probs, classes in zip(predictions, (10, 19), strict=True):
        assert log_probs.shape == (4, classes) and log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(4))


# An encoder never sees the addend, and a head sees only features and addend: what follows holds
# for all pairs if it holds for each encoder with one head, and for each head with one encoder.
EACH = [(encoder, model.OuterProduct) for encoder in ENCODERS]
EACH += [(OURS[0], head) for head in HEADS[1:]]
EACH = pytest.mark.parametrize("encoder, head", EACH, ids=lambda part: part.__name__)


@EACH
def test_predictions_are_log_probabilities_and_the_sum_loss_reaches_the_encoder(encoder, head):
    network = build(encoder, head)
    predictions = network(*batch())
    assert_log_probabilities(predictions)
    F.nll_loss(predictions[1], torch.arange(4)).backward()
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    assert first.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert_log_probabilities(network(*batch()))


@EACH
def test_predictions_depend_on_the_addend_but_not_on_the_batch_or_when_the_image_was_encoded(
    encoder, head
):
    network = build(encoder, head).eval()
    image, addend = batch()
    together = network(image, addend)
    features = network.encoder(image)
    single = network(image[3:4], addend[3:4])
    rows = torch.arange(4), addend.argmax(dim=1)
    outputs = network.classify(features, addend), network.classify_all(features), single, together
    for ours, every, one, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(every[rows], theirs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one, theirs[3:4], atol=1e-5, rtol=1e-4)
    _, total = network.classify_all(features)
    assert (total[0, 1:] - total[0, :1]).abs().amax(dim=1).min() > 1e-6


# Counted by hand: a convolution has inputs x outputs x kernel size + outputs parameters, a fully
# connected layer inputs x outputs + outputs.


def test_only_with_the_shared_trunk_the_digit_depends_on_the_addend():
    image, _ = batch(1)
    for head in HEADS:
        network = build(published.two_conv, head).eval()
        digit, _ = network(image.expand(10, -1, -1, -1), torch.eye(10))
        assert torch.equal(digit, digit[:1].expand(10, -1)) != issubclass(
            head, published.SharedTrunk
        )


def test_the_second_softmax_is_used_in_training_only():
    network, inputs = build(published.two_conv, published.TwoSoftmaxes), batch()
    training, evaluation = network(*inputs), network.eval()(*inputs)
    for twice, once in zip(training, evaluation, strict=True):
        torch.testing.assert_close(twice, F.log_softmax(once.exp(), dim=1))


def test_numbers_on_circles_are_added():
    head = model.ComplexNumbers(10)
    real, imag = head.numbers.detach()  # views
    angles = torch.arange(19.0)[:, None] * 2 * math.pi / 19 * torch.arange(1, real.shape[1] + 1)
    real.copy_(angles.cos())
    imag.copy_(angles.sin())
    with torch.no_grad():  # features are the digit, certain
        head.digit.weight.copy_(100 * torch.eye(10))
        head.digit.bias.zero_()
        digit, addend = torch.cartesian_prod(*2 * [torch.arange(10)]).unbind(1)
        inputs = (F.one_hot(values, 10).float() for values in (digit, addend))
        assert torch.equal(head(*inputs)[1].argmax(dim=1), digit + addend)


def test_one_cycle_rises_to_one_and_falls_to_zero():
    rates = [one_cycle(step, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.99 < max(rates) <= 1 and rates[0] < 0.1 and 0 < rates[-1] < 0.001 and 15 <= peak <= 25
    assert {constant(step, 100) for step in range(100)} == {1.0}
