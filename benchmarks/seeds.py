"""Run a recipe with several seeds, and print what it reaches and what it costs; ablations too.

    python benchmarks/seeds.py --recipe fast --seeds 10 -- --data-dir data
    python benchmarks/seeds.py --recipe fast --seeds 20 --name fast-ablation \\
        --vary label_smoothing=0 --vary optimizer=SGD lr=0.1 -- --val-size 10000

Each run is a call of `train.py` with the flags after `--`. Its last epoch counts, on the test set,
each image with all ten addends; with --val-size on the images held out instead. Each --vary is
another row beside the recipe's, and is compared with it seed by seed. A benchmark that was stopped
goes on where it was when it is called again, as long as all files are those of the same commit. The
results are written to results/NAME.json.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import recipes  # noqa: E402
import train  # noqa: E402
from dataset import NUM_DIGITS, SIDE, Affine  # noqa: E402
from recipes import RECIPES  # noqa: E402
from rundir import LAST  # noqa: E402

# How a column's value is made of the plain types of JSON, where it is none of them itself.
KINDS = {"affine": lambda limits: limits and Affine(*limits)}
KINDS["schedule"] = lambda name: getattr(recipes, name)
FILES = ("results", "args")
TRAIN_IMAGES = 60_000


def multiply_adds(recipe):
    """Multiplications and additions of one image's way through the network of a recipe's row."""
    network = model.build(recipe["encoder"], recipe["join"]).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, NUM_DIGITS))
    return counter.get_total_flops() // 2


def training_flops(recipe):
    """FLOPs of training by a recipe's row, the backward pass counted as two forward ones."""
    images = recipe["epochs"] * (TRAIN_IMAGES - recipe["val_size"])
    return 6 * multiply_adds(recipe) * images


def varied(recipe, changes):
    """A recipe's row with some columns changed, each by a text such as "lr=0.1" (JSON, or a name).

    Raises:
        ValueError, TypeError, AttributeError: there is no such column, or no such value.
    """
    columns = {}
    for change in changes:
        column, _, text = change.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        columns[column] = KINDS.get(column, lambda value: value)(value)
    return dataclasses.replace(recipe, **columns)


def run_once(name, seed, folder, flags):
    """Train the row `name` with one seed in `folder`, or take what lies there from an earlier call.

    Returns its figures (fractions), its results and its settings.
    """
    if not (folder / "results.json").exists():
        begun = (folder / LAST).exists()
        place = ["--resume", str(folder)] if begun else ["--output-dir", str(folder)]
        argv = ["--recipe", name, "--seed", str(seed), "--quiet", *place, *flags]
        with redirect_stdout(io.StringIO()):
            status = train.main(argv)
        if status:
            sys.exit(status)
    results, settings = (json.loads((folder / f"{part}.json").read_text()) for part in FILES)
    with open(folder / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    part = "val" if settings["recipe"]["val_size"] else "test"
    figures = {name: float(last[f"{part}_{name}_accuracy"]) for name in ("digit", "sum", "both")}
    if part == "test":
        figures["consistency"] = results["test"]["consistency"]
    return figures, results, settings


def summary(values):
    """n, mean, sample standard deviation, least and greatest of some numbers."""
    return {
        "n": len(values),
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def run_seeds(name, folder, args):
    """Train the row `name` with each seed; returns its part of the table, in plain types."""
    runs = []
    for seed in range(args.seeds):
        runs.append(run_once(name, seed, folder / f"seed-{seed}", args.flags))
        figures, results, settings = runs[-1]
        accuracies = "  ".join(f"{key} {100 * value:.3f}" for key, value in figures.items())
        print(f"{name}  seed {seed}  {accuracies}  {results['train_seconds']:.1f} s", flush=True)
    recipe = settings["recipe"]
    each = {key: [run[0][key] for run in runs] for key in figures}
    return {
        **{key: results[key] for key in ("dataset", "device", "precision", "threads", "versions")},
        "settings": recipe,
        "parameters": results["parameters"],
        "training_flops": training_flops(recipe),
        "each": each,
        "figures": {key: summary(values) for key, values in each.items()},
        "train_seconds": summary([run[1]["train_seconds"] for run in runs]),
        "median_train_seconds": statistics.median(run[1]["train_seconds"] for run in runs),
    }


def report(name, row):
    """Print what a row of the table reached and what it cost."""
    cost = f"{row['parameters']:,} parameters, {row['training_flops']:.2e} FLOPs"
    cost += f", {row['median_train_seconds']:.1f} s of training (median)"
    print(f"{name}: {row['dataset']}, epochs: {row['settings']['epochs']}, {cost}")
    for key, figures in row["figures"].items():
        shown = {what: 100 * value for what, value in figures.items() if what != "n"}
        print(f"  {key:<12} " + "  ".join(f"{what} {value:.3f}" for what, value in shown.items()))


def comparison(rows):
    """An ablation's table in Markdown: each row's figures, and how they differ from the first's.

    The difference is the mean over seeds, of runs with the same seed, with its standard error.
    """
    base = next(iter(rows.values()))
    lines = ["| change | digit | sum | both | both, compared | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in rows.items():
        cells = [f"{100 * row['figures'][key]['mean']:.3f}" for key in ("digit", "sum", "both")]
        pairs = zip(row["each"]["both"], base["each"]["both"], strict=True)
        change = summary([100 * (ours - theirs) for ours, theirs in pairs])
        error = change["sd"] / math.sqrt(change["n"])
        compared = f"{change['mean']:+.3f} ± {error:.3f}" if row is not base else ""
        seconds = f"{row['median_train_seconds']:.1f}"
        lines.append(f"| {' | '.join([f'`{name}`', *cells, compared, seconds])} |")
    return "\n".join(lines)


def processor():
    """The name of this machine's processor."""
    capabilities = torch.cpu.get_capabilities()
    return f"{capabilities.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def commit():
    """The commit of the program, with "-dirty" after it where files differ from it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def parse(argv=None):
    """The flags, and the rows to run by their names: the recipe's, then each --vary's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--seeds", type=int, default=5, help="as many, from 0 (default: 5)")
    parser.add_argument(
        "--name", help="of the file in results (default: the recipe's, or RECIPE-ablation)"
    )
    text = "another row: columns of the recipe, changed; may be given several times"
    parser.add_argument("--vary", nargs="+", action="append", default=[], metavar="X=Y", help=text)
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args(argv)
    rows = {args.recipe: RECIPES[args.recipe]}
    for changes in args.vary:
        try:
            rows[" ".join(changes)] = varied(RECIPES[args.recipe], changes)
        except (AttributeError, TypeError, ValueError) as error:
            parser.error(f"--vary {' '.join(changes)}: {error}")
    return args, rows


def main(argv=None):
    args, rows = parse(argv)
    name = args.name or args.recipe + ("-ablation" if args.vary else "")
    made_by = commit()
    kept = ROOT / "runs" / "benchmarks" / made_by
    if made_by.endswith("-dirty"):  # what lies there may be the work of other code
        shutil.rmtree(kept, ignore_errors=True)
    table = {
        "command": shlex.join(["python", "benchmarks/seeds.py", *(argv or sys.argv[1:])]),
        "commit": made_by,
        "machine": processor(),
        "rows": {},
    }
    # Pictures that nobody looks at would take longer than some runs.
    with patch.dict(RECIPES, rows), patch.object(train.Run, "draw", lambda run: []):
        for row, recipe in rows.items():
            key = json.dumps([recipe.as_plain(), args.flags])
            folder = kept / hashlib.sha256(key.encode()).hexdigest()[:12]
            table["rows"][row] = run_seeds(row, folder, args)
            report(row, table["rows"][row])
    if args.vary:
        print("", comparison(table["rows"]), sep="\n")
    path = ROOT / "results" / f"{name}.json"
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(f"written  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
