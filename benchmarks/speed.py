"""Measure how long a recipe takes to train, and how well it uses the machine.

python -m benchmarks.speed accuracy --recipe fast --peer ../examples
python -m benchmarks.speed limit --recipe default
python -m benchmarks.speed growth --recipe fast
python -m benchmarks.speed processes --recipe fast
python -m benchmarks.speed busy --recipe fast

Each run is train.py in a process of its own; flags of train.py go after --. Needs POSIX's wait4.
"""

import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import (
    BENCHMARKS,
    ROOT,
    TRAIN_IMAGES,
    multiply_adds,
    provenance,
    save_json,
    summary,
    train_flag,
)
from recipes import RECIPES
from training.cli import Parser, exit_status, number, parse_train_args
from training.device import pick_device
from training.errors import UserError

TARGET = 0.99  # test accuracy of both outputs
ACCURACIES = ("digit_accuracy", "sum_accuracy")
EPOCHS = ("--epochs", "3")  # unless given; their median is used
# Equal to libgomp's defaults: idle threads spin for milliseconds before they sleep.
LIBGOMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300000"}


class Run(NamedTuple):
    """A training run, measured from outside its process."""

    results: dict  # its results.json
    recipe: dict  # the recipe with all flags applied, in JSON types
    epoch_seconds: list[float]  # training time of each epoch
    wall_seconds: float  # from the start of the process until its result is printed
    peak_bytes: int  # memory of the largest process


def train(recipe, flags, processes=1, environment=os.environ):
    """Train in a new process, or with torchrun in several that share the threads; returns a Run."""
    with tempfile.TemporaryDirectory() as directory:
        return run_train(recipe, flags, directory, processes, environment)


def run_train(recipe, flags, directory, processes=1, environment=os.environ):
    """See `train`; the files of the run are left in `directory`."""
    threads = torch.get_num_threads() // processes or 1
    environment = {**environment, "OMP_NUM_THREADS": str(threads)}
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "train.py")]
    command += ["--recipe", recipe, "--output-dir", directory, "--quiet", *flags]
    clock = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("result"):
            wall_seconds = time.perf_counter() - clock
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it must not be waited for again
    if status:
        raise UserError(f"failed: {shlex.join(command)}")
    files = ("results.json", "args.json", "metrics.csv")
    results, args, metrics = (Path(directory, name).read_text() for name in files)
    header, *rows = (line.split(",") for line in metrics.splitlines())
    epoch_seconds = [float(row[header.index("train_seconds")]) for row in rows]
    # On Linux the maximum includes the fork of this process, which is smaller.
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    recipe = json.loads(args)["recipe"]
    return Run(json.loads(results), recipe, epoch_seconds, wall_seconds, peak_bytes)


def run_peer(checkout, data_dir):
    """Run mnist/main.py of a checkout of pytorch/examples unchanged, until it reaches the target.

    It expects the data in ../data. Its training time is measured from the first to the last line
    that it prints in an epoch, without the first batch and the seven after the last line; its wall
    time ends with the line that has the target accuracy. Both are in its favor.
    """
    script = Path(checkout, "mnist", "main.py").resolve()
    with tempfile.TemporaryDirectory() as directory:
        os.symlink(os.path.abspath(data_dir), f"{directory}/data")
        os.mkdir(f"{directory}/mnist")
        pipe = {"cwd": f"{directory}/mnist", "stdout": subprocess.PIPE, "text": True}
        clock = time.perf_counter()
        with subprocess.Popen([sys.executable, "-u", str(script)], **pipe) as process:
            try:
                epochs = list(read_peer_epochs(process.stdout))
                wall_seconds = time.perf_counter() - clock
            finally:
                process.kill()
    if not epochs:
        raise UserError(f"failed: {script} ended before the first epoch")
    return {
        "reached": epochs[-1]["digit_accuracy"] >= TARGET,
        "epochs": epochs,
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        "wall_seconds": wall_seconds,
    }


def read_peer_epochs(lines):
    """Yield accuracy and training time of the peer's epochs as it prints them, up to the target."""
    times = []
    for line in lines:
        if line.startswith("Train Epoch: "):
            times.append(time.perf_counter())
        elif match := re.match(r"Test set: .* Accuracy: (\d+)/(\d+) ", line):
            accuracy, seconds = int(match[1]) / int(match[2]), times[-1] - times[0]
            print(f"peer  digit {100 * accuracy:.2f} %  {seconds:.1f} s of training", flush=True)
            yield {"digit_accuracy": accuracy, "train_seconds": seconds}
            if accuracy >= TARGET:
                return
            times.clear()


def accuracy(args):
    """Training time, if both outputs reach a test accuracy of 0.99, and that of a peer."""
    rows = []
    for seed in range(args.seeds):
        run = train(args.recipe, ["--seed", str(seed), *args.flags])
        accuracies = {name: run.results["test"][name] for name in ACCURACIES}
        reached = min(accuracies.values()) >= TARGET
        seconds = {"train_seconds": sum(run.epoch_seconds), "wall_seconds": run.wall_seconds}
        rows.append({"seed": seed, "reached": reached, **accuracies, **seconds})
        texts = [f"{name} {100 * value:.2f} %" for name, value in accuracies.items()]
        print(f"seed {seed}", *texts, "reached" if reached else "MISSED", sep="  ", flush=True)
    misses = sum(not row["reached"] for row in rows)
    print(f"{args.recipe}: {misses} of {len(rows)} seeds missed {100 * TARGET:.1f} %")
    section = {"target": TARGET, "misses": misses, "median": {}, "runs": rows}
    if args.peer:
        section["peer"] = run_peer(args.peer, parse_train_args(args.flags).data_dir)
    for name in seconds:
        # A miss never reaches the target.
        ours = statistics.median(row[name] if row["reached"] else math.inf for row in rows)
        section["median"][name] = ours if math.isfinite(ours) else None
        text = f"{name}: median {ours:.1f}"
        if args.peer and section["peer"]["reached"] and misses < len(rows) / 2:
            theirs = section["peer"][name]
            text += f"; peer {theirs:.1f}, {theirs / ours:.1f} times as long"
        print(text)
    return run, section


def limit(args):
    """FLOP/s of training, relative to those of matrix products."""
    device, _ = pick_device(parse_train_args(args.flags))
    run = train(args.recipe, [*EPOCHS, *args.flags])
    images = (TRAIN_IMAGES - run.recipe["val_size"]) / statistics.median(run.epoch_seconds)
    flops = 6 * multiply_adds(RECIPES[args.recipe]) * images  # backward: two forward passes
    section = {"images_per_second": images, "flops_per_second": flops, "products": {}}
    print(f"{args.recipe}: {images:,.0f} images/s, {flops / 1e9:,.1f} GFLOP/s")
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        rate = product_rate(device, dtype)
        section["products"][name] = {"flops_per_second": rate, "reached": flops / rate}
        text = f"{100 * flops / rate:.1f} % of the {rate / 1e9:,.1f} GFLOP/s"
        print(f"{text} of matrix products in {name}")
    return run, section


def product_rate(device, dtype):
    """FLOP/s of matrix products in linear layers: the best of several sizes and repetitions."""
    best, side, seconds = 0.0, 128, 0.0
    while seconds < 0.1 and side < 16_384:  # larger ones may take minutes if dtype is emulated
        side *= 2
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(5):
            clock = time.perf_counter()
            F.linear(a, b)[0, 0].item()  # synchronizes
            seconds = time.perf_counter() - clock
            best = max(best, 2 * side**3 / seconds)
    return best


def growth(args):
    """Seconds per epoch and peak memory for fractions of the training set: do they grow linearly?

    The other images are held out and evaluated, which counts toward memory but not toward time.
    """
    if parse_train_args(args.flags).val_size is not None:
        raise UserError("growth sets --val-size itself", status=2)
    rows, sizes = [], [TRAIN_IMAGES // part for part in (8, 4, 2, 1)]
    print(f"training on {', '.join(f'{n:,}' for n in sizes)} images in turn", flush=True)
    for images in sizes:
        run = train(args.recipe, [*EPOCHS, "--val-size", str(TRAIN_IMAGES - images), *args.flags])
        seconds = statistics.median(run.epoch_seconds)
        rows.append({"images": images, "epoch_seconds": seconds, "peak_bytes": run.peak_bytes})
        memory = f"{run.peak_bytes / 1e6:,.0f} MB"
        print(f"{images:,} images: {seconds:.2f} s per epoch, {memory}", flush=True)
    x, y = ([row[name] for row in rows] for name in ("images", "epoch_seconds"))
    slope, intercept = statistics.linear_regression(x, y)
    deviation = max(abs(intercept + slope * a - b) / b for a, b in zip(x, y, strict=True))
    line = f"{intercept:.2f} s + {1e6 * slope:.1f} us per image"
    print(f"linear fit: {line}, deviations up to {100 * deviation:.1f} %")
    fit = {"seconds_per_image": slope, "intercept_seconds": intercept}
    return run, {"sizes": rows, "line": fit | {"largest_deviation": deviation}}


def processes(args):
    """One process against two that share its threads, and the gradients that they exchange."""
    runs = {1: [], 2: []}
    for seed in range(args.seeds):
        for count, finished in runs.items():  # alternating: a change of the machine affects both
            finished.append(train(args.recipe, ["--seed", str(seed), *args.flags], count))
    run = runs[1][-1]
    batch, gradients = run.recipe["batch_size"], 4 * run.results["parameters"]
    steps = math.ceil((TRAIN_IMAGES - run.recipe["val_size"]) / batch)
    flops = 6 * multiply_adds(RECIPES[args.recipe]) * batch
    section = {"gradient_bytes_per_step": gradients, "flops_per_step": flops, "processes": {}}
    print(f"per step: {gradients / 1e6:.2f} MB of gradients, {flops / 1e9:.2f} GFLOP")
    for count, finished in runs.items():
        threads = finished[0].results["threads"]
        seconds = statistics.median(s for run in finished for s in run.epoch_seconds)
        tests = [run.results["test"] for run in finished]
        accuracies = {name: summary([test[name] for test in tests]) for name in ACCURACIES}
        row = {"threads_per_process": threads, "epoch_seconds": seconds}
        section["processes"][count] = row | {"step_seconds": seconds / steps} | accuracies
        texts = [f"{name} {100 * row['mean']:.3f} %" for name, row in accuracies.items()]
        texts += [f"{seconds:.2f} s per epoch", f"{1e3 * seconds / steps:.1f} ms per step"]
        print(f"{count} x {threads} threads", *texts, sep="  ")
    return run, section


def busy(args):
    """Training time alone and beside a busy process, with our thread settings and torch's."""
    # The program sets both variables where the user has not.
    ours = {name: value for name, value in os.environ.items() if name not in LIBGOMP}
    environments = {"ours": ours, "torch": ours | LIBGOMP}
    seconds = {name: {"alone": [], "beside": []} for name in environments}
    for seed in range(args.seeds):
        for name, place in itertools.product(environments, ("alone", "beside")):
            with busy_process() if place == "beside" else nullcontext():
                flags = ["--seed", str(seed), *args.flags]
                run = train(args.recipe, flags, environment=environments[name])
            seconds[name][place].append(sum(run.epoch_seconds))
            last = f"{seconds[name][place][-1]:.1f} s of training"
            print(f"seed {seed}  {name}  {place}  {last}", flush=True)
    section = {"seconds": seconds, "beside_to_alone": {}}
    for name, row in seconds.items():
        alone, beside = map(statistics.median, row.values())
        section["beside_to_alone"][name] = beside / alone
        text = f"median {alone:.1f} s alone, {beside:.1f} s beside a busy process"
        print(f"{name}: {text}, {beside / alone:.2f} times as long")
    alone = {name: statistics.median(row["alone"]) for name, row in seconds.items()}
    section["ours_to_torch_alone"] = ratio = alone["ours"] / alone["torch"]
    print(f"alone, ours takes {ratio:.2f} times as long as torch")
    return run, section


@contextmanager
def busy_process():
    """Another process that keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def parse_args(argv):
    """Parse the command line; `args.measure` is the function of the measurement."""
    parser = Parser(prog="speed.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for measure in (accuracy, limit, growth, processes, busy):
        text = measure.__doc__.splitlines()[0]
        command = commands.add_parser(measure.__name__, help=text, description=text)
        command.set_defaults(measure=measure)
        flag = command.add_argument
        text = "row of the table in recipes.py (default: %(default)s)"
        flag("--recipe", choices=RECIPES, default="fast", metavar="NAME", help=text)
        if measure in (accuracy, processes, busy):
            text = "number of seeds: 0 to N - 1 (default: %(default)s)"
            flag("--seeds", type=number(int, 1, 10_000), default=5, metavar="N", help=text)
        if measure is accuracy:
            flag("--peer", metavar="DIR", help="a checkout of pytorch/examples")
        text = "results file, in which this command replaces its section (default: %(default)s)"
        flag("--output", type=Path, default=BENCHMARKS / "speed.json", metavar="FILE", help=text)
        flag("flags", nargs="*", type=train_flag, help="flags of train.py, after --")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    run, section = args.measure(args)
    columns = ("dataset", "device", "precision", "threads", "versions")
    info = provenance("speed", argv) | {column: run.results[column] for column in columns}
    results.setdefault(args.measure.__name__, {})[args.recipe] = info | section
    save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
