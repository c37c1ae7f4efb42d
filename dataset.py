"""MNIST with a random addend for each image: items (image, digit, one-hot addend, sum).

Addends, order and augmentation are functions of (seed, split, epoch, index), drawn on the CPU from
separate generators: they do not depend on the batch size, the device or the number of processes,
and a resumed run needs no saved generator state.
"""

import contextlib
import hashlib
import http.client
import io
import math
import socket
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from training.console import UserError, rank, warn
from training.processes import from_rank_0, world_size

NUM_DIGITS, NUM_SUMS, SIDE = 10, 19, 28
MEAN, STD = 0.1307, 0.3081  # of the pixels of the training set, scaled to 0..1
RAW = Path("MNIST", "raw")  # torchvision's folder for the files
# A digest of all images and labels: torchvision checks what it downloads, but not whether the files
# that it finds are whole, or those of Fashion-MNIST.
SHA256 = "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b"


class MNISTSum(Dataset):
    """MNIST images, each with a random addend: `(image, digit, addend, total)`.

    For example the image of a 7 with addend 5:

        image   float32 (1, 28, 28), normalized
        digit   int64   7
        addend  float32 (10,)  [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        total   int64   12

    The images stay on `device` as uint8, and batches are sliced from them there. `set_epoch` draws
    the addends and the augmentation of an epoch.

    Args:
        mnist: torchvision's MNIST, or any object with `data`, uint8 (N, 28, 28), and `targets`,
            int64 (N,).
        indices: int64 (n,), the images to use; all by default.
        addends: when they are drawn, "each-epoch" or "once".
        unseen: bool (10, 10) for digit and addend, the pairs that must not occur.
        affine: the limits of `affine_matrices`, or None.
    """

    def __init__(
        self, mnist, split, indices=None, *, seed=0, addends="each-epoch", unseen=None, affine=None,
        mean=MEAN, std=STD, device="cpu",
    ):  # fmt: skip
        if mnist.data.dtype != torch.uint8 or mnist.data.shape[1:] != (SIDE, SIDE):
            raise ValueError("images must be uint8 (N, 28, 28), 0 to 255")
        if mnist.targets.shape != mnist.data.shape[:1]:
            raise ValueError("targets must be int64 (N,), one for each image")
        self.labels = mnist.targets  # of all images
        self.indices = torch.arange(len(self.labels)) if indices is None else indices
        self.images = mnist.data[self.indices].to(device)  # (n, 28, 28)
        self.digits = mnist.targets[self.indices].to(device)  # (n,)
        self.split, self.seed, self.redraw_addends = split, seed, addends == "each-epoch"
        self.unseen, self.affine = unseen, affine
        self.mean, self.std, self.device = mean, std, torch.device(device)
        self.set_epoch(1)

    def set_epoch(self, epoch):
        """Draw the addends and the augmentation of an epoch, counted from 1.

        Has no effect on the workers of a DataLoader with `persistent_workers=True`.
        """
        self.key = self.seed, self.split, epoch
        # Drawn for all images, not only for `indices`, so that --val-size does not change them.
        rng = generator(self.seed, self.split, epoch if self.redraw_addends else "once", "addends")
        if self.unseen is None:
            addends = torch.randint(NUM_DIGITS, self.labels.shape, generator=rng)
        else:  # uniformly from the addends that the digit may occur with
            weights = (~self.unseen).float()[self.labels]
            addends = torch.multinomial(weights, 1, generator=rng).squeeze(1)
        self.addends = addends[self.indices].to(self.device)  # (n,)
        self.matrices = None
        if self.affine:
            rng = generator(*self.key, "affine")
            matrices = affine_matrices(len(self.labels), rng, *self.affine)
            self.matrices = matrices[self.indices].to(self.device)  # (n, 2, 3)

    def batches(self, batch_size, drop_last=False):
        """This process's share of each batch of the epoch, as a list of indices, int64 (B,).

        All processes get equal shares of at least two images, because batch normalization fails on
        one; too few images at the end of the epoch are left out. Raises UserError if a full batch
        cannot be shared like that, or there is none.
        """
        least = 2 * world_size()
        if batch_size % world_size() or batch_size < least:
            message = f"--batch-size must be a multiple of {world_size()}, at least {least}"
            raise UserError(message, status=2)
        order = torch.randperm(len(self), generator=generator(*self.key, "order"))
        batches = list(order.to(self.device).split(batch_size))
        if len(batches[-1]) < (batch_size if drop_last else least):
            batches.pop()
        if not batches:
            message = f"only {len(self)} training images for --batch-size {batch_size}"
            raise UserError(message, status=2)
        return [batch[rank() :: world_size()][: len(batch) // world_size()] for batch in batches]

    def normalized(self, indices, matrices=None):
        """The images as model input, transformed by the matrices: float32 (B, 1, 28, 28)."""
        images = self.images[indices].unsqueeze(1).float()
        if matrices is not None:
            images = warp(images, matrices[indices])
        return images.sub_(255 * self.mean).div_(255 * self.std)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        """An item; for a slice, a list or a tensor of indices, the items stacked."""
        indices = torch.arange(len(self))[index]  # raises IndexError, which ends a loop
        batch = self.batch(indices.view(-1))
        return batch if indices.ndim else tuple(part[0] for part in batch)

    def batch(self, indices):
        """The items at int64 (B,) `indices`, stacked: images, digits, one-hot addends, sums."""
        indices = indices.to(self.device)
        image = self.normalized(indices, self.matrices)
        digit, addend = self.digits[indices], self.addends[indices]
        return image, digit, F.one_hot(addend, NUM_DIGITS).float(), digit + addend


def split_indices(count, val_size, seed):
    """Sorted indices of training and validation images: int64 (count - val_size,), (val_size,)."""
    shuffled = torch.randperm(count, generator=generator(seed, "validation"))
    return shuffled[val_size:].sort().values, shuffled[:val_size].sort().values


def draw_unseen(count, seed):
    """Draw pairs of digit and addend that training must not show: bool (10, 10), `count` True.

    Each digit, each addend and each sum still occurs in the others. None if count is 0.
    """
    if not count:
        return None
    digit, addend = torch.cartesian_prod(*2 * [torch.arange(NUM_DIGITS)]).unbind(1)  # (100,) each
    rng = generator(seed, "unseen pairs")
    while True:
        order = torch.randperm(98, generator=rng) + 1  # never 0 + 0 or 9 + 9: no other pair has
        unseen = torch.zeros(100).bool().index_fill(0, order[:count], True)  # their sums
        sizes = [len(part[~unseen].unique()) for part in (digit, addend, digit + addend)]
        if sizes == [NUM_DIGITS, NUM_DIGITS, NUM_SUMS]:
            return unseen.view(NUM_DIGITS, NUM_DIGITS)


def generator(*key):
    """A CPU generator seeded with a hash of the key: `generator(seed, split, epoch, "order")`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def affine_matrices(count, rng, rotate, translate, scale, shear):
    """Random matrices for `warp`, float32 (count, 2, 3), as of torchvision's RandomAffine.

    The limits are degrees of rotation, a fraction of the side to shift by, a fraction by which each
    side becomes longer or shorter, and degrees of shear.
    """
    angle, slant, scale_x, scale_y, shift_x, shift_y = torch.rand(6, count, generator=rng) * 2 - 1
    angle = angle * math.radians(rotate)
    slant = torch.tan(slant * math.radians(shear))
    scale_x, scale_y = 1 + scale_x * scale, 1 + scale_y * scale
    cos, sin = torch.cos(angle), torch.sin(angle)
    # rotation @ shear @ scale; affine_grid measures shifts in half sides
    x = [cos * scale_x, (cos * slant - sin) * scale_y, 2 * translate * shift_x]
    y = [sin * scale_x, (sin * slant + cos) * scale_y, 2 * translate * shift_y]
    return torch.stack([torch.stack(x, dim=1), torch.stack(y, dim=1)], dim=1)


def warp(images, matrices):
    """Warp float images (B, 1, H, W) by matrices (B, 2, 3) from output to input coordinates."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def load_data(name, data_dir):
    """Load "mnist" or "synthetic" digits; "auto" is MNIST, or synthetic if it is unavailable.

    Returns an object with their `name` and the sets `train` and `test`, each with `data`, uint8
    (N, 28, 28), and `targets`, int64 (N,). Rank 0 downloads and decides for all processes. Raises
    UserError if "mnist" is unavailable, or damaged.
    """
    data_dir = Path(data_dir).expanduser()
    if name != "synthetic" and from_rank_0(download, data_dir, name == "mnist"):
        train, test = read_mnist(data_dir)
        return SimpleNamespace(name="mnist", train=train, test=test)
    from synthetic import synthetic_mnist  # not at the top: it imports this module

    train, test = synthetic_mnist("train", 60_000), synthetic_mnist("test", 10_000)
    return SimpleNamespace(name="synthetic", train=train, test=test)


def download(data_dir, required):
    """Download MNIST with torchvision unless it is there; returns whether it is there now.

    If that fails: UserError if it is required, else a warning.
    """
    from torchvision.datasets import MNIST  # not at the top: predictions need not wait for it

    if all((data_dir / RAW / name).with_suffix("").exists() for name, _ in MNIST.resources):
        return True
    warn(f"downloading MNIST to {data_dir}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without an answer; torchvision sets none
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(data_dir, download=True)  # prints a progress bar for each file
        return True
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        message = f"MNIST cannot be downloaded ({str(error).strip().splitlines()[-1]}); "
        message += f"put its four files in {data_dir / RAW} or pass --data-dir"
        if required:
            raise UserError(message) from None
        warn(f"warning: {message}")
        warn("training on synthetic digits, NOT MNIST")
        return False
    finally:
        socket.setdefaulttimeout(timeout)


def read_mnist(data_dir):
    """The training and the test set. Raises UserError if they are not MNIST's."""
    from torchvision.datasets import MNIST

    try:
        train, test = MNIST(data_dir, train=True), MNIST(data_dir, train=False)
    except Exception as error:  # of many types, for damaged files
        raise UserError(f"MNIST in {data_dir} cannot be read ({error})") from None
    digest = hashlib.sha256()
    for tensor in (train.data, train.targets, test.data, test.targets):
        digest.update(tensor.numpy())
    if digest.hexdigest() != SHA256:
        raise UserError(f"{data_dir}/MNIST is damaged or not MNIST; delete it to download it again")
    return train, test
