"""The Dataset: its items, and that its randomness depends on (seed, split, epoch, index) only."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms.functional import InterpolationMode, affine

from dataset import MNISTSum, load_data, split_indices
from training import distributed
from training.augment import Affine, affine_matrices, generator, warp
from training.errors import UserError
from training.synthetic import synthetic_mnist

AFFINE = Affine(10, 0.1, 0.1, 10)


@pytest.fixture(scope="module")
def digits():
    return synthetic_mnist("train", 500)


def test_several_items_come_stacked(data_dir):
    items = MNISTSum(load_data("mnist", data_dir).train, "train")
    expected = [torch.stack(parts) for parts in zip(*(items[i] for i in range(4)), strict=True)]
    sampler = BatchSampler(range(4), batch_size=4, drop_last=False)
    loader = DataLoader(items, sampler=sampler, batch_size=None)
    for batch in (items[0:4], items[[0, 1, 2, 3]], next(iter(loader))):
        for part, whole in zip(batch, expected, strict=True):
            torch.testing.assert_close(part, whole)
    assert torch.equal(items[-1][0], items[len(items) - 1][0])
    with pytest.raises(IndexError):
        items[len(items)]


def test_an_item_is_image_digit_addend_and_sum(data_dir):
    source = load_data("mnist", data_dir).train
    items = MNISTSum(source, "train", mean=0.1, std=0.5)
    image, digit, addend, total = items[7]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
    assert (addend.shape, addend.dtype, addend.sum()) == ((10,), torch.float32, 1)
    assert digit.dtype == total.dtype == torch.int64
    assert digit == source.targets[7]
    assert total == digit + addend.argmax()
    torch.testing.assert_close(image[0], (source.data[7] / 255 - 0.1) / 0.5)


def test_addends_are_uniform_from_0_to_9(digits):
    counts = torch.zeros(10)
    dataset = MNISTSum(digits, "train")
    for epoch in range(1, 101):
        dataset.set_epoch(epoch)
        counts += dataset.addends.bincount(minlength=10)
    expected = counts.sum() / 10
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # exceeded by chance once in a thousand, with 9 degrees of freedom


def test_randomness_depends_only_on_seed_split_epoch_and_index(digits):
    whole, again = (MNISTSum(digits, "train", affine=AFFINE) for _ in range(2))
    part = MNISTSum(digits, "train", torch.arange(100, 200), affine=AFFINE)
    indices = torch.arange(20)
    for epoch in (3, 1, 2):
        for dataset in (whole, part):
            dataset.set_epoch(epoch)
        again.set_epoch(9)  # earlier epochs leave no state
        again.set_epoch(epoch)
        assert torch.equal(whole.order(), again.order())
        for ours, theirs in zip(whole[0], again[0], strict=True):
            assert torch.equal(ours, theirs)
        batch, shifted = whole.batch(indices + 100), part.batch(indices)
        for ours, theirs in zip(batch, shifted, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "test"}, {"epoch": 2}])
def test_another_seed_split_or_epoch_gives_other_draws(digits, change):
    drawn = []
    for key in ({}, change):
        key = {"seed": 0, "split": "train", "epoch": 1} | key
        dataset = MNISTSum(digits, key["split"], seed=key["seed"], affine=AFFINE)
        dataset.set_epoch(key["epoch"])
        drawn.append((dataset.order(), dataset.addends, dataset.matrices))
    assert all((ours != theirs).float().mean() > 0.5 for ours, theirs in zip(*drawn, strict=True))


def test_addends_drawn_once_are_the_same_in_every_epoch(digits):
    dataset = MNISTSum(digits, "train", addends="once")
    before, order = dataset.addends, dataset.order()
    dataset.set_epoch(2)
    assert torch.equal(before, dataset.addends)
    assert not torch.equal(order, dataset.order())


def test_the_order_is_a_permutation(digits):
    dataset = MNISTSum(digits, "train", torch.arange(100))
    assert torch.equal(dataset.order().sort().values, torch.arange(100))


@pytest.mark.parametrize("drop_last, sizes", [(False, [192, 192, 116]), (True, [192, 192])])
def test_batches_cover_the_epoch_once(digits, drop_last, sizes):
    dataset = MNISTSum(digits, "train")
    batches = dataset.batches(192, drop_last)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), dataset.order()[: sum(sizes)])


def set_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


@pytest.mark.parametrize("images, last", [(132, 4), (133, 4), (131, 0)])
def test_processes_get_equal_shares_of_each_batch_and_of_the_images(
    digits, images, last, monkeypatch
):
    dataset = MNISTSum(digits, "train", torch.arange(images))
    order, shares, evaluated = dataset.order(), [], []
    for rank in range(2):
        set_rank(monkeypatch, rank, 2)
        shares.append(dataset.batches(64))
        evaluated.append(dataset.share())
        with pytest.raises(UserError):
            dataset.batches(65)
    sizes = [64, 64] + ([last] if last else [])  # images that cannot be shared are left out
    for share, size, batch in zip(zip(*shares, strict=True), sizes, order.split(64), strict=False):
        assert [len(part) for part in share] == [size // 2] * 2
        assert torch.equal(torch.cat(share).sort().values, batch[:size].sort().values)
    assert len(shares[0]) == len(sizes)
    assert torch.equal(torch.cat(evaluated).sort().values, torch.arange(images))


def test_members_and_processes_draw_differently_but_the_first_as_a_single_one(digits, monkeypatch):
    drawn, seeds = [], set()
    for member in (0, 1):
        dataset = MNISTSum(digits, "train", affine=AFFINE)
        before = dataset.order(), dataset.addends, dataset.matrices
        dataset.set_epoch(1, member)
        drawn.append((dataset.order(), dataset.addends, dataset.matrices))
        assert all(map(torch.equal, before, drawn[-1])) == (member == 0)
        for rank in (0, 1):
            set_rank(monkeypatch, rank, 2)
            seeds.add(dataset.process_seed())
    assert not any(map(torch.equal, *drawn)) and len(seeds) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataloader_gives_the_same_batches(digits, workers):
    dataset = MNISTSum(digits, "train", affine=AFFINE)
    loader = DataLoader(dataset, 128, sampler=dataset.order().tolist(), num_workers=workers)
    for indices, theirs in zip(dataset.batches(128), loader, strict=True):
        for a, b in zip(dataset.batch(indices), theirs, strict=True):
            assert torch.equal(a, b)


def test_the_validation_split_depends_on_the_seed():
    train, val = split_indices(1000, 300, seed=5)
    assert len(train) == 700 and len(val) == 300
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert torch.equal(val, split_indices(1000, 300, seed=5)[1])
    assert not torch.equal(val, split_indices(1000, 300, seed=6)[1])


def test_the_global_generator_is_not_used(digits):
    before = torch.get_rng_state()
    dataset = MNISTSum(digits, "train", affine=AFFINE)
    dataset.batch(dataset.batches(100)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_the_identity_changes_nothing(digits):
    images = digits.data[:50].unsqueeze(1).float()
    matrices = affine_matrices(50, Affine(0, 0, 0, 0), generator("identity"))
    torch.testing.assert_close(warp(images, matrices), images, atol=0.01, rtol=0)


def test_rotation_is_the_same_as_in_torchvision(digits):
    images = digits.data[:50].unsqueeze(1).float()
    for degrees in (10, -25):
        angle = math.radians(degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(50, 2, 3)
        theirs = affine(images, -degrees, [0, 0], 1.0, [0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(warp(images, matrix), theirs, atol=0.5, rtol=0)


def test_affine_augmentation_is_rotation_after_shear_after_zoom():
    matrices = affine_matrices(5, Affine(30, 0.1, 0.2, 20), generator("parts"))
    angle, shear, *zoom = (torch.rand(6, 5, generator=generator("parts")) * 2 - 1)[:4]
    for i, matrix in enumerate(matrices):
        shearing = torch.tensor([[1, math.tan(math.radians(20) * shear[i])], [0, 1]])
        zooming = torch.diag(1 + 0.2 * torch.stack([part[i] for part in zoom]))
        cos, sin = (f(math.radians(30) * angle[i]) for f in (torch.cos, torch.sin))
        rotation = torch.tensor([[cos, -sin], [sin, cos]])
        torch.testing.assert_close(matrix[:, :2], rotation @ shearing @ zooming)


def test_random_affine_stays_within_its_limits():
    matrices = affine_matrices(10_000, Affine(10, 0.1, 0.2, 0), generator("limits"))
    shifts = matrices[:, :, 2] / 2  # as fractions of the side
    assert 0.099 < shifts.abs().max() <= 0.1
    zooms = matrices[:, :, :2].norm(dim=1)
    assert 0.8 <= zooms.min() < 0.802 and 1.198 < zooms.max() <= 1.2
    angles = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert 9.9 < angles.abs().max() <= 10.001
    assert shifts.mean().abs() < 0.002 and angles.mean().abs() < 0.3


def test_the_one_hot_vector_is_of_the_addend():
    zeros = torch.zeros(40, 28, 28, dtype=torch.uint8)
    dataset = MNISTSum(SimpleNamespace(data=zeros, targets=torch.arange(40) % 10), "train")
    _, digit, one_hot, total = dataset.batch(torch.arange(40))
    assert torch.equal(one_hot, F.one_hot(dataset.addends, 10).float())
    assert torch.equal(total - digit, dataset.addends)
