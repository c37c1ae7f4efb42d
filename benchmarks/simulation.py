"""Simulated photographs of digits.

A digit of MNIST is enlarged with the sharp edges of a pen, drawn in ink on paper, lit and
photographed: light = paper x (1 - coverage) + ink x coverage, then illumination, blur, noise, JPEG.
Each kind of damage is applied alone; "all" combines most of them.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.drawings import as_picture
from handwriting.picture import read_picture

COMBINED = ("color", "uneven", "shadow", "noise", "blur", "specks", "off center", "exif", "jpeg")
DAMAGES = ("plain", *COMBINED, "thin pen", "pencil", "ruled", "all")
MIN_CONTRAST = 80.0  # distance of ink from paper in RGB (0 to 441); people misread fainter ink
EXIF_ORIENTATION = 0x0112  # the tag
# How a camera transposes what it stores, for the EXIF orientations 2 to 8.
TRANSPOSED = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"


def photograph(digit_image, rng, damage):
    """Simulate a photograph of a digit.

    Args:
        digit_image: uint8 (28, 28), light on dark, as in MNIST, or a larger one of several digits.
        rng: a NumPy generator, the only source of randomness.
        damage: one of `DAMAGES`.

    Returns:
        an RGB image of Pillow; with "exif" or "jpeg" one read from the bytes of a JPEG file.
    """
    effects = set(COMBINED) if damage == "all" else {damage}
    size = int(rng.integers(150, 401))  # pixels, from 28
    pen = thin_pen(digit_image, size, rng) if "thin pen" in effects else wide_pen(digit_image, size)
    coverage = place_on_sheet(pen, rng, off_center="off center" in effects)
    scene = draw(coverage, size, effects, rng)
    scene = illuminate(scene, effects, rng)
    if "blur" in effects:
        radius = size / 28 * rng.uniform(0.3, 0.9)
        scene = np.asarray(as_picture(scene).filter(ImageFilter.GaussianBlur(radius)), dtype=float)
    if "noise" in effects:
        scene = add_noise(scene, rng)
    orientation = int(rng.integers(2, 9)) if "exif" in effects else 1
    quality = int(rng.integers(15, 61)) if "jpeg" in effects else 95
    picture = as_picture(scene)
    return as_jpeg(picture, orientation, quality) if effects & {"exif", "jpeg"} else picture


def wide_pen(digit_image, size):
    """Enlarge a digit with sharp edges: coverage by ink, 0 to 1, float; 28 pixels become `size`."""
    small = Image.fromarray(digit_image.astype(np.float32) / 255)
    sides = [side * size // 28 for side in small.size]
    large = np.asarray(small.resize(sides, Image.Resampling.BICUBIC))
    return np.clip((large - 0.4) * 2 + 0.5, 0, 1).astype(float)


def thin_pen(digit_image, size, rng):
    """Draw the center line of a digit with a thin pen: coverage, float, as in `wide_pen`."""
    line = Image.fromarray(skeleton(wide_pen(digit_image, 112) > 0.5).astype(np.float32))
    sides = [side * size // 112 for side in line.size]
    large = line.resize(sides, Image.Resampling.BICUBIC)
    radius = size * rng.uniform(0.010, 0.022)  # that of an MNIST stroke is about 0.045
    soft = gaussian_blur(np.asarray(large, dtype=float), radius)
    return np.clip(soft / np.percentile(soft[soft > soft.max() / 3], 50) * 1.6 - 0.3, 0, 1)


def skeleton(mask):
    """Thin a boolean image to lines, after Zhang and Suen (1984)."""
    mask = np.pad(mask, 1)
    changed = True
    while changed:
        changed = False
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            shifts = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            ring = np.stack([np.roll(mask, s, (0, 1)) for s in shifts])  # N, NE, E, ... NW
            transitions = (~ring & np.roll(ring, -1, 0)).sum(0)
            count = ring.sum(0)
            removed = mask & (count >= 2) & (count <= 6) & (transitions == 1)
            removed &= ~ring[list(first)].all(0) & ~ring[list(second)].all(0)
            mask = mask & ~removed
            changed |= bool(removed.any())
    return mask[1:-1, 1:-1]


def place_on_sheet(pen, rng, off_center):
    """Coverage of the whole picture: the digit near the center, or small and away from it."""
    rows, columns = np.nonzero(pen.max(1))[0], np.nonzero(pen.max(0))[0]
    pen = pen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    longer = max(pen.shape)
    shape = longer * (rng.uniform(2.5, 5, 2) if off_center else rng.uniform(1.3, 2, 2))
    sheet = np.zeros(shape.astype(int))
    spare = np.array(sheet.shape) - pen.shape
    margin = longer * 0.08
    corner = rng.uniform(margin, spare - margin) if off_center else spare * rng.uniform(0.4, 0.6, 2)
    y, x = corner.astype(int)
    sheet[y : y + pen.shape[0], x : x + pen.shape[1]] = pen
    return sheet


def draw(coverage, size, effects, rng):
    """Draw ink on paper where it covers the sheet: float RGB (H, W, 3), 0 to 255."""
    paper, ink = choose_colors(rng) if "color" in effects else (np.full(3, 236.0), np.full(3, 40.0))
    sheet = np.tile(paper, (*coverage.shape, 1))
    if "ruled" in effects:
        draw_ruling(sheet, size, rng)
    if "specks" in effects:
        add_specks(coverage, rng)
    if "pencil" in effects:
        coverage = coverage * pencil_density(coverage.shape, rng)
    return sheet + coverage[..., None] * (ink - sheet)


def choose_colors(rng):
    """Colors of paper and ink, RGB: mostly light, grayish paper, and any ink that is visible."""
    while True:
        paper = rng.uniform(110, 250) + rng.uniform(-15, 15, 3)
        if rng.random() < 0.2:
            paper = paper / 4  # a blackboard
        ink = rng.uniform(0, 255, 3)
        if np.linalg.norm(paper - ink) >= MIN_CONTRAST:
            return np.clip(paper, 0, 255), ink


def draw_ruling(sheet, size, rng):
    """Draw pale blue lines or squares on a sheet, in place."""
    pitch = int(size * rng.uniform(0.25, 0.9))
    line = np.array([170.0, 185.0, 215.0]) + rng.uniform(-10, 10)
    for k in range(max(1, size // 120)):
        sheet[pitch // 2 + k :: pitch] = line
        if pitch < size * 0.5:
            sheet[:, pitch // 3 + k :: pitch] = line


def add_specks(coverage, rng):
    """Add 3 to 15 round specks of at most about 1/60 of the picture's shorter side, in place."""
    height, width = coverage.shape
    for _ in range(int(rng.integers(3, 16))):
        radius = rng.uniform(0.8, max(1.5, min(height, width) / 120))
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        ys, xs = np.ogrid[:height, :width]
        speck = np.clip(radius + 0.5 - np.hypot(ys - y, xs - x), 0, 1) * rng.uniform(0.4, 1)
        np.maximum(coverage, speck, out=coverage)


def pencil_density(shape, rng):
    """How much of the paper graphite covers, 0 to 1: it varies with pressure and paper grain."""
    pressure, grain = smooth_noise(shape, 30, rng), smooth_noise(shape, rng.uniform(0.8, 2), rng)
    density = rng.uniform(0.35, 0.7) * (1 + 0.25 * pressure.clip(-1.5, 1.5) + 0.25 * grain)
    return density.clip(0.05, 1)


def illuminate(scene, effects, rng):
    """Apply uneven light and a shadow."""
    ys, xs = np.mgrid[-1 : 1 : scene.shape[0] * 1j, -1 : 1 : scene.shape[1] * 1j]
    if "uneven" in effects:
        scene = scene * uneven_light(xs, ys, rng)[..., None]
    if "shadow" in effects:
        scene = scene * shadow(xs, ys, rng)[..., None]
    return scene


def uneven_light(xs, ys, rng):
    """A lamp at one side, and a lens that darkens the corners: from 1 down to about 0.45."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = (xs * np.cos(angle) + ys * np.sin(angle)) / np.sqrt(2)
    light = 1 - rng.uniform(0.1, 0.4) * (1 + slope) / 2 - rng.uniform(0, 0.2) * (xs**2 + ys**2) / 2
    return light / light.max()


def shadow(xs, ys, rng):
    """The shadow of a hand or phone: a slightly curved edge, blurred over 2 to 15% of the side."""
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    across = xs * np.sin(angle) - ys * np.cos(angle)
    depth = along + bend * across**2 - rng.uniform(-0.6, 0.6)
    return 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-depth / rng.uniform(0.01, 0.075)))


def add_noise(scene, rng):
    """Add the noise of the sensor, independent per channel, and the coarser, gray paper grain."""
    scene = scene + rng.normal(0, rng.uniform(2, 9), scene.shape)
    paper = smooth_noise(scene.shape[:2], rng.uniform(1, 2.5), rng)
    return scene + paper[..., None] * rng.uniform(0.5, 3)


def smooth_noise(shape, sigma, rng):
    """Gaussian noise, blurred with `sigma` pixels, with standard deviation 1."""
    noise = gaussian_blur(rng.normal(0, 1, shape), sigma)
    return noise / noise.std()


def gaussian_blur(values, sigma):
    """Blur a float array (H, W); Pillow only blurs 8-bit images."""
    reach = int(3 * sigma + 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for _ in range(2):  # columns, then rows
        padded = np.pad(values, ((reach, reach), (0, 0)))
        values = sum(k * padded[i : i + len(values)] for i, k in enumerate(kernel / kernel.sum())).T
    return values


def as_jpeg(picture, orientation, quality):
    """Store a picture as a camera does, rotated, with the orientation in its EXIF, and read it."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[TRANSPOSED.split()[orientation - 2]])
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, exif=exif)
    file.seek(0)
    return read_picture(file)
