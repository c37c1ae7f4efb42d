"""The two-headed network, our encoders and our heads.

An encoder maps an image to features (B, F). A head maps the features and the one-hot addend to the
logits of the digit and of the sum. A recipe names one of each.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dataset import NUM_DIGITS, NUM_SUMS, SIDE
from training.console import UserError


class TwoHeadedNet(nn.Module):
    """`digit_log_probs, sum_log_probs = model(image, addend)`: (B, 10), (B, 19).

    Images are float32 (B, 1, 28, 28), addends one-hot, float32 (B, 10).
    """

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def classify(self, features, addend):
        """Map features (B, F) and one-hot addends (B, 10) to log-probabilities (B, 10), (B, 19).

        Runs in float32 even under autocast: the head is cheap, and bf16 logits would tie.
        """
        with torch.autocast(features.device.type, enabled=False):
            digit_logits, sum_logits = self.head(features.float(), addend)
            return F.log_softmax(digit_logits, dim=1), F.log_softmax(sum_logits, dim=1)

    def classify_all(self, features):
        """`classify` with each of the ten addends: (B, 10 addends, 10), (B, 10 addends, 19)."""
        addends = torch.eye(NUM_DIGITS, device=features.device).repeat(len(features), 1)
        outputs = self.classify(features.repeat_interleave(NUM_DIGITS, dim=0), addends)
        return [log_probs.unflatten(0, (-1, NUM_DIGITS)) for log_probs in outputs]

    def forward(self, image, addend):
        return self.classify(self.encoder(image), addend)


def build_model(encoder, head):
    """Build the network of a recipe, from an encoder function and a head class.

    Raises UserError if the encoder does not return features (B, F).
    """
    layers = encoder().eval()
    with torch.no_grad():
        features = layers(torch.zeros(2, 1, SIDE, SIDE))
    if features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape)
        raise UserError(f"encoder {encoder.__name__} must return (B, F), not {shape} for B = 2")
    return TwoHeadedNet(layers.train(), head(features.shape[1]))


def kl_loss(log_probs, target, smoothing):
    """KL divergence from the label, smoothed, to the prediction: log_probs (..., C), target (...).

    It is `cross_entropy` with label smoothing, less a constant that makes the minimum 0.
    """
    classes = log_probs.shape[-1]
    nll = F.nll_loss(log_probs.reshape(-1, classes), target.reshape(-1))
    label = (1 - smoothing) * torch.eye(classes)[0] + smoothing / classes
    entropy = torch.special.entr(label).sum().item()
    return (1 - smoothing) * nll - smoothing * log_probs.mean() - entropy


def probabilities(log_probs, label_smoothing):
    """Probabilities from log-probabilities (..., C), with label smoothing undone.

    With label smoothing e a network learns (1 - e) p + e / C instead of the probability p.
    """
    probs = (log_probs.exp() - label_smoothing / log_probs.shape[-1]).clamp(min=0)
    return probs / probs.sum(dim=-1, keepdim=True)


def conv_norm_relu(in_channels, out_channels, kernel, stride=1, padding=0, pool=1):
    """Convolution, optional max pooling, batch normalization, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
        nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def standard():
    """Four convolutions; the first has stride 2, since full resolution would take the most time."""
    return nn.Sequential(
        conv_norm_relu(1, 32, kernel=5, stride=2, padding=2),  # (B, 32, 14, 14)
        conv_norm_relu(32, 64, kernel=3, padding=1, pool=2),  # (B, 64, 7, 7)
        conv_norm_relu(64, 128, kernel=3, padding=1),  # (B, 128, 7, 7)
        conv_norm_relu(128, 128, kernel=3),  # (B, 128, 5, 5)
        nn.MaxPool2d(5),  # AdaptiveMaxPool2d has no deterministic backward pass on GPUs
        nn.Flatten(),  # (B, 128)
    )


def shallow():
    """Two convolutions and a fully connected layer, on the central 24x24 pixels."""
    return nn.Sequential(
        nn.ZeroPad2d(-2),  # crops to (B, 1, 24, 24): the border is nearly always empty
        conv_norm_relu(1, 16, kernel=5, pool=2),  # (B, 16, 10, 10)
        conv_norm_relu(16, 48, kernel=3, pool=2),  # (B, 48, 4, 4)
        nn.Flatten(),  # (B, 768)
        nn.Linear(768, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(inplace=True),  # (B, 256)
    )


def separable(in_channels, out_channels, pool=1):
    """A depthwise and a pointwise convolution: about a seventh of a full 3x3 one's parameters."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        *conv_norm_relu(in_channels, out_channels, kernel=1, pool=pool),
    )


class SharedPointwise(nn.Module):
    """Residual separable convolutions that share the weights of their pointwise convolution."""

    def __init__(self, channels, depth):
        super().__init__()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            for _ in range(depth)
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))
        for norm in self.norms:  # else the features would grow with each repetition
            nn.init.constant_(norm.weight, 1 / depth)

    def forward(self, x):
        for depthwise, norm in zip(self.depthwise, self.norms, strict=True):
            x = x + F.relu(norm(self.pointwise(depthwise(x))))
        return x


def tiny():
    """Many layers, few parameters: after MobileNet (arXiv 1704.04861) and ResNet (1512.03385)."""
    return nn.Sequential(
        nn.ZeroPad2d(-1),  # crops to (B, 1, 26, 26)
        conv_norm_relu(1, 16, kernel=5, padding=2, pool=2),  # (B, 16, 13, 13)
        separable(16, 24),  # (B, 24, 13, 13)
        separable(24, 36, pool=2),  # (B, 36, 6, 6)
        SharedPointwise(36, depth=4),
        nn.MaxPool2d(6),
        nn.Flatten(),  # (B, 36)
    )


class ComplexNumbers(nn.Module):
    """Adds by multiplying complex numbers, because the angles of a product add up.

    One learned table has a vector of complex numbers for each of the numbers 0 to 18, the same for
    digit, addend and sum. Digit and addend are multiplied, and the logit of a sum is its similarity
    to the product. For this to be correct, the numbers must lie evenly on circles: then pairs of
    digit and addend that never occurred in training are added correctly too. After the products
    of complex embeddings of Trouillon et al. 2016 (arXiv 1606.06357) and the clocks that Nanda et
    al. 2023 (2301.05217) found in networks that learned to add.
    """

    components = 8

    def __init__(self, num_features):
        super().__init__()
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        # Real and imaginary parts. Small at the start, since large numbers learn pairs by heart,
        # and scaled by 20 when they are used, so that a step of the optimizer changes them faster.
        self.numbers = nn.Parameter(0.01 * torch.randn(2, NUM_SUMS, self.components))

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        real, imag = 20 * self.numbers  # (19, C) each
        a, b = (F.softmax(digit_logits, dim=1) @ part[:NUM_DIGITS] for part in (real, imag))
        c, d = (addend @ part[:NUM_DIGITS] for part in (real, imag))
        # (a + bi) (c + di), and its inner product with each number; (B, C), then (B, 19)
        return digit_logits, (a * c - b * d) @ real.T + (a * d + b * c) @ imag.T

    @torch.no_grad()
    def planes(self):
        """The numbers 0 to 18, complex (19, C), to be shown: easily read components come first.

        In those, neighbors are close to each other, compared with their size.
        """
        numbers = torch.complex(*self.numbers.cpu())
        steps, sizes = numbers.diff(dim=0).abs(), numbers.abs().square()
        return numbers[:, (steps.sum(dim=0) / sizes.sum(dim=0)).argsort()]


class OuterProduct(nn.Module):
    """The outer product of digit probabilities and one-hot addend, 10 x 10, then FC 19.

    P(sum = s) = P(digit = s - addend) is linear in these 100 products, so a linear layer can output
    a multiple of it as the logit of s. But each pair has weights of its own: it looks sums up
    instead of adding, and the sum of a pair that never occurred in training is wrong.
    """

    def __init__(self, num_features):
        super().__init__()
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        self.sum = nn.Linear(NUM_DIGITS * NUM_DIGITS, NUM_SUMS)

    def forward(self, features, addend):
        digit_logits = self.digit(features)  # (B, 10)
        products = F.softmax(digit_logits, dim=1).unsqueeze(2) * addend.unsqueeze(1)  # (B, 10, 10)
        # Usually only one of the 100 products is large, so each weight gets gradients from few
        # images: the factor 10 speeds up learning.
        return digit_logits, 10 * self.sum(products.flatten(1))
