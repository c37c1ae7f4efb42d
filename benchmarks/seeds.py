"""Train a recipe with several seeds: accuracies, cost, and how variations of the recipe compare.

python -m benchmarks.seeds --recipe tiny --seeds 5
python -m benchmarks.seeds --recipe fast --seeds 3 --vary label_smoothing=0 -- --val-size 10000
python -m benchmarks.seeds --seeds 3 --vary head=ConcatMLP --vary schedule=constant lr=0.002

Flags of train.py go after --. Each --vary adds a row: the recipe with some columns changed, which
is compared with the unchanged recipe over runs with the same seed. Accuracies are those after the
last epoch, on the test set or, with --val-size, on the validation images. After an interruption the
same command continues, unless the code, the dataset, torch or the machine has changed.
"""

import csv
import hashlib
import io
import json
import math
import statistics
import sys
from argparse import ArgumentTypeError
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import train
from benchmarks.common import (
    BENCHMARKS,
    ROOT,
    machine,
    provenance,
    save_json,
    summary,
    train_flag,
    training_flops,
)
from dataset import load_data
from model import build_model
from recipes import RECIPES, recipe_from_args
from training import plots
from training.augment import Affine
from training.checkpoint import LAST
from training.cli import Parser, exit_status, number, parse_train_args, train_parser
from training.device import pick_device
from training.errors import UserError

# The program's modules, as far as they are imported here: what the result of a run depends on.
FILES = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
CODE = sorted(
    path for path in FILES if path.parent in (ROOT, ROOT / "training", ROOT / "published")
)
OUTPUTS = ("digit", "sum", "both")  # "both": digit and sum of a pair are correct
# Ranges of the recipe's numbers that have no flag in train.py.
RANGES = {"loss_weight": number(float, 0, 100), "label_smoothing": number(float, 0, 0.9)}
RANGES |= {"clean_epochs": number(int, 0, 100_000)}
RANGES |= {"mean": number(float, 0, 1), "std": number(float, 0.001, 100)}
COMPARISON = """\
Accuracies on {} images in percent, median seconds of training. Compared: mean difference from the
first row over runs with the same seed ± standard error of that mean."""


def vary(recipe, changes):
    """A Recipe with some columns changed.

    Args:
        changes: texts such as "lr=0.1", with a value in JSON, or a name: "head=ConcatMLP".
            Encoders, heads, schedules and addends are those in the table of recipes.

    Raises:
        UserError: there is no such column or value.
    """
    columns = {}
    for change in changes:
        column, _, text = change.partition("=")
        if column in columns:
            raise UserError(f"--vary {change}: {column} is given twice", status=2)
        if column not in recipe.as_plain():
            raise UserError(f"--vary {change}: recipes have no column {column!r}", status=2)
        if column == "val_size":
            message = "rows must be measured on the same images; pass --val-size after --"
            raise UserError(f"--vary {change}: {message}", status=2)
        try:
            columns[column] = parse_value(recipe, column, text)
        except UserError as error:
            raise UserError(f"--vary {change}: {error}", status=2) from error
        except (ArgumentTypeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"--vary {change}: invalid value for {column}", status=2) from error
    varied = replace(recipe, **columns)
    try:  # now, not after hours of training other rows
        train.make_optimizer(build_model(varied.encoder, varied.head), varied)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--vary {' '.join(changes)}: {error}", status=2) from error
    return varied


def parse_value(recipe, column, text):
    """The new value of a recipe's column. Raises one of several errors if it is invalid."""
    parser = train_parser()
    if column in vars(parser.parse_args([])):  # a flag has the name of its column
        return getattr(parser.parse_args([f"--{column.replace('_', '-')}={text}"]), column)
    if column in RANGES:
        return RANGES[column](text)
    if column in ("encoder", "head", "schedule"):
        values = {getattr(recipe, column) for recipe in RECIPES.values()}
        return {value.__name__: value for value in values}[text]
    if column == "optimizer":
        return text
    value = json.loads(text)
    if column == "affine":
        return None if value is None else Affine(*map(number(float, 0, 90), value))
    if type(value) is not type(getattr(recipe, column)):
        raise TypeError
    return value


def conditions(flags):
    """What the results of training with some flags depend on, besides the code and the recipe."""
    args = parse_train_args(flags)
    dataset = load_data(args.dataset, args.data_dir).name
    device, _ = pick_device(args)  # stores the precision
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return flags, dataset, str(device), gpu, args.precision, torch.__version__, machine()


def work_directory(recipe, conditions):
    """The directory of a row's runs, which depends on all that determines their results."""
    settings = recipe.as_plain(), conditions
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in CODE:
        digest.update(path.read_bytes())
    return BENCHMARKS / "seeds" / digest.hexdigest()[:12]


def train_once(name, recipe, seed, directory, flags):
    """Train a row of the table, unless an earlier call has; returns results.json as a dict."""
    if not (directory / "results.json").exists():
        unfinished = (directory / LAST).exists()
        place = ["--resume" if unfinished else "--output-dir", str(directory)]
        with redirect_stdout(io.StringIO()):
            argv = ["--recipe", name, "--seed", str(seed), "--quiet", *place, *flags]
            status = train.main(argv, recipes={name: recipe})
        if status:
            message = f"{name}: training with seed {seed} did not finish"
            raise UserError(f"{message}; the same command continues", status)
    return json.loads((directory / "results.json").read_text())


def measured_on(val_size):
    """The kind of images on which accuracies are measured."""
    return "validation" if val_size else "test"


def run_seed(name, recipe, seed, directory, flags):
    """Train a row with a seed; returns results.json and the last epoch's accuracies, fractions."""
    results = train_once(name, recipe, seed, directory, flags)
    split = "val" if recipe.val_size else "test"
    with open(directory / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    accuracies = {output: float(last[f"{split}_{output}_accuracy"]) for output in OUTPUTS}
    if split == "test":
        accuracies["consistency"] = results["test"]["consistency"]
    text = "  ".join(f"{key} {100 * value:.3f} %" for key, value in accuracies.items())
    where = f"on {measured_on(recipe.val_size)} images"
    print(f"{name}  seed {seed}  {text}  {where}  {results['train_seconds']:.1f} s", flush=True)
    return results, accuracies


def summarize(recipe, runs):
    """A row's part of the results file, in JSON types, from what `run_seed` returned per seed."""
    results, accuracies = zip(*runs, strict=True)
    seconds = [one["train_seconds"] for one in results]
    each = {key: [one[key] for one in accuracies] for key in accuracies[0]}
    columns = ("dataset", "device", "precision", "threads", "versions")
    return {
        **{column: results[0][column] for column in columns},
        "settings": recipe.as_plain(),
        "parameters": results[0]["parameters"],
        "training_flops": training_flops(recipe),
        "each": each,
        "metrics": {key: summary(values) for key, values in each.items()},
        "train_seconds": summary(seconds),
        "median_train_seconds": statistics.median(seconds),
    }


def report(name, row):
    """Text on the accuracies and the cost of a row."""
    cost = f"{row['parameters']:,} parameters, {row['training_flops']:.2e} FLOPs"
    cost += f", {row['median_train_seconds']:.1f} s of training (median)"
    images = f"{measured_on(row['settings']['val_size'])} images"
    lines = [f"{name}: {row['dataset']}, {images}, epochs: {row['settings']['epochs']}, {cost}"]
    for key, values in row["metrics"].items():
        shown = [what for what in ("mean", "sd", "min", "max") if values[what] is not None]
        percent = [f"{what} {100 * values[what]:.3f}" for what in shown]
        lines.append(f"  {key:<12} {'  '.join(percent)}")
    return "\n".join(lines)


def comparison(rows):
    """The table of all rows, a dict as in the results file, in Markdown. See COMPARISON."""
    base = next(iter(rows.values()))
    lines = ["| change | digit | sum | both | both, compared | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in rows.items():
        cells = [f"{100 * row['metrics'][output]['mean']:.3f}" for output in OUTPUTS]
        pairs = zip(row["each"]["both"], base["each"]["both"], strict=True)
        change = summary([100 * (changed - unchanged) for changed, unchanged in pairs])
        compared = f"{change['mean']:+.3f}" if row is not base else ""
        if compared and change["n"] > 1:
            compared += f" ± {change['sd'] / math.sqrt(change['n']):.3f}"
        seconds = f"{row['median_train_seconds']:.1f}"
        lines.append(f"| {' | '.join([f'`{name}`', *cells, compared, seconds])} |")
    return "\n".join(lines)


def parse_args(argv):
    """The flags, and the rows to run: a dict of Recipes, the first of which is not varied."""
    parser = Parser(prog="seeds.py", description=__doc__)
    flag = parser.add_argument
    text = "row of the table in recipes.py (default: %(default)s)"
    flag("--recipe", choices=RECIPES, default="default", metavar="NAME", help=text)
    text = "number of seeds: 0 to N - 1 (default: %(default)s)"
    flag("--seeds", type=number(int, 1, 10_000), default=5, metavar="N", help=text)
    text = "a variation of the recipe; repeatable"
    flag("--vary", nargs="+", action="append", default=[], metavar="COLUMN=VALUE", help=text)
    text = f"results file (default: {BENCHMARKS}/RECIPE.json, or RECIPE-ablation.json with --vary)"
    flag("--output", type=Path, metavar="FILE", help=text)
    flag("flags", nargs="*", type=train_flag, help="flags of train.py, after --")
    args = parser.parse_args(argv)
    given = parse_train_args(["--recipe", args.recipe, *args.flags])
    recipe = recipe_from_args(given)
    rows = {args.recipe: recipe}
    rows |= {" ".join(changes): vary(recipe, changes) for changes in args.vary}
    for column in (change.partition("=")[0] for changes in args.vary for change in changes):
        if getattr(given, column, None) is not None:
            raise UserError(f"{column} is both in --vary and in a flag after --", status=2)
    return args, rows


@exit_status
def main(argv):
    args, rows = parse_args(argv)
    results = {**provenance("seeds", argv), "rows": {}}
    shared = conditions(args.flags)
    directories = {name: work_directory(recipe, shared) for name, recipe in rows.items()}
    runs = {name: [] for name in rows}
    # Plots that nobody looks at would take longer than some runs.
    with patch.object(plots, "run_figures", lambda *args: {}):
        for seed in range(args.seeds):
            for name, recipe in rows.items():  # inner loop: a busy machine slows all rows down
                directory = directories[name] / f"seed-{seed}"
                runs[name].append(run_seed(name, recipe, seed, directory, args.flags))
    for name, recipe in rows.items():
        results["rows"][name] = summarize(recipe, runs[name])
        print(report(name, results["rows"][name]), flush=True)
    if args.vary:
        note = COMPARISON.format(measured_on(rows[args.recipe].val_size))
        print("", comparison(results["rows"]), "", note, sep="\n")
    name = f"{args.recipe}-ablation.json" if args.vary else f"{args.recipe}.json"
    save_json(args.output or BENCHMARKS / name, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
