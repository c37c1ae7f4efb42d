"""The table of recipes: networks with their hyperparameters. `train.py --help` lists them."""

from dataclasses import replace

from model import ComplexNumbers, OuterProduct, shallow, standard, tiny
from published.recipes import PUBLISHED
from training.recipe import Recipe

RECIPES = {
    "default": Recipe(
        description="best accuracy for its cost: four convolutions, affine augmentation",
        encoder=standard,
        head=ComplexNumbers,
        epochs=20,
        batch_size=256,
        lr=0.01,
        rotate=10,
        translate=0.1,
        scale=0.1,
        shear=10,
    ),
    "fast": Recipe(
        description="trains in seconds: two convolutions, weak affine augmentation",
        encoder=shallow,
        head=ComplexNumbers,
        epochs=1,
        batch_size=128,
        lr=0.01,
        rotate=5,
        translate=0.05,
        scale=0.05,
        shear=5,
    ),
    "tiny": Recipe(
        description="fewer than 6,000 parameters: separable convolutions with shared weights",
        encoder=tiny,
        head=ComplexNumbers,
        epochs=60,
        batch_size=256,
        lr=0.02,
        rotate=10,
        translate=0.1,
        scale=0.1,
        shear=10,
    ),
}
RECIPES["outer-product"] = replace(
    RECIPES["default"],
    description="default with a head that knows each pair by heart, for comparison",
    head=OuterProduct,
)
RECIPES |= PUBLISHED
