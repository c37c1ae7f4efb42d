"""The networks: an encoder of the image, and a join that brings the number in.

Encoders and joins are two tables of names. Any encoder goes with any join: an encoder gives
features (B, F), a join takes F and gives both predictions.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dataset import NUM_DIGITS, NUM_SUMS, SIDE


class Network(nn.Module):
    """An image and a number in, the digit's and the sum's log-probabilities out."""

    def __init__(self, encoder, join):
        super().__init__()
        self.encoder = encoder
        self.heads = join

    def encode(self, image):
        """Image (B, 1, 28, 28) to features (B, F): what can be done without the number."""
        return self.encoder(image)

    def join(self, features, addend):
        """Features (B, F) and one-hot addend (B, 10) to log-probabilities (B, 10) and (B, 19).

        In float32 also under autocast: it is little of the work, and bf16's eight bits would make
        ties of close decisions.
        """
        with torch.autocast(features.device.type, enabled=False):
            digit_logits, sum_logits = self.heads(features.float(), addend)
            return F.log_softmax(digit_logits, dim=1), F.log_softmax(sum_logits, dim=1)

    def forward(self, image, addend):
        return self.join(self.encode(image), addend)


def build(encoder, join):
    """The network of an encoder and a join, by their names in ENCODERS and JOINS."""
    layers = ENCODERS[encoder]()
    layers.eval()
    with torch.no_grad():
        num_features = layers(torch.zeros(1, 1, SIDE, SIDE)).shape[1]
    return Network(layers.train(), JOINS[join](num_features))


def count_parameters(module):
    """Trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def has_batch_norm(network):
    """Whether a network normalises over the batch, and so can't be trained on a batch of one."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def summary(network):
    """A table of the layers: name, kind, shape of the weights, parameters; as text."""
    rows = [
        (name, type(layer).__name__, " x ".join(map(str, layer.weight.shape)), layer)
        for name, layer in network.named_modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter)
    ]
    lines = [
        f"  {name:<14} {kind:<12} {shape:<18} {count_parameters(layer):>9,}"
        for name, kind, shape, layer in rows
    ]
    return "\n".join([*lines, f"  {'total':<46} {count_parameters(network):>9,} parameters"])


# Encoders


def conv_norm_relu(inputs, outputs, kernel, stride=1, padding=None, pool=1):
    """Convolution, max pooling if asked for, batch normalisation, ReLU."""
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def compact():
    """A strided first layer, so that nothing runs at 28x28, where most of the time would go."""
    return nn.Sequential(
        conv_norm_relu(1, 32, kernel=5, stride=2),  # (B, 32, 14, 14)
        conv_norm_relu(32, 64, kernel=3, pool=2),  # (B, 64, 7, 7)
        conv_norm_relu(64, 128, kernel=3),  # (B, 128, 7, 7)
        conv_norm_relu(128, 128, kernel=3, padding=0),  # (B, 128, 5, 5)
        nn.MaxPool2d(5),  # AdaptiveMaxPool2d has no deterministic backward pass on GPUs
        nn.Flatten(),  # (B, 128)
    )


def small():
    """Two convolutions and a layer over what is left of the image."""
    return nn.Sequential(
        conv_norm_relu(1, 16, kernel=5, padding=0, pool=2),  # (B, 16, 12, 12)
        conv_norm_relu(16, 32, kernel=3, padding=0, pool=2),  # (B, 32, 5, 5)
        nn.Flatten(),
        nn.Linear(800, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(inplace=True),
    )


def separable(inputs, outputs, pool=1):
    """A 3x3 convolution of each channel alone, then a 1x1 of all: a seventh of the parameters."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        *conv_norm_relu(inputs, outputs, kernel=1, pool=pool),
    )


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, x):
        return x + super().forward(x)


def tiny():
    """Depth for few parameters, after MobileNet (arXiv 1704.04861) and ResNet (1512.03385)."""
    return nn.Sequential(
        conv_norm_relu(1, 16, kernel=5, pool=2),  # (B, 16, 14, 14)
        separable(16, 24),  # (B, 24, 14, 14)
        separable(24, 30, pool=2),  # (B, 30, 7, 7)
        Residual(separable(30, 30)),
        Residual(separable(30, 30)),
        Residual(separable(30, 30)),
        nn.MaxPool2d(7),
        nn.Flatten(),  # (B, 30)
    )


def conv_relu(*channels, kernel=3, padding=0):
    """A list of layers: from each number of channels to the next a convolution and a ReLU."""
    layers = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU(inplace=True)]
    return layers


def seven_conv():
    """Of concat-mlp: seven 3x3 convolutions that end in the ten digit logits themselves."""
    return nn.Sequential(
        *conv_relu(1, 32, 64, padding=1),
        nn.MaxPool2d(2),  # (B, 64, 14, 14)
        *conv_relu(64, 128, 256, padding=1),
        nn.MaxPool2d(2),  # (B, 256, 7, 7)
        *conv_relu(256, 512, 1024),  # (B, 1024, 3, 3)
        nn.Conv2d(1024, NUM_DIGITS, 3),  # (B, 10, 1, 1)
        nn.Flatten(),
    )


def six_conv():
    """Of concat-linear: six 3x3 convolutions and two layers, that end in the digit logits."""
    return nn.Sequential(
        *conv_relu(1, 32, 64, padding=1),
        nn.MaxPool2d(2),  # (B, 64, 14, 14)
        *conv_relu(64, 128, 256, padding=1),
        nn.MaxPool2d(2),  # (B, 256, 7, 7)
        *conv_relu(256, 256, 512),  # (B, 512, 3, 3)
        nn.Flatten(),
        nn.Linear(4608, 1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, NUM_DIGITS),
    )


def two_conv():
    """Of shared-trunk: two small 5x5 convolutions, and what they leave of the image."""
    return nn.Sequential(
        *conv_relu(1, 6, kernel=5),
        nn.MaxPool2d(2),  # (B, 6, 12, 12)
        *conv_relu(6, 12, kernel=5),
        nn.MaxPool2d(2),  # (B, 12, 4, 4)
        nn.Flatten(),  # (B, 192)
    )


def two_conv_fc():
    """Of added: the two convolutions of shared-trunk, and two layers down to 60 features."""
    return nn.Sequential(
        *two_conv(),
        nn.Linear(192, 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 60),
        nn.ReLU(inplace=True),  # (B, 60)
    )


ENCODERS = {
    "compact": compact,
    "small": small,
    "tiny": tiny,
    "seven-conv": seven_conv,
    "six-conv": six_conv,
    "two-conv": two_conv,
    "two-conv-fc": two_conv_fc,
}


# Joins


def digit_layer(num_features):
    """Features to digit logits; an encoder that ends in ten features has them already."""
    return nn.Identity() if num_features == NUM_DIGITS else nn.Linear(num_features, NUM_DIGITS)


class Outer(nn.Module):
    """Every pair of digit probability and addend has its own weights: 10 x 10 -> FC 19.

    The shift P(sum = s) = P(digit = s - addend) is linear in these pairs, so this layer can take
    a doubtful digit through the sum, which one over the 10 + 10 inputs can't.
    """

    def __init__(self, num_features):
        super().__init__()
        self.digit = digit_layer(num_features)
        self.sum = nn.Linear(NUM_DIGITS * NUM_DIGITS, NUM_SUMS)

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        pairs = F.softmax(digit_logits, dim=1).unsqueeze(2) * addend.unsqueeze(1)  # (B, 10, 10)
        # One pair in a hundred is active, so each weight learns seldom: ten times as fast, then.
        return digit_logits, 10 * self.sum(pairs.flatten(1))


class ConcatMLP(nn.Module):
    """Digit logits and one-hot addend side by side -> FC 128 -> ReLU -> FC 19."""

    def __init__(self, num_features):
        super().__init__()
        self.digit = digit_layer(num_features)
        self.hidden = nn.Linear(NUM_DIGITS + NUM_DIGITS, 128)
        self.sum = nn.Linear(128, NUM_SUMS)

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        hidden = F.relu(self.hidden(torch.cat([digit_logits, addend], dim=1)))  # (B, 128)
        return digit_logits, self.sum(hidden)


class ConcatLinear(nn.Module):
    """Digit logits and one-hot addend side by side -> FC 19, with nothing between."""

    def __init__(self, num_features):
        super().__init__()
        self.digit = digit_layer(num_features)
        self.sum = nn.Linear(NUM_DIGITS + NUM_DIGITS, NUM_SUMS)

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        return digit_logits, self.sum(torch.cat([digit_logits, addend], dim=1))


class SharedTrunk(nn.Module):
    """An embedded addend beside the features -> FC 120 -> 60 -> 45 -> both heads.

    The digit's head sees the addend too, so here one image has a digit prediction for each addend.
    """

    def __init__(self, num_features):
        super().__init__()
        self.embedding = nn.Linear(NUM_DIGITS, 30)
        self.trunk = nn.Sequential(
            nn.Linear(num_features + 30, 120),
            nn.ReLU(inplace=True),
            nn.Linear(120, 60),
            nn.ReLU(inplace=True),
            nn.Linear(60, 45),
            nn.ReLU(inplace=True),
        )
        self.digit = nn.Linear(45, NUM_DIGITS)
        self.sum = nn.Linear(45, NUM_SUMS)

    def forward(self, features, addend):
        embedded = F.relu(self.embedding(addend))  # (B, 30)
        shared = self.trunk(torch.cat([features, embedded], dim=1))  # (B, 45)
        return self.digit(shared), self.sum(shared)


class Added(nn.Module):
    """The addend, embedded in as many features as the image has, added to these -> FC 19."""

    def __init__(self, num_features):
        super().__init__()
        self.digit = digit_layer(num_features)
        self.embedding = nn.Linear(NUM_DIGITS, num_features)
        self.sum = nn.Linear(num_features, NUM_SUMS)

    def forward(self, features, addend):
        embedded = F.relu(self.embedding(addend))  # (B, F)
        return self.digit(features), self.sum(features + embedded)


JOINS = {
    "outer": Outer,
    "concat-mlp": ConcatMLP,
    "concat-linear": ConcatLinear,
    "shared-trunk": SharedTrunk,
    "added": Added,
}
