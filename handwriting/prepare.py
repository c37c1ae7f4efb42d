"""Converts a photo, scan or drawing of a handwritten digit to a 28x28 image as in MNIST.

`prepare` finds the sheet, separates ink from paper (ink differs from its surroundings and is thin),
selects one digit, widens thin strokes and normalizes it as in MNIST: crop, pad to a square, shrink
to 20x20 by area averaging, scale the strongest ink to 255, shift the center of mass to index 14.
MNIST's own digits change by at most one gray level, except 16 of 70,000: their longer side is 19.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from dataset import SIDE
from handwriting.sheet import bounding_box, connected_components, find_sheet, longer_side

NO_INK = "no digit found, or too small: photograph it from above, near, in even light"
SEVERAL, CUT, SMALL = "more than one digit", "ink at the picture's edge", "the digit is too small"
DIGIT_SIDE, CENTER = 20, 14  # of MNIST's images, in pixels
ON_SHEET, IN_SCENE = 0.3, 0.15  # strokes are thinner than this fraction of the longer side
MIN_SIDE = 6  # of a digit in a reduced picture, in pixels
THIN = 2.5  # stroke width at this size, in pixels: 75% of MNIST's digits have wider strokes
FAINT = 0.4  # a pixel is ink if it is stronger than this fraction of the strong ink ...
NOISE = 5  # ... and than this many standard deviations of the background
VISIBLE = 6  # there is no ink if the strong ink is weaker than this many of them


class Prepared(NamedTuple):
    """A digit as an MNIST image."""

    pixels: np.ndarray  # uint8 (28, 28), light on dark; all 0 if no ink was found
    warnings: tuple[str, ...] = ()  # a subset of NO_INK, SEVERAL, CUT, SMALL


def prepare(image):
    """Return the digit in a Pillow image as a Prepared. Ink may be lighter or darker than paper."""
    image = as_rgb(image)
    small, factor = reduced(image)
    sheet, whole = find_sheet(np.asarray(small, dtype=float)), [[0, 0], small.size[::-1]]
    if sheet is None:
        return prepare_part(image, IN_SCENE)
    found, inside = [prepare_part(crop(image, sheet * factor), ON_SHEET)], sheet != whole
    several = False
    if inside.sum() == 1:  # it reaches three sides of the picture: is another beside it?
        beside = np.where(inside[::-1], sheet[::-1], whole)
        several = not prepare_part(crop(image, beside * factor), ON_SHEET).warnings
    if found[0].warnings or inside.any():
        found.append(prepare_part(image, IN_SCENE))  # other digits, or it is not the sheet
    best = min(found, key=lambda one: (NO_INK in one.warnings, bool(one.warnings)))
    several |= any(SEVERAL in one.warnings for one in found)
    return best._replace(warnings=tuple(dict.fromkeys(best.warnings + several * (SEVERAL,))))


def prepare_part(image, window):
    """Return the digit in an RGB image as a Prepared; strokes are thinner than `window`."""
    small, factor = reduced(image)
    difference, flat = paper_difference(small, window)
    digit, found = select_digit(*find_ink(difference, flat), flat)
    if not digit.any():
        return Prepared(np.zeros((SIDE, SIDE), np.uint8), found)
    (top, left), (bottom, right) = box = bounding_box(digit)
    side = longer_side(box)
    if side < MIN_SIDE and factor > 1:
        found = (SMALL,)  # at this size noise looks like other digits
    if side < max(digit.shape) / 4 and factor > 1:  # search again, closer
        closer = prepare_part(crop(image, (box + [[-side // 2], [side // 2]]) * factor), window)
        # Ink that reaches the edge only in the closer picture is the edge of a shadow.
        if not {NO_INK, CUT} & set(closer.warnings) - set(found):
            return Prepared(closer.pixels, tuple(dict.fromkeys(found + closer.warnings)))
    digit = digit[top:bottom, left:right]
    if not flat:  # strokes have soft edges and uneven ink: clip most of it
        digit = np.minimum(digit, 0.9 * np.quantile(digit[digit > 0], 0.9))
    return Prepared(as_mnist(thicken(digit)), found)


def reduced(image):
    """An RGB image, reduced to at most 480 x 480 pixels, and the factor."""
    factor = math.ceil(max(image.size) / 480)
    return image.reduce(factor), factor


def crop(image, box):
    """Crop a Pillow image to a box, [[top, left], [bottom, right]], clipped to the image."""
    return image.crop(box[:, ::-1].clip(0, image.size).flatten().tolist())


def as_rgb(image):
    """Convert to RGB; transparency becomes white, or black if the ink is white."""
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


def paper_difference(image, window):
    """The difference of an RGB image from its paper, float (H, W, 3), and whether paper is flat.

    In a drawing, paper has the border's most common color. In a photograph it is what is left
    without everything that is thinner than `window` and dark, or light: sheets and shadows stay.
    """
    rgb = np.asarray(image)
    border = np.concatenate([rgb[0], rgb[1:, -1], rgb[-1, -2::-1], rgb[-2:0:-1, 0]])  # clockwise
    colors, counts = np.unique(border, axis=0, return_counts=True)
    color = colors[counts.argmax()].astype(float)
    same = (border == color).all(axis=1)
    # A shadow covers one stretch of the border; ink that reaches it crosses it in several places.
    if same.mean() > 0.9 or (same.mean() > 0.3 and (same ^ np.roll(same, 1)).sum() > 2):
        return rgb - color, True
    rgb = np.asarray(image.filter(ImageFilter.BoxBlur(1)))  # against grain
    width = math.ceil(window * max(rgb.shape))
    padded = np.pad(rgb, [(width - 1, width - 1)] * 2 + [(0, 0)], "edge")
    orders = (np.maximum, np.minimum), (np.minimum, np.maximum)
    papers = [slide(slide(padded, width, a), width, b).astype(np.float32) for a, b in orders]
    # Paper that contains the ink has edges near thin things. Per channel: ink may be dark in one.
    coarse = [np.pad(p, [(0, 2), (0, 2), (0, 0)], "edge")[::2, ::2] for p in papers]
    slopes = [np.abs(np.gradient(p, axis=(0, 1))).sum(axis=0) for p in coarse]
    edges = [((coarse[0] - coarse[1]) * slope).sum(axis=(0, 1)) for slope in slopes]  # (3,)
    paper = np.where(edges[0] < edges[1], *papers)
    # Contrast is proportional to brightness: undo shading.
    difference = abs(rgb - paper) * (paper.mean(axis=(0, 1)) + 24) / (paper + 24)
    return difference - np.quantile(difference[::4, ::4], 0.3, axis=(0, 1)), False  # that of noise


def slide(values, width, choose):
    """np.minimum or np.maximum in each square window of `width` pixels: (H - width + 1, ...)."""
    for _ in range(2):  # rows, then columns
        done = 1
        while done < width:
            step = min(done, width - done)
            values = choose(values[step:], values[:-step])
            done += step
        values = values.swapaxes(0, 1)
    return values


def find_ink(difference, flat):
    """Ink, float (H, W), along one direction in color space; its threshold, inf without ink."""
    ink = np.linalg.norm(difference, axis=2)
    for _ in range(2):  # the second pass has a better estimate of the ink
        level = np.quantile(ink, 0.999, method="lower")
        strong = ink > (level if level > VISIBLE else ink.max()) / 2  # else ink is few pixels
        if not strong.any():
            return ink, np.inf
        direction = difference[strong].mean(axis=0)
        projection = difference @ (direction / max(np.linalg.norm(direction), 1e-9))
        ink = projection.clip(0)
    strength = np.median(ink[strong])
    rest = projection[~strong]
    deviation = 0 if flat else 1.4826 * np.median(np.abs(rest - np.median(rest)))
    visible = strength > VISIBLE * max(deviation, 1)  # a reduced photo has no noise
    return ink, max(FAINT * strength, NOISE * deviation) if visible else np.inf


def select_digit(ink, threshold, noiseless):
    """Select one digit, without specks. Returns its ink, float (H, W), and the warnings."""
    mask = ink > threshold
    if not mask.any():
        return np.zeros_like(ink), (NO_INK,)
    box = bounding_box(ink)
    if noiseless and longer_side(box) == DIGIT_SIDE:  # from MNIST: keep its faintest grays
        return ink, (CUT,) if ink.shape != (SIDE, SIDE) and touches_edge(box, ink.shape) else ()
    # Then it is paper around ink of the other kind, and its pieces are no digits.
    dense = mask.sum() > np.ptp(bounding_box(mask), axis=0).prod() / 2
    labels = connected_components(mask)
    mass = np.bincount(labels[mask], ink[mask])  # 0 for label 0, paper
    strongest = sorted(np.argsort(mass)[-50:])  # at most 50: each takes a pass over the picture
    boxes = {i: bounding_box(labels == i) for i in strongest if mass[i] > 0.03 * mass.max()}
    at_edge = {i for i in boxes if touches_edge(boxes[i], ink.shape)}
    lines = {i for i, box in boxes.items() if np.ptp(box, axis=0) @ [4, -1] < 0}

    def encloses(i, j):  # a ring or a frame around a digit
        inside = (boxes[i][0] < boxes[j][0]).all() and (boxes[i][1] > boxes[j][1]).all()
        return inside and longer_side(boxes[j]) > np.ptp(boxes[i], axis=0).min() / 3

    boxes = {i: box for i, box in boxes.items() if not any(encloses(i, j) for j in boxes)}
    # A line, or a component at the edge, is less likely the digit than an underline or a table.
    main = max(boxes, key=lambda i: mass[i] * 0.1 ** ((i in at_edge) + (i in lines)))
    main_box, kept, found = boxes.pop(main), [main], []
    main_side = longer_side(main_box)
    for i, box in boxes.items():
        gaps = np.maximum(main_box[0], box[0]) - np.minimum(main_box[1], box[1])  # (y, x)
        tall = box[1, 0] - box[0, 0] > main_side / 2  # the bar of a 5 is not
        below = box[0, 0] >= main_box[1, 0] - 2
        if i in lines and (below or i in at_edge):  # an underline, or the bar of a screen
            continue
        if i in at_edge and main not in at_edge and not noiseless:
            continue
        large = longer_side(box) > 0.4 * main_side and mass[i] > mass[main] / 15
        if large and not dense and (tall and gaps.max() >= 0 or gaps.max() > main_side / 5):
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
