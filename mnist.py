"""MNIST: found in the data folder, or downloaded; and a stand-in for where it can't be had."""

import gzip
import hashlib
import http.client
import os
import shutil
import socket
import tempfile
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from dataset import NUM_DIGITS, SIDE, Affine, DataError, affine_matrices, generator, warp
from locks import folder_lock

try:
    from torchvision.datasets import MNIST, VisionDataset
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch
    raise DataError(
        f"torchvision can't be used with torch {torch.__version__} ({error}); "
        "install both again from one index: pip install --force-reinstall torch torchvision"
    ) from error

# The four files of MNIST, unpacked. They are all that is read in a data folder's MNIST/raw.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CONNECTION_TIMEOUT = 10  # seconds without an answer
DOWNLOAD_TIMEOUT = 300  # seconds for all four files


class Absent(DataError):
    """MNIST is neither in the data folder nor to be had."""


class Source(NamedTuple):
    """A training and a test set, each with `data`, uint8 (N, 28, 28), and `targets`, int64 (N,)."""

    name: str  # "mnist" or "synthetic"
    train: Any
    test: Any
    note: str = ""  # to stand wherever results of the stand-in are shown


def load(kind, data_dir, announce):
    """The Source that `--dataset` asks for: "mnist", "synthetic", or "auto".

    `auto` takes the stand-in where MNIST is absent; it does not where MNIST is damaged. `announce`
    is called with a line when something happens that takes a while or was not asked for.

    Raises:
        DataError: there is no such data.
    """
    if kind != "synthetic":
        try:
            return load_mnist(data_dir, announce)
        except Absent as error:
            if kind == "mnist":
                raise Absent(
                    f"{error}; put the files {', '.join(SHA256)} (or each as .gz) into "
                    f"{raw_folder(data_dir)}, or pass their folder as --data-dir"
                ) from error
            announce(f"{error}: training on synthetic digits instead, which are NOT MNIST")
    train, test = stand_in("train", 60_000), stand_in("test", 10_000)
    return Source("synthetic", train, test, "synthetic stand-in digits, NOT MNIST")


def load_mnist(data_dir, announce):
    """MNIST from `data_dir`, downloaded into it first where a file is missing. See `load`."""
    try:
        return Source("mnist", VerifiedMNIST(data_dir, True), VerifiedMNIST(data_dir, False))
    except Absent as error:
        announce(f"{error}: downloading MNIST")
        fetch(data_dir)
    return Source("mnist", VerifiedMNIST(data_dir, True), VerifiedMNIST(data_dir, False))


class VerifiedMNIST(MNIST):
    """torchvision's MNIST, read from nothing but files whose SHA-256 digests are known."""

    def __init__(self, root, train):
        VisionDataset.__init__(self, root)  # MNIST's own takes whatever it finds in the folder
        self.train = train
        part = "train" if train else "t10k"
        raw = raw_folder(root)
        self.data = parse_idx(read_verified(raw, f"{part}-images-idx3-ubyte"))  # (N, 28, 28)
        self.targets = parse_idx(read_verified(raw, f"{part}-labels-idx1-ubyte")).long()  # (N,)


def raw_folder(data_dir):
    """Where torchvision keeps MNIST's files in a data folder."""
    return Path(data_dir, "MNIST", "raw")


def parse_idx(content):
    """An IDX file's bytes as a uint8 tensor: two zeros, type, rank, big-endian sizes, data."""
    rank = content[3]
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * rank).view(sizes)


def read_verified(folder, name):
    """The unpacked content of one of MNIST's files, from `name` or else `name.gz` in `folder`.

    Raises:
        Absent: there is neither.
        DataError: it can't be read, or is not the file that MNIST has under this name.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if os.path.lexists(plain) else packed
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path == packed else content
    except FileNotFoundError as error:
        raise Absent(f"there is no {plain}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""  # a damaged archive: it has no content with the right digest
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}); mend it or choose another --data-dir"
        ) from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise DataError(
            f"{path} is damaged or not MNIST's (its SHA-256 digest differs); "
            "delete it, and it is downloaded anew, or put the original there"
        )
    return content


def fetch(data_dir):
    """Download MNIST through torchvision into `data_dir`, where only verified files get names.

    Of several processes one downloads, and the others wait for it.

    Raises:
        Absent: no mirror gave the right files in time; nothing is left behind.
        DataError: the folder can't be written.
    """
    raw = raw_folder(data_dir)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with folder_lock(data_dir, wait=True):
            if all((raw / name).exists() for name in SHA256):
                return
            for killed in Path(data_dir).glob(".download-*"):
                shutil.rmtree(killed, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                download(folder)
                for name in SHA256:
                    read_verified(raw_folder(folder), name)
                    os.replace(raw_folder(folder) / name, raw / name)
    except OSError as error:
        raise DataError(
            f"{data_dir} can't be written ({error.strerror}); choose another --data-dir"
        ) from error


def download(folder):
    """torchvision's own download, within a limit of time, which it does not have. Raises Absent."""
    failures = []

    def work():
        try:
            MNIST(folder, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            failures.append(str(error).strip().splitlines()[-1])

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_TIMEOUT)
    try:
        # A daemon, so that a server that drips can't keep the program from ending.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(DOWNLOAD_TIMEOUT)
    finally:
        socket.setdefaulttimeout(before)
    if thread.is_alive():
        failures.append(f"not done within {DOWNLOAD_TIMEOUT} s")
    if failures:
        raise Absent(f"MNIST can't be downloaded ({failures[0]})")


# The pen's way for each digit, stroke by stroke: points (x, y) in a box of 10 by 10, y downwards.
STROKES = (
    [[(5, 0), (2, 1), (1, 4), (1, 7), (3, 10), (6, 10), (8, 8), (9, 5), (8, 2), (5, 0)]],
    [[(3, 2), (5, 0), (5, 3), (5, 7), (5, 10)]],
    [[(1, 2), (3, 0), (7, 0), (8, 2), (7, 5), (4, 8), (1, 10), (4, 9), (9, 10)]],
    [[(1, 1), (4, 0), (8, 1), (8, 3), (4, 5), (8, 6), (9, 8), (6, 10), (3, 10), (1, 9)]],
    [[(3, 0), (2, 3), (1, 6), (5, 6), (9, 6)], [(7, 2), (7, 5), (6, 10)]],
    [[(8, 0), (3, 0), (2, 4), (5, 4), (8, 5), (8, 8), (5, 10), (1, 9)]],
    [[(7, 0), (4, 2), (2, 5), (1, 8), (4, 10), (7, 10), (8, 7), (6, 5), (3, 6), (2, 8)]],
    [[(1, 1), (4, 0), (9, 0), (7, 4), (5, 7), (4, 10)]],
    [
        [(7, 1), (4, 0), (2, 2), (4, 4), (7, 6), (8, 8), (5, 10), (2, 9), (2, 7), (5, 5)]
        + [(8, 2), (7, 1)]
    ],
    [[(8, 2), (5, 0), (2, 1), (2, 4), (5, 5), (8, 3), (8, 1), (8, 5), (7, 10)]],
)
HANDS = 64  # ways of writing each digit
STAND_IN_WARP = Affine(degrees=12, translate=0.05, scale=0.15, shear=15)


def stand_in(part, count):
    """Digits written by a shaky pen: a set of `count` images, the same at each call.

    Each digit is written by 64 hands, which differ between the parts; each image is one of these,
    warped by the augmentation's own code. Nothing of it is MNIST.
    """
    draw = generator("stand-in", part)
    pens = torch.cat([written(strokes, draw) for strokes in STROKES])  # (10 * HANDS, 28, 28)
    digits = torch.randint(NUM_DIGITS, (count,), generator=draw)
    chosen = digits * HANDS + torch.randint(HANDS, (count,), generator=draw)
    matrices = affine_matrices(count, STAND_IN_WARP, draw)
    data = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    for i in torch.arange(count).split(5_000):
        data[i] = warp(pens[chosen[i]].unsqueeze(1), matrices[i]).squeeze(1).round().byte()
    return SimpleNamespace(data=data, targets=digits)


def written(strokes, draw):
    """A digit as HANDS hands write it: float32 (HANDS, 28, 28), 0 to 255."""
    dots = []
    for stroke in strokes:
        points = torch.tensor(stroke, dtype=torch.float32)  # (P, 2)
        shaken = points + 0.5 * torch.randn(HANDS, *points.shape, generator=draw)
        steps = 6 * (len(stroke) - 1) + 1
        line = torch.nn.functional.interpolate(
            shaken.transpose(1, 2), steps, mode="linear", align_corners=True
        )
        dots.append(line)  # (HANDS, 2, steps)
    dots = 5 + 1.8 * torch.cat(dots, dim=2)  # in pixels: the box is 18 wide, 5 from the edge
    axis = torch.arange(SIDE, dtype=torch.float32)
    right = (axis.view(1, 1, SIDE, 1) - dots[:, 0].view(HANDS, 1, 1, -1)) ** 2
    down = (axis.view(1, SIDE, 1, 1) - dots[:, 1].view(HANDS, 1, 1, -1)) ** 2
    distance = (right + down).amin(dim=3).sqrt()  # (HANDS, 28, 28), to the nearest dot
    thickness = 1 + torch.rand(HANDS, 1, 1, generator=draw)
    return 255 * (thickness + 0.5 - distance).clamp(0, 1)
