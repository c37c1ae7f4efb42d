"""Photographs of handwritten digits, imitated, and how many of them a trained network reads.

    python benchmarks/photographs.py runs/default --data-dir data

A test image of MNIST is enlarged with a pen's crisp edge, written in ink on paper, lit, and taken
by a camera: light = paper x (1 - coverage) + ink x coverage, then illumination, blur, grain, JPEG.
`DAMAGES` names what can go wrong, each alone on an otherwise plain picture, and "all" together.
"""

import argparse
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mnist  # noqa: E402
from handwriting import SIDE, Prepared, prepare  # noqa: E402
from predict import Predictor, predict  # noqa: E402
from rundir import find_checkpoint, load_checkpoint  # noqa: E402

TOGETHER = ("colour", "uneven", "shadow", "noise", "blur", "specks", "off centre", "exif", "jpeg")
DAMAGES = ("plain", *TOGETHER, "thin pen", "pencil", "ruled", "all")
READABLE = 80.0  # least distance of ink from paper in RGB (0 to 441): fainter, people squint too
ORIENTATION = 0x0112  # EXIF's tag, and how a camera held that way stores the picture
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def photograph(digit_image, rng, damage):
    """Photograph one digit.

    Args:
        digit_image: uint8 (28, 28), light on dark, as in MNIST.
        rng: where every choice comes from; the same state makes the same photograph.
        damage: one of `DAMAGES`.
    Returns: an RGB picture; after "exif" or "jpeg" one opened from
        JPEG bytes, so that its EXIF orientation is still to be followed.
    Raises: ValueError for an unknown damage.
    """
    if damage not in DAMAGES:
        raise ValueError(f"unknown damage {damage!r}; choose one of {', '.join(DAMAGES)}")
    suffers = set(TOGETHER) if damage == "all" else {damage}
    size = int(rng.integers(150, 401))  # pixels that MNIST's 28 become
    pen = _thin_pen(digit_image, size, rng) if "thin pen" in suffers else _pen(digit_image, size)
    coverage = _on_sheet(pen, rng, far="off centre" in suffers)
    height, width = coverage.shape
    ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    paper, ink = _colours(rng) if "colour" in suffers else (np.full(3, 236.0), np.full(3, 40.0))
    sheet = np.tile(paper, (height, width, 1))
    if "ruled" in suffers:
        sheet = _rule(sheet, size, rng)
    if "specks" in suffers:
        _sprinkle(coverage, rng)
    if "pencil" in suffers:
        coverage = coverage * _pencil(coverage.shape, rng)
    scene = sheet + coverage[..., None] * (ink - sheet)
    if "uneven" in suffers:
        scene = scene * _falloff(xs, ys, rng)[..., None]
    if "shadow" in suffers:
        scene = scene * _shadow(xs, ys, rng)[..., None]
    if "blur" in suffers:
        radius = size / 28 * rng.uniform(0.3, 0.9)
        scene = np.asarray(_picture(scene).filter(ImageFilter.GaussianBlur(radius)), dtype=float)
    if "noise" in suffers:
        scene = _grain(scene, rng)
    orientation = int(rng.integers(2, 9)) if "exif" in suffers else 1
    quality = int(rng.integers(15, 61)) if "jpeg" in suffers else 95
    taken = _picture(scene)
    if not suffers & {"exif", "jpeg"}:
        return taken
    return _jpeg(taken, orientation, quality)


def _pen(digit_image, size):
    """Coverage 0..1, (size, size): MNIST enlarged smoothly, the edge twice as steep."""
    small = Image.fromarray(digit_image.astype(np.float32) / 255)
    large = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    return np.clip((large - 0.4) * 2 + 0.5, 0, 1).astype(float)


def _thin_pen(digit_image, size, rng):
    """Coverage 0..1, (size, size): the digit's middle line, drawn with a fine pen."""
    line = _skeleton(_pen(digit_image, 112) > 0.5)
    large = Image.fromarray(line.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    radius = size * rng.uniform(0.010, 0.022)  # an MNIST stroke's is about 0.045
    soft = _blurred(np.asarray(large, dtype=float), radius)
    return np.clip(soft / np.percentile(soft[soft > soft.max() / 3], 50) * 1.6 - 0.3, 0, 1)


def _skeleton(mask):
    """Zhang and Suen's thinning (1984) of a boolean picture."""
    mask = np.pad(mask, 1)
    changed = True
    while changed:
        changed = False
        for one, two in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            shifts = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            ring = np.stack([np.roll(mask, s, (0, 1)) for s in shifts])  # N, NE, E, ... NW
            turns = (~ring & np.roll(ring, -1, 0)).sum(0)
            count = ring.sum(0)
            peel = mask & (count >= 2) & (count <= 6) & (turns == 1)
            peel &= ~ring[list(one)].all(0) & ~ring[list(two)].all(0)
            mask = mask & ~peel
            changed |= bool(peel.any())
    return mask[1:-1, 1:-1]


def _on_sheet(pen, rng, far):
    """Coverage of the whole frame: the digit about in the middle, or small and far from it."""
    rows, columns = np.nonzero(pen.max(1))[0], np.nonzero(pen.max(0))[0]
    pen = pen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    longer = max(pen.shape)
    frame = longer * (rng.uniform(2.5, 5, 2) if far else rng.uniform(1.3, 2, 2))
    sheet = np.zeros(frame.astype(int))
    spare = np.array(sheet.shape) - pen.shape
    margin = longer * 0.08
    place = rng.uniform(margin, spare - margin) if far else spare * rng.uniform(0.4, 0.6, 2)
    y, x = place.astype(int)
    sheet[y : y + pen.shape[0], x : x + pen.shape[1]] = pen
    return sheet


def _colours(rng):
    """Colours of paper and ink, RGB in 0..255: greyish paper, mostly light; any ink."""
    while True:
        paper = rng.uniform(110, 250) + rng.uniform(-15, 15, 3)
        if rng.random() < 0.2:
            paper = paper / 4  # a blackboard
        ink = rng.uniform(0, 255, 3)
        if np.linalg.norm(paper - ink) >= READABLE:
            return np.clip(paper, 0, 255), ink


def _rule(sheet, size, rng):
    """Faint blue lines across the sheet, or squares."""
    pitch = int(size * rng.uniform(0.25, 0.9))
    line = np.array([170.0, 185.0, 215.0]) + rng.uniform(-10, 10)
    for k in range(max(1, size // 120)):
        sheet[pitch // 2 + k :: pitch] = line
        if pitch < size * 0.5:
            sheet[:, pitch // 3 + k :: pitch] = line
    return sheet


def _sprinkle(coverage, rng):
    """Crumbs: 3 to 15 round dots, up to a twelfth of the digit's stroke-box across."""
    height, width = coverage.shape
    for _ in range(int(rng.integers(3, 16))):
        radius = rng.uniform(0.8, max(1.5, min(height, width) / 120))
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        ys, xs = np.ogrid[:height, :width]
        dot = np.clip(radius + 0.5 - np.hypot(ys - y, xs - x), 0, 1) * rng.uniform(0.4, 1)
        np.maximum(coverage, dot, out=coverage)


def _pencil(shape, rng):
    """Graphite, light grey: its share 0..1 follows the hand's pressure and the paper's tooth."""
    pressure, tooth = _noise(shape, 30, rng), _noise(shape, rng.uniform(0.8, 2), rng)
    share = rng.uniform(0.35, 0.7) * (1 + 0.25 * pressure.clip(-1.5, 1.5) + 0.25 * tooth)
    return share.clip(0.05, 1)


def _falloff(xs, ys, rng):
    """A lamp at one side and a lens that darkens the corners: 1 down to about 0.45."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = (xs * np.cos(angle) + ys * np.sin(angle)) / np.sqrt(2)
    light = 1 - rng.uniform(0.1, 0.4) * (1 + slope) / 2 - rng.uniform(0, 0.2) * (xs**2 + ys**2) / 2
    return light / light.max()


def _shadow(xs, ys, rng):
    """A hand's or a phone's shadow: a slightly round edge, its penumbra 2 to 15 % of the frame."""
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    across = xs * np.sin(angle) - ys * np.cos(angle)
    depth = along + bend * across**2 - rng.uniform(-0.6, 0.6)
    return 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-depth / rng.uniform(0.01, 0.075)))


def _grain(scene, rng):
    """The sensor's noise, colour by colour, and the paper's grain, coarser and grey."""
    scene = scene + rng.normal(0, rng.uniform(2, 9), scene.shape)
    paper = _noise(scene.shape[:2], rng.uniform(1, 2.5), rng)
    return scene + paper[..., None] * rng.uniform(0.5, 3)


def _noise(shape, sigma, rng):
    """Smooth noise of mean about 0 and standard deviation 1; `sigma` is its grain in pixels."""
    noise = _blurred(rng.normal(0, 1, shape), sigma)
    return noise / noise.std()


def _blurred(values, sigma):
    """Gaussian blur of a float picture (Pillow's takes 8 bits only)."""
    reach = int(3 * sigma + 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for _ in range(2):  # down the columns, then, turned, along the rows
        padded = np.pad(values, ((reach, reach), (0, 0)))
        values = sum(k * padded[i : i + len(values)] for i, k in enumerate(kernel / kernel.sum())).T
    return values


def _picture(scene):
    return Image.fromarray(np.clip(scene + 0.5, 0, 255).astype(np.uint8))


def _jpeg(taken, orientation, quality):
    """What the camera stores: turned as the sensor was held, with a note how to turn it back."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if orientation in STORED:
        taken = taken.transpose(STORED[orientation])
    stored = io.BytesIO()
    taken.save(stored, "JPEG", quality=quality, exif=exif)
    return Image.open(stored)


def resized(picture):
    """What most published tools do: grey, the whole picture squeezed to 28x28, light on dark."""
    grey = ImageOps.exif_transpose(picture).convert("L").resize((SIDE, SIDE))
    pixels = np.asarray(grey)
    return Prepared(255 - pixels if pixels.mean() > 127 else pixels)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, or a checkpoint")
    parser.add_argument("--data-dir", default="data", help="holds MNIST (default: data)")
    parser.add_argument("--count", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    predictor = Predictor(load_checkpoint(find_checkpoint(args.run)))
    source = mnist.load("mnist", args.data_dir, print)
    images, digits = source.test.data.numpy(), source.test.targets.numpy()

    def right(prepared, chosen):
        return predict(predictor, prepared, 0)[0].argmax(dim=1).numpy() == digits[chosen]

    print("| damage | prepared | resized to 28x28 | as in MNIST | warned of |")
    print("| --- | ---: | ---: | ---: | ---: |")
    totals, table = Counter(), {}
    for kind, damage in enumerate(DAMAGES):
        rng = np.random.default_rng([args.seed, kind])
        chosen = rng.choice(len(images), args.count, replace=False)
        taken = [photograph(images[index], rng, damage) for index in chosen]
        prepared = [prepare(picture) for picture in taken]
        row = {
            "prepared": int(right(prepared, chosen).sum()),
            "resized": int(right([resized(picture) for picture in taken], chosen).sum()),
            "MNIST": int(right([Prepared(images[index]) for index in chosen], chosen).sum()),
            "warned": sum(bool(one.warnings) for one in prepared),
        }
        totals.update(row)
        table[damage] = row
        print_row(damage, row, args.count)
    print_row(f"of {args.count * len(DAMAGES)}", totals, args.count * len(DAMAGES))
    path = ROOT / "results" / "photographs.json"
    table = {"count": args.count, "seed": args.seed, "right": table}
    path.write_text(json.dumps(table, indent=2) + "\n")


def print_row(name, row, count):
    print(f"| {name} | " + " | ".join(f"{100 * n / count:.1f} %" for n in row.values()) + " |")


if __name__ == "__main__":
    main()
