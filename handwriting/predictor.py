"""A trained network for inference: loading it, its probabilities, the prediction for a picture."""

import torch
import torch.nn.functional as F

from dataset import NUM_DIGITS, NUM_SUMS, SIDE
from handwriting.prepare import NO_INK
from model import build_model, probabilities
from recipes import RECIPES
from training.checkpoint import load_checkpoint, restore
from training.console import UserError
from training.recipe import choices_of

UNSURE = 0.65  # warn if the digit is less probable than this


def load_model(path, checkpoint=None):
    """Load the trained model of a run directory or a checkpoint, on the CPU, in evaluation mode.

    Also returns the checkpoint, a dict, which may be given if it is loaded already. Raises
    UserError if its network is none of ours.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    saved = checkpoint["recipe"]
    try:
        encoder, head = (choices_of(part, RECIPES)[saved[part]] for part in ("encoder", "head"))
        model = build_model(encoder, head)
        restore(checkpoint, model)
    except (KeyError, UserError) as error:
        name = checkpoint["flags"]["recipe"]
        raise UserError(f"{path}: recipe {name!r} is gone or has a different network") from error
    return model.eval(), checkpoint


class Predictor(torch.nn.Module):
    """A trained network that takes pixels and returns probabilities, for inference only."""

    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe = model.requires_grad_(False), recipe

    def forward(self, pixels, addends):
        """Map uint8 (B, 28, 28), int64 (B,) to probabilities of digits (B, 10), sums (B, 19)."""
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (SIDE, SIDE):
            given = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels must be uint8 (B, 28, 28), 0 to 255, not {given}")
        images = (pixels.unsqueeze(1).float() / 255 - self.recipe["mean"]) / self.recipe["std"]
        log_probs = self.model(images, F.one_hot(addends, NUM_DIGITS).float())
        return tuple(probabilities(x, self.recipe["label_smoothing"]) for x in log_probs)


def predict(predictor, prepared, addend):
    """Predict the digit of a Prepared image and its sum with the addend.

    Returns the prediction, a dict in JSON types, and the probabilities, (10,) and (19,). If there
    is no ink, the values are None and the probabilities 0.
    """
    record = {"digit": None, "digit_probability": None, "addend": addend}
    record |= {"sum": None, "sum_probability": None, "warnings": list(prepared.warnings)}
    if NO_INK in prepared.warnings:
        return record, torch.zeros(NUM_DIGITS), torch.zeros(NUM_SUMS)
    pixels = torch.from_numpy(prepared.pixels)[None]  # (1, 28, 28)
    (digits,), (sums,) = predictor(pixels, torch.tensor([addend]))
    record |= {"digit": digits.argmax().item(), "digit_probability": digits.max().item()}
    record |= {"sum": sums.argmax().item(), "sum_probability": sums.max().item()}
    record["warnings"] += ["the digit is uncertain"] if digits.max() < UNSURE else []
    return record, digits, sums
