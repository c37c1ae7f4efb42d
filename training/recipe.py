"""What a recipe is: a network with its hyperparameters, each also a flag of train.py."""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace

from torch import nn

from dataset import MEAN, STD
from training.console import Number, UserError, warn
from training.processes import world_size


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


def setting(help, kind, default=MISSING):
    """A field that is a flag too. kind: a Number, a tuple of choices, bool, or "name".

    A "name" is the name of a function or class that any recipe has in this field.
    """
    return field(default=default, metadata={"help": help, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and its hyperparameters; the defaults are those that our recipes share."""

    description: str
    epochs: int = setting("passes over the training images", Number(int, 1, 5000))
    batch_size: int = setting("images per step", Number(int, 2, 100_000))
    lr: float = setting("peak learning rate", Number(float, 1e-9, 100))
    weight_decay: float = setting("weight decay", Number(float, 0, 10), 0.01)
    numbers_decay: float = setting(
        "weight decay of ComplexNumbers' table", Number(float, 0, 100), 10.0
    )
    label_smoothing: float = setting("label smoothing", Number(float, 0, 0.9), 0.1)
    val_size: int = setting("training images held out for validation", Number(int, 0, 59_999), 0)
    digit_weight: float = setting("factor of the digit's loss", Number(float, 0, 100), 1.0)
    sum_weight: float = setting("factor of the sum's loss", Number(float, 0, 100), 1.0)
    unseen_pairs: int = setting(
        "pairs of digit and addend, of the 100, that never occur in training", Number(int, 0, 75), 0
    )
    # Saved by name: no lambdas, no functools.partial. image (B, 1, 28, 28) -> features (B, F)
    encoder: Callable[[], nn.Module] = setting("image to features", "name")
    # F -> module: features, one-hot addend -> digit logits, sum logits
    head: Callable[[int], nn.Module] = setting("features and addend to digit and sum", "name")
    optimizer: str = setting("optimizer", ("AdamW", "Adam", "SGD"), "AdamW")
    momentum: float = setting("momentum of SGD, beta1 of Adam", Number(float, 0, 0.9999), 0.9)
    beta2: float = setting("beta2 of Adam", Number(float, 0, 0.99999), 0.99)
    # (step, total steps) -> factor of lr
    schedule: Callable[[int, int], float] = setting("of the learning rate", "name", one_cycle)
    rotate: float = setting("augmentation: degrees of rotation", Number(float, 0, 180), 0.0)
    translate: float = setting("augmentation: shift, of the side", Number(float, 0, 1), 0.0)
    scale: float = setting("augmentation: change of each side", Number(float, 0, 0.9), 0.0)
    shear: float = setting("augmentation: degrees of shear", Number(float, 0, 80), 0.0)
    mean: float = setting("subtracted from the pixels (0 to 1)", Number(float, 0, 1), MEAN)
    std: float = setting("the pixels are divided by it", Number(float, 0.001, 100), STD)
    addends: str = setting("when the addends are drawn", ("each-epoch", "once"), "each-epoch")
    drop_last: bool = setting("skip a last batch that is not full", bool, False)

    def as_plain(self):
        """The settings in JSON types, with functions and classes as their names."""
        return {name: getattr(value, "__name__", value) for name, value in vars(self).items()}


def choices_of(name, recipes):
    """The functions or classes that the recipes have in a field, by their names."""
    values = [getattr(recipe, name) for recipe in recipes.values()]
    return {value.__name__: value for value in values}


def add_flags(group, recipes):
    """Add a flag for each setting of a recipe to a group of a parser. Not given, it is None."""
    for one in fields(Recipe)[1:]:  # without the description
        text, kind = one.metadata["help"], one.metadata["kind"]
        if isinstance(kind, Number):
            options = {"type": kind, "metavar": "N"}
            text += f", {kind.low} to {kind.high}"
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"choices": choices_of(one.name, recipes) if kind == "name" else kind}
        group.add_argument(f"--{one.name.replace('_', '-')}", help=text, **options)


def recipe_from_args(args, recipes):
    """The recipe that `--recipe` names, with the settings that other flags replace."""
    if args.recipe not in recipes:
        raise UserError(f"no recipe {args.recipe!r}; choose from {', '.join(recipes)}", status=2)
    given = {one.name: getattr(args, one.name) for one in fields(Recipe) if one.metadata}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & {"encoder", "head", "schedule"}:
        given[name] = choices_of(name, recipes)[given[name]]
    recipe = replace(recipes[args.recipe], **given)
    return replace(recipe, epochs=min(recipe.epochs, 2)) if args.dry_run else recipe


def check_resumable(checkpoint, recipe):
    """Raise UserError if a checkpoint cannot be continued as this recipe."""
    may_differ = {"description": "", "epochs": 0}
    if checkpoint["recipe"] | may_differ != recipe.as_plain() | may_differ:
        message = f"recipe {checkpoint['flags']['recipe']!r} has changed: start a new run"
        raise UserError(message, status=2)
    trained = len(checkpoint["history"])
    if recipe.epochs < trained:
        raise UserError(f"--epochs must be at least {trained}, the epochs already trained", 2)
    if checkpoint["processes"] != world_size():
        warn(f"warning: trained with {checkpoint['processes']} processes until now")
