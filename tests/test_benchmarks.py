"""What the benchmarks count and time is so."""

import json
import re
import shlex
import time

import pytest
import seeds
import speed
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import model
from dataset import NUM_DIGITS, SIDE
from recipes import RECIPES

# Each output of a layer times the inputs that it is made of, counted by hand.
JOIN = 100 * 19
SMALL_FIRST = 24 * 24 * 16 * 5 * 5
COMPACT_FIRST = 14 * 14 * 32 * 5 * 5
BY_HAND = {
    "fast": (SMALL_FIRST, 10 * 10 * 32 * 16 * 3 * 3 + 800 * 256 + 256 * 10 + JOIN),
    "default": (
        COMPACT_FIRST,
        (14 * 14 * 64 * 32 + 7 * 7 * 128 * 64 + 5 * 5 * 128 * 128) * 3 * 3 + 128 * 10 + JOIN,
    ),
}
# As pytorch/examples prints it.
PEER = r"""
import sys, time
from pathlib import Path

assert Path("../data/MNIST/raw/train-images-idx3-ubyte").is_file()
for epoch, right in enumerate((9850, 9900, 9999), start=1):
    for step in (0, 10):
        print(f"Train Epoch: {epoch} [{64 * step}/60000 (0%)]\tLoss: 0.1")
        time.sleep(0.1)
    time.sleep(0.3)  # the test
    print(f"\nTest set: Average loss: 0.0300, Accuracy: {right}/10000 (99%)\n")
time.sleep(60)
"""


@pytest.mark.parametrize("recipe", BY_HAND)
def test_training_costs_six_times_the_multiply_adds(recipe):
    row = RECIPES[recipe]
    first, others = BY_HAND[recipe]
    assert speed.multiply_adds(row.as_plain()) == first + others
    network, images = model.build(row.encoder, row.join), 2
    with FlopCounterMode(display=False) as counter:
        outputs = network(torch.zeros(images, 1, SIDE, SIDE), torch.zeros(images, NUM_DIGITS))
        sum(part.sum() for part in outputs).backward()
    # The rule of six counts a gradient by the image as well, which nobody needs.
    assert counter.get_total_flops() == images * (6 * (first + others) - 2 * first)


def test_an_ablation_is_compared_seed_by_seed_and_goes_on_where_it_was(
    workplace, monkeypatch, capsys
):
    monkeypatch.setattr(seeds, "ROOT", workplace)
    (workplace / "results").mkdir()
    vary = shlex.split("--vary label_smoothing=0 affine=[9,0.1,0.1,9] --vary schedule=constant")
    argv = ["--recipe", "fast", "--seeds", "2", *vary, "--", "--dry-run", "--val-size", "50"]
    seeds.main(argv)
    rows = json.loads((workplace / "results/fast-ablation.json").read_text())["rows"]
    base, clean, constant = rows.values()
    assert base["settings"] == RECIPES["fast"].as_plain() | {"val_size": 50}
    assert clean["settings"]["label_smoothing"] == 0 and len(clean["settings"]["affine"]) == 4
    assert constant["settings"]["schedule"] == "constant"
    for row in rows.values():
        assert set(row["figures"]) == {"digit", "sum", "both"}  # of the images held out
        assert row["figures"]["both"]["n"] == 2 and min(row["each"]["both"]) > 0
    assert base["each"] != clean["each"] != constant["each"]
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| .* \| [+-]\d\.\d+ ± \d", printed, re.MULTILINE)) == 2

    monkeypatch.setattr(seeds.train, "main", None)  # nothing is left to train
    seeds.main(argv)
    assert json.loads((workplace / "results/fast-ablation.json").read_text())["rows"] == rows


@pytest.mark.parametrize("change", ["no_column=1", "schedule=none", "affine=3"])
def test_a_column_that_is_not_there_is_refused(change, capsys):
    with pytest.raises(SystemExit):
        seeds.main(["--vary", change])
    assert f"--vary {change}: " in capsys.readouterr().err


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(command line) -> the section that it writes."""
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.json")

    def run(line):
        command, _, recipe, *_ = line = shlex.split(line)
        speed.main(line)
        return json.loads(speed.RESULTS.read_text())[command][recipe]

    return run


@pytest.fixture
def small_job(tmp_path, monkeypatch, data_dir, digests):
    """In train.py's place the same job with the small MNIST and no pictures: its flags."""
    (tmp_path / "train.py").write_text(
        f"import sys\nsys.path[0] = {str(ROOT)!r}\n"
        f"import mnist, train\nmnist.SHA256 = {digests!r}\n"
        "train.Run.draw = lambda run: []\nsys.exit(train.main())\n"
    )
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    return f"--data-dir {data_dir}"


def test_misses_are_counted_and_the_peer_is_stopped_at_the_mark(measure, small_job, tmp_path):
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
def made_up(monkeypatch):
    """Runs of 2 s and 1 ms an image in place of real ones; two processes take half as long."""

    def train(recipe, flags, processes=1):
        args = speed.train_parser("").parse_args(flags)
        row = RECIPES[recipe].as_plain() | {"val_size": args.val_size or 0}
        seconds = [(2 + 1e-3 * (60_000 - row["val_size"])) / processes] * (args.epochs or 1)
        test = {"digit_accuracy": 0.992 + 0.002 * args.seed, "sum_accuracy": 0.991}
        facts = {"test": test, "parameters": 1000, "threads": 2 // processes, "versions": {}}
        facts |= {"dataset": "mnist", "device": "cpu", "precision": "fp32"}
        return speed.Run(facts, row, seconds, 70.0, 5 * row["val_size"])

    monkeypatch.setattr(speed, "train", train)


def test_growth_is_held_against_a_line(measure, made_up):
    section = measure("growth --recipe fast")
    assert [row["images"] for row in section["sizes"]] == [7_500, 15_000, 30_000, 60_000]
    assert section["line"]["seconds_an_image"] == pytest.approx(1e-3)
    assert section["line"]["seconds_at_none"] == pytest.approx(2)
    assert section["line"]["largest_deviation"] == pytest.approx(0, abs=1e-9)


def test_the_limit_is_that_of_matrix_products(measure, made_up, monkeypatch):
    rates = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: rates[dtype])
    section = measure("limit --recipe fast")
    assert section["flops_a_second"] == pytest.approx(6 * sum(BY_HAND["fast"]) * 60_000 / 62)
    reached = {name: product["reached"] for name, product in section["products"].items()}
    assert reached["fp32"] == pytest.approx(section["flops_a_second"] / 1e11)
    assert reached["bf16"] == pytest.approx(reached["fp32"] / 4)


def test_products_are_timed():
    one, times = torch.rand(1024, 1024), []
    for _ in range(5):
        clock = time.perf_counter()
        one @ one
        times.append(time.perf_counter() - clock)
    rate = speed.product_rate(torch.device("cpu"), torch.float32)
    assert 0.1 < rate / (2 * 1024**3 / min(times)) < 10


def test_processes_are_compared_over_the_same_seeds(measure, made_up):
    section = measure("processes --recipe fast --seeds 2")
    one, two = (section["processes"][count] for count in ("1", "2"))
    assert (one["epoch_seconds"], two["epoch_seconds"]) == (62, 31)
    assert one["step_seconds"] == pytest.approx(62 / 469)  # 60,000 in batches of 128
    assert one["digit_accuracy"]["mean"] == pytest.approx(0.993) and one["sum_accuracy"]["n"] == 2
    assert section["gradient_bytes_a_step"] == 4000
    assert section["flops_a_step"] == 6 * 128 * sum(BY_HAND["fast"])


@pytest.mark.parametrize("script, count", [(seeds, 2 + 2), (speed, 5 + 4)])
def test_the_commands_that_are_told_of_parse(script, count):
    told = (ROOT / "README.md").read_text() + script.__doc__.replace("\\\n", "")
    name = script.__name__
    lines = re.findall(rf"^ *python benchmarks/{name}\.py ([^#\n]+)", told, re.MULTILINE)
    assert len(lines) == count
    for line in lines:
        argv = shlex.split(line)
        args = seeds.parse(argv)[0] if script is seeds else speed.parser().parse_args(argv)
        assert args.recipe in RECIPES
        speed.train_parser("").parse_args(args.flags)
