"""Measure training on a GPU: accuracies, time, GPU utilization, and the cost of --deterministic.

python -m benchmarks.gpu
python -m benchmarks.gpu --output results/gpu.json -- --data-dir data

Trains each recipe in full once, and three times for two epochs: once unchanged and twice with
--deterministic. Steps are timed and profiled after a warm-up. Flags of train.py go after --.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile
from tqdm import tqdm

import train
from benchmarks import speed
from benchmarks.common import BENCHMARKS, multiply_adds, provenance, save_json, train_flag
from dataset import MNISTSum, load_data
from model import build_model
from recipes import RECIPES, recipe_from_args
from training.checkpoint import LAST, load_checkpoint
from training.cli import Parser, exit_status, number, parse_train_args
from training.device import move_model, pick_device

NAMES = ("default", "fast", "tiny", "concat-mlp")


def measure_steps(recipe, images, device, precision, steps):
    """Time training steps after a warm-up, and profile them.

    Args:
        images: MNIST's training set, with `data` and `targets`.

    Returns:
        seconds of the warm-up and per step, and the fraction of a step in which the GPU is idle
        (None on a CPU), as a dict.
    """
    part = torch.arange(min(steps * recipe.batch_size, len(images.data)))
    options = {"affine": recipe.affine, "mean": recipe.mean, "std": recipe.std}
    dataset = MNISTSum(images, "train", part, device=device, **options)
    steps = len(dataset.batches(recipe.batch_size, recipe.drop_last))
    model = move_model(build_model(recipe.encoder, recipe.head), device)
    optimizer = train.make_optimizer(model, recipe)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, precision == "bf16")

    def epoch():  # ends with a copy to the CPU, which waits for the GPU
        clock = time.perf_counter()
        bar = tqdm(disable=True)
        train.train_epoch(model, optimizer, dataset, recipe, 1, autocast, bar)
        return time.perf_counter() - clock

    warmup_seconds, step_seconds = epoch(), epoch() / steps
    idle = None
    if device.type == "cuda":
        with profile() as profiler:
            epoch()
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        # An annotation lasts from the first to the last of several kernels.
        kernels = [event for event in events if not event.is_user_annotation]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / steps
        idle = 1 - busy / step_seconds  # profiling slows the host down, but not the kernels
    return {"warmup_seconds": warmup_seconds, "step_seconds": step_seconds, "gpu_idle": idle}


def measure_deterministic(name, flags):
    """Whether two runs with --deterministic are bit-identical, and their slowdown."""
    seconds, weights = [], []
    for extra in ([], ["--deterministic"]) * 2:
        with tempfile.TemporaryDirectory() as directory:
            run = speed.run_train(name, [*flags, "--epochs", "2", *extra], directory)
            checkpoint = load_checkpoint(Path(directory, LAST))
        seconds.append(run.epoch_seconds[-1])  # the first epoch includes the warm-up
        weights.append(checkpoint["network"])
    identical = all(torch.equal(value, weights[3][key]) for key, value in weights[1].items())
    return {"bit_identical": identical, "slowdown": min(seconds[1::2]) / min(seconds[::2])}


def measure(name, args, device, precision, source, product_flops):
    """All measurements of a recipe, as a dict."""
    recipe = recipe_from_args(parse_train_args(["--recipe", name, *args.flags]))
    run = speed.train(name, args.flags)
    steps = measure_steps(recipe, source.train, device, precision, args.steps)
    images_per_second = recipe.batch_size / steps["step_seconds"]
    return {
        "train_seconds": sum(run.epoch_seconds),
        "epochs": len(run.epoch_seconds),
        "digit_accuracy": run.results["test"]["digit_accuracy"],
        "sum_accuracy": run.results["test"]["sum_accuracy"],
        **steps,
        "images_per_second": images_per_second,
        "product_fraction": 6 * multiply_adds(recipe) * images_per_second / product_flops,
        **measure_deterministic(name, args.flags),
    }


def report(name, row):
    """A measurement as text."""
    accuracies = f"digit {100 * row['digit_accuracy']:.2f} %, sum {100 * row['sum_accuracy']:.2f} %"
    idle = f"GPU idle {100 * row['gpu_idle']:.0f} %" if row["gpu_idle"] is not None else "no GPU"
    step = f"{1e3 * row['step_seconds']:.2f} ms per step, {row['images_per_second']:,.0f} images/s"
    same = "bit-identical" if row["bit_identical"] else "NOT bit-identical"
    return (
        f"{name}: {row['train_seconds']:.1f} s of training, epochs: {row['epochs']}, {accuracies}\n"
        f"  warm-up {row['warmup_seconds']:.1f} s, then {step}, {idle}\n"
        f"  {100 * row['product_fraction']:.1f} % of the FLOP/s of matrix products in bf16\n"
        f"  --deterministic: {same}, {row['slowdown']:.2f} times as long"
    )


def parse_args(argv):
    parser = Parser(prog="gpu.py", description=__doc__)
    flag = parser.add_argument
    text = "rows of the table in recipes.py (default: %(default)s)"
    flag("--recipes", nargs="+", choices=RECIPES, default=NAMES, metavar="NAME", help=text)
    text = "steps to time and profile (default: %(default)s)"
    flag("--steps", type=number(int, 1, 10_000), default=200, metavar="N", help=text)
    text = "results file (default: %(default)s)"
    flag("--output", type=Path, default=BENCHMARKS / "gpu.json", metavar="FILE", help=text)
    flag("flags", nargs="*", type=train_flag, help="flags of train.py, after --")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    given = parse_train_args(args.flags)
    device, _ = pick_device(given)
    source = load_data(given.dataset, given.data_dir)
    product_flops = speed.product_rate(device, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    results = provenance("gpu", argv) | {"gpu": name, "precision": given.precision}
    results |= {"product_flops": product_flops, "rows": {}}
    for recipe in args.recipes:
        row = measure(recipe, args, device, given.precision, source, product_flops)
        results["rows"][recipe] = row
        print(report(recipe, row), flush=True)
    save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
