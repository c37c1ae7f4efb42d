"""The benchmarks measure what they say."""

import itertools
import json
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, gpu, seeds, speed
from model import build_model
from recipes import RECIPES
from training.constants import NUM_DIGITS, SIDE

# Multiply-adds by hand: each output of a layer times the inputs that it is computed from.
HEAD = 100 * 19
SMALL_FIRST = 20 * 20 * 16 * 5 * 5
COMPACT_FIRST = 14 * 14 * 32 * 5 * 5
BY_HAND = {
    "fast": (SMALL_FIRST, 8 * 8 * 48 * 16 * 3 * 3 + 768 * 256 + 256 * 10 + HEAD),
    "default": (
        COMPACT_FIRST,
        (14 * 14 * 64 * 32 + 7 * 7 * 128 * 64 + 5 * 5 * 128 * 128) * 3 * 3 + 128 * 10 + HEAD,
    ),
}
# Prints what the mnist example of pytorch/examples prints.
PEER = r"""
import sys, time
from pathlib import Path

assert Path("../data/MNIST/raw/train-images-idx3-ubyte").is_file()
for epoch, correct in enumerate((9850, 9900, 9999), start=1):
    for step in (0, 10):
        print(f"Train Epoch: {epoch} [{64 * step}/60000 (0%)]\tLoss: 0.1")
        time.sleep(0.1)
    time.sleep(0.3)  # the test
    print(f"\nTest set: Average loss: 0.0300, Accuracy: {correct}/10000 (99%)\n")
time.sleep(60)
"""


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_are_six_times_the_multiply_adds(name):
    recipe = RECIPES[name]
    first, others = BY_HAND[name]
    assert common.multiply_adds(recipe) == first + others
    model, images = build_model(recipe.encoder, recipe.head), 2
    with FlopCounterMode(display=False) as counter:
        outputs = model(torch.zeros(images, 1, SIDE, SIDE), torch.zeros(images, NUM_DIGITS))
        sum(part.sum() for part in outputs).backward()
    # The factor of six includes the gradient with respect to the image, which is not computed.
    assert counter.get_total_flops() == images * (6 * (first + others) - 2 * first)


def test_flops_of_an_ensemble_are_those_of_its_members():
    members = RECIPES["ensemble"].members
    flops = common.training_flops(RECIPES["default"])
    assert members > 1 and common.training_flops(RECIPES["ensemble"]) == members * flops


def test_an_ablation_compares_equal_seeds_and_resumes(workdir, monkeypatch, capsys):
    vary = "--vary label_smoothing=0 affine=[9,0.1,0.1,9] --vary schedule=constant"
    argv = shlex.split(f"--recipe fast --seeds 2 {vary} -- --dry-run --val-size 50")
    assert seeds.main(argv) == 0
    path = workdir / "runs" / "benchmarks" / "fast-ablation.json"
    rows = json.loads(path.read_text())["rows"]
    base, changed, constant = rows.values()
    assert base["settings"] == RECIPES["fast"].as_plain() | {"val_size": 50}
    assert changed["settings"]["label_smoothing"] == 0 and len(changed["settings"]["affine"]) == 4
    assert constant["settings"]["schedule"] == "constant"
    for row in rows.values():
        assert set(row["metrics"]) == {"digit", "sum", "both"}  # of the validation images
        assert row["metrics"]["both"]["n"] == 2 and min(row["each"]["both"]) > 0
    assert base["each"] not in (changed["each"], constant["each"])
    printed = capsys.readouterr().out
    rows_printed = [
        line for line in printed.splitlines() if line.startswith(("fast", "label", "sch"))
    ]
    assert len(rows_printed) == 9 and all("validation" in line for line in rows_printed)
    assert len(re.findall(r"^\| .* \| [+-]\d\.\d+ ± \d", printed, re.MULTILINE)) == 2

    monkeypatch.setattr(seeds.train, "main", None)  # nothing is left to train
    assert seeds.main([*argv[:4], "--output", "elsewhere.json", *argv[4:]]) == 0
    assert json.loads((workdir / "elsewhere.json").read_text())["rows"] == rows


def test_runs_of_other_code_are_kept_apart(workdir, monkeypatch):
    names = {path.relative_to(ROOT).as_posix() for path in seeds.CODE}
    assert names >= {"train.py", "recipes.py", "training/augment.py", "published/models.py"}
    assert "benchmarks/seeds.py" not in names
    recipe, file = RECIPES["fast"], workdir / "train.py"
    monkeypatch.setattr(seeds, "CODE", [file])
    file.write_text("old")
    before = seeds.work_directory(recipe, seeds.conditions(["--dataset", "synthetic"]))
    file.write_text("new")
    assert seeds.work_directory(recipe, seeds.conditions(["--dataset", "synthetic"])) != before


def test_runs_without_mnist_are_not_reused_with_it(workdir):
    def directory():
        return seeds.work_directory(RECIPES["fast"], seeds.conditions([]))

    with_mnist = directory()
    (workdir / "data").rename(workdir / "moved")
    assert directory() != with_mnist


def test_a_column_is_not_changed_twice(capsys):
    argv = shlex.split("--vary label_smoothing=0 --vary schedule=constant lr=0.1 -- --lr 0.2")
    assert seeds.main(argv) == 2
    assert "lr is both in --vary" in capsys.readouterr().err


def test_a_single_seed_has_no_spread(workdir, capsys):
    argv = shlex.split("--recipe fast --seeds 1 --vary schedule=constant -- --dry-run")
    assert seeds.main([*argv, "--dataset", "synthetic"]) == 0
    rows = json.loads((workdir / "runs" / "benchmarks" / "fast-ablation.json").read_text())["rows"]
    assert rows["fast"]["metrics"]["sum"]["sd"] is None
    printed = capsys.readouterr().out
    assert "sd" not in printed and "± 0.000" not in printed


BAD_CHANGES = ["no_column=1", "schedule=none", "affine=3", "head=Missing", "addends=never"]
BAD_CHANGES += ["lr=null", "optimizer=Missing", "optimizer=SGD"]  # SGD has no betas
BAD_CHANGES += ["lr=0.1 lr=0.1", "val_size=100"]
# Outside the ranges of train.py's flags, or of columns without a flag.
BAD_CHANGES += ["epochs=0", "lr=Infinity", "lr=NaN", "batch_size=64.5", "weight_decay=-1"]
BAD_CHANGES += ["label_smoothing=2", "std=0", "clean_epochs=1.5", "drop_last=3"]
BAD_CHANGES += ["affine=[9,Infinity,0.1,9]"]


@pytest.mark.parametrize("changes", BAD_CHANGES)
def test_an_unknown_column_or_value_is_refused(changes, capsys):
    *_, last = changes = changes.split()
    assert seeds.main(["--vary", *changes]) == 2
    assert f"--vary {last}: " in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["seeds.py", "speed.py limit", "gpu.py"])
@pytest.mark.parametrize("flag", ["--seed", "--output-dir=x", "--recipe"])
def test_flags_that_a_benchmark_sets_itself_are_refused(benchmark, flag, capsys):
    script, *command = benchmark.split()
    main = {"seeds.py": seeds, "speed.py": speed, "gpu.py": gpu}[script].main
    assert main([*command, "--", flag, "fast"]) == 2
    assert f"{flag} cannot be given after --" in capsys.readouterr().err


@pytest.fixture
def measure(tmp_path):
    """measure(command line) -> the section that it writes."""

    def run(line):
        command, _, recipe, *rest = shlex.split(line)
        output = tmp_path / "speed.json"
        assert speed.main([command, "--output", str(output), "--recipe", recipe, *rest]) == 0
        return json.loads(output.read_text())[command][recipe]

    return run


@pytest.fixture
def small_job(tmp_path, monkeypatch, data_dir, digests):
    """Replaces train.py by the same job with the small MNIST and without plots; returns flags."""
    (tmp_path / "train.py").write_text(
        f"import sys\nsys.path[0] = {str(ROOT)!r}\n"
        f"import dataset, train\nfrom support import plots\ndataset.SHA256 = {digests!r}\n"
        "plots.run_figures = lambda *args: {}\nsys.exit(train.main())\n"
    )
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    return f"--data-dir {data_dir}"


def test_misses_are_counted_and_the_peer_is_stopped_at_the_target(measure, small_job, tmp_path):
    peer = tmp_path / "examples" / "mnist" / "main.py"
    peer.parent.mkdir(parents=True)
    peer.write_text(PEER)
    section = measure(f"accuracy --recipe fast --seeds 1 --peer {tmp_path}/examples -- {small_job}")
    assert section["misses"] == 1 and section["dataset"] == "mnist"
    assert section["median"] == {"train_seconds": None, "wall_seconds": None}
    assert 0 < section["runs"][0]["train_seconds"] < section["runs"][0]["wall_seconds"]
    peer = section["peer"]
    assert [epoch["digit_accuracy"] for epoch in peer["epochs"]] == [0.985, 0.99]
    assert peer["reached"] and 0.1 < peer["train_seconds"] < peer["wall_seconds"] - 0.6


@pytest.fixture
def fixed_times(monkeypatch):
    """Runs that take 2 s and 1 ms per image; two processes take half as long."""

    def train(recipe, flags, processes=1):
        args = speed.parse_train_args(flags)
        row = RECIPES[recipe].as_plain() | {"val_size": args.val_size or 0}
        seconds = [(2 + 1e-3 * (60_000 - row["val_size"])) / processes] * (args.epochs or 1)
        test = {"digit_accuracy": 0.992 + 0.002 * args.seed, "sum_accuracy": 0.991}
        info = {"test": test, "parameters": 1000, "threads": 2 // processes, "versions": {}}
        info |= {"dataset": "mnist", "device": "cpu", "precision": "fp32"}
        return speed.Run(info, row, seconds, 70.0, 5 * row["val_size"])

    monkeypatch.setattr(speed, "train", train)


def test_growth_is_compared_with_a_line(measure, fixed_times):
    section = measure("growth --recipe fast")
    assert [row["images"] for row in section["sizes"]] == [7_500, 15_000, 30_000, 60_000]
    assert section["line"]["seconds_per_image"] == pytest.approx(1e-3)
    assert section["line"]["intercept_seconds"] == pytest.approx(2)
    assert section["line"]["largest_deviation"] == pytest.approx(0, abs=1e-9)


def test_growth_refuses_the_flag_that_it_sets(capsys):
    assert speed.main(["growth", "--", "--val-size", "100"]) == 2
    assert "growth sets --val-size" in capsys.readouterr().err


def test_the_limit_is_the_rate_of_matrix_products(measure, fixed_times, monkeypatch):
    rates = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: rates[dtype])
    section = measure("limit --recipe fast")
    assert section["flops_per_second"] == pytest.approx(6 * sum(BY_HAND["fast"]) * 60_000 / 62)
    reached = {name: product["reached"] for name, product in section["products"].items()}
    assert reached["fp32"] == pytest.approx(section["flops_per_second"] / 1e11)
    assert reached["bf16"] == pytest.approx(reached["fp32"] / 4)


def test_the_rate_of_matrix_products_is_the_best_one(monkeypatch):
    seconds = [0.05, 0.02, 0.05, 0.05, 0.05]  # of 256 rows and columns: too fast to be measured
    seconds += [0.2, 0.1, 0.2, 0.2, 0.2]  # of 512
    times = itertools.accumulate(itertools.chain.from_iterable((0, value) for value in seconds))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    rate = speed.product_rate(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 512**3 / 0.1)


def test_processes_are_compared_over_equal_seeds(measure, fixed_times):
    section = measure("processes --recipe fast --seeds 2")
    one, two = (section["processes"][count] for count in ("1", "2"))
    assert (one["epoch_seconds"], two["epoch_seconds"]) == (62, 31)
    assert one["step_seconds"] == pytest.approx(62 / 469)  # 60,000 in batches of 128
    assert one["digit_accuracy"]["mean"] == pytest.approx(0.993) and one["sum_accuracy"]["n"] == 2
    assert section["gradient_bytes_per_step"] == 4000
    assert section["flops_per_step"] == 6 * 128 * sum(BY_HAND["fast"])


def test_times_beside_a_busy_process(measure, fixed_times, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the program's own setting is measured, not this one
    started, train = [], speed.train
    times = {(None, 0): 11, (None, 1): 16.5, ("300000", 0): 10, ("300000", 1): 40}

    def start(command):
        started.append(subprocess.Popen(command))
        return started[-1]

    def train_beside(recipe, flags, environment):
        running = sum(process.poll() is None for process in started)
        seconds = times[environment.get("GOMP_SPINCOUNT"), running]
        return train(recipe, flags)._replace(epoch_seconds=[seconds])

    monkeypatch.setattr(speed, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(speed, "train", train_beside)
    section = measure("busy --recipe fast --seeds 3")
    assert section["seconds"]["torch"] == {"alone": [10] * 3, "beside": [40] * 3}
    assert section["beside_to_alone"] == {"ours": 1.5, "torch": 4}
    assert section["ours_to_torch_alone"] == 1.1
    assert len(started) == 6 and all(process.poll() is not None for process in started)


def test_the_gpu_benchmark(small_job, workdir):
    flags = [*shlex.split(small_job), "--dry-run", "--device", "cpu", "--batch-size", "100"]
    assert gpu.main(["--recipes", "fast", "--steps", "2", "--", *flags]) == 0
    rows = json.loads((workdir / "runs" / "benchmarks" / "gpu.json").read_text())["rows"]
    assert list(rows) == ["fast"]
    row = rows["fast"]
    assert row["bit_identical"] and row["slowdown"] > 0 and row["gpu_idle"] is None
    assert row["product_fraction"] > 0 and row["warmup_seconds"] > row["step_seconds"] > 0
    assert row["images_per_second"] * row["step_seconds"] == pytest.approx(100)  # the batch size
