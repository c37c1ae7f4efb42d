"""Train a recipe with several seeds, and compare it with variations: a loop over train.py.

python -m benchmarks.seeds --recipe tiny --seeds 5
python -m benchmarks.seeds --recipe fast --vary "--label-smoothing 0" -- --val-size 10000
python -m benchmarks.seeds --vary "--head ConcatMLP" --vary "--schedule constant --lr 0.002"

Flags of train.py go after --. Each --vary adds a row, the same with more flags, which is compared
with the first over runs with the same seed. Accuracies are those after the last epoch, of the test
or, with --val-size, the validation images. After an interruption the same command continues.
"""

import csv
import hashlib
import json
import shlex
import statistics
import subprocess
import sys

import torch

from benchmarks import common
from benchmarks.common import BENCHMARKS, ROOT, percent, summary
from training.console import Parser, UserError, exit_status

CODE = [path for part in (".", "training", "published") for path in (ROOT / part).glob("*.py")]


def directory(flags):
    """Where the runs with some flags are: a name for all that determines their results."""
    digest = hashlib.sha256(json.dumps([flags, common.machine(), torch.__version__]).encode())
    for path in sorted(CODE):
        digest.update(path.read_bytes())
    return BENCHMARKS / "seeds" / digest.hexdigest()[:12]


def train(path, flags):
    """Train in a directory, unless it was done; returns results.json and the last accuracies."""
    if not (path / "results.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--dataset", "mnist", *flags]
        command += ["--output-dir", str(path), "--resume", "--quiet"]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"failed: {shlex.join(command)}", status)
    *_, last = csv.DictReader((path / "metrics.csv").read_text().splitlines())
    split, accuracies = "val_" if "val_sum_accuracy" in last else "test_", {}
    for name, value in last.items():
        if name.startswith(split) and not name.endswith("_loss"):
            accuracies[name.removeprefix(split).removesuffix("_accuracy")] = float(value)
    return json.loads((path / "results.json").read_text()), accuracies


def measure(rows, seeds):
    """Train with the flags of each row, a dict by name, and each seed; returns results by row."""
    recipes = {name: common.parse_flags(flags)[1] for name, flags in rows.items()}
    if len({recipe.val_size for recipe in recipes.values()}) > 1:
        raise UserError("--val-size cannot be varied: pass it after --", status=2)
    paths = {name: directory(flags) for name, flags in rows.items()}
    runs = {name: [] for name in rows}
    for seed in seeds:
        for name, flags in rows.items():  # inner loop: a busy machine slows all rows down
            if directory(flags) != paths[name]:
                raise UserError("the code has changed: the same command starts again")
            run = train(paths[name] / f"seed-{seed}", [*flags, "--seed", str(seed)])
            text = ", ".join(f"{key} {100 * value:.3f} %" for key, value in run[1].items())
            print(f"{name}, seed {seed}: {text}; {run[0]['train_seconds']:.1f} s", flush=True)
            runs[name].append(run)
    return {name: summarize(recipes[name], *zip(*runs[name], strict=True)) for name in rows}


def summarize(recipe, results, accuracies):
    """A row of the results file, from what `train` returned for each seed."""
    columns = ("dataset", "device", "precision", "threads", "versions", "parameters")
    each = {key: [one[key] for one in accuracies] for key in accuracies[0]}
    seconds = [one["train_seconds"] for one in results]
    return {column: results[0][column] for column in columns} | {
        "settings": recipe.as_plain(),
        "training_flops": common.training_flops(recipe),
        "each": each,
        "metrics": {key: summary(values) for key, values in each.items()},
        "train_seconds": seconds,
        "median_train_seconds": statistics.median(seconds),
    }


def table(rows):
    """The rows of a results file in Markdown; "both" is compared with that of the first."""
    base, lines = next(iter(rows.values())), []
    keys = list(dict.fromkeys(key for row in rows.values() for key in row["metrics"]))
    for name, row in rows.items():
        cells = [percent(row["metrics"].get(key), "min") for key in keys]
        cells += ["" if row is base else common.compared(row["each"]["both"], base["each"]["both"])]
        lines.append([f"`{name}`", *cells, f"{row['median_train_seconds']:.3g}"])
    return common.markdown(["", *keys, "both, compared", "seconds"], lines)


def train_flags(text):
    return [common.train_flag(flag) for flag in shlex.split(text)]


def parse_args(argv):
    parser = Parser(prog="seeds.py", description=__doc__)
    common.add_flags(parser, "seeds.json", recipe="default", seeds=5)
    text = 'a row with more flags, such as "--lr 0.1"; repeatable'
    options = {"type": train_flags, "default": [], "metavar": "FLAGS", "help": text}
    parser.add_argument("--vary", action="append", **options)
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    base = ["--recipe", args.recipe, *args.flags]
    rows = {args.recipe: base} | {shlex.join(flags): base + flags for flags in args.vary}
    results = common.provenance("seeds", argv) | {"rows": measure(rows, range(args.seeds))}
    print("", table(results["rows"]), "", sep="\n")
    common.save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
