"""Measure training on a GPU: accuracies, time, GPU utilization, and the cost of --deterministic.

python -m benchmarks.gpu
python -m benchmarks.gpu --output results/gpu.json -- --data-dir data

Trains each recipe in full, and four times for two epochs, twice with --deterministic. The steps of
an epoch are timed and profiled after a warm-up. Flags of train.py go after --.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import profile
from tqdm import tqdm

import train
from benchmarks import common, seeds
from dataset import load_data
from model import build_model
from recipes import RECIPES
from training.checkpoint import load_checkpoint
from training.console import Parser, exit_status
from training.device import move_model, pick_device

NAMES = ["default", "fast", "tiny", "concat-mlp"]


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


def measure_steps(recipe, dataset, device, precision):
    """Time the training steps of an epoch after another one, and profile them in a third.

    Returns a dict: seconds of the first epoch and per step, and the fraction of a step in which the
    GPU is idle (None on a CPU).
    """
    steps = len(dataset.batches(recipe.batch_size, recipe.drop_last))
    model = move_model(build_model(recipe.encoder, recipe.head), device)
    optimizer = train.make_optimizer(model, recipe)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")

    def epoch():  # ends with a copy to the CPU, which waits for the GPU
        clock = time.perf_counter()
        train.train_epoch(model, optimizer, dataset, recipe, 1, autocast, tqdm(disable=True))
        return time.perf_counter() - clock

    first_seconds, step_seconds = epoch(), epoch() / steps
    idle = None
    if device.type == "cuda":
        with profile() as profiler:
            epoch()
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        # An annotation lasts from the first to the last of several kernels.
        kernels = [event for event in events if not event.is_user_annotation]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / steps
        idle = 1 - busy / step_seconds  # profiling slows the host down, but not the kernels
    return {"first_epoch_seconds": first_seconds, "step_seconds": step_seconds, "gpu_idle": idle}


def measure_deterministic(flags):
    """Whether two runs with --deterministic are bit-identical, and their slowdown."""
    seconds, weights = [], []
    for extra in ([], ["--deterministic"]) * 2:
        with tempfile.TemporaryDirectory() as directory:
            seeds.train(Path(directory), [*flags, "--epochs", "2", *extra])
            checkpoint = load_checkpoint(directory)
        seconds.append(checkpoint["history"][-1]["train_seconds"])  # the first has the warm-up
        weights.append(checkpoint["network"])
    identical = all(torch.equal(value, weights[3][key]) for key, value in weights[1].items())
    return {"bit_identical": identical, "slowdown": min(seconds[1::2]) / min(seconds[::2])}


def measure(flags, data, device, precision, product_flops):
    """All measurements of a recipe, as a dict."""
    given, recipe = common.parse_flags(flags)
    dataset, _ = train.make_datasets(data, recipe, None, given.seed, given.dry_run, device)
    with tempfile.TemporaryDirectory() as directory:
        results = seeds.train(Path(directory), flags)
    steps = measure_steps(recipe, dataset, device, precision)
    images_per_second = recipe.batch_size / steps["step_seconds"]
    flops = 6 * common.multiply_adds(recipe) * images_per_second
    row = {"epochs": recipe.epochs, "train_seconds": results["train_seconds"]}
    row |= results["accuracies"] | steps
    row |= {"images_per_second": images_per_second, "product_fraction": flops / product_flops}
    return row | measure_deterministic(flags)


def table(rows):
    """The rows of a results file in Markdown."""
    columns = list(next(iter(rows.values())))
    lines = []
    for name, row in rows.items():
        values = ["–" if row[key] is None else f"{row[key]:.5g}" for key in columns]
        lines.append([f"`{name}`", *values])
    return common.markdown(["", *columns], lines)


def parse_args(argv):
    parser = Parser(prog="gpu.py", description=__doc__)
    common.add_flags(parser, "gpu.json")
    text = "rows of the table in recipes.py (default: %(default)s)"
    options = {"choices": RECIPES, "default": NAMES, "metavar": "NAME", "help": text}
    parser.add_argument("--recipes", nargs="+", **options)
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    given, _ = common.parse_flags(args.flags)
    device, precision = pick_device(given.device, given.precision)
    data = load_data(given.dataset, given.data_dir or "data")
    rate = product_rate(device, torch.bfloat16)
    results = common.provenance("gpu", argv) | {"precision": precision, "product_flops": rate}
    results["rows"] = {}
    for name in args.recipes:
        flags = ["--recipe", name, *args.flags]
        results["rows"][name] = measure(flags, data, device, precision, rate)
        print(name, results["rows"][name], flush=True)
    print("", table(results["rows"]), "", sep="\n")
    common.save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
