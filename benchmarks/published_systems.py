"""Compare our runs of the published systems with what was published; prints a table in Markdown.

python -m benchmarks.published_systems

Reads the results of train.py --recipe NAME in published/results/NAME, results.json or, of several
seeds, seed-N.json, and results/default.json.
"""

import csv
import json
import statistics
import sys
from dataclasses import replace

from benchmarks.common import ROOT, markdown, training_flops
from model import build_model
from recipes import RECIPES
from training.console import Parser, UserError, exit_status
from training.recipe import constant

PUBLISHED = ROOT / "published" / "results"
DEFAULT = ROOT / "results" / "default.json"
OUTPUTS = ("digit", "sum", "both")
# Published test accuracies, in percent. See published/README.md for their sources.
SYSTEMS = {
    "concat-mlp": "98.96 / 98.83 / –",
    "shared-trunk": "98.97 / 55.07 / 54.80",
    "shared-trunk-slow": "98.35 / 38.97 / 38.75",
    "concat-linear": "mean 82.88",  # of the authors' notebook
    "concat-linear --epochs 40": "mean 88.19",  # trained longer, without a log
    "added": "98.13 / – / –",  # its sum was not trained
}
# For each system, the recipe that fixes what held it back.
FIXED = {
    "shared-trunk": "shared-trunk-fixed",
    "shared-trunk-slow": "shared-trunk-fixed",
    "concat-linear": "concat-linear-fixed",
    "added": "added-fixed",
}


def read(path, how):
    """The text of a file. Raises UserError if it is missing; `how` is the command that makes it."""
    if not path.exists():
        raise UserError(f"{path} is missing; it comes from {how}")
    return path.read_text()


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def check(path, found, expected):
    """Raise UserError unless the results in a file are those that are expected."""
    for key, value in expected.items():
        if found[key] != value:
            raise UserError(f"{path}: {key} is {found[key]!r} instead of {value!r}; run it again")


def parameters(recipe):
    return sum(part.numel() for part in build_model(recipe.encoder, recipe.head).parameters())


def find_recipe(system):
    """The name of a system's recipe, and the Recipe with the number of epochs of the system."""
    name, _, epochs = system.partition(" --epochs ")
    return name, replace(RECIPES[name], epochs=int(epochs or RECIPES[name].epochs))


def runs(system):
    """Our runs of a system: accuracies in percent of digit, sum and both for each run."""
    name, recipe = find_recipe(system)
    expected = {"recipe": name, "dataset": "mnist", "parameters": parameters(recipe)}
    tests, folder = [], PUBLISHED / name
    for path in sorted(folder.glob("seed-*.json")) or [folder / "results.json"]:
        results = json.loads(read(path, f"train.py --recipe {name}"))
        check(path, results | results.get("flags", {}), expected)  # older runs have no "flags"
        tests.append(results["test"])
    if len(tests) == 1:
        # With a constant learning rate, the first epochs of a longer run are a shorter one.
        rows = read_csv(folder / "metrics.csv")
        longer = len(rows) > recipe.epochs and recipe.schedule is not constant
        if longer or len(rows) < recipe.epochs:
            raise UserError(f"{path}: epochs: {len(rows)} instead of {recipe.epochs}; run it again")
        last = rows[recipe.epochs - 1]
        tests = [{name.removeprefix("test_"): value for name, value in last.items()}]
    return [[100 * float(test[f"{output}_accuracy"]) for output in OUTPUTS] for test in tests]


def three(values):
    return " / ".join(f"{value:.2f}" for value in values)


def ours(system):
    """Our accuracies for a system, as text: the mean if there are several runs."""
    values = runs(system)
    means = [statistics.mean(output) for output in zip(*values, strict=True)]
    if "mean" in SYSTEMS.get(system, ""):
        return f"{three(means)}, mean {statistics.mean(means[:2]):.2f}"
    if len(values) == 1:
        return three(means)
    deviations = three(map(statistics.stdev, zip(*values, strict=True)))
    return f"{three(means)} (mean of {len(values)}; sd {deviations})"


def default_accuracies():
    """Means of the recipe `default` over its seeds."""
    row = json.loads(read(DEFAULT, "python -m benchmarks.seeds"))["rows"]["default"]
    check(DEFAULT, row, {"dataset": "mnist", "parameters": parameters(RECIPES["default"])})
    metrics = [row["metrics"][output] for output in OUTPUTS]
    return f"{three(100 * values['mean'] for values in metrics)} (mean of {metrics[0]['n']})"


def table():
    """The comparison in Markdown: accuracies digit / sum / both correct, in percent."""
    rows = []
    for system, published in (SYSTEMS | {"default": "–"}).items():
        recipe = find_recipe(system)[1]
        accuracies = "–" if system == "default" else ours(system)
        fixed = default_accuracies() if system == "default" else "–"
        if system in FIXED:
            fixed = ours(FIXED[system])
        flops = f"{training_flops(recipe):.1e}".replace("e+", "e")
        cost = [f"{parameters(recipe):,}", str(recipe.epochs), flops]
        rows.append([f"`{system}`", published, accuracies, fixed, *cost])
    header = ["recipe", "published", "as published, ours", "fixed, ours"]
    return markdown([*header, "parameters", "epochs", "FLOPs"], rows)


@exit_status
def main(argv):
    parse_args(argv)
    print(table())
    return 0


def parse_args(argv):
    return Parser(prog="published_systems.py", description=__doc__).parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
