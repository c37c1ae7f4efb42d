"""Checkpoints: finding, loading and validating them."""

import itertools
import math
import os
import zipfile
from pathlib import Path

import torch

from training.cli import TRANSIENT, train_parser
from training.console import warn
from training.errors import UserError

RUNS = Path("runs")
LAST = "last.pt"
TYPES = {"recipe": dict, "history": list, "curve": list, "network": dict, "optimizer": dict}


def latest_runs(recipes):
    """Path and last checkpoint of each run in RUNS, the most recent first, without dry runs.

    Warns of runs that cannot be used: their recipe must be one of `recipes`, a dict or names.
    """
    for path in sorted(RUNS.glob(f"*/{LAST}"), key=os.path.getmtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint["flags"]["recipe"] not in recipes:
                raise UserError(f"{path}: no recipe {checkpoint['flags']['recipe']!r}")
        except UserError as error:
            warn(f"warning: {error}; skipped")
            continue
        if not checkpoint["flags"]["dry_run"]:
            yield path, checkpoint


def find_checkpoint(path):
    """The path of the checkpoint in a run directory, or of the checkpoint file itself."""
    return Path(path, LAST) if os.path.isdir(path) else Path(path)


def checkpoint_to_resume(args, recipes):
    """The path of the checkpoint that --resume names, by default of the latest unfinished run.

    With --eval-only, or with --epochs beyond what it has, a finished run counts too.
    """
    if args.resume:
        return find_checkpoint(args.resume)
    for path, checkpoint in latest_runs(recipes):
        left = (args.epochs or checkpoint["recipe"]["epochs"]) - len(checkpoint["history"])
        if args.eval_only or left > 0:
            return path
    raise UserError(f"no {'' if args.eval_only else 'unfinished '}run in {RUNS}; give a run")


def load_checkpoint(path):
    """Load a checkpoint, or that of a run directory, on the CPU; UserError if it is not usable."""
    path = find_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load accepts damaged tensors
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["recipe"].setdefault("members", 1)  # older checkpoints have no ensembles
        if not is_valid(checkpoint):
            raise ValueError
    except Exception as error:  # for a damaged archive, zipfile and torch raise many types
        reason = getattr(error, "strerror", None) or "no checkpoint, damaged, or of another version"
        raise UserError(f"cannot read {path} ({reason})") from error
    return checkpoint


def is_valid(checkpoint):
    """Whether a checkpoint has the content that the program relies on, apart from the tensors.

    If it has another structure, this may raise any error.
    """
    history, curve = checkpoint["history"], checkpoint["curve"]
    numbers = itertools.chain([checkpoint["seconds"]], *map(dict.values, history), *curve)
    return (
        all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers)
        and len({tuple(row) for row in history}) == 1  # the same columns, at least one row
        and {"test_digit_accuracy", "test_sum_accuracy", "train_seconds"} <= history[0].keys()
        and [row["epoch"] for row in history] == list(range(1, len(history) + 1))
        and all(len(point) == 3 for point in curve)
        and isinstance(checkpoint["recipe"]["epochs"], int)
        and all(isinstance(checkpoint[name], kind) for name, kind in TYPES.items())
        and are_valid_flags(checkpoint["flags"])
    )


def are_valid_flags(flags):
    """Whether these are the flags of train.py. Raises UserError for a value that is invalid."""
    line = []
    for name, value in flags.items():
        if value is not None and value is not False:  # 0 is a value
            flag = f"--{name}".replace("_", "-")
            line.append(flag if value is True else f"{flag}={value}")
    parsed = vars(train_parser().parse_args(line))
    return {name: value for name, value in parsed.items() if name not in TRANSIENT} == flags


def training_caveat(flags):
    """What makes a network unfit for real digits, as text; "" if nothing does."""
    synthetic = "synthetic digits, NOT MNIST" if flags["dataset"] != "mnist" else ""
    dry_run = "a few batches of a DRY RUN" if flags["dry_run"] else ""
    return "; ".join(filter(None, [synthetic, dry_run]))


def restore(checkpoint, model, optimizer=None):
    """Load a checkpoint into a model and its optimizer. Raises UserError if they don't fit."""
    try:
        if optimizer:
            # Fused optimizers do not check their state: they crash if it has other shapes. A step
            # makes the state that is expected; what it changes is replaced.
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if layout(checkpoint["optimizer"]) != layout(optimizer.state_dict()):
                raise ValueError
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:
                group["fused"] = optimizer.defaults["fused"]  # depends on the device
        model.load_state_dict(checkpoint["network"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("the network or the optimizer is not that of the run") from error


def layout(state):
    """The state of an optimizer with shapes instead of tensors, and without what may differ."""
    any_value = {"lr": None, "fused": None, "foreach": None}
    groups = [group | any_value for group in state["param_groups"]]
    states = {
        index: {name: getattr(value, "shape", None) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return groups, states
