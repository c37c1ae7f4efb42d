"""The Dataset that pairs each MNIST image with a random addend: items (image, digit, addend, sum).

Everything random here is a function of (seed, split, epoch, index), drawn on the CPU from private
generators: the same addends, order and augmentation come out whatever the batch size, the device
or the number of processes, and a resumed run needs no generator's state to go on as it was.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

NUM_DIGITS = 10
NUM_SUMS = 19
SIDE = 28  # pixels
MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to 0..1
# Test images whose labels people found wrong: they show another digit, or one can't agree which.
DOUBTED = {947, 1621, 1901, 2462, 2597, 3558, 5937, 6651, 6783, 9729, 2130, 2654, 3520, 8527, 9679}


class DataError(Exception):
    """The data can't be used; the message says what is wrong and what to do."""


class Affine(NamedTuple):
    """Limits of a random affine augmentation, in the terms of torchvision's RandomAffine."""

    degrees: float  # rotation
    translate: float  # shift, as a fraction of the side
    scale: float  # zoom from 1 - scale to 1 + scale, each axis on its own
    shear: float  # degrees


class MNISTSum(Dataset):
    """MNIST images with a random addend each: `(image, digit, addend_one_hot, total)`.

    For example the image of a 7 with addend 5:

        image           float32 (1, 28, 28), normalised
        digit           int64   7
        addend_one_hot  float32 (10,)  [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        total           int64   12

    The images stay uint8 on `device`, and a batch is cut from them there at once. `set_epoch`
    draws the epoch's addends and augmentation.

    Args:
        mnist: torchvision's MNIST, or anything with its `data`, uint8 (N, 28, 28), and `targets`.
        split: the name under which this part of the data draws ("train", "val", "test").
        indices: int64 (n,), the part of `mnist` to use; all of it by default.
        addends: "each-epoch" draws them anew each epoch, "once" for the whole run.
        affine: the limits of the augmentation; none by default.
    """

    def __init__(
        self,
        mnist,
        split,
        indices=None,
        *,
        seed=0,
        addends="each-epoch",
        affine=None,
        mean=MEAN,
        std=STD,
        device="cpu",
    ):
        self.population = len(mnist.data)
        self.indices = torch.arange(self.population) if indices is None else indices
        self.images = mnist.data[self.indices].to(device)  # (n, 28, 28)
        self.digits = mnist.targets[self.indices].to(device)  # (n,)
        self.split, self.seed, self.redraw = split, seed, addends == "each-epoch"
        self.affine, self.mean, self.std, self.device = affine, mean, std, torch.device(device)
        self.set_epoch(1)

    def set_epoch(self, epoch, augment=True):
        """Draw the addends and the augmentation of `epoch` (from 1); `augment=False` omits it."""
        self.epoch = epoch
        # Drawn for the whole population, so that an image's addend does not depend on the split.
        draw = generator(self.seed, self.split, epoch if self.redraw else "once", "addends")
        addends = torch.randint(NUM_DIGITS, (self.population,), generator=draw)
        self.addends = addends[self.indices].to(self.device)  # (n,)
        self.matrices = None
        if self.affine and augment:
            draw = generator(self.seed, self.split, epoch, "affine")
            matrices = affine_matrices(self.population, self.affine, draw)
            self.matrices = matrices[self.indices].to(self.device)  # (n, 2, 3)

    def order(self):
        """The epoch's order: int64 (n,), on the device; drawn on the CPU and moved once."""
        draw = generator(self.seed, self.split, self.epoch, "order")
        return torch.randperm(len(self), generator=draw).to(self.device)

    def batches(self, batch_size, drop_last=False, rank=0, world=1):
        """The epoch's batches, each with how many images it has in all of the `world` processes.

        Yields that count and, of the batch, what falls to the process `rank`: four tensors, ready
        for the network, and empty where a small last batch leaves it nothing.
        """
        for indices in self.order().split(batch_size):
            if len(indices) == batch_size or not drop_last:
                yield len(indices), self.__getitems__(indices[rank::world])

    def normalised(self, indices, matrices=None):
        """Images as the network takes them: float32 (B, 1, 28, 28)."""
        images = self.images[indices].unsqueeze(1).float()
        if matrices is not None and len(images):  # affine_grid takes no empty batch
            images = warp(images, matrices[indices])
        return images.sub_(255 * self.mean).div_(255 * self.std)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return tuple(part[0] for part in self.__getitems__(torch.tensor([index])))

    def __getitems__(self, indices):
        """The items at `indices`: a tensor of them gives one ready batch of four tensors.

        A DataLoader asks with a list, and gets the list of items that its collate_fn expects.
        """
        if isinstance(indices, list):
            return list(zip(*self.__getitems__(torch.tensor(indices)), strict=True))
        indices = indices.to(self.device)
        image = self.normalised(indices, self.matrices)
        digit, addend = self.digits[indices], self.addends[indices]
        return image, digit, F.one_hot(addend, NUM_DIGITS).float(), digit + addend


def generator(*key):
    """A generator of its own for each key, on the CPU: `generator(seed, split, epoch, "order")`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def split_off(count, val_size, seed):
    """Indices of the training and the validation images: int64 (count - val_size,), (val_size,)."""
    shuffled = torch.randperm(count, generator=generator(seed, "validation"))
    return shuffled[val_size:].sort().values, shuffled[:val_size].sort().values


def affine_matrices(count, affine, draw):
    """Random matrices for `warp`: float32 (count, 2, 3), uniform within the limits of `affine`."""
    angle, shear, wide, high, right, down = torch.rand(6, count, generator=draw) * 2 - 1
    angle = angle * math.radians(affine.degrees)
    shear = torch.tan(shear * math.radians(affine.shear))
    wide, high = 1 + wide * affine.scale, 1 + high * affine.scale
    cos, sin = torch.cos(angle), torch.sin(angle)
    # rotation @ shear @ zoom; shifts are in half sides, the unit of affine_grid
    rows = [
        torch.stack([cos * wide, (cos * shear - sin) * high, 2 * affine.translate * right], dim=1),
        torch.stack([sin * wide, (sin * shear + cos) * high, 2 * affine.translate * down], dim=1),
    ]
    return torch.stack(rows, dim=1)


def warp(images, matrices):
    """Warp float (B, 1, H, W) by (B, 2, 3) from output to input coordinates; black outside."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
