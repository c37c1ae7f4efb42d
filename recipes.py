"""The recipes: one table, a row each, of all that makes one training run differ from another."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from dataset import MEAN, STD, Affine


def constant(step, total_steps):
    """The same rate at every step."""
    return 1.0


def one_cycle(step, total_steps, warmup=0.2):
    """Up linearly from near 0 to 1 in the first fifth of the steps, then down a half cosine to 0.

    After Smith & Topin, Super-Convergence (arXiv 1708.07120); a function of the step and of the
    total alone, so a run that is extended enters the longer schedule where it stands.
    """
    position = (step + 1) / (total_steps + 1)
    if position < warmup:
        return position / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (position - warmup) / (1 - warmup))


@dataclass(frozen=True)
class Recipe:
    """A row of the table. The defaults are the columns that most rows share."""

    about: str  # what it is, and where it comes from
    encoder: str  # a name in model.ENCODERS
    join: str  # a name in model.JOINS
    epochs: int
    batch_size: int
    lr: float  # the schedule's peak
    optimizer: str = "AdamW"  # a class in torch.optim
    optimizer_options: Mapping = field(default_factory=dict)
    weight_decay: float = 0.0
    schedule: Callable[[int, int], float] = one_cycle  # (step, total steps) -> factor of lr
    digit_weight: float = 1.0  # of the digit's loss in the total loss
    sum_weight: float = 1.0
    label_smoothing: float = 0.0  # share of the target given to all classes alike
    affine: Affine | None = None  # augmentation of the training images
    clean_epochs: int = 0  # the last epochs, which see the images as they are
    mean: float = MEAN  # what is taken from the pixels (0..1), and
    std: float = STD  # what they are then divided by
    addends: str = "each-epoch"  # or "once"
    drop_last: bool = False  # leave out an epoch's last batch if it is not full
    val_size: int = 0  # training images held out for validation

    def as_plain(self):
        """The row in the plain types of JSON, the schedule by its name."""
        return json.loads(json.dumps(asdict(self), default=lambda schedule: schedule.__name__))


# What our own recipes share, and what those of more than an epoch add.
OURS = {"optimizer_options": {"betas": (0.9, 0.99)}, "weight_decay": 0.01, "label_smoothing": 0.1}
AUGMENTED = {"affine": Affine(degrees=10, translate=0.1, scale=0.1, shear=10), "clean_epochs": 1}
# What all published systems have: pixels in 0..1 as they are, and one rate to the end.
AS_PUBLISHED = {"mean": 0.0, "std": 1.0, "schedule": constant}
# What one of them, published at two rates, has beside the rate.
SHARED_TRUNK = AS_PUBLISHED | {
    "encoder": "two-conv",
    "join": "shared-trunk",
    "epochs": 100,
    "batch_size": 32,
    "optimizer": "SGD",
    "optimizer_options": {"momentum": 0.9},
    "addends": "once",
    "val_size": 10_000,
}

RECIPES = {
    "default": Recipe(
        about="the result: a compact network, augmented, in twenty epochs",
        encoder="compact",
        join="outer",
        epochs=20,
        batch_size=256,
        lr=0.01,
        **OURS,
        **AUGMENTED,
    ),
    "fast": Recipe(
        about="seconds: a small network, one epoch",
        encoder="small",
        join="outer",
        epochs=1,
        batch_size=128,
        lr=0.01,
        **OURS,
    ),
    "tiny": Recipe(
        about="fewer than 8,000 parameters: for microcontrollers, and for teaching",
        encoder="tiny",
        join="outer",
        epochs=20,
        batch_size=256,
        lr=0.02,
        **OURS,
        **AUGMENTED,
    ),
    "concat-mlp": Recipe(
        about="published: digit logits and one-hot number into FC 128 (98.96 / 98.83)",
        encoder="seven-conv",
        join="concat-mlp",
        epochs=20,
        batch_size=128,
        lr=0.01,
        optimizer="SGD",
        optimizer_options={"momentum": 0.7},
        digit_weight=0.5,
        sum_weight=0.5,
        drop_last=True,
        **AS_PUBLISHED,
    ),
    "shared-trunk": Recipe(
        about="published: embedded number beside 192 features, one trunk for both heads "
        "(98.97 / 55.07); mended: one softmax in the loss, not two, and numbers to 9, not 8",
        lr=0.01,
        **SHARED_TRUNK,
    ),
    "shared-trunk-slow": Recipe(
        about="published: shared-trunk at a tenth of the rate (98.35 / 38.97); mended as that",
        lr=0.001,
        **SHARED_TRUNK,
    ),
    "concat-linear": Recipe(
        about="published: digit logits and one-hot number into one linear layer (mean 88.19); "
        "chosen: ReLU after all but the last layer of the image, as its authors' notebook has it",
        encoder="six-conv",
        join="concat-linear",
        epochs=25,
        batch_size=64,
        lr=0.001,
        optimizer="Adam",
        digit_weight=0.5,
        sum_weight=0.5,
        **AS_PUBLISHED,
    ),
    "added": Recipe(
        about="published: embedded number added to 60 features (98.13 on training images); mended: "
        "one softmax, sum trained; chosen: number one-hot into 60, numbers drawn each epoch, "
        "images shuffled",
        encoder="two-conv-fc",
        join="added",
        epochs=12,
        batch_size=16,
        lr=0.001,
        optimizer="Adam",
        **AS_PUBLISHED,
    ),
}
