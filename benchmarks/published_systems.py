"""Compare our runs of the published systems with what was published; prints a table in Markdown.

python -m benchmarks.published_systems
python -m benchmarks.published_systems --curve    # also plot published/results/concat-mlp/curve.png

Reads the results of train.py --recipe NAME in published/results/NAME, results.json or, of several
seeds, seed-N.json, and results/default.json.
"""

import csv
import json
import statistics
import sys
from dataclasses import replace
from typing import NamedTuple

from benchmarks.common import ROOT, training_flops
from model import build_model
from recipes import RECIPES, constant
from training import plots
from training.cli import Parser, exit_status
from training.errors import UserError
from training.files import write_atomic

PUBLISHED = ROOT / "published" / "results"
DEFAULT = ROOT / "results" / "default.json"
OUTPUTS = ("digit", "sum", "both")


class Accuracies(NamedTuple):
    """Test accuracies in percent; None if unknown. See published/README.md for their sources."""

    digit: float | None = None
    sum: float | None = None
    both: float | None = None
    mean: float | None = None  # of digit and sum

    def __str__(self):
        three = " / ".join("–" if value is None else f"{value:.2f}" for value in self[:3])
        if self.mean is None:
            return three
        return f"mean {self.mean:.2f}" if self.digit is None else f"{three}, mean {self.mean:.2f}"


SYSTEMS = {
    "concat-mlp": Accuracies(digit=98.96, sum=98.83),
    "shared-trunk": Accuracies(digit=98.97, sum=55.07, both=54.8),
    "shared-trunk-slow": Accuracies(digit=98.35, sum=38.97, both=38.75),
    "concat-linear": Accuracies(mean=82.88),  # of the authors' notebook
    "concat-linear --epochs 40": Accuracies(mean=88.19),  # trained longer, without a log
    "added": Accuracies(digit=98.13),  # its sum was not trained
}
# For each system, the recipe that fixes what held it back.
FIXED = {
    "shared-trunk": "shared-trunk-fixed",
    "shared-trunk-slow": "shared-trunk-fixed",
    "concat-linear": "concat-linear-fixed",
    "added": "added-fixed",
}

# Published test accuracies of concat-mlp after each of twenty epochs, in percent.
CURVE = {
    "digit": "56.34 94.29 96.57 97.5 98.04 98.19 98.24 98.5 98.69 98.71 "
    "98.74 98.84 98.87 98.92 98.87 98.95 99.0 98.99 98.9 98.96",
    "sum": "9.94 14.32 18.48 26.86 36.98 48.15 60.81 71.26 78.29 85.94 "
    "90.52 94.8 96.65 97.72 98.01 98.59 98.62 98.72 98.54 98.83",
}


def read(path, how):
    """The text of a file. Raises UserError if it is missing; `how` is the command that makes it."""
    if not path.exists():
        raise UserError(f"{path} is missing; it comes from {how}")
    return path.read_text()


def check(path, found, expected):
    """Raise UserError unless the results in a file are those of today's recipe, on MNIST."""
    for key, value in expected.items():
        if found[key] != value:
            raise UserError(f"{path}: {key} is {found[key]!r} instead of {value!r}; run it again")


def find_recipe(system):
    """The name of a system's recipe, and the Recipe with the number of epochs of the system."""
    name, _, epochs = system.partition(" --epochs ")
    return name, replace(RECIPES[name], epochs=int(epochs or RECIPES[name].epochs))


def expected_settings(recipe):
    """What the results of a recipe must have, as a dict."""
    model = build_model(recipe.encoder, recipe.head)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"dataset": "mnist", "parameters": parameters}


def run_accuracies(system):
    """Accuracies of our run of a system in PUBLISHED, after the epochs of its recipe.

    With a constant learning rate, the first epochs of a longer run are those of a shorter one.
    """
    name, recipe = find_recipe(system)
    path = PUBLISHED / name / "results.json"
    results = json.loads(read(path, f"train.py --recipe {name}"))
    expected = expected_settings(recipe) | {"recipe": name, "note": ""}
    if recipe.schedule is not constant:
        expected["epochs"] = recipe.epochs
    check(path, results, expected)
    rows = list(csv.DictReader(read(path.with_name("metrics.csv"), str(path)).splitlines()))
    if len(rows) < recipe.epochs:
        raise UserError(f"{path}: epochs is {len(rows)}, less than {recipe.epochs}; run it again")
    row = rows[recipe.epochs - 1]
    return Accuracies(*(100 * float(row[f"test_{output}_accuracy"]) for output in OUTPUTS))


def over_seeds(name, paths):
    """Mean and standard deviation of our runs with several seeds, as text; paths: results.json."""
    expected = expected_settings(RECIPES[name]) | {"recipe": name, "epochs": RECIPES[name].epochs}
    runs = [json.loads(path.read_text()) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        check(path, run, expected)
    seeds = [[100 * run["test"][f"{output}_accuracy"] for run in runs] for output in OUTPUTS]
    mean, sd = (Accuracies(*map(f, seeds)) for f in (statistics.mean, statistics.stdev))
    return f"{mean} (mean of {len(runs)}; sd {sd})"


def as_published(name):
    """Our accuracies for a published system, those that it also published."""
    if seeds := sorted((PUBLISHED / name).glob("seed-*.json")):
        return over_seeds(name, seeds)
    digit, total, both, _ = run_accuracies(name)
    if SYSTEMS[name].mean:
        return Accuracies(digit, total, both, mean=(digit + total) / 2)
    return Accuracies(digit, total, both) if SYSTEMS[name].sum else Accuracies(digit)


def default_accuracies():
    """Means of the recipe `default` over its seeds."""
    results = json.loads(read(DEFAULT, "python -m benchmarks.seeds"))["rows"]["default"]
    check(DEFAULT, results, expected_settings(RECIPES["default"]))
    metrics = [results["metrics"][output] for output in OUTPUTS]
    accuracies = Accuracies(*(100 * values["mean"] for values in metrics))
    return f"{accuracies} (mean of {metrics[0]['n']})"


def cost(system):
    """Number of parameters, epochs and training FLOPs of a system, as a list of cells."""
    _, recipe = find_recipe(system)
    parameters, flops = expected_settings(recipe)["parameters"], f"{training_flops(recipe):.1e}"
    return [f"{parameters:,}", str(recipe.epochs), flops.replace("e+", "e")]


def table():
    """The comparison in Markdown: accuracies digit / sum / both correct, in percent."""
    header = ["recipe", "published", "as published, ours", "fixed, ours"]
    rows = [[*header, "parameters", "epochs", "FLOPs"], ["---"] * 4 + ["---:"] * 3]
    for name, accuracies in SYSTEMS.items():
        fixed = run_accuracies(FIXED[name]) if name in FIXED else "–"
        rows.append([f"`{name}`", *map(str, (accuracies, as_published(name), fixed)), *cost(name)])
    rows.append(["`default`", "–", "–", default_accuracies(), *cost("default")])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def plot_curve():
    """Plot error rates of concat-mlp by epoch, ours and the published ones; returns the path."""
    path = PUBLISHED / "concat-mlp" / "curve.png"
    metrics = read(path.with_name("metrics.csv"), "train.py --recipe concat-mlp")
    history = list(csv.DictReader(metrics.splitlines()))
    subtitle = "concat-mlp. Ours: all ten addends for each test image; published: one, sampled."
    figure = plots.new_figure("Test error rate: ours and published", subtitle, 5.6)
    axes = figure.add_subplot()
    epochs = range(1, len(history) + 1)
    for output, text in CURVE.items():
        ours = [100 - 100 * float(row[f"test_{output}_accuracy"]) for row in history]
        theirs = [100 - float(value) for value in text.split()]
        color = plots.OUTPUT_COLORS[output]
        for name, errors, style in (("ours", ours, "-o"), ("published", theirs, "--s")):
            fill = color if name == "ours" else "white"
            label = f"{output}, {name}: {100 - errors[-1]:.2f} %"
            axes.plot(epochs, errors, style, color=color, mfc=fill, ms=5, label=label)
    plots.finish_curves(axes, "error rate, % (log scale)", "accuracy after the last epoch")
    write_atomic(path, plots.as_png(figure))
    return path


def parse_args(argv):
    parser = Parser(prog="published_systems.py", description=__doc__)
    parser.add_argument("--curve", action="store_true", help="plot the curve of concat-mlp")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    print(table())
    if args.curve:
        print(f"saved    {plot_curve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
