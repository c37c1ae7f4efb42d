"""How long a recipe takes, and how much of the machine it uses; kept in results/speed.json.

    python benchmarks/speed.py accuracy --recipe fast --peer ../examples -- --data-dir data
    python benchmarks/speed.py limit --recipe default -- --data-dir data
    python benchmarks/speed.py growth --recipe default -- --data-dir data
    python benchmarks/speed.py processes --recipe fast -- --data-dir data

Each run is `train.py` as a process of its own, with the flags after `--`. It needs POSIX's wait4.
"""

import argparse
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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from seeds import (  # puts the program on the path
    ROOT,
    TRAIN_IMAGES,
    commit,
    multiply_adds,
    processor,
    summary,
)

from cli import train_parser
from device import pick_engine

RESULTS = ROOT / "results" / "speed.json"
MARK = 0.99  # of both heads, on the test set
HEADS = ("digit_accuracy", "sum_accuracy")
EPOCHS = ("--epochs", "3")  # of which the median counts, where the flags don't say otherwise


class Run(NamedTuple):
    """A training run as it was seen from outside."""

    results: dict  # of results.json
    recipe: dict  # of args.json: the row, with the flags in their places
    epoch_seconds: list[float]  # of training alone, an epoch each
    wall_seconds: float  # from the process's start to the line with its result
    peak_bytes: int  # of memory, of the largest process


def train(recipe, flags, processes=1):
    """Train in a process of its own, or in several under torchrun that share out the threads."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads() // processes or 1)}
    several = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(several if processes > 1 else []), str(ROOT / "train.py")]
        command += ["--recipe", recipe, "--output-dir", folder, "--quiet", *flags]
        clock = time.perf_counter()
        pipe = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | threads}
        process = subprocess.Popen(command, **pipe)
        for line in process.stdout:
            if line.startswith("result"):
                wall_seconds = time.perf_counter() - clock
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status  # so that it is not waited for again
        if status:
            sys.exit(f"failed: {shlex.join(command)}")
        names = ("results.json", "args.json", "metrics.csv")
        results, settings, metrics = (Path(folder, name).read_text() for name in names)
    header, *rows = (line.split(",") for line in metrics.splitlines())
    epoch_seconds = [float(row[header.index("train_seconds")]) for row in rows]
    # Linux counts from what this process held when it started the other, which is no more.
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    recipe = json.loads(settings)["recipe"]
    return Run(json.loads(results), recipe, epoch_seconds, wall_seconds, peak_bytes)


def run_peer(checkout, data_dir):
    """The checkout's mnist/main.py as it is, till an epoch's test accuracy is at the mark.

    It looks for the data in ../data, where a link is put. Its training seconds are those between
    the first and the last line of each epoch's training: they lack its first batch, and the seven
    after the last line. Its wall seconds end at the line with the mark. All to its advantage.
    """
    script = Path(checkout, "mnist", "main.py").resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(data_dir), f"{folder}/data")
        os.mkdir(f"{folder}/mnist")
        pipe = {"cwd": f"{folder}/mnist", "stdout": subprocess.PIPE, "text": True}
        clock = time.perf_counter()
        with subprocess.Popen([sys.executable, "-u", str(script)], **pipe) as process:
            try:
                epochs = list(read_peer(process.stdout))
                wall_seconds = time.perf_counter() - clock
            finally:
                process.kill()
    if not epochs:
        sys.exit(f"failed: {script} has ended without an epoch")
    train_seconds = sum(epoch["train_seconds"] for epoch in epochs)
    facts = {"reached": epochs[-1]["digit_accuracy"] >= MARK, "epochs": epochs}
    return {**facts, "train_seconds": train_seconds, "wall_seconds": wall_seconds}


def read_peer(lines):
    """Its epochs, told from its lines as they come, to the first one at the mark or to its end."""
    times = []
    for line in lines:
        if line.startswith("Train Epoch: "):
            times.append(time.perf_counter())
        elif found := re.match(r"Test set: .* Accuracy: (\d+)/(\d+) ", line):
            accuracy, seconds = int(found[1]) / int(found[2]), times[-1] - times[0]
            print(f"peer    {100 * accuracy:.2f} %  {seconds:.1f} s of training", flush=True)
            yield {"digit_accuracy": accuracy, "train_seconds": seconds}
            if accuracy >= MARK:
                return
            times.clear()


def accuracy(args):
    """Seconds till both heads are at the mark, a miss counted as for ever; and the peer's."""
    rows = []
    for seed in range(args.seeds):
        run = train(args.recipe, ["--seed", str(seed), *args.flags])
        heads = {name: run.results["test"][name] for name in HEADS}
        reached = min(heads.values()) >= MARK
        seconds = {"train_seconds": sum(run.epoch_seconds), "wall_seconds": run.wall_seconds}
        rows.append({"seed": seed, "reached": reached, **heads, **seconds})
        figures = [f"{name} {100 * value:.2f}" for name, value in heads.items()]
        print(f"seed {seed}", *figures, "reached" if reached else "MISSED", sep="  ", flush=True)
    misses = sum(not row["reached"] for row in rows)
    print(f"{args.recipe}: {misses} of {len(rows)} missed {100 * MARK:.1f} %")
    section = {"mark": MARK, "misses": misses, "median": {}, "runs": rows}
    if args.peer:
        section["peer"] = run_peer(args.peer, train_parser("").parse_args(args.flags).data_dir)
    for name in seconds:
        ours = statistics.median(row[name] if row["reached"] else math.inf for row in rows)
        section["median"][name] = ours if math.isfinite(ours) else None
        line = f"{name}: median {ours:.1f}"
        if args.peer and section["peer"]["reached"]:
            theirs = section["peer"][name]
            line += f"; peer {theirs:.1f}, {theirs / ours:.1f} times as long"
        print(line)
    return run, section


def limit(args):
    """FLOP/s of training, and what part that is of the machine's rate of matrix products."""
    device = pick_engine(train_parser("").parse_args(args.flags).device).device
    run = train(args.recipe, [*EPOCHS, *args.flags])
    images = (TRAIN_IMAGES - run.recipe["val_size"]) / statistics.median(run.epoch_seconds)
    flops = 6 * multiply_adds(run.recipe) * images  # the backward pass counted as two forward
    section = {"images_a_second": images, "flops_a_second": flops, "products": {}}
    print(f"{args.recipe}: {images:,.0f} images/s, {flops / 1e9:,.1f} GFLOP/s")
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        rate = product_rate(device, dtype)
        section["products"][name] = {"flops_a_second": rate, "reached": flops / rate}
        print(f"{100 * flops / rate:.1f} % of the {rate / 1e9:,.1f} of matrix products in {name}")
    return run, section


def product_rate(device, dtype):
    """FLOP/s of matrix products as linear layers do them: the best of several sizes and tries."""
    best, side, seconds = 0.0, 128, 0.0
    while seconds < 0.1 and side < 16_384:  # a larger one could take minutes where it is emulated
        side *= 2
        one, other = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(5):
            clock = time.perf_counter()
            F.linear(one, other)[0, 0].item()  # which waits for the device
            seconds = time.perf_counter() - clock
            best = max(best, 2 * side**3 / seconds)
    return best


def growth(args):
    """Seconds an epoch and peak memory at parts of the training set: a straight line?

    The rest is held out, and so evaluated. That is no part of the seconds, but it is of the memory,
    in which an image's predictions take more room than the image.
    """
    rows = []
    for images in (TRAIN_IMAGES // part for part in (8, 4, 2, 1)):
        run = train(args.recipe, [*EPOCHS, "--val-size", str(TRAIN_IMAGES - images), *args.flags])
        seconds = statistics.median(run.epoch_seconds)
        rows.append({"images": images, "epoch_seconds": seconds, "peak_bytes": run.peak_bytes})
        print(f"{images:,} images: {seconds:.2f} s an epoch, {run.peak_bytes / 1e6:,.0f} MB")
    xs, ys = ([row[name] for row in rows] for name in ("images", "epoch_seconds"))
    slope, start = statistics.linear_regression(xs, ys)
    off = max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    line = {"seconds_an_image": slope, "seconds_at_none": start, "largest_deviation": off}
    print(f"line: {1e6 * slope:.1f} us an image and {start:.2f} s; at most {100 * off:.1f} % off")
    return run, {"sizes": rows, "line": line}


def processes(args):
    """One process, and two that share out its threads; and what they exchange at each step."""
    runs = {1: [], 2: []}
    for seed in range(args.seeds):
        for count, done in runs.items():  # by turns: a machine that becomes slower is so for both
            done.append(train(args.recipe, ["--seed", str(seed), *args.flags], count))
    run = runs[1][-1]
    batch, gradients = run.recipe["batch_size"], 4 * run.results["parameters"]
    steps = math.ceil((TRAIN_IMAGES - run.recipe["val_size"]) / batch)
    flops = 6 * multiply_adds(run.recipe) * batch
    section = {"gradient_bytes_a_step": gradients, "flops_a_step": flops, "processes": {}}
    print(f"a step: {gradients / 1e6:.2f} MB of gradients, {flops / 1e9:.2f} GFLOP")
    for count, done in runs.items():
        epoch = statistics.median(second for one in done for second in one.epoch_seconds)
        heads = {name: summary([one.results["test"][name] for one in done]) for name in HEADS}
        facts = {"threads_each": done[0].results["threads"], "epoch_seconds": epoch}
        section["processes"][count] = facts | {"step_seconds": epoch / steps} | heads
        figures = [f"{name} {100 * row['mean']:.3f}" for name, row in heads.items()]
        figures += [f"{epoch:.2f} s an epoch", f"{1e3 * epoch / steps:.1f} ms a step"]
        print(f"{count} x {facts['threads_each']} threads", *figures, sep="  ")
    return run, section


def save(name, recipe, run, section):
    """Put a section into results/speed.json beside the others, with what it was measured on."""
    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    facts = {"command": command, "commit": commit(), "machine": processor()}
    names = ("dataset", "device", "precision", "threads", "versions")
    facts |= {fact: run.results[fact] for fact in names}
    sections = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sections.setdefault(name, {})[recipe] = facts | section
    RESULTS.write_text(json.dumps(sections, indent=2) + "\n")
    print(f"written  {RESULTS}")


def parser():
    """The command line: a sub-command for each of the four measurements."""
    whole = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for measure in (accuracy, limit, growth, processes):
        one = commands.add_parser(measure.__name__, help=measure.__doc__.splitlines()[0])
        one.set_defaults(measure=measure)
        one.add_argument("--recipe", default="fast", help="(default: fast)")
        if measure in (accuracy, processes):
            one.add_argument("--seeds", type=int, default=5, help="as many, from 0 (default: 5)")
        if measure is accuracy:
            one.add_argument("--peer", metavar="DIR", help="a checkout of pytorch/examples")
        one.add_argument("flags", nargs="*", help="flags of train.py, after --")
    return whole


def main(argv=None):
    args = parser().parse_args(argv)
    save(args.measure.__name__, args.recipe, *args.measure(args))


if __name__ == "__main__":
    main()
