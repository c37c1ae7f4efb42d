"""A trained network for inference: loading it, its probabilities, the prediction for a picture."""

import torch
import torch.nn.functional as F

from handwriting.prepare import NO_INK
from model import build_model
from recipes import RECIPES
from training.checkpoint import load_checkpoint, restore
from training.constants import NUM_DIGITS, SIDE
from training.errors import UserError

UNSURE = 0.65  # warn if the digit is less probable than this


def load_model(path):
    """Load the trained model of a run directory or a checkpoint, on the CPU, in evaluation mode.

    Also returns the checkpoint, a dict. Raises UserError if its network is not that of the recipe.
    """
    checkpoint = load_checkpoint(path)
    name, saved = checkpoint["flags"]["recipe"], checkpoint["recipe"]
    recipe = RECIPES.get(name)
    settings = "encoder", "head", "members", "mean", "std", "label_smoothing"
    if not recipe or any(saved.get(setting) != recipe.as_plain()[setting] for setting in settings):
        raise UserError(f"{path}: recipe {name!r} is gone or has a different network")
    model = build_model(recipe.encoder, recipe.head, recipe.members)
    restore(checkpoint, model)
    return model.eval(), checkpoint


class Predictor(torch.nn.Module):
    """A trained network that takes pixels and returns probabilities, for inference only."""

    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe = model.requires_grad_(False), recipe
        # Fails now, not at the first picture, if the weights are NaN.
        blank = next(model.parameters()).new_zeros(1, SIDE, SIDE)
        self(blank.byte(), blank[:, 0, 0].long())

    def forward(self, pixels, addends):
        """Map uint8 (B, 28, 28), int64 (B,) to probabilities of digits (B, 10), sums (B, 19).

        Raises UserError if a probability is NaN.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, 0 to 255, not {pixels.dtype}")
        images = (pixels.unsqueeze(1).float() / 255 - self.recipe["mean"]) / self.recipe["std"]
        log_probs = self.model(images, F.one_hot(addends, NUM_DIGITS).float())
        # Undo label smoothing e, with which a network learns (1 - e) p + e / C instead of p.
        e = self.recipe["label_smoothing"]
        probabilities = [(x.exp() - e / x.shape[-1]).clamp(min=0) for x in log_probs]
        probabilities = [p / p.sum(dim=-1, keepdim=True) for p in probabilities]
        if not torch.compiler.is_compiling() and not torch.cat(probabilities, 1).isfinite().all():
            raise UserError("unusable network: its probabilities are not numbers")
        return tuple(probabilities)


def predict(predictor, prepared, addend):
    """Predict the digit of a Prepared image and its sum with the addend.

    Returns the prediction, a dict in JSON types, and the probabilities, (10,) and (19,). If there
    is no ink, the values are None and the probabilities 0.
    """
    pixels = torch.from_numpy(prepared.pixels)[None]  # (1, 28, 28)
    (digits,), (sums,) = predictor(pixels, torch.tensor([addend]))
    digits, sums = digits * pixels.any(), sums * pixels.any()
    record = {"digit": None, "digit_probability": None, "addend": addend}
    record |= {"sum": None, "sum_probability": None, "warnings": list(prepared.warnings)}
    if NO_INK not in prepared.warnings:
        record |= {"digit": digits.argmax().item(), "digit_probability": digits.max().item()}
        record |= {"sum": sums.argmax().item(), "sum_probability": sums.max().item()}
        record["warnings"] += ["the digit is uncertain"] if digits.max() < UNSURE else []
    return record, digits, sums
