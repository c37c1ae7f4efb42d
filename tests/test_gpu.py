"""On a GPU: the same experiment as on the CPU, reproducible if asked, and no step that waits."""

import dataclasses
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_train import FAST, assert_equal_runs, read_json

import train
from dataset import MNISTSum
from model import build_model
from recipes import RECIPES
from synthetic import synthetic_mnist
from training.device import move_model, pick_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

DEFAULT = RECIPES["default"]
AFFINE = 10, 0.1, 0.1, 10
PROGRESS = SimpleNamespace(update=lambda: None)


def make_dataset(images, device):
    return MNISTSum(synthetic_mnist("train", images), "train", affine=AFFINE, device=device)


def start(recipe, device, precision):
    """What `train.train_epoch` needs on a device, all but the dataset: train(dataset) -> steps."""
    torch.manual_seed(0)
    device, precision = pick_device(device, precision)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    model = move_model(build_model(recipe.encoder, recipe.head), device)
    optimizer = train.make_optimizer(model, recipe)
    return lambda dataset: train.train_epoch(
        model, optimizer, dataset, recipe, 1, autocast, PROGRESS
    )


def test_a_run_on_the_gpu_continues_on_the_cpu_and_back(job_with_plots):
    flags = [*FAST, "--device", "cuda", "--output-dir", "run"]
    assert job_with_plots(*flags, "--epochs", 2)[::2] == (0, "")
    assert read_json("run")["device"] == "cuda:0"
    for epochs, device in ((3, "cpu"), (4, "cuda")):
        assert job_with_plots("--resume", "run", "--epochs", epochs, "--device", device)[0] == 0
        assert read_json("run")["device"].startswith(device)


def test_a_deterministic_run_is_reproducible_bit_for_bit(job):
    for directory in ("one", "two"):
        flags = ["--device", "cuda", "--deterministic", "--epochs", 2, "--batch-size", 100]
        assert job(*flags, "--output-dir", directory)[0] == 0
    assert_equal_runs("one", "two")


def test_order_addends_and_augmentation_are_those_of_the_cpu():
    ours, theirs = make_dataset(64, "cpu"), make_dataset(64, "cuda")
    assert torch.equal(ours.matrices, theirs.matrices.cpu())
    for on_cpu, on_gpu in zip(ours.batches(16), theirs.batches(16), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
        expected = ours.batch(on_cpu)
        image, *rest = (part.cpu() for part in theirs.batch(on_gpu))
        torch.testing.assert_close(image, expected[0], atol=1e-3, rtol=1e-3)
        assert all(map(torch.equal, rest, expected[1:]))


def test_fp32_trains_as_on_the_cpu():
    recipe = dataclasses.replace(DEFAULT, batch_size=16)
    steps = [start(recipe, name, "fp32")(make_dataset(64, name)) for name in ("cpu", "cuda")]
    # Only the losses: an image at the decision boundary may change the accuracies.
    losses = [sums[:, :2] / sums[:, -1:] for sums in steps]
    torch.testing.assert_close(*losses, atol=0.05, rtol=0.05)


def count_synchronizations(train_on, images):
    """How often the host waits for the GPU in an epoch of so many images."""
    dataset = make_dataset(images, "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_on(dataset)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ["default", "fast", "tiny", "concat-mlp"])
def test_a_step_never_waits_for_the_gpu(name):
    recipe = dataclasses.replace(RECIPES[name], batch_size=16)
    train_on = start(recipe, "cuda", "bf16")
    count_synchronizations(train_on, 16)  # loads libraries and chooses the fastest kernels
    few, many = count_synchronizations(train_on, 32), count_synchronizations(train_on, 160)
    assert 1 <= few == many  # only at the start and end of the epoch
