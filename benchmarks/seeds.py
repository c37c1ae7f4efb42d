"""Train a recipe with several seeds, and compare it with variations: a loop over train.py.

python -m benchmarks.seeds --recipe tiny --seeds 5
python -m benchmarks.seeds --vary "--head ConcatMLP" --vary "--lr 0.1" -- --val-size 10000

Flags of train.py go after --. Each --vary adds a row with more flags, compared over equal seeds.
Accuracies are of test or, with --val-size, validation images. The same command continues.
"""

import csv
import hashlib
import json
import shlex
import subprocess
import sys

import torch

from benchmarks import common
from training.console import Parser, UserError, exit_status

CODE = {p for part in ("", "training/", "published/") for p in common.ROOT.glob(f"{part}*.py")}
CODE -= {common.ROOT / "predict.py", common.ROOT / "demo.py"}  # training does not use them


def directory(flags):
    """Where the runs with some flags are: a name for all that determines their results."""
    digest = hashlib.sha256(json.dumps([flags, common.machine(), torch.__version__]).encode())
    for path in sorted(CODE):
        digest.update(path.read_bytes())
    return common.BENCHMARKS / "seeds" / digest.hexdigest()[:12]


def train(path, flags):
    """Train in a directory, unless it was done; returns results.json with the last accuracies."""
    if not (path / "results.json").exists():
        command = [sys.executable, str(common.ROOT / "train.py"), "--dataset", "mnist", *flags]
        command += ["--output-dir", str(path), "--resume", "--quiet"]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"failed: {shlex.join(command)}", status)
    *_, last = csv.DictReader((path / "metrics.csv").read_text().splitlines())
    split, accuracies = "val_" if "val_sum_accuracy" in last else "test_", {}
    for name, value in last.items():
        if name.startswith(split) and not name.endswith("_loss"):
            accuracies[name.removeprefix(split).removesuffix("_accuracy")] = float(value)
    return json.loads((path / "results.json").read_text()) | {"accuracies": accuracies}


def measure(rows, seeds):
    """Train with the flags of each row, a dict by name, and each seed; returns results by row."""
    recipes = {name: common.parse_flags(flags)[1] for name, flags in rows.items()}
    if len({recipe.val_size for recipe in recipes.values()}) > 1:
        raise UserError("--val-size cannot be varied: pass it after --", status=2)
    paths, runs = {name: directory(flags) for name, flags in rows.items()}, {}
    for seed in seeds:
        for name, flags in rows.items():  # inner loop: a busy machine slows all rows down
            if directory(flags) != paths[name]:
                raise UserError("the code has changed: the same command starts again")
            run = train(paths[name] / f"seed-{seed}", [*flags, "--seed", str(seed)])
            text = ", ".join(f"{key} {100 * v:.3f} %" for key, v in run["accuracies"].items())
            print(f"{name}, seed {seed}: {text}; {run['train_seconds']:.1f} s", flush=True)
            runs.setdefault(name, []).append(run)
    return {name: summarize(recipes[name], runs[name]) for name in rows}


def summarize(recipe, runs):
    """A row of the results file, from what `train` returned for each seed."""
    info, names = runs[0]["flags"] | runs[0], "dataset device precision threads versions parameters"
    each = {key: [run["accuracies"][key] for run in runs] for key in info["accuracies"]}
    return {name: info[name] for name in names.split()} | {
        "settings": info["recipe"],
        "training_flops": common.training_flops(recipe),
        "each": each,
        "metrics": {key: common.summary(values) for key, values in each.items()},
        "train_seconds": common.summary([run["train_seconds"] for run in runs]),
    }


def table(rows):
    """The rows of a results file in Markdown; "both" is compared with that of the first."""
    base, lines = next(iter(rows.values())), []
    keys = list(dict.fromkeys(key for row in rows.values() for key in row["metrics"]))
    for name, row in rows.items():
        cells = [common.percent(row["metrics"].get(key), "min") for key in keys]
        cells += ["" if row is base else common.compared(row["each"]["both"], base["each"]["both"])]
        lines.append([f"`{name}`", *cells, f"{row['train_seconds']['median']:.3g}"])
    return common.markdown(["", *keys, "both, compared", "seconds"], lines)


def parse_args(argv):
    parser = Parser(prog="seeds.py", description=__doc__)
    common.add_flags(parser, "seeds.json", recipe="default", seeds=5)
    text = 'a row with more flags, such as "--lr 0.1"; repeatable'
    parser.add_argument("--vary", action="append", default=[], type=common.train_flags, help=text)
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
