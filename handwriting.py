"""A person's picture of a handwritten digit as the 28x28 picture that an MNIST network expects.

`read_picture` opens a file; `prepare` tells the ink from the paper and does with it what was done
to MNIST's own digits: the box around the ink made square, shrunk by area to 20x20, its largest
grey raised to 255, its centre of mass moved by whole pixels to index 14. So MNIST's own images come
out as they went in.

    prepare(read_picture("seven.jpg")).pixels  # uint8 (28, 28), light on dark
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.polynomial.legendre import legvander
from PIL import Image, ImageOps, UnidentifiedImageError

SIDE, BOX, MIDDLE = 28, 20, 14  # pixels of MNIST's picture, of its digit; where the mass is centred
LOOK = 480  # pixels to which a picture's longer side is reduced, to be searched for ink
SMALL = 0.25  # a digit smaller than this share of the picture is looked at again, closer
CELLS = 32  # the paper's brightness is fitted to so many averages along the longer side
RING = 0.05  # share of the picture's side: its border, where there is paper and hardly ink
FAINT = 0.4  # share of the ink's strength below which it is paper
NOISE = 5  # ink is stronger than so many deviations of what is around it
CLEAR = 4.7  # deviations of the border's paper: where the strongest ink is weaker, there is none
SPECK = 0.03  # share of the largest piece's ink below which a piece is a speck
FULL = 0.9  # share of a strong stroke's ink that counts as full
NO_INK, SEVERAL, CUT = "no ink found", "more than one digit", "ink at the picture's edge"


class PictureError(ValueError):
    """A picture that can't be used; the message says what is wrong and what to do."""


class Prepared(NamedTuple):
    """A digit prepared as MNIST's were, and what is doubtful about it."""

    pixels: np.ndarray  # uint8 (28, 28), light on dark
    warnings: tuple[str, ...] = ()


def read_picture(file):
    """Open a picture: a path, or a binary stream.

    Raises:
        PictureError: there is none, it is none, or it is animated, damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(Path(file) if isinstance(file, str) else file)
            if getattr(picture, "n_frames", 1) > 1:
                raise PictureError("it is animated; give one picture")
            picture.load()
    except UnidentifiedImageError as error:
        raise PictureError("it is no picture; give a PNG or a JPEG, say") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureError("it has too many pixels; give a smaller one") from error
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise PictureError(f"it can't be read ({reason}); give another") from error
    except (SyntaxError, ValueError) as error:  # what Pillow's readers raise on damaged files
        if isinstance(error, PictureError):
            raise
        raise PictureError("it is damaged; give another") from error
    if min(picture.size) < 3:
        raise PictureError(f"it has {picture.width} x {picture.height} pixels; give a larger one")
    return picture


def prepare(picture):
    """The digit in a picture of Pillow's, as a Prepared.

    Ink may be of any colour, darker or lighter than its paper. What is doubtful is warned of; where
    there is no ink, the pixels are all 0.
    """
    picture = upright(picture)
    factor = math.ceil(max(picture.size) / LOOK)
    colours = np.asarray(picture.reduce(factor), dtype=float)  # (H, W, 3)
    ink, threshold, noiseless = find_ink(colours)
    digit, doubts = pick_digit(ink, threshold, noiseless)
    if not digit.any():
        return Prepared(np.zeros((SIDE, SIDE), np.uint8), (NO_INK,))
    top, bottom, left, right = box_of(digit)
    longer = max(bottom - top, right - left)
    if longer < SMALL * max(ink.shape) and factor > 1:
        near = np.array([left - longer, top - longer, right + longer, bottom + longer]) * factor
        near = near.clip(0, [*picture.size, *picture.size]).tolist()
        closer = prepare(picture.crop(near))
        return Prepared(closer.pixels, tuple(dict.fromkeys(doubts + closer.warnings)))
    if not noiseless:  # a stroke's edge is soft, and its middle not evenly inked
        digit = np.minimum(digit, FULL * np.quantile(digit[digit > 0], 0.9))
    return Prepared(as_mnist(digit[top:bottom, left:right]), doubts)


def upright(picture):
    """A picture as its EXIF turns it, its alpha over white, in RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # of 16 or 32 bits, which Pillow would cut off at 255
        values = np.asarray(picture, dtype=np.float64)
        spread = max(np.ptp(values), 1e-9)
        picture = Image.fromarray(((values - values.min()) * (255 / spread)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def find_ink(colours):
    """How much ink there is, float (H, W), from 0; above which value it is ink; and if noiseless.

    Ink is what differs from the paper in the direction in which the strongest of it differs, each
    direction measured in the paper's own deviations, so that coloured ink is seen on paper of the
    same brightness. A noiseless picture, its border of one colour, keeps its faintest greys.
    """
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    plain = np.median(border, axis=0)
    noiseless = (border == plain).all(axis=1).mean() > 0.9
    change = colours - plain if noiseless else whitened(colours)
    ink = np.linalg.norm(change, axis=2)
    for _ in range(3):  # each time the direction is taken from better ink
        strong = ink > np.quantile(ink, 0.999, method="lower") / 2
        if not strong.any():
            return np.zeros_like(ink), 0.0, noiseless
        towards = change[strong].mean(axis=0)
        signed = change @ (towards / np.linalg.norm(towards))
        ink = signed.clip(0)
    level = np.median(ink[strong])
    if noiseless:
        return ink, FAINT * level, True
    if level < CLEAR:
        return np.zeros_like(ink), 0.0, False
    around = signed[~strong]
    deviation = 1.4826 * np.median(np.abs(around - np.median(around)))  # as of a normal one
    return ink, max(FAINT * level, NOISE * deviation), False


def whitened(colours):
    """Colours less the paper's, float (H, W, 3), in deviations of the border in each direction."""
    paper = fit_paper(colours)
    change = (colours - paper) * (paper.mean(axis=(0, 1)) + 24) / (paper.clip(0) + 24)  # in shadow
    rows = np.pad(change, ((1, 1), (1, 1), (0, 0)), "edge")
    rows = rows[:-2] + rows[1:-1] + rows[2:]
    change = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9  # grain evened out
    width = max(1, int(RING * min(change.shape[:2])))
    ring = np.ones(change.shape[:2], dtype=bool)
    ring[width:-width, width:-width] = False
    covariance = np.cov(change[ring].T) + 4 * np.eye(3)
    return change @ np.linalg.cholesky(np.linalg.inv(covariance))


def fit_paper(colours):
    """The paper's colours without the ink, float (H, W, 3): a quadratic surface for each channel.

    It is fitted to averages of cells in the sense of least absolute deviations, by reweighting, so
    that the ink, in the minority everywhere, hardly matters.
    """
    height, width, _ = colours.shape
    share = min(1, CELLS / max(height, width))
    cells = [max(3, round(side * share)) for side in (height, width)]
    channels = [Image.fromarray(c) for c in np.moveaxis(colours.astype(np.float32), 2, 0)]
    means = [np.asarray(c.resize(cells[::-1], Image.Resampling.BOX)) for c in channels]
    means = np.stack(means, axis=-1).reshape(-1, 3).astype(float)

    def terms(rows, columns):
        y, x = (legvander((np.arange(n) + 0.5) / n * 2 - 1, 2) for n in (rows, columns))
        return np.einsum("yi,xj->yxij", y, x).reshape(rows * columns, 9)

    coarse, weight = terms(*cells), np.ones(len(means))
    for _ in range(20):
        weighted = coarse.T * weight
        fit = np.linalg.lstsq(weighted @ coarse, weighted @ means, rcond=None)[0]
        weight = 1 / np.maximum(np.linalg.norm(means - coarse @ fit, axis=1), 0.5)
    return (terms(height, width) @ fit).reshape(colours.shape)


def pick_digit(ink, threshold, noiseless):
    """The ink of the one digit in a picture, float (H, W), without specks; and the doubts of it."""
    if not ink.any():
        return ink, ()
    top, bottom, left, right = box_of(ink > 0)
    if noiseless and max(bottom - top, right - left) == BOX:  # MNIST's own: not a grey is lost
        cut = ink.shape != (SIDE, SIDE) and touches((top, bottom, left, right), ink.shape)
        return ink, (CUT,) if cut else ()
    if not (ink > threshold).any():
        return np.zeros_like(ink), ()
    labels = pieces(ink > threshold)
    mass = np.bincount(labels.ravel(), ink.ravel())
    mass[0] = 0
    boxes = {label: box_of(labels == label) for label in np.nonzero(mass > SPECK * mass.max())[0]}
    # What touches the edge is rather the table, or the next digit, than the digit.
    worth = {k: mass[k] * (0.2 if touches(box, ink.shape) else 1) for k, box in boxes.items()}
    main = max(worth, key=worth.get)
    kept, doubts = [main], []
    size = longer_side(boxes[main])
    for label, box in boxes.items():
        across, down = gaps(boxes[main], box)
        tall = box[1] - box[0] > size / 2
        large = longer_side(box) > size / 2 and mass[label] > mass[main] / 10
        if label == main:
            continue
        if large and (across >= 0 and tall or max(across, down) > size / 5):
            doubts.append(SEVERAL)
        elif max(across, down) <= size / 4:  # a detached bar, a dot of a dry pen
            kept.append(label)
    digit = np.where(np.isin(labels, kept), ink, 0)
    if touches(box_of(digit > 0), ink.shape):
        doubts.append(CUT)
    return digit, tuple(dict.fromkeys(doubts))


def pieces(mask):
    """Labels of the 8-connected pieces of a mask, int (H, W), from 1; 0 outside.

    Runs of a row are joined with those that touch them in the next row, by union and find.
    """
    width = mask.shape[1] + 2
    steps = np.diff(np.pad(mask, 1).ravel().astype(np.int8))
    start, stop = np.nonzero(steps == 1)[0], np.nonzero(steps == -1)[0]
    first = np.searchsorted(stop, start + width)
    last = np.searchsorted(start, stop + width, "right")
    root = list(range(len(start)))

    def find(run):
        while root[run] != run:
            root[run] = root[root[run]]
            run = root[run]
        return run

    for run in range(len(start)):
        for below in range(first[run], last[run]):
            root[find(below)] = find(run)
    _, piece = np.unique([find(run) for run in range(len(root))], return_inverse=True)
    labels = np.zeros(mask.shape, dtype=int)
    labels[mask] = np.repeat(piece + 1, stop - start)
    return labels


def box_of(mask):
    """Top, bottom, left and right of what is set in a mask; bottom and right are exclusive."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def longer_side(box):
    top, bottom, left, right = box
    return max(bottom - top, right - left)


def gaps(one, two):
    """Pixels between two boxes, across and down; negative where they overlap."""
    down = max(one[0], two[0]) - min(one[1], two[1])
    across = max(one[2], two[2]) - min(one[3], two[3])
    return across, down


def touches(box, shape):
    """Whether a box touches the edge of a picture of `shape`."""
    top, bottom, left, right = box
    return top == 0 or left == 0 or bottom == shape[0] or right == shape[1]


def as_mnist(ink):
    """Ink, float (h, w), as a picture of MNIST's, uint8 (28, 28)."""
    height, width = ink.shape
    longer = max(height, width)
    square = np.zeros((longer, longer), np.float32)
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = ink
    box = np.asarray(Image.fromarray(square).resize((BOX, BOX), Image.Resampling.BOX), dtype=float)
    sheet = np.zeros((SIDE + 2 * BOX, SIDE + 2 * BOX), np.uint8)  # room to shift the box in
    centre = [np.arange(BOX) @ box.sum(axis=axis) / box.sum() for axis in (1, 0)]
    y, x = (BOX + math.ceil(MIDDLE - 0.5 - c) for c in centre)
    sheet[y : y + BOX, x : x + BOX] = np.rint(box * (255 / box.max()))
    return sheet[BOX : BOX + SIDE, BOX : BOX + SIDE]
