"""Converts a photo, scan or drawing of a handwritten digit to a 28x28 image as in MNIST.

`prepare` finds the sheet, separates ink from paper, widens thin strokes and normalizes the digit as
in MNIST: crop, pad to a square, shrink to 20x20 by area averaging, scale the strongest ink to 255,
shift the center of mass to index 14. MNIST's own digits change by at most one gray level, except
the 16 of 70,000 whose longer side is 19.
"""

import io
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.polynomial.legendre import legvander
from PIL import Image, ImageOps, UnidentifiedImageError

from inference.sheet import bounding_box, connected_components, find_sheet, longer_side
from support.constants import SIDE
from support.errors import UserError

NO_INK, SEVERAL, CUT = "no ink found", "more than one digit", "ink at the picture's edge"
UNSUPPORTED = {"HEIC": rb"(?s)^.{4}ftyp(hei|hev|mif1|msf1)", "PDF": rb"^%PDF", "SVG": rb"<svg"}
DIGIT_SIDE, CENTER = 20, 14  # of MNIST's images, in pixels
THIN = 2.5  # stroke width at this size, in pixels: 75% of MNIST's digits have wider strokes
FAINT = 0.4  # a pixel is ink if it is stronger than this fraction of the strong ink ...
NOISE = 5  # ... and than this many standard deviations of the background


class Prepared(NamedTuple):
    """A digit as an MNIST image."""

    pixels: np.ndarray  # uint8 (28, 28), light on dark; all 0 if no ink was found
    warnings: tuple[str, ...] = ()  # a subset of NO_INK, SEVERAL, CUT


def read_picture(file, formats=None, max_pixels=90_000_000):
    """Open a path or a binary stream in one of Pillow's `formats`. UserError if unusable.

    Images with transparency or more than 8 bits take more memory: they may have half of
    `max_pixels`. A JPEG with more pixels is decoded at a half, quarter or eighth of its size.
    """
    try:
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        with warnings.catch_warnings(action="ignore"):  # about chunks that don't matter
            image = Image.open(io.BytesIO(content), formats=formats)
            if min(image.size) < 3:
                raise UserError(f"only {image.width} x {image.height} pixels; give a larger image")
            doubled = image.has_transparency_data or image.mode[0] in "IF"
            excess = image.width * image.height * (1 + doubled) / max_pixels
            if excess > 1:
                factor = 2 ** math.ceil(math.log2(excess) / 2)  # of width and height
                if not image.draft(None, (image.width // factor, image.height // factor)):
                    raise UserError("too many pixels; give a smaller image")
            # Phone cameras write MPO: the photo, then a depth map or a gain map.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise UserError("has several pages or frames; give a single image")
            image.load()
            return ImageOps.exif_transpose(image)  # here: damaged EXIF data raises too
    except UserError:
        raise
    except UnidentifiedImageError as error:
        for name, pattern in UNSUPPORTED.items():
            if re.search(pattern, content[:1000]):
                raise UserError(f"{name} is not supported; export it as JPEG or PNG") from error
        raise UserError("not a readable image") from error
    except Image.DecompressionBombError as error:
        raise UserError("too many pixels; give a smaller image") from error
    except MemoryError as error:
        raise UserError("not enough memory to read it; give a smaller image") from error
    except Exception as error:  # for damaged files Pillow raises errors of many types
        missing = re.search("Ghostscript|not available", str(error))  # which Pillow calls
        reason = getattr(error, "strerror", None) or (str(error) if missing else "damaged image")
        raise UserError(f"cannot be read ({reason})") from error


def prepare(image):
    """Return the digit in a Pillow image as a Prepared. Ink may be lighter or darker than paper."""
    image = upright(image)
    rgb, factor = reduced(image)
    whole = np.array([[0, 0], rgb.shape[:2]])
    # Look for a digit on a sheet, in the whole picture (None), then for a small one on a sheet.
    for smallest in (0.15, None, 0.05):
        sheet = whole if smallest is None else find_sheet(rgb, smallest)
        if sheet is not None:
            prepared = prepare_sheet(crop(image, sheet * factor))
            if NO_INK not in prepared.warnings:  # else it was not the sheet
                break
    return prepared


def prepare_sheet(image):
    """Return the digit in an RGB image that shows only paper and ink, as a Prepared."""
    rgb, factor = reduced(image)
    ink, threshold, noiseless = find_ink(rgb)
    digit, found = select_digit(ink, threshold, noiseless)
    if not digit.any():
        return Prepared(np.zeros((SIDE, SIDE), np.uint8), (NO_INK,))
    (top, left), (bottom, right) = box = bounding_box(digit)
    side = longer_side(box)
    if side < max(ink.shape) / 4 and factor > 1:  # search again, closer
        closer = prepare_sheet(crop(image, (box + [[-side], [side]]) * factor))
        if NO_INK in closer.warnings:
            return closer
        return Prepared(closer.pixels, tuple(dict.fromkeys(found + closer.warnings)))
    digit = digit[top:bottom, left:right]
    if not noiseless:  # strokes have soft edges and uneven ink: clip most of it
        digit = np.minimum(digit, 0.9 * np.quantile(digit[digit > 0], 0.9))
    return Prepared(as_mnist(thicken(digit)), found)


def reduced(image):
    """An RGB image, reduced to at most 480 x 480 pixels: float (H, W, 3), and the factor."""
    factor = math.ceil(max(image.size) / 480)
    return np.asarray(image.reduce(factor), dtype=float), factor


def crop(image, box):
    """Crop a Pillow image to a box, [[top, left], [bottom, right]], clipped to the image."""
    return image.crop(box[:, ::-1].clip(0, image.size).flatten().tolist())


def upright(image):
    """Convert to upright RGB; transparency becomes white, or black if the ink is white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
        values = np.asarray(image, dtype=np.float64)
        span = max(np.ptp(values), 1e-9)
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white, black = (Image.new("RGBA", image.size, color) for color in ("white", "black"))
        opaque = Image.alpha_composite(white, image)
        visible = min(low for low, _ in opaque.getextrema()) < 240  # else white ink
        image = opaque if visible else Image.alpha_composite(black, image)
    return image.convert("RGB")


def find_ink(rgb):
    """Separate ink from paper: ink, float (H, W), its threshold, whether the image is noiseless.

    Ink differs from paper along one direction in color space, measured in the paper's standard
    deviations; in a noiseless image, whose border has nearly a single color, in RGB values. The
    threshold is infinite if there is no ink.
    """
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = np.median(border, axis=0)
    noiseless = (border == background).all(axis=1).mean() > 0.9
    difference = rgb - background if noiseless else whitened_difference(rgb)
    ink = np.linalg.norm(difference, axis=2)
    for _ in range(3):  # each pass estimates the direction from a better estimate of the ink
        strong = ink > np.quantile(ink, 0.999, method="lower") / 2
        if not strong.any():
            return ink, np.inf, noiseless
        direction = difference[strong].mean(axis=0)
        projection = difference @ (direction / np.linalg.norm(direction))
        ink = projection.clip(0)
    strength = np.median(ink[strong])
    if noiseless:
        return ink, FAINT * strength, True
    if strength < 4.7:  # standard deviations of the paper: no ink
        return ink, np.inf, False
    rest = projection[~strong]
    deviation = 1.4826 * np.median(np.abs(rest - np.median(rest)))  # of a normal distribution
    return ink, max(FAINT * strength, NOISE * deviation), False


def whitened_difference(rgb):
    """Differences from the paper's color in its standard deviations, float (H, W, 3)."""
    paper = fit_paper(rgb)
    # Contrast is proportional to brightness: undo shading.
    difference = (rgb - paper) * (paper.mean(axis=(0, 1)) + 24) / (paper.clip(0) + 24)
    rows = np.pad(difference, ((1, 1), (1, 1), (0, 0)), "edge")
    rows = rows[:-2] + rows[1:-1] + rows[2:]
    difference = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9  # 3x3 average, against grain
    border = np.ones(difference.shape[:2], dtype=bool)  # mostly paper
    width = max(1, min(border.shape) // 20)
    border[width:-width, width:-width] = False
    covariance = np.cov(difference[border].T) + 4 * np.eye(3)
    return difference @ np.linalg.cholesky(np.linalg.inv(covariance))


def fit_paper(rgb):
    """Fit a quadratic surface to the paper's color, float (H, W, 3), as if there were no ink."""
    height, width, _ = rgb.shape
    scale = min(1, 32 / max(height, width))
    rows, columns = (max(3, round(side * scale)) for side in (height, width))  # of averages
    channels = [Image.fromarray(c) for c in np.moveaxis(rgb.astype(np.float32), 2, 0)]
    averages = [np.asarray(c.resize((columns, rows), Image.Resampling.BOX)) for c in channels]
    averages = np.stack(averages, axis=-1).reshape(-1, 3).astype(float)

    def polynomials(*shape):  # values of the 9 basis polynomials at each pixel
        y, x = (legvander((np.arange(n) + 0.5) / n * 2 - 1, 2) for n in shape)
        return np.einsum("yi,xj->yxij", y, x).reshape(-1, 9)

    basis, weight = polynomials(rows, columns), np.ones(len(averages))
    for _ in range(20):  # reweighted least squares: least absolute deviations, to ignore ink
        weighted = basis.T * weight
        fit = np.linalg.lstsq(weighted @ basis, weighted @ averages, rcond=None)[0]
        weight = 1 / np.maximum(np.linalg.norm(averages - basis @ fit, axis=1), 0.5)
    return (polynomials(height, width) @ fit).reshape(rgb.shape)


def select_digit(ink, threshold, noiseless):
    """Select one digit, without specks. Returns its ink, float (H, W), and the warnings."""
    mask = ink > threshold
    if not mask.any():
        return np.zeros_like(ink), ()
    box = bounding_box(ink)
    if noiseless and longer_side(box) == DIGIT_SIDE:  # from MNIST: keep its faintest grays
        cut = ink.shape != (SIDE, SIDE) and touches_edge(box, ink.shape)
        return ink, (CUT,) if cut else ()
    labels = connected_components(mask)
    mass = np.bincount(labels.ravel(), ink.ravel())
    mass[0] = 0  # label 0 is paper
    strongest = sorted(np.argsort(mass)[-50:])  # at most 50: each takes a pass over the picture
    boxes = {i: bounding_box(labels == i) for i in strongest if mass[i] > 0.03 * mass.max()}
    # A component at the edge is less likely the digit than the table or a neighboring digit.
    main = max(boxes, key=lambda i: mass[i] * (0.2 if touches_edge(boxes[i], ink.shape) else 1))
    main_box, kept, found = boxes.pop(main), [main], []
    main_side = longer_side(main_box)
    for i, box in boxes.items():
        gaps = np.maximum(main_box[0], box[0]) - np.minimum(main_box[1], box[1])  # (y, x)
        large = longer_side(box) > main_side / 2 and mass[i] > mass[main] / 10
        beside = gaps[1] >= 0 and box[1, 0] - box[0, 0] > main_side / 2
        if large and (beside or gaps.max() > main_side / 5):
            found.append(SEVERAL)
        elif gaps.max() <= main_side / 4:  # a detached part of the same digit
            kept.append(i)
    digit = np.where(np.isin(labels, kept), ink, 0)
    if touches_edge(bounding_box(digit), ink.shape):
        found.append(CUT)
    return digit, tuple(dict.fromkeys(found))


def touches_edge(box, shape):
    return (box[0] == 0).any() or (box[1] == shape).any()


def thicken(ink):
    """Widen the strokes of cropped ink, float (h, w), if they are thinner than most of MNIST's."""
    side = max(ink.shape)
    if side <= DIGIT_SIDE:  # an image of MNIST, or a smaller digit: nothing is shrunk
        return ink
    stroke = ink > 0
    width = 2 * stroke.sum() / (stroke ^ with_neighbors(stroke, np.minimum)).sum()  # area / edge
    layers = max(0, round((THIN * side / DIGIT_SIDE - width) / 2))
    ink = np.pad(ink, layers)
    for _ in range(layers):
        ink = with_neighbors(ink, np.maximum)
    return ink


def with_neighbors(values, choose):
    """np.minimum or np.maximum of each value (H, W) and its four neighbors, 0 outside."""
    padded = np.pad(values, 1)
    neighbors = padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]
    return choose.reduce([values, *neighbors])


def as_mnist(ink):
    """Normalize cropped ink, float (h, w), to an MNIST image, uint8 (28, 28)."""
    missing = max(ink.shape) - np.array(ink.shape)
    square = np.pad(ink, [(n // 2, n - n // 2) for n in missing])
    # Each side is divided into 20 n parts: an old pixel has 20 of them, a new one n. Exact up to a
    # factor, while Pillow's box filter gives some rows and columns no weight at all.
    overlap = np.eye(DIGIT_SIDE).repeat(len(square), axis=1).reshape(DIGIT_SIDE, -1, DIGIT_SIDE)
    weights = overlap.mean(axis=2)  # (20, n), of each old pixel in each new one
    digit = weights @ square @ weights.T
    if len(square) > DIGIT_SIDE:  # shrinking makes edges gray: clip the top quarter
        digit = np.minimum(digit, np.quantile(digit[digit > 0.1 * digit.max()], 0.75))
    center = [np.arange(DIGIT_SIDE) @ digit.sum(axis=axis) / digit.sum() for axis in (1, 0)]
    y, x = (math.ceil(CENTER - 0.5 - c) for c in center)
    image = Image.new("L", (SIDE, SIDE))
    image.paste(Image.fromarray(np.rint(digit * (255 / digit.max())).astype(np.uint8)), (x, y))
    return np.array(image)
