"""MNIST with a random addend for each image: items (image, digit, one-hot addend, sum).

Addends, order and augmentation are functions of (seed, split, epoch, index), drawn on the CPU from
separate generators: they do not depend on the batch size, the device or the number of processes,
and a resumed run needs no saved generator state.
"""

import gzip
import hashlib
import http.client
import os
import socket
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from training import distributed
from training.augment import affine_matrices, generator, warp
from training.console import warn
from training.constants import MEAN, NUM_DIGITS, SIDE, STD
from training.errors import UserError
from training.files import lock_directory
from training.synthetic import synthetic_mnist

# Digests of the unpacked files: torchvision checks only what it downloads.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
RAW = Path("MNIST", "raw")  # torchvision's folder for them, in the data directory
DOWNLOAD_TIMEOUT = 10  # seconds without an answer


class MNISTSum(Dataset):
    """MNIST images, each with a random addend: `(image, digit, addend, total)`.

    For example the image of a 7 with addend 5:

        image   float32 (1, 28, 28), normalized
        digit   int64   7
        addend  float32 (10,)  [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        total   int64   12

    The images stay on `device` as uint8, and batches are sliced from them there. `set_epoch` draws
    the addends of an epoch, new ones if `addends` is "each-epoch", the same ones if it is "once",
    and its augmentation, within the limits `affine`. `mnist` is torchvision's MNIST, or any object
    with the same `data`, uint8 (N, 28, 28), and `targets`, int64 (N,); `indices`, int64 (n,), are
    the images to use.
    """

    def __init__(
        self, mnist, split, indices=None, *, seed=0, addends="each-epoch", affine=None,
        mean=MEAN, std=STD, device="cpu",
    ):  # fmt: skip
        self.num_images = len(mnist.data)
        self.indices = torch.arange(self.num_images) if indices is None else indices
        self.images = mnist.data[self.indices].to(device)  # (n, 28, 28)
        self.digits = mnist.targets[self.indices].to(device)  # (n,)
        self.split, self.seed, self.redraw_addends = split, seed, addends == "each-epoch"
        self.affine, self.mean, self.std, self.device = affine, mean, std, torch.device(device)
        self.set_epoch(1)

    def set_epoch(self, epoch, member=0, augment=True):
        """Draw the addends of an epoch, counted from 1, and its augmentation if `augment`.

        Each member of an ensemble has its own. Has no effect on the workers of a DataLoader with
        `persistent_workers=True`.
        """
        split = f"{self.split}-{member}" if member else self.split
        self.key = self.seed, split, epoch
        # Drawn for all images, not only for `indices`, so that --val-size does not change them.
        rng = generator(self.seed, split, epoch if self.redraw_addends else "once", "addends")
        addends = torch.randint(NUM_DIGITS, (self.num_images,), generator=rng)
        self.addends = addends[self.indices].to(self.device)  # (n,)
        self.matrices = None
        if self.affine and augment:
            matrices = affine_matrices(self.num_images, self.affine, generator(*self.key, "affine"))
            self.matrices = matrices[self.indices].to(self.device)  # (n, 2, 3)

    def order(self):
        """The shuffled order of the epoch: int64 (n,) on the device."""
        return torch.randperm(len(self), generator=generator(*self.key, "order")).to(self.device)

    def batches(self, batch_size, drop_last=False):
        """This process's share of each batch of the epoch, as a list of indices, int64 (B,).

        All processes get equal shares of at least two images, because batch normalization fails on
        one; too few images at the end of the epoch are left out. Raises UserError if a full batch
        cannot be shared like that, or there is none.
        """
        rank, world_size = distributed.rank(), distributed.world_size()
        least = 2 * world_size
        if batch_size % world_size or batch_size < least:
            raise UserError(f"--batch-size must be a multiple of {world_size}, at least {least}", 2)
        batches = list(self.order().split(batch_size))
        if len(batches[-1]) < (batch_size if drop_last else least):
            batches.pop()
        if not batches:
            raise UserError(f"only {len(self)} training images for --batch-size {batch_size}", 2)
        return [batch[rank::world_size][: len(batch) // world_size] for batch in batches]

    def share(self):
        """This process's images for evaluation: int64 (n,) on the device."""
        indices = torch.arange(len(self), device=self.device)
        return indices[distributed.rank() :: distributed.world_size()]

    def process_seed(self):
        """A seed for what the network itself draws in the epoch; each process has its own."""
        return generator(*self.key, "network", distributed.rank()).initial_seed()

    def normalized(self, indices, matrices=None):
        """The images as model input: float32 (B, 1, 28, 28)."""
        images = self.images[indices].unsqueeze(1).float()
        if matrices is not None and len(images):  # affine_grid does not accept an empty batch
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


def load_data(name, data_dir):
    """Load "mnist" or "synthetic" digits; "auto" is MNIST, or synthetic if it is unavailable.

    Returns an object with their `name` and the sets `train` and `test`, each with `data`, uint8
    (N, 28, 28), and `targets`, int64 (N,). Rank 0 decides for all processes. Raises UserError if
    "mnist" is unavailable, or damaged.
    """
    if name != "synthetic":
        try:
            if not all(find_file(data_dir, file) for file in SHA256):
                download(data_dir)
        except ConnectionError as error:
            instruction = f"place {', '.join(SHA256)} in {data_dir}"
            if name == "mnist":
                raise UserError(f"{error}; {instruction}") from error
            warn(f"warning: {error}")
            warn(instruction)
            warn("training on synthetic digits, NOT MNIST")
            name = "synthetic"
    if distributed.from_rank_0(lambda: name) == "synthetic":
        train, test = synthetic_mnist("train", 60_000), synthetic_mnist("test", 10_000)
        return SimpleNamespace(name="synthetic", train=train, test=test)
    train, test = read_mnist(data_dir, "train"), read_mnist(data_dir, "t10k")
    return SimpleNamespace(name="mnist", train=train, test=test)


def find_file(data_dir, name):
    """The path of an unpacked or packed file of MNIST, in torchvision's layout or a flatter one."""
    names = name, name.replace("-idx", ".idx")  # the latter on Yann LeCun's page
    files = [f"{file}{suffix}" for file in names for suffix in ("", ".gz")]
    paths = (Path(data_dir, folder, file) for folder in (RAW, "raw", "") for file in files)
    return next(filter(os.path.lexists, paths), None)


def read_mnist(data_dir, prefix):
    """A set of MNIST, with `data` and `targets` as in torchvision's MNIST."""
    images = read_verified(data_dir, f"{prefix}-images-idx3-ubyte")
    labels = read_verified(data_dir, f"{prefix}-labels-idx1-ubyte")
    data = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, SIDE, SIDE)
    targets = torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
    return SimpleNamespace(data=data, targets=targets)


def read_verified(data_dir, name):
    """The unpacked content of a file. Raises UserError if it is missing or damaged."""
    path = find_file(data_dir, name) or Path(data_dir, RAW, name)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise UserError(f"{path} is damaged (wrong SHA-256); delete it to download it again")
    return bytearray(content)  # torch.frombuffer warns of bytes, which are read-only


def download(data_dir):
    """Download MNIST with torchvision. If it fails, raises ConnectionError and leaves no file."""
    from torchvision.datasets import MNIST  # not at the top: importing it takes a second

    raw = Path(data_dir, RAW)
    raw.mkdir(parents=True, exist_ok=True)
    # One process downloads while the others wait.
    with lock_directory(raw, wait=True), TemporaryDirectory(dir=raw) as temporary:
        if all(find_file(data_dir, name) for name in SHA256):
            return
        warn(f"downloading MNIST to {data_dir}")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
        try:
            MNIST(temporary, download=True)
            for name in SHA256:
                read_verified(temporary, name)
        except (OSError, RuntimeError, http.client.HTTPException, UserError) as error:
            reason = str(getattr(error, "reason", error)).strip().splitlines()[-1]
            raise ConnectionError(f"MNIST cannot be downloaded ({reason})") from error
        finally:
            socket.setdefaulttimeout(timeout)
        for name in SHA256:
            os.replace(Path(temporary, RAW, name), raw / name)
