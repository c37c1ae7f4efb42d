"""The Dataset: its items, and that its randomness depends on (seed, split, epoch, index) only."""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import InterpolationMode, affine

import dataset
from dataset import MNISTSum, affine_matrices, draw_unseen, generator, split_indices, warp
from synthetic import synthetic_mnist
from training.console import UserError

AFFINE = 10, 0.1, 0.1, 10


@pytest.fixture(scope="module")
def digits():
    return synthetic_mnist("train", 500)


def order(items):
    """The order of the images in an epoch."""
    return torch.cat(items.batches(2))


def test_several_items_come_stacked_also_from_a_dataloader(digits):
    items = MNISTSum(digits, "train", affine=AFFINE)
    sampler = order(items).tolist()
    for batch in DataLoader(items, 128, sampler=sampler, num_workers=1):
        indices, sampler = sampler[:128], sampler[128:]
        for same in (items.batch(torch.tensor(indices)), items[indices]):
            assert all(map(torch.equal, batch, same))
    for part, whole in zip(items[-2:], zip(items[498], items[499], strict=True), strict=True):
        assert torch.equal(part, torch.stack(whole))
    assert not sampler and torch.equal(items[-1][0], items[499][0])
    with pytest.raises(IndexError):
        items[500]


def test_an_item_is_image_digit_addend_and_sum(digits):
    items = MNISTSum(digits, "train", mean=0.1, std=0.5)
    image, digit, addend, total = items[7]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
    assert (addend.shape, addend.dtype, addend.sum()) == ((10,), torch.float32, 1)
    assert digit.dtype == total.dtype == torch.int64
    assert digit == digits.targets[7] and total == digit + addend.argmax()
    torch.testing.assert_close(image[0], (digits.data[7] / 255 - 0.1) / 0.5)


def test_images_and_targets_that_are_not_those_of_mnist_are_refused(digits):
    for data, targets in (
        (digits.data / 255, digits.targets),
        (digits.data[:, :14], digits.targets),
        (digits.data, digits.targets[:-1]),
        (digits.data, F.one_hot(digits.targets)),
    ):
        with pytest.raises(ValueError):
            MNISTSum(SimpleNamespace(data=data, targets=targets), "train")


def test_addends_are_uniform_and_stay_those_of_their_key(digits):
    items = MNISTSum(digits, "train", seed=5)
    items.set_epoch(3)
    key = hashlib.sha256(b"5/train/3/addends").digest()
    draw = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    assert torch.equal(items.addends, torch.randint(10, (500,), generator=draw))


@pytest.mark.parametrize("seed", [0, 1])
def test_of_any_number_of_unseen_pairs_each_digit_addend_and_sum_is_still_seen(seed):
    assert draw_unseen(0, seed) is None
    for count in range(1, 76):
        unseen = draw_unseen(count, seed)
        assert unseen.shape == (10, 10) and unseen.dtype == torch.bool and unseen.sum() == count
        digit, addend = (~unseen).nonzero().unbind(1)
        for values, classes in ((digit, 10), (addend, 10), (digit + addend, 19)):
            assert len(values.unique()) == classes


def test_unseen_pairs_depend_on_the_seed_and_each_may_be_one():
    draws = [draw_unseen(30, seed) for seed in range(300)]
    assert torch.equal(draws[7], draw_unseen(30, 7))
    often = torch.stack(draws).float().mean(dim=0).flatten()
    assert often[0] == often[-1] == 0  # nothing else has the sums of 0 + 0 and 9 + 9
    assert often[1:-1].min() > 0.15 and often.max() < 0.45


def test_addends_that_may_occur_are_uniform(digits):
    unseen = draw_unseen(60, seed=2)
    items = MNISTSum(digits, "train", unseen=unseen)
    counts = torch.zeros(10, 10)
    for epoch in range(1, 101):
        items.set_epoch(epoch)
        counts.index_put_((items.digits, items.addends), torch.ones(500), accumulate=True)
    assert not counts[unseen].any()
    shares, allowed = counts / counts.sum(dim=1, keepdim=True), (~unseen).sum(dim=1)
    for digit, addend in (~unseen).nonzero().tolist():
        assert shares[digit, addend] == pytest.approx(1 / allowed[digit].item(), abs=0.05)


def test_randomness_depends_only_on_seed_split_epoch_and_index(digits):
    whole, again = (MNISTSum(digits, "train", affine=AFFINE) for _ in range(2))
    part = MNISTSum(digits, "train", torch.arange(100, 200), affine=AFFINE)
    indices = torch.arange(20)
    for epoch in (3, 1, 2):
        for items in (whole, part):
            items.set_epoch(epoch)
        again.set_epoch(9)  # earlier epochs leave no state
        again.set_epoch(epoch)
        assert torch.equal(order(whole), order(again))
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
        items = MNISTSum(digits, key["split"], seed=key["seed"], affine=AFFINE)
        items.set_epoch(key["epoch"])
        drawn.append((order(items), items.addends, items.matrices))
    assert all((ours != theirs).float().mean() > 0.5 for ours, theirs in zip(*drawn, strict=True))


def test_addends_drawn_once_are_the_same_in_every_epoch(digits):
    items = MNISTSum(digits, "train", addends="once")
    before, ordered = items.addends, order(items)
    items.set_epoch(2)
    assert torch.equal(before, items.addends) and not torch.equal(ordered, order(items))


@pytest.mark.parametrize("drop_last, sizes", [(False, [192, 192, 116]), (True, [192, 192])])
def test_batches_cover_the_epoch_once(digits, drop_last, sizes):
    batches = MNISTSum(digits, "train").batches(192, drop_last)
    assert [len(batch) for batch in batches] == sizes
    assert len(torch.cat(batches).unique()) == sum(sizes)


@pytest.mark.parametrize("images, last", [(132, 4), (133, 4), (131, 0)])
def test_processes_get_equal_shares_of_each_batch(digits, images, last, monkeypatch):
    items = MNISTSum(digits, "train", torch.arange(images))
    whole, shares = items.batches(64), []
    for rank in range(2):
        monkeypatch.setattr(dataset, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dataset, "world_size", lambda: 2)
        shares.append(items.batches(64))
        with pytest.raises(UserError):
            items.batches(65)
    sizes = [64, 64] + ([last] if last else [])  # images that cannot be shared are left out
    for share, size, batch in zip(zip(*shares, strict=True), sizes, whole, strict=False):
        assert [len(part) for part in share] == [size // 2] * 2
        assert torch.equal(torch.cat(share).sort().values, batch[:size].sort().values)
    assert len(shares[0]) == len(sizes)


def test_the_validation_split_depends_on_the_seed():
    train, val = split_indices(1000, 300, seed=5)
    assert len(train) == 700 and len(val) == 300
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert torch.equal(val, split_indices(1000, 300, seed=5)[1])
    assert not torch.equal(val, split_indices(1000, 300, seed=6)[1])


def test_rotation_is_the_same_as_in_torchvision(digits):
    images = digits.data[:50].unsqueeze(1).float()
    for degrees in (0, 10, -25):
        angle = math.radians(degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(50, 2, 3)
        theirs = affine(images, -degrees, [0, 0], 1.0, [0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(warp(images, matrix), theirs, atol=0.5, rtol=0)


def test_affine_augmentation_is_rotation_after_shear_after_zoom_and_a_shift():
    matrices = affine_matrices(5, generator("parts"), 30, 0.1, 0.2, 20)
    angle, shear, *rest = torch.rand(6, 5, generator=generator("parts")) * 2 - 1
    for i, matrix in enumerate(matrices):
        shearing = torch.tensor([[1, math.tan(math.radians(20) * shear[i])], [0, 1]])
        zoom_x, zoom_y, *shift = (part[i] for part in rest)
        zooming = torch.diag(1 + 0.2 * torch.stack([zoom_x, zoom_y]))
        cos, sin = (f(math.radians(30) * angle[i]) for f in (torch.cos, torch.sin))
        rotation = torch.tensor([[cos, -sin], [sin, cos]])
        torch.testing.assert_close(matrix[:, :2], rotation @ shearing @ zooming)
        torch.testing.assert_close(matrix[:, 2], 2 * 0.1 * torch.stack(shift))  # of half sides
