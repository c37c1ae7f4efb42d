"""A small MNIST made of synthetic digits, and train.py in this process."""
# ruff: noqa: E402

import functools
import gzip
import hashlib
import http.server
import os
import signal
import struct
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import training  # noqa: F401 (sets environment variables that torch reads when it starts)

# isort: split
import torch
from torch import nn
from torchvision.datasets import MNIST

import dataset
import train
from recipes import RECIPES
from synthetic import synthetic_mnist
from training import plots

TRAIN_IMAGES, TEST_IMAGES = 600, 200


def pytest_configure():
    torch.set_num_threads(1)  # results are bit-identical only with equal thread counts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it


def pytest_xdist_auto_num_workers(config):
    """Two processes, but none besides this one for a single file: each takes seconds to start."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else 2


def small_mnist(train_images, test_images):
    """A small MNIST: its four files, name -> bytes, and its value of dataset.SHA256."""
    files, digest = {}, hashlib.sha256()
    for prefix, split, count in (("train", "train", train_images), ("t10k", "test", test_images)):
        digits = synthetic_mnist(split, count)
        for kind, tensor in (("images-idx3", digits.data), ("labels-idx1", digits.targets)):
            header = bytes([0, 0, 8, tensor.ndim]) + struct.pack(f">{tensor.ndim}I", *tensor.shape)
            files[f"{prefix}-{kind}-ubyte"] = header + tensor.byte().numpy().tobytes()
            digest.update(tensor.numpy())
    return files, digest.hexdigest()


def write_mnist(data_dir, files):
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)


@pytest.fixture(scope="session")
def small():
    return small_mnist(TRAIN_IMAGES, TEST_IMAGES)


@pytest.fixture(autouse=True)
def only_small_mnist(monkeypatch, small):
    """Only the small files pass as MNIST, and nothing can be downloaded."""
    monkeypatch.setattr(dataset, "SHA256", small[1])
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def mirror(tmp_path, small, monkeypatch):
    """A local server to download the small MNIST from; yields its request handler class."""
    directory = tmp_path / "mirror"
    directory.mkdir()
    resources = []
    for name, content in small[0].items():
        packed = gzip.compress(content)
        (directory / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_dir(tmp_path, small):
    """A data directory with the small MNIST."""
    write_mnist(tmp_path / "data", small[0])
    return tmp_path / "data"


@pytest.fixture
def workdir(tmp_path, monkeypatch, data_dir):
    """An empty working directory, apart from the small MNIST in `data`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job_with_plots(workdir, capsys):
    """train.py in this process: job(flag, ...) -> (exit status, stdout, stderr)."""

    def run(*flags):
        status = train.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def job(job_with_plots, monkeypatch):
    """The same without plots and without waiting for the disk, which take most of the time."""
    monkeypatch.setattr(plots, "run_figures", lambda *args: [])
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return job_with_plots


def toy():
    """An encoder without batch normalization and with few parameters."""
    return nn.Sequential(nn.Conv2d(1, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


TOY = replace(RECIPES["concat-mlp"], encoder=toy, drop_last=False)


@pytest.fixture
def toy_recipe(monkeypatch):
    """Adds the recipe "toy"."""
    monkeypatch.setitem(RECIPES, "toy", TOY)
