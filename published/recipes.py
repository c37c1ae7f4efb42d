"""Recipes of the published systems, and of those that we fixed. See README.md for their sources."""

from dataclasses import replace
from functools import partial

from published import models
from training.recipe import Recipe, constant, one_cycle

published = partial(
    Recipe,
    weight_decay=0.0,
    label_smoothing=0.0,
    beta2=0.999,
    schedule=constant,
    mean=0.0,
    std=1.0,
)
concat_mlp = published(
    description="published: digit logits and one-hot addend into FC 128",
    encoder=models.seven_conv,
    head=models.ConcatMLP,
    epochs=20,
    batch_size=128,
    lr=0.01,
    digit_weight=0.5,
    sum_weight=0.5,
    optimizer="SGD",
    momentum=0.7,
    drop_last=True,
)
shared_trunk = published(
    description="published: embedded addend and features into one trunk, two softmaxes",
    encoder=models.two_conv,
    head=models.TwoSoftmaxes,
    epochs=100,
    batch_size=32,
    lr=0.01,
    optimizer="SGD",
    addends="once",
    val_size=10_000,
)
concat_linear = published(
    description="published: digit logits and one-hot addend into one linear layer",
    encoder=models.six_conv,
    head=models.ConcatLinear,
    epochs=25,
    batch_size=64,
    lr=0.001,
    optimizer="Adam",
    digit_weight=0.5,
    sum_weight=0.5,
)
added = published(
    description="published: embedded addend added to 60 features",
    encoder=models.two_conv_fc,
    head=models.Added,
    epochs=12,
    batch_size=16,
    lr=0.001,
    optimizer="Adam",
)
PUBLISHED = {
    "concat-mlp": concat_mlp,
    "shared-trunk": shared_trunk,
    "shared-trunk-slow": replace(
        shared_trunk,
        description="published: shared-trunk with a tenth of the learning rate",
        lr=0.001,
    ),
    "shared-trunk-fixed": replace(
        shared_trunk,
        description="shared-trunk with one softmax and a decaying learning rate",
        head=models.SharedTrunk,
        epochs=60,
        schedule=one_cycle,
    ),
    "concat-linear": concat_linear,
    "concat-linear-fixed": replace(
        concat_linear,
        description="concat-linear on probabilities, with a decaying learning rate",
        head=models.ConcatProbabilities,
        epochs=10,
        lr=0.002,
        schedule=one_cycle,
    ),
    "added": added,
    "added-fixed": replace(
        added,
        description="added on probabilities, with a decaying learning rate",
        head=models.AddedProbabilities,
        lr=0.003,
        schedule=one_cycle,
    ),
}
