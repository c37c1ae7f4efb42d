"""Finds the sheet, canvas or screen with the ink in a picture that shows more than that."""

import numpy as np


def find_sheet(rgb):
    """The box of the largest sheet in a picture, float (H, W, 3), that contains no other, or None.

    A sheet is a region of one brightness, nearly a rectangle, that surrounds ink: at least a stroke
    whose longer side is a twentieth of the shorter side of the sheet.
    """
    gray, sheets = rgb.mean(axis=2), []
    if max(gray.shape) < 40:  # nothing but a sheet
        return None
    for mask in similar_pixels(gray):
        labels = connected_components(mask)
        areas = np.bincount(labels[mask])  # 0 for label 0, the rest of the picture
        regions = [(labels == label, mask) for label in np.flatnonzero(areas > 0.1 * gray.size)]
        for region, similar in regions:
            sheet, ink = fill_holes(region, similar)
            if ink is not None and is_rectangle(sheet):
                if ink.sum() > 0.8 * (sheet & ~similar).sum():  # nothing else: perhaps a dark tile
                    regions.append((ink, ~similar))
                box = grow(bounding_box(ink), sheet)
                sides = box[1] - box[0]
                edge = min(2, sides.max() // 64)  # pixels at its edge that may be blurred
                # Else nothing is left inside the edge, or it is the edge of a shadow.
                if sides.min() > 2 * edge and sides.prod() > sheet.sum() / 2:
                    inner = np.where(box == [[0, 0], gray.shape], 0, [[edge], [-edge]])
                    sheets.append((sheet, box + inner))
    sheets.sort(key=lambda item: item[0].sum(), reverse=True)
    for index, (sheet, box) in enumerate(sheets):
        if not any(sheet[smaller].all() for smaller, _ in sheets[index + 1 :]):
            return box
    return None


def similar_pixels(gray):
    """Yield masks of pixels of one brightness: light and dark ones, in narrow and wide ranges."""
    counts = np.bincount(gray.astype(int).ravel(), minlength=256)
    dark, moment = np.cumsum(counts) / gray.size, np.cumsum(counts * np.arange(256)) / gray.size
    # Otsu's threshold (1979) has the largest variance between the two classes.
    variance = (moment[-1] * dark - moment) ** 2 / np.maximum(dark * (1 - dark), 1e-9)
    light = gray > variance.argmax() + 1
    if light.any() and not light.all():
        high, low = np.median(gray[light]), np.median(gray[~light])
        for tolerance in (0.15, 0.5):  # narrow: leaves out a thin frame, half faded by reduction
            yield gray > high - tolerance * (high - low)
            yield gray < low + tolerance * (high - low)


def fill_holes(region, mask):
    """A region with its holes filled, and the ink in them: the largest stroke, or None."""
    labels = connected_components(np.pad(~region, 1, constant_values=True))
    filled = (labels != labels[0, 0])[1:-1, 1:-1]
    holes = connected_components(filled & ~mask)  # without the inside of a 0
    if not holes.any():
        return filled, None
    ink = holes == np.bincount(holes[holes > 0]).argmax()
    sides, sheet_sides = (np.ptp(bounding_box(part), axis=0) for part in (ink, filled))
    # The inside of a 0 fills most of its box, and much of the height and the width of the "sheet".
    inside_0 = ink.sum() > 0.7 * sides.prod() and (sides > 0.4 * sheet_sides).all()
    return filled, None if inside_0 or sides.max() < sheet_sides.min() / 20 else ink


def is_rectangle(mask):
    """Whether a mask fills most of the smallest rectangle, at any angle, around it."""
    points = np.argwhere(np.diff(np.pad(mask, ((0, 0), (1, 1)))))  # the ends of the rows: (N, 2)
    angles = np.radians(np.arange(0, 180, 3))
    extent = np.ptp(points @ np.stack([np.cos(angles), np.sin(angles)]), axis=0)
    area = (extent * np.roll(extent, 30)).min()  # two extents at right angles
    return mask.sum() > 0.87 * area  # an ellipse fills 0.79 of it


def grow(box, mask):
    """Grow a box at all four sides as far as it stays inside a mask."""
    previous = None
    while not np.array_equal(previous, box):
        previous = box
        for side in np.eye(4, dtype=int).reshape(4, 2, 2) * [[-1], [1]]:  # top, left, bottom, right
            (top, left), (bottom, right) = larger = box + side
            inside = (larger[0] >= 0).all() and (larger[1] <= mask.shape).all()
            box = larger if inside and mask[top:bottom, left:right].all() else box
    return box


def bounding_box(mask):
    """The box around the nonzero elements: [[top, left], [bottom, right]], the latter exclusive."""
    indices = np.argwhere(mask)
    return np.array([indices.min(axis=0), indices.max(axis=0) + 1])


def longer_side(box):
    return np.ptp(box, axis=0).max()


def connected_components(mask):
    """Label the 8-connected components of a mask: int (H, W), from 1; 0 outside the mask."""
    # Union-find on the runs of pixels in each row; runs that touch in adjacent rows are merged.
    width = mask.shape[1] + 2
    steps = np.diff(np.pad(mask, 1).ravel().astype(np.int8))
    start, stop = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    # Run i touches the runs first[i] to last[i] - 1 of the row below.
    first = np.searchsorted(stop, start + width)
    last = np.searchsorted(start, stop + width, "right")
    parent = list(range(len(start)))

    def root(run):
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    for run in range(len(start)):
        for below in range(first[run], last[run]):
            parent[root(below)] = root(run)
    _, component = np.unique([root(run) for run in range(len(parent))], return_inverse=True)
    labels = np.zeros(mask.shape, dtype=int)
    labels[mask] = np.repeat(component + 1, stop - start)
    return labels
