"""Training recipes: a table of networks with their hyperparameters."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from torch import nn

from model import LowRankProduct, OuterProduct, shallow, standard, tiny
from published import models as published
from training.augment import Affine
from training.constants import MEAN, STD
from training.errors import UserError


def constant(step, total_steps):
    """The same learning rate at every step."""
    return 1.0


def one_cycle(step, total_steps, warmup=0.2):
    """Linear warmup to 1 over the first fifth of the steps, then cosine decay to 0.

    After Smith & Topin, Super-Convergence (arXiv 1708.07120). It depends only on the step and the
    total, so a run that is extended continues on the longer schedule.
    """
    position = (step + 1) / (total_steps + 1)
    if position < warmup:
        return position / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (position - warmup) / (1 - warmup))


@dataclass(frozen=True)
class Recipe:
    """A network and its hyperparameters. The defaults are the values that most recipes share."""

    description: str
    # Functions and classes are saved by name: no lambdas, no functools.partial.
    encoder: Callable[[], nn.Module]  # builds a module: image (B, 1, 28, 28) -> features (B, F)
    # F, or None if the features are the digit logits -> module: features, addend -> both logits
    head: Callable[[int | None], nn.Module]
    epochs: int
    batch_size: int
    lr: float  # peak learning rate of the schedule
    optimizer: str = "AdamW"  # a class in torch.optim with the option `fused`: AdamW, Adam or SGD
    optimizer_options: Mapping = field(default_factory=dict)
    weight_decay: float = 0.0
    schedule: Callable[[int, int], float] = one_cycle  # (step, total steps) -> factor of lr
    loss_weight: float = 1.0  # of both losses: 1 adds the two losses, 0.5 averages them
    label_smoothing: float = 0.0
    affine: Affine | None = None  # augmentation of the training images
    clean_epochs: int = 0  # number of epochs at the end without augmentation
    mean: float = MEAN  # pixels (0..1) are normalized to (pixel - mean) / std
    std: float = STD
    addends: str = "each-epoch"  # when they are drawn: "each-epoch" or "once"
    drop_last: bool = False  # skip the last batch of an epoch if it is not full
    val_size: int = 0  # training images held out for validation
    members: int = 1  # number of networks; several are an Ensemble

    def as_plain(self):
        """The settings in JSON types, with functions and classes as their names."""
        return json.loads(json.dumps(asdict(self), default=lambda f: f.__name__))


# What our recipes share, what the augmented ones add, and what the published systems share.
OURS = {"optimizer_options": {"betas": (0.9, 0.99)}, "weight_decay": 0.01, "label_smoothing": 0.1}
AUGMENTED = {"affine": Affine(degrees=10, translate=0.1, scale=0.1, shear=10), "clean_epochs": 1}
PUBLISHED = {"mean": 0.0, "std": 1.0, "schedule": constant}
SHARED_TRUNK = PUBLISHED | {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}}
SHARED_TRUNK |= {"addends": "once", "val_size": 10_000}

# fmt: off
RECIPES = {
    # description; encoder, head, epochs, batch size, peak learning rate; further settings
    "default": Recipe(
        "best accuracy for its cost: four convolutions, affine augmentation",
        standard, OuterProduct, 20, 256, 0.01, **OURS, **AUGMENTED),
    "fast": Recipe(
        "trains in seconds: two convolutions, weak affine augmentation",
        shallow, OuterProduct, 1, 128, 0.01, **OURS,
        affine=Affine(degrees=5, translate=0.05, scale=0.05, shear=5)),
    "tiny": Recipe(
        "fewer than 6,000 parameters: separable convolutions with shared weights",
        tiny, LowRankProduct, 60, 256, 0.02, **OURS, **AUGMENTED),
    "concat-mlp": Recipe(
        "published: digit logits and one-hot addend into FC 128",
        published.seven_conv, published.ConcatMLP, 20, 128, 0.01, loss_weight=0.5, drop_last=True,
        optimizer="SGD", optimizer_options={"momentum": 0.7}, **PUBLISHED),
    "shared-trunk": Recipe(
        "published: embedded addend and features into one trunk, two softmaxes",
        published.two_conv, published.TwoSoftmaxes, 100, 32, 0.01, **SHARED_TRUNK),
    "shared-trunk-slow": Recipe(
        "published: shared-trunk with a tenth of the learning rate",
        published.two_conv, published.TwoSoftmaxes, 100, 32, 0.001, **SHARED_TRUNK),
    "shared-trunk-fixed": Recipe(
        "shared-trunk with one softmax and a decaying learning rate",
        published.two_conv, published.SharedTrunk, 60, 32, 0.01,
        **SHARED_TRUNK | {"schedule": one_cycle}),
    "concat-linear": Recipe(
        "published: digit logits and one-hot addend into one linear layer",
        published.six_conv, published.ConcatLinear, 25, 64, 0.001, loss_weight=0.5,
        optimizer="Adam", **PUBLISHED),
    "concat-linear-fixed": Recipe(
        "concat-linear on probabilities, with a decaying learning rate",
        published.six_conv, published.ConcatProbabilities, 10, 64, 0.002, loss_weight=0.5,
        optimizer="Adam", **PUBLISHED | {"schedule": one_cycle}),
    "added": Recipe(
        "published: embedded addend added to 60 features",
        published.two_conv_fc, published.Added, 12, 16, 0.001, optimizer="Adam", **PUBLISHED),
    "added-fixed": Recipe(
        "added on probabilities, with a decaying learning rate",
        published.two_conv_fc, published.AddedProbabilities, 12, 16, 0.003, optimizer="Adam",
        **PUBLISHED | {"schedule": one_cycle}),
}
# fmt: on
ENSEMBLE = "six networks of default, their log-probabilities averaged"
RECIPES["ensemble"] = replace(RECIPES["default"], description=ENSEMBLE, members=6)


def recipe_from_args(args, recipes=RECIPES):
    """The recipe that `--recipe` names, with the settings that other flags replace."""
    if args.recipe not in recipes:
        raise UserError(f"no recipe {args.recipe!r}; choose from {', '.join(recipes)}", status=2)
    settings = {setting.name for setting in fields(Recipe)}
    given = {k: v for k, v in vars(args).items() if k in settings and v is not None}
    recipe = replace(recipes[args.recipe], **given)
    if args.dry_run:
        recipe = replace(recipe, epochs=min(recipe.epochs, 2))
    return recipe
