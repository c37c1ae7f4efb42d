"""results/tiny.pt, the trained network in the repository."""

import hashlib
import os
import re
import subprocess
import sys
from unittest.mock import ANY

import pytest
from conftest import ROOT

import predict
from handwriting.predictor import load_model
from recipes import RECIPES

PATH = ROOT / "results" / "tiny.pt"
SHA256 = "d1352e1a0aef56e46f964545670a320fdfc6ed5ade1b68ae08636e5b3fc442d4"
MNIST_DIR = os.environ.get("MNIST_DIR")


def test_recipe_and_digest():
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == SHA256
    model, checkpoint = load_model(PATH)
    assert checkpoint["recipe"] | {"description": ANY} == RECIPES["tiny"].as_plain()
    assert len(checkpoint["history"]) == RECIPES["tiny"].epochs
    assert sum(p.numel() for p in model.parameters()) < 6000


@pytest.mark.parametrize("name, digit", [("five", 5), ("two", 2), ("nine", 9)])
def test_the_sample_pictures_are_recognized(name, digit, capsys):
    assert predict.main([str(PATH), str(ROOT / "samples" / f"{name}.png"), "--add", "7"]) == 0
    assert capsys.readouterr().out.startswith(f"digit {digit} ")


def test_it_can_be_evaluated(job):
    status, out, err = job("--resume", PATH, "--eval-only", "--data-dir", "data")
    assert (status, err) == (0, "") and "\nresult   test: digit " in out


def test_it_is_the_only_checkpoint():
    command = ["git", "ls-files", "*.pt", "*.pth", "*.pt2", "*.onnx"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git repository")
    assert files.stdout.split() == ["results/tiny.pt"]


@pytest.mark.skipif(not MNIST_DIR, reason="needs MNIST in MNIST_DIR")
def test_accuracy():
    command = [sys.executable, "train.py", "--resume", PATH, "--eval-only", "--data-dir", MNIST_DIR]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    digit, total = re.search(r"digit (\S+) %, sum (\S+) %", line).groups()
    assert f"{digit} / {total} on the test images" in (ROOT / "results" / "README.md").read_text()
