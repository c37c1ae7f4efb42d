"""Checkpoints: finding, loading and restoring them."""

import os
import zipfile
from pathlib import Path

import torch

from training.console import UserError, warn

RUNS = Path("runs")
LAST = "last.pt"
FORMAT = 2  # of checkpoints; changes with the columns of metrics.csv


def latest_runs(recipes):
    """Path and last checkpoint of each run in RUNS, the most recent first, without dry runs.

    Warns of runs that cannot be used: their recipe must be one of `recipes`, a dict.
    """
    runs, skipped = [], []
    for path in sorted(RUNS.glob(f"*/{LAST}")):
        try:
            checkpoint = load_checkpoint(path)
            recipe = checkpoint["flags"]["recipe"]
        except UserError:
            recipe = None
        if recipe not in recipes:
            skipped.append(str(path.parent))
        elif not checkpoint["flags"]["dry_run"]:
            runs.append((path, checkpoint))
    if skipped:
        warn(f"warning: {', '.join(skipped)} skipped: damaged, or the recipe is gone")
    return sorted(runs, key=lambda run: run[1]["time"], reverse=True)


def find_checkpoint(path):
    """The path of the checkpoint in a run directory, or of the checkpoint file itself."""
    return Path(path, LAST) if os.path.isdir(path) else Path(path)


def load_checkpoint(path):
    """Load a checkpoint, or that of a run directory, on the CPU; UserError if it is not usable."""
    path = find_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load accepts damaged tensors
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError
    except Exception as error:  # for a damaged archive, zipfile and torch raise many types
        reason = getattr(error, "strerror", None)
        reason = reason or "not a checkpoint of this version, or damaged"
        raise UserError(f"cannot read {path} ({reason})") from error
    return checkpoint


def unwrapped(model):
    """The network itself, if torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)


def restore(checkpoint, model, optimizer=None):
    """Load a checkpoint into a model and its optimizer. Raises UserError if they don't fit.

    A step with zero gradients makes the optimizer's state, into which the saved one is copied: so
    it has the memory layout of this device, in which fused optimizers read it.
    """
    try:
        if optimizer:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            saved = checkpoint["optimizer"]["state"]
            for index, state in optimizer.state_dict()["state"].items():
                for name, tensor in state.items():
                    if isinstance(tensor, torch.Tensor):
                        tensor.copy_(saved[index][name])
        unwrapped(model).load_state_dict(checkpoint["network"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError("the network or the optimizer is not that of the run") from error


def training_caveat(flags):
    """What makes a network unfit for real digits, as text; "" if nothing does."""
    synthetic = "synthetic digits, NOT MNIST" if flags["dataset"] != "mnist" else ""
    dry_run = "a few batches of a DRY RUN" if flags["dry_run"] else ""
    return "; ".join(filter(None, [synthetic, dry_run]))
