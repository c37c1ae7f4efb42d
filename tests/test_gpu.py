"""On a GPU: the CPU's experiment, which repeats to the bit where asked, and no step that waits."""

import dataclasses
import warnings

import pytest
import torch
from test_train import FAST, result, without_seconds
from tqdm import tqdm

import mnist
from dataset import MNISTSum
from device import NEVER, pick_engine
from learner import Learner, train_epoch
from recipes import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")

DEFAULT = RECIPES["default"]


def dataset(images, device):
    """The first images of the stand-in, as `default` trains on them."""
    return MNISTSum(mnist.stand_in("train", images), "train", affine=DEFAULT.affine, device=device)


def test_the_job_runs_on_the_gpu(drawing_job):
    status, out, err = drawing_job(*FAST, "--device", "cuda", "--epochs", 2)
    assert (status, err) == (0, "") and out.startswith("device   cuda")
    assert result("runs/fast")["device"].startswith("cuda")


def test_a_deterministic_run_repeats_to_the_bit(job):
    for folder in ("one", "two"):
        flags = ["--device", "cuda", "--deterministic", "--epochs", 2, "--batch-size", 100]
        assert job(*flags, "--output-dir", folder)[0] == 0
    assert without_seconds("one") == without_seconds("two")
    one, two = (torch.load(f"{x}/last.pt", weights_only=True) for x in ("one", "two"))
    assert all(torch.equal(v, two["network"][k]) for k, v in one["network"].items())


def test_order_addends_and_augmentation_are_those_of_the_cpu():
    here, there = dataset(64, "cpu"), dataset(64, "cuda")
    assert torch.equal(here.order(), there.order().cpu())
    assert torch.equal(here.matrices, there.matrices.cpu())
    for ours, theirs in zip(here.batches(16), there.batches(16), strict=True):
        assert ours[0] == theirs[0]
        image, digit, addend, total = (part.cpu() for part in theirs[1])
        torch.testing.assert_close(ours[1][0], image, atol=1e-3, rtol=1e-3)
        for one, other in zip(ours[1][1:], (digit, addend, total), strict=True):
            assert torch.equal(one, other)


def test_fp32_on_the_gpu_learns_as_on_the_cpu():
    recipe = dataclasses.replace(DEFAULT, batch_size=16)
    records = []
    for device in ("cpu", "cuda"):
        learner = Learner.build(recipe, pick_engine(device, "fp32"), seed=0)
        bar = tqdm(disable=True)
        record = train_epoch(learner, dataset(64, device), 0, 4, NEVER, bar)
        records.append(record[:, :2])  # the losses: an image on the edge may change the counts
    torch.testing.assert_close(*records, atol=0.05, rtol=0.05)


def waits(learner, images):
    """How often the host waits for the GPU in an epoch of so many images."""
    part = dataset(images, "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_epoch(learner, part, 0, 100, NEVER, tqdm(disable=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ["default", "fast", "tiny", "concat-mlp"])
def test_a_step_never_waits_for_the_gpu(name):
    recipe = dataclasses.replace(RECIPES[name], batch_size=16, affine=DEFAULT.affine)
    learner = Learner.build(recipe, pick_engine("cuda"), seed=0)
    waits(learner, 16)  # libraries load, and try which of their kernels is fastest
    few, many = waits(learner, 32), waits(learner, 160)
    assert 1 <= few == many  # at the epoch's ends alone
