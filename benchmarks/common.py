"""What the benchmarks share: cost of a recipe, statistics, provenance of a result, its file."""

import json
import platform
import shlex
import statistics
import subprocess
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import build_model
from training.checkpoint import RUNS
from training.constants import NUM_DIGITS, SIDE
from training.files import write_atomic

ROOT = Path(__file__).parent.parent
BENCHMARKS = RUNS / "benchmarks"
TRAIN_IMAGES = 60_000
OWN_FLAGS = ("--recipe", "--seed", "--output-dir", "--resume", "--eval-only")  # of train.py


def multiply_adds(recipe):
    """Multiply-adds of the forward pass of one image through the network of a Recipe."""
    model = build_model(recipe.encoder, recipe.head, recipe.members).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, NUM_DIGITS))
    return counter.get_total_flops() // 2


def training_flops(recipe):
    """FLOPs to train a Recipe; the backward pass counts as two forward passes."""
    return 6 * multiply_adds(recipe) * recipe.epochs * (TRAIN_IMAGES - recipe.val_size)


def summary(values):
    """Number, mean, sample standard deviation (None for a single value) and range of values."""
    return {
        "n": len(values),
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def machine():
    """The processor and the number of threads, as text."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions know nothing
    processor = known.get("cpu_name", platform.machine())
    return f"{processor}, {torch.get_num_threads()} threads"


def provenance(script, argv):
    """How a result was made: command, commit of the code, machine and torch, as a dict."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        commit = ""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *argv]),
        "commit": commit or "unknown",
        "machine": machine(),
        "torch": str(torch.__version__),
    }


def save_json(path, value):
    """Write a results file, and print its path. Creates its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
    print(f"saved    {path}")


def train_flag(text):
    """An argparse type: a flag of train.py that the benchmarks do not set themselves."""
    if text.partition("=")[0] in OWN_FLAGS:
        raise ArgumentTypeError(f"{text} cannot be given after --")
    return text
