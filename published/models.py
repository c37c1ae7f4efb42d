"""The networks of the four published systems, layer by layer. See README.md for their sources."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dataset import NUM_DIGITS, NUM_SUMS


def stack(layer, *sizes, **options):
    """A list of layers: `layer` and ReLU between consecutive sizes."""
    layers = []
    for size_in, size_out in pairwise(sizes):
        layers += [layer(size_in, size_out, **options), nn.ReLU(inplace=True)]
    return layers


def seven_conv():
    """Encoder of concat-mlp: six 3x3 convolutions. The seventh, which covers all of their output,
    is the linear layer of the head."""
    return nn.Sequential(
        *stack(nn.Conv2d, 1, 32, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(2),  # (B, 64, 14, 14)
        *stack(nn.Conv2d, 64, 128, 256, kernel_size=3, padding=1),
        nn.MaxPool2d(2),  # (B, 256, 7, 7)
        *stack(nn.Conv2d, 256, 512, 1024, kernel_size=3),  # (B, 1024, 3, 3)
        nn.Flatten(),  # (B, 9216)
    )


def six_conv():
    """Encoder of concat-linear: six 3x3 convolutions and a linear layer."""
    return nn.Sequential(
        *stack(nn.Conv2d, 1, 32, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(2),  # (B, 64, 14, 14)
        *stack(nn.Conv2d, 64, 128, 256, kernel_size=3, padding=1),
        nn.MaxPool2d(2),  # (B, 256, 7, 7)
        *stack(nn.Conv2d, 256, 256, 512, kernel_size=3),  # (B, 512, 3, 3)
        nn.Flatten(),
        *stack(nn.Linear, 4608, 1024),  # (B, 1024)
    )


def two_conv():
    """Encoder of shared-trunk: two 5x5 convolutions."""
    return nn.Sequential(
        *stack(nn.Conv2d, 1, 6, kernel_size=5),
        nn.MaxPool2d(2),  # (B, 6, 12, 12)
        *stack(nn.Conv2d, 6, 12, kernel_size=5),
        nn.MaxPool2d(2),  # (B, 12, 4, 4)
        nn.Flatten(),  # (B, 192)
    )


def two_conv_fc():
    """Encoder of added: that of shared-trunk and two linear layers down to 60 features."""
    return nn.Sequential(*two_conv(), *stack(nn.Linear, 192, 120, 60))


class ConcatMLP(nn.Module):
    """Digit logits and one-hot addend, concatenated -> FC 128 -> ReLU -> FC 19."""

    hidden = (128,)

    def __init__(self, num_features):
        super().__init__()
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        sizes = NUM_DIGITS + NUM_DIGITS, *self.hidden
        self.sum = nn.Sequential(*stack(nn.Linear, *sizes), nn.Linear(sizes[-1], NUM_SUMS))

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        return digit_logits, self.sum(torch.cat([digit_logits, addend], dim=1))


class ConcatLinear(ConcatMLP):
    """The same without a hidden layer: concatenated -> FC 19."""

    hidden = ()


class SharedTrunk(nn.Module):
    """Features and embedded addend -> FC 120, 60, 45 -> both outputs; both depend on the addend."""

    def __init__(self, num_features):
        super().__init__()
        self.embedding = nn.Linear(NUM_DIGITS, 30)
        self.trunk = nn.Sequential(*stack(nn.Linear, num_features + 30, 120, 60, 45))
        self.digit = nn.Linear(45, NUM_DIGITS)
        self.sum = nn.Linear(45, NUM_SUMS)

    def forward(self, features, addend):
        embedded = F.relu(self.embedding(addend))  # (B, 30)
        shared = self.trunk(torch.cat([features, embedded], dim=1))  # (B, 45)
        return self.digit(shared), self.sum(shared)


class TwoSoftmaxes(SharedTrunk):
    """SharedTrunk with a second softmax in the training loss, as it was published.

    The model applies log_softmax to what a head returns, here probabilities already. In evaluation
    the logits are returned, so that the predicted probabilities are those of a single softmax.
    """

    def forward(self, features, addend):
        outputs = super().forward(features, addend)
        return tuple(F.softmax(logits, dim=1) for logits in outputs) if self.training else outputs


class Added(nn.Module):
    """The addend, embedded to the dimension of the features and added to them -> FC 19."""

    def __init__(self, num_features):
        super().__init__()
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        self.embedding = nn.Linear(NUM_DIGITS, num_features)
        self.sum = nn.Linear(num_features, NUM_SUMS)

    def forward(self, features, addend):
        embedded = F.relu(self.embedding(addend))  # (B, F)
        return self.digit(features), self.sum(features + embedded)


class ConcatProbabilities(ConcatLinear):
    """ConcatLinear on digit probabilities, its sum logits scaled.

    If the digit d is certain, a linear layer can compute 2s(d + a) - s^2 from it and the addend a,
    which is largest at s = d + a. This needs large weights; the factor speeds up learning.
    """

    def forward(self, features, addend):
        digit_logits = self.digit(features)
        inputs = torch.cat([F.softmax(digit_logits, dim=1), addend], dim=1)  # (B, 20)
        return digit_logits, 30 * self.sum(inputs)


class AddedProbabilities(nn.Module):
    """Added on digit probabilities, ten features instead of sixty, its sum logits scaled."""

    def __init__(self, num_features):
        super().__init__()
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        self.embedding = nn.Linear(NUM_DIGITS, NUM_DIGITS)
        self.sum = nn.Linear(NUM_DIGITS, NUM_SUMS)

    def forward(self, features, addend):
        digit_logits = self.digit(features)
        embedded = F.relu(self.embedding(addend))  # (B, 10)
        return digit_logits, 30 * self.sum(F.softmax(digit_logits, dim=1) + embedded)
