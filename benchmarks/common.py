"""What the benchmarks share: cost of a recipe, statistics, provenance of a result, its file."""

import json
import math
import platform
import shlex
import statistics
import subprocess
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset import NUM_DIGITS, SIDE
from model import build_model
from recipes import RECIPES
from training.checkpoint import RUNS
from training.console import Number
from training.files import write_atomic
from training.flags import train_parser
from training.recipe import recipe_from_args

ROOT = Path(__file__).parent.parent
BENCHMARKS = RUNS / "benchmarks"
TRAIN_IMAGES = 60_000
OWN_FLAGS = ("--recipe", "--seed", "--output-dir", "--resume", "--eval-only")  # of train.py


def multiply_adds(recipe):
    """Multiply-adds of the forward pass of one image through the network of a Recipe."""
    model = build_model(recipe.encoder, recipe.head).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, NUM_DIGITS))
    return counter.get_total_flops() // 2


def training_flops(recipe):
    """FLOPs to train a Recipe; the backward pass counts as two forward passes."""
    return 6 * multiply_adds(recipe) * recipe.epochs * (TRAIN_IMAGES - recipe.val_size)


def summary(values):
    """Statistics of values as a dict; the standard deviation of a single value is None."""
    return {
        "n": len(values),
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def percent(values, *others):
    """The mean (sd) of a `summary` of fractions in percent, and others such as "min", as text."""
    if values is None:
        return "–"
    sd = "" if values["sd"] is None else f" ({100 * values['sd']:.3f})"
    texts = [f", {name} {100 * values[name]:.3f}" for name in others]
    return "".join([f"{100 * values['mean']:.3f}{sd}", *texts])


def compared(values, others):
    """Mean difference of equal seeds in percentage points ± the standard error of that mean."""
    change = summary([100 * (a - b) for a, b in zip(values, others, strict=True)])
    error = f" ± {change['sd'] / math.sqrt(change['n']):.3f}" if change["n"] > 1 else ""
    return f"{change['mean']:+.3f}{error}"


def markdown(header, rows):
    """A table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine():
    """The processor, the number of threads, and the GPU if there is one, as text."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions know nothing
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{known.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads{gpu}"


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
        raise ArgumentTypeError(f"{text} is set by the benchmark")
    return text


def train_flags(text):
    """An argparse type: the same for several flags in one text, as a list."""
    return [train_flag(flag) for flag in shlex.split(text)]


def add_flags(parser, output, recipe=None, seeds=None):
    """Add --output, flags of train.py, and --recipe and --seeds if they have a default."""

    def flag(name, text, **options):
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **options)

    if recipe:
        text = "row of the table in recipes.py"
        flag("--recipe", text, choices=RECIPES, default=recipe, metavar="NAME")
    if seeds:
        text = "number of seeds: 0 to N - 1"
        flag("--seeds", text, type=Number(int, 1, 10_000), default=seeds, metavar="N")
    flag("--output", "results file", type=Path, default=BENCHMARKS / output, metavar="FILE")
    text = "flags of train.py, after --"
    parser.add_argument("flags", nargs="*", type=train_flag, help=text)


def parse_flags(flags):
    """The arguments and the Recipe for flags of train.py. Raises UserError if they are invalid."""
    args = train_parser("", RECIPES).parse_args(flags)
    return args, recipe_from_args(args, RECIPES)
