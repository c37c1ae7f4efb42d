"""Measure how long a recipe takes to train, and how well it uses the machine; prints JSON.

python -m benchmarks.speed accuracy --recipe fast --peer ../examples
python -m benchmarks.speed limit --recipe default
python -m benchmarks.speed busy --recipe fast

Each run is train.py in a process of its own; flags of train.py go after --.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import common, seeds
from training.console import Parser, UserError, exit_status
from training.device import pick_device

TARGET = 0.99  # test accuracy of both outputs
# Equal to libgomp's defaults: idle threads spin for milliseconds before they sleep.
LIBGOMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300000"}


def train(args, seed=0, environment=None):
    """Train in a new process; returns results.json with "wall_seconds", those of the process."""
    flags = ["--recipe", args.recipe, *args.flags, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as directory:
        clock = time.perf_counter()
        results = seeds.train(Path(directory), flags, environment)
        results["wall_seconds"] = time.perf_counter() - clock
    print(f"seed {seed}: {results['train_seconds']:.1f} s of training", flush=True)
    return results


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
    seconds = sum(epoch["train_seconds"] for epoch in epochs)
    return {"epochs": epochs, "train_seconds": seconds, "wall_seconds": wall_seconds}


def read_peer_epochs(lines):
    """Yield accuracy and training time of the peer's epochs as it prints them, up to the target."""
    times = []
    for line in lines:
        if line.startswith("Train Epoch: "):
            times.append(time.perf_counter())
        elif match := re.match(r"Test set: .* Accuracy: (\d+)/(\d+) ", line):
            accuracy = int(match[1]) / int(match[2])
            yield {"digit_accuracy": accuracy, "train_seconds": times[-1] - times[0]}
            if accuracy >= TARGET:
                return
            times.clear()


def accuracy(args):
    """Seconds, and in how many runs both outputs reach 0.99 on the test images; also of a peer."""
    runs = [train(args, seed) for seed in range(args.seeds)]
    tests = [run["test"] for run in runs]
    lower = [min(test["digit_accuracy"], test["sum_accuracy"]) for test in tests]
    section = {"target": TARGET, "misses": sum(value < TARGET for value in lower)}
    for name in ("train_seconds", "wall_seconds"):
        section[name] = common.summary([run[name] for run in runs])
    if args.peer:
        data_dir = common.parse_flags(args.flags)[0].data_dir or "data"
        section["peer"] = run_peer(args.peer, data_dir)
    return runs[0], section


def limit(args):
    """FLOP/s of training, relative to those of matrix products."""
    given, recipe = common.parse_flags(["--recipe", args.recipe, *args.flags])
    device, _ = pick_device(given.device, given.precision)
    run = train(args)
    flops = common.training_flops(recipe) / run["train_seconds"]
    products = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        rate = product_rate(device, dtype)
        products[name] = {"flops_per_second": rate, "reached": flops / rate}
    return run, {"flops_per_second": flops, "products": products}


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


def busy(args):
    """Training time alone and beside a busy process, with our thread settings and torch's."""
    # The program sets both variables where the user has not.
    ours = {name: value for name, value in os.environ.items() if name not in LIBGOMP}
    seconds = {}
    for seed in range(args.seeds):  # outer loop: a change of the machine affects all
        for name, environment in {"ours": ours, "torch": ours | LIBGOMP}.items():
            for place, other in {"alone": nullcontext, "beside": busy_process}.items():
                with other():
                    run = train(args, seed, environment)
                seconds.setdefault(f"{name} {place}", []).append(run["train_seconds"])
    return run, {name: common.summary(values) for name, values in seconds.items()}


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
    for measure in (accuracy, limit, busy):
        text = measure.__doc__.splitlines()[0]
        command = commands.add_parser(measure.__name__, help=text, description=text)
        command.set_defaults(measure=measure)
        count = None if measure is limit else 5
        common.add_flags(command, "speed.json", recipe="fast", seeds=count)
        if measure is accuracy:
            command.add_argument("--peer", metavar="DIR", help="a checkout of pytorch/examples")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    run, section = args.measure(args)
    print(json.dumps(section, indent=2))
    columns = ("dataset", "device", "precision", "threads", "versions")
    info = common.provenance("speed", argv) | {column: run[column] for column in columns}
    results.setdefault(args.measure.__name__, {})[args.recipe] = info | section
    common.save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
