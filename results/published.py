"""The published systems beside ours: the table of the README, and a learning curve.

    python results/published.py            # print the table
    python results/published.py --curve    # draw results/concat-mlp/curve.png as well

It reads what runs of train.py left, kept in results/RECIPE: results.json and metrics.csv. FLOPs are
those of training: 6 x the multiply-adds of one image's way through the network x the images seen.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS.parent / "benchmarks")]

from seeds import training_flops  # noqa: E402

import model  # noqa: E402
import plots  # noqa: E402
from recipes import RECIPES  # noqa: E402
from rundir import as_png, write_whole  # noqa: E402

NONE = "–"


class Published(NamedTuple):
    """A system's published accuracies in per cent; None where none was published."""

    about: str  # who published it, and how its number meets the image
    digit: float | None = None
    sum: float | None = None
    both: float | None = None
    mean: float | None = None  # of digit and sum


SYSTEMS = {
    "concat-mlp": Published(
        "ajaykulkarni09 (Extensive-Vision-AI-Program, session 3): digit logits and one-hot number "
        "side by side into FC 128, ReLU, FC 19; one number drawn for each test image",
        digit=98.96,
        sum=98.83,
    ),
    "shared-trunk": Published(
        "an author who isn't named: the number, embedded by FC 30 and ReLU, beside 192 features of "
        "the image; three layers, and both heads on the last",
        digit=98.97,
        sum=55.07,
        both=54.8,
    ),
    "shared-trunk-slow": Published(
        "the same author: the same network at a tenth of the rate",
        digit=98.35,
        sum=38.97,
        both=38.75,
    ),
    "concat-linear": Published(
        "Haswants Aekula, Shreeyash Pawar, Smita and Manjeera (hassiahk/EVA6-Phase1-Assignments, "
        "session 3): digit logits and one-hot number side by side into one linear layer; the mean "
        "of digit and sum in the best epoch on the test images",
        mean=88.19,
    ),
    "added": Published(
        "ShriramGithub7 (EV8---Sum-of-Random-number-and-MNIST-number): the number, embedded by an "
        "FC layer and ReLU, added to the image's features; the digit in the best epoch on the "
        "training images, the sum not trained",
        digit=98.13,
    ),
}

# Of concat-mlp's author: test accuracies after each of twenty epochs, in per cent.
CURVE = {
    "digit": "56.34 94.29 96.57 97.5 98.04 98.19 98.24 98.5 98.69 98.71 "
    "98.74 98.84 98.87 98.92 98.87 98.95 99.0 98.99 98.9 98.96",
    "sum": "9.94 14.32 18.48 26.86 36.98 48.15 60.81 71.26 78.29 85.94 "
    "90.52 94.8 96.65 97.72 98.01 98.59 98.62 98.72 98.54 98.83",
}


class Unfit(Exception):
    """A result can't stand beside the published ones; the message says what to do."""


def read_results(name, parameters):
    """What results.json says of the run of a recipe.

    Raises:
        Unfit: it isn't there, or is of another network, length or data than the recipe's own.
    """
    path = RESULTS / name / "results.json"
    if not path.exists():
        raise Unfit(f"{path} isn't there; put a run of train.py --recipe {name} there")
    results = json.loads(path.read_text())
    meant = {"recipe": name, "dataset": "mnist", "note": "", "parameters": parameters}
    for key, value in (meant | {"epochs": RECIPES[name].epochs}).items():
        if results[key] != value:
            raise Unfit(f"{path}: {key} is {results[key]!r}, not {value!r}; run the recipe again")
    return results


def shares(digit, total, both, mean):
    """Accuracies in per cent as a cell of the table: of digit, sum, both right, and the mean."""
    three = " / ".join(NONE if x is None else f"{x:.2f}" for x in (digit, total, both))
    if mean is None:
        return three
    return f"mean {mean:.2f}" if digit is None else f"{three}, mean {mean:.2f}"


def row(name, published):
    """A recipe's row of the table, cell by cell; `published` is None for one of our own."""
    recipe = RECIPES[name]
    parameters = model.count_parameters(model.build(recipe.encoder, recipe.join))
    results = read_results(name, parameters)
    heads = ("digit", "sum", "both")
    digit, total, both = (100 * results["test"][f"{head}_accuracy"] for head in heads)
    mean = (digit + total) / 2 if published and published.mean else None
    ours = shares(digit, total, both, mean)
    device = results["device"].split(":")[0]
    cores = f" x {results['threads']}" if device == "cpu" else ""
    seconds = f"{results['train_seconds']:,.0f} ({device}{cores}, {results['precision']})"
    theirs = shares(*published[1:]) if published else NONE
    cost = f"{training_flops(recipe.as_plain()):.1e}".replace("e+", "e")
    return [f"`{name}`", theirs, ours, f"{parameters:,}", str(recipe.epochs), cost, seconds]


def table():
    """The comparison in Markdown: a table, and a line on each system that was published."""
    head = ["recipe", "published", "ours", "parameters", "epochs", "FLOPs", "seconds"]
    rows = [row(name, published) for name, published in SYSTEMS.items()]
    cells = [head, ["---"] * 3 + ["---:"] * 4, *rows, row("default", None)]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    abouts = [f"- `{name}`: {published.about}." for name, published in SYSTEMS.items()]
    return "\n".join([*lines, "", *abouts])


def draw_curve():
    """Draw our run of concat-mlp over the published one; returns the picture's path.

    Raises:
        Unfit: the run isn't there.
    """
    folder = RESULTS / "concat-mlp"
    if not (folder / "metrics.csv").exists():
        advice = "put a run of train.py --recipe concat-mlp there"
        raise Unfit(f"no curve: {folder / 'metrics.csv'} isn't there; {advice}")
    with open(folder / "metrics.csv", newline="") as file:
        history = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    published = {head: [float(value) for value in text.split()] for head, text in CURVE.items()}
    title = "concat-mlp: test accuracy, ours with all ten numbers, theirs with one drawn"
    write_whole(folder / "curve.png", as_png(plots.comparison_figure(history, published, title)))
    return folder / "curve.png"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", action="store_true", help="draw results/concat-mlp/curve.png")
    args = parser.parse_args(argv)
    try:
        print(table())
        if args.curve:
            print(f"picture  {draw_curve()}")
    except Unfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
