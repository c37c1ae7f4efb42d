"""A small data folder in MNIST's format, made of the stand-in's digits, and ways to run the job."""

import hashlib
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "benchmarks", "results")]

import mnist  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from recipes import RECIPES  # noqa: E402

TRAIN_IMAGES, TEST_IMAGES = 600, 200


def pytest_configure():
    torch.set_num_threads(1)  # bits are equal only at equal thread counts


def idx(tensor):
    """A uint8 tensor as the bytes of an IDX file."""
    sizes = struct.pack(f">{tensor.ndim}I", *tensor.shape)
    return bytes([0, 0, 8, tensor.ndim]) + sizes + tensor.byte().numpy().tobytes()


def files_of(images):
    """The four files of a small MNIST, with {"train": count, "test": count}: name -> bytes."""
    files = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        digits = mnist.stand_in(part, images[part])
        files[f"{name}-images-idx3-ubyte"] = idx(digits.data)
        files[f"{name}-labels-idx1-ubyte"] = idx(digits.targets)
    return files


def digests_of(files):
    """What mnist.SHA256 says of files."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def write_files(data_dir, files):
    """Put files where a data folder has them."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)


@pytest.fixture(scope="session")
def idx_files():
    return files_of({"train": TRAIN_IMAGES, "test": TEST_IMAGES})


@pytest.fixture(scope="session")
def digests(idx_files):
    return digests_of(idx_files)


@pytest.fixture(autouse=True)
def small_mnist(monkeypatch, digests):
    """The small files take the place of MNIST's, and no mirror is ever asked."""
    monkeypatch.setattr(mnist, "SHA256", digests)
    monkeypatch.setattr(mnist.MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def data_dir(tmp_path, idx_files):
    """A data folder with the small MNIST."""
    write_files(tmp_path / "data", idx_files)
    return tmp_path / "data"


@pytest.fixture
def workplace(tmp_path, monkeypatch, data_dir):
    """An empty current folder with the small MNIST in its `data`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job(drawing_job, monkeypatch):
    """The real job in this process, without its pictures, which would take most of the time."""
    monkeypatch.setattr(train.Run, "draw", lambda self: [])
    return drawing_job


@pytest.fixture
def drawing_job(workplace, capsys):
    """The real job in this process: job(flag, ...) -> (exit status, stdout, stderr)."""

    def run(*flags):
        status = train.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return run


def toy():
    """An encoder without batch normalisation, and with few parameters."""
    return nn.Sequential(nn.Conv2d(1, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


TOY = replace(RECIPES["concat-mlp"], encoder="toy", drop_last=False)


def add_toy_recipe():
    """Let there be the recipe "toy", of that encoder, trained as a published system was."""
    model.ENCODERS["toy"], RECIPES["toy"] = toy, TOY


@pytest.fixture
def toy_recipe(monkeypatch):
    """The recipe "toy", for a test."""
    monkeypatch.setitem(model.ENCODERS, "toy", toy)
    monkeypatch.setitem(RECIPES, "toy", TOY)
