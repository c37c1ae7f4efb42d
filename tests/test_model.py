"""The networks: their shapes, counts and what flows through them; and the table of recipes."""

import math

import pytest
import torch
import torch.nn.functional as F

import model
from recipes import RECIPES, constant, one_cycle

PAIRS = [(encoder, join) for encoder in model.ENCODERS for join in model.JOINS]


def batch(count=4):
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(count, 1, 28, 28, generator=draw)
    addend = F.one_hot(torch.randint(10, (count,), generator=draw), 10).float()
    return image, addend


def build(encoder, join):
    torch.manual_seed(0)
    return model.build(encoder, join)


def assert_log_probabilities(predictions):
    """They are those of the digits and sums of four images."""
    for log_probs, classes in zip(predictions, (10, 19), strict=True):
        assert log_probs.shape == (4, classes) and log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("encoder, join", PAIRS)
def test_any_encoder_goes_with_any_join_and_the_sum_reaches_the_first_convolution(encoder, join):
    network = build(encoder, join)
    predictions = network(*batch())
    assert_log_probabilities(predictions)
    F.nll_loss(predictions[1], torch.arange(4)).backward()
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    assert first.weight.grad.abs().max() > 0


# An encoder never sees the number, and a join sees nothing but features and the number: what
# follows holds for all pairs if it holds for each encoder with one join, and each join with one
# encoder.
EACH = [(encoder, "outer") for encoder in model.ENCODERS]
EACH += [("small", join) for join in model.JOINS if join != "outer"]


@pytest.mark.parametrize("encoder, join", EACH)
def test_predictions_are_in_float32_under_autocast_too(encoder, join):
    network = build(encoder, join)
    with torch.autocast("cpu", torch.bfloat16):
        assert_log_probabilities(network(*batch()))


@pytest.mark.parametrize("encoder, join", EACH)
def test_an_image_is_predicted_alone_as_in_company_and_encoded_once(encoder, join):
    network = build(encoder, join).eval()
    image, addend = batch()
    together = network(image, addend)
    features = network.encode(image)
    for ours, theirs in zip(network.join(features, addend), together, strict=True):
        assert torch.equal(ours, theirs)
    alone = network(image[3:4], addend[3:4])
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours, theirs[3:4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder, join", EACH)
def test_the_sum_depends_on_the_addend(encoder, join):
    network = build(encoder, join).eval()
    features = network.encode(batch(1)[0]).expand(10, -1)
    _, total = network.join(features, torch.eye(10))
    assert (total[1:] - total[:1]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("name", RECIPES)
def test_untrained_losses_are_those_of_chance(name):
    network = build(RECIPES[name].encoder, RECIPES[name].join)
    image, addend = batch(40)
    digit, total = network(image, addend)
    # Not below, and not far above: the largest of many untrained features are large.
    digit_loss = F.nll_loss(digit, torch.arange(40) % 10).item()
    assert 0.75 * math.log(10) < digit_loss < 1.75 * math.log(10)
    assert F.nll_loss(total, torch.arange(40) % 19).item() == pytest.approx(math.log(19), rel=0.25)


# Parameters of the published systems by hand: a convolution has inputs x outputs x kernel size
# + outputs of them, an FC layer inputs x outputs + outputs.
SIZES = {
    # 3x3: 1-32 320, 32-64 18,496, 64-128 73,856, 128-256 295,168, 256-512 1,180,160,
    # 512-1024 4,719,616, 1024-10 92,170; FC: 20-128 2,688, 128-19 2,451
    "concat-mlp": 6_384_925,
    # 5x5: 1-6 156, 6-12 1,812; FC: number 10-30 330, 192+30-120 26,760, 120-60 7,260,
    # 60-45 2,745, 45-10 460, 45-19 874
    "shared-trunk": 40_397,
    "shared-trunk-slow": 40_397,
    # 3x3: 1-32 320, 32-64 18,496, 64-128 73,856, 128-256 295,168, 256-256 590,080,
    # 256-512 1,180,160; FC: 512x3x3-1024 4,719,616, 1024-10 10,250, 20-19 399
    "concat-linear": 6_888_345,
    # 5x5: 1-6 156, 6-12 1,812; FC: 192-120 23,160, 120-60 7,260, 60-10 610, number 10-60 660,
    # 60-19 1,159
    "added": 34_817,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_systems_have_their_sizes(name):
    recipe = RECIPES[name]
    assert model.count_parameters(build(recipe.encoder, recipe.join)) == SIZES[name]


def test_the_digit_hangs_on_the_addend_in_the_shared_trunk_alone():
    image, _ = batch(1)
    for join in model.JOINS:
        digit, _ = build("two-conv", join).eval()(image.expand(10, -1, -1, -1), torch.eye(10))
        assert torch.equal(digit, digit[:1].expand(10, -1)) == (join != "shared-trunk")


@pytest.mark.parametrize("name", ["default", "fast"])
def test_our_networks_are_compact(name):
    network = build(RECIPES[name].encoder, RECIPES[name].join)
    assert model.count_parameters(network) <= 400_000


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_layers_accounts_for_every_parameter(name):
    network = build(RECIPES[name].encoder, RECIPES[name].join)
    *layers, total = model.summary(network).splitlines()
    counts = [int(line.split()[-1].replace(",", "")) for line in layers]
    assert sum(counts) == sum(p.numel() for p in network.parameters())
    assert f"{sum(counts):,} parameters" in total


def test_one_cycle_rises_to_one_and_falls_to_nothing():
    rates = [one_cycle(step, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[0] < 0.1 and max(rates) == pytest.approx(1, abs=0.01)
    assert 0 < rates[-1] < 0.001 and 15 <= peak <= 25


def test_one_cycle_of_few_steps_never_stands_still():
    for total in (1, 2, 3):
        assert all(0 < one_cycle(step, total) <= 1 for step in range(total))


def test_constant_is_constant():
    assert {constant(step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_plain_types_tells_all(name):
    plain = RECIPES[name].as_plain()
    assert plain["schedule"] == RECIPES[name].schedule.__name__
    assert plain["lr"] == RECIPES[name].lr and plain["encoder"] in model.ENCODERS
    # the names that users type are free of what a shell would take for something else
    assert name.replace("-", "").isalnum()
