"""The networks: shapes, parameter counts and gradients; and the table of recipes."""

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
PARAMETERS = {
    # 3x3: 1-32 320, 32-64 18,496, 64-128 73,856, 128-256 295,168, 256-512 1,180,160,
    # 512-1024 4,719,616, 1024-10 92,170; FC: 20-128 2,688, 128-19 2,451
    "concat-mlp": 6_384_925,
    # 5x5: 1-6 156, 6-12 1,812; FC: addend 10-30 330, 192+30-120 26,760, 120-60 7,260,
    # 60-45 2,745, 45-10 460, 45-19 874
    "shared-trunk": 40_397,
    # 3x3: 1-32 320, 32-64 18,496, 64-128 73,856, 128-256 295,168, 256-256 590,080,
    # 256-512 1,180,160; FC: 512x3x3-1024 4,719,616, 1024-10 10,250, 20-19 399
    "concat-linear": 6_888_345,
    # 5x5: 1-6 156, 6-12 1,812; FC: 192-120 23,160, 120-60 7,260, 60-10 610, addend 10-60 660,
    # 60-19 1,159
    "added": 34_817,
    # the same, but probabilities: addend 10-10 110, 10-19 209
    "added-fixed": 33_317,
}
LIMITS = {"default": 400_000, "fast": 400_000, "tiny": 6_000}


@pytest.mark.parametrize("name", [*PARAMETERS, *LIMITS])
def test_parameter_counts(name):
    network = build(RECIPES[name].encoder, RECIPES[name].head)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS[name] if name in PARAMETERS else count < LIMITS[name]


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


def predicted_sums(head):
    """The sums that a head predicts for each certain digit and addend: (10, 10)."""
    with torch.no_grad():
        head.digit.weight.copy_(100 * torch.eye(10))
        head.digit.bias.zero_()
        digit, addend = torch.eye(10).repeat_interleave(10, dim=0), torch.eye(10).repeat(10, 1)
        return head(digit, addend)[1].argmax(dim=1).view(10, 10)


EVERY_SUM = torch.arange(10)[:, None] + torch.arange(10)


@pytest.mark.parametrize("head", [published.ConcatProbabilities, published.AddedProbabilities])
def test_a_fixed_head_can_represent_every_sum(head):
    network = head(10)
    total, numbers = torch.arange(19.0), torch.arange(10.0)
    with torch.no_grad():  # the logit of s is 2s(d + a) - s^2
        layer = network.sum[0] if head is published.ConcatProbabilities else network.sum
        layer.weight.copy_((2 * total.outer(numbers)).repeat(1, layer.in_features // 10))
        layer.bias.copy_(-(total**2))
        if head is published.AddedProbabilities:
            network.embedding.weight.copy_(torch.eye(10))
            network.embedding.bias.zero_()
    assert torch.equal(predicted_sums(network), EVERY_SUM)


def test_numbers_on_circles_are_added():
    head = model.ComplexNumbers(10)
    real, imag = head.numbers.detach()  # views
    angles = torch.arange(19.0)[:, None] * 2 * math.pi / 19 * torch.arange(1, real.shape[1] + 1)
    real.copy_(angles.cos())
    imag.copy_(angles.sin())
    assert torch.equal(predicted_sums(head), EVERY_SUM)


@pytest.mark.parametrize("total", [1, 3, 100])
def test_one_cycle_rises_to_one_and_falls_to_zero(total):
    rates = [one_cycle(step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0 and max(rates) <= 1
    if total == 100:
        assert max(rates) > 0.99 and rates[0] < 0.1 and rates[-1] < 0.001 and 15 <= peak <= 25
    assert {constant(step, total) for step in range(total)} == {1.0}
