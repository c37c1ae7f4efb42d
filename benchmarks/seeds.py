"""Run a recipe with several seeds, and print what it reaches and what it costs.

    python benchmarks/seeds.py --recipe fast --seeds 10 -- --data-dir data
    python benchmarks/seeds.py --recipe fast --seeds 3 --processes 2 -- --data-dir data

Each run is `train.py` as a process of its own, with the flags after `--`; its last epoch counts, on
the test set, each image with all ten addends. The results are written to results/NAME.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from dataset import NUM_DIGITS, SIDE  # noqa: E402

FIGURES = ("digit_accuracy", "sum_accuracy", "both_accuracy", "consistency")


def multiply_adds(recipe):
    """Multiplications and additions of one image's way through the network of a recipe's row."""
    network = model.build(recipe["encoder"], recipe["join"]).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, NUM_DIGITS))
    return counter.get_total_flops() // 2


def run_once(args, seed, folder):
    """Train with one seed in `folder`; returns its results and its settings."""
    launcher = [sys.executable]
    environment = dict(os.environ)
    if args.processes > 1:
        threads = max(1, torch.get_num_threads() // args.processes)
        environment["OMP_NUM_THREADS"] = str(threads)
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(args.processes)]
    flags = ["--recipe", args.recipe, "--seed", str(seed), "--output-dir", folder, "--quiet"]
    command = [*launcher, str(ROOT / "train.py"), *flags, *args.flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return [json.loads(Path(folder, f"{name}.json").read_text()) for name in ("results", "args")]


def summary(values):
    """n, mean, sample standard deviation, least and greatest of some numbers."""
    return {
        "n": len(values),
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def processor():
    """The name of this machine's processor."""
    capabilities = torch.cpu.get_capabilities()
    return f"{capabilities.get('cpu_name', platform.machine())}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--seeds", type=int, default=5, help="as many, from 0 (default: 5)")
    parser.add_argument("--processes", type=int, default=1, help="under torchrun (default: 1)")
    parser.add_argument("--name", help="of the file in results (default: the recipe's)")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args()
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results, settings = run_once(args, seed, folder)
        runs.append(results)
        test = results["test"]
        accuracies = "  ".join(f"{name} {100 * test[name]:.3f}" for name in FIGURES)
        print(f"seed {seed}  {accuracies}  {results['train_seconds']:.1f} s", flush=True)

    last = runs[-1]
    recipe = settings["recipe"]
    images = recipe["epochs"] * (60_000 - recipe["val_size"])
    table = {
        "recipe": args.recipe,
        "command": " ".join(["python", "benchmarks/seeds.py", *sys.argv[1:]]),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "machine": processor(),
        **{name: last[name] for name in ("dataset", "device", "precision", "threads")},
        "processes": args.processes,
        "versions": last["versions"],
        "epochs": recipe["epochs"],
        "parameters": last["parameters"],
        "training_flops": 6 * multiply_adds(recipe) * images,
        "figures": {name: summary([run["test"][name] for run in runs]) for name in FIGURES},
        "train_seconds": summary([run["train_seconds"] for run in runs]),
        "total_seconds": summary([run["total_seconds"] for run in runs]),
    }
    print(f"{args.recipe}: {table['epochs']} epochs, {table['parameters']:,} parameters, ", end="")
    print(f"{table['training_flops']:.2e} FLOPs, {table['machine']}, {table['precision']}")
    for name in FIGURES:
        row = {key: 100 * value for key, value in table["figures"][name].items() if key != "n"}
        print(f"{name:<15} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"seconds of training: median {statistics.median(r['train_seconds'] for r in runs):.1f}")
    path = ROOT / "results" / f"{args.name or args.recipe}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(f"written  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
