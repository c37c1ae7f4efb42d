"""Pictures that people send: digits of MNIST that are cropped, circled, on a table, in an app.

Those in `SEVERAL_DIGITS` show two or three, of which none should be read without a warning.
"""

from functools import partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.drawings import as_picture, canvas, letterboxed, on_desk, on_page
from benchmarks.simulation import (
    DAMAGES,
    add_noise,
    illuminate,
    photograph,
    place_on_sheet,
    smooth_noise,
    wide_pen,
)

PAPER, INK = 236.0, 40.0


def cut_out(coverage, margin=0):
    """Crop coverage to its digit and a margin in pixels."""
    padded = np.pad(coverage, margin)
    rows, columns = (np.flatnonzero(coverage.max(axis=axis) > 0.5) for axis in (1, 0))
    return padded[rows[0] : rows[-1] + 1 + 2 * margin, columns[0] : columns[-1] + 1 + 2 * margin]


def on_paper(coverage):
    """Dark ink on white paper, float RGB (H, W, 3)."""
    return np.repeat(PAPER + coverage[..., None] * (INK - PAPER), 3, axis=2)


def noisy(scene, rng):
    return as_picture(add_noise(scene, rng))


def crop(image, rng):
    """MNIST's image without its margin, dark or light."""
    picture = Image.fromarray(image)
    picture = picture.crop(picture.getbbox())
    return picture if rng.random() < 0.5 else picture.point(lambda gray: 255 - gray)


def large_crop(image, rng):
    picture = crop(image, rng)
    return picture.resize([10 * side for side in picture.size])


def close_photo(image, rng):
    """A photograph with 5 pixels around the digit."""
    return noisy(on_paper(cut_out(wide_pen(image, 300), 5)), rng)


def binary_crop(image, rng):
    """Two colors, without a margin."""
    return canvas(cut_out(wide_pen(image, int(rng.integers(100, 400))) > 0.5), rng)


def ring(image, rng):
    """An ellipse around the digit."""
    coverage = np.pad(cut_out(wide_pen(image, 300)), 150)
    height, width = np.array(coverage.shape) - 300
    sides = np.maximum([width, height], height / 2) * np.sqrt(2) * rng.uniform(1.1, 1.5, 2)
    center = np.array(coverage.shape[::-1]) / 2
    box = [*(center - sides / 2), *(center + sides / 2)]
    return marked(coverage, rng, lambda draw, pen: draw.ellipse(box, outline=255, width=pen))


def underline(image, rng):
    """A line below the digit, nearly horizontal."""
    coverage = np.pad(cut_out(wide_pen(image, 300)), 150)
    height, width = np.array(coverage.shape) - 300
    y = 150 + height * (1 + rng.uniform(0.08, 0.35))
    half = max(width, height / 2) * rng.uniform(0.4, 0.9)
    x = 150 + width / 2 + rng.uniform(-0.1, 0.1) * half
    rise = half * rng.normal(0, 0.03)
    line = [x - half, y + rise, x + half, y - rise]
    return marked(coverage, rng, lambda draw, pen: draw.line(line, fill=255, width=pen))


def marked(coverage, rng, mark):
    """A digit with a mark, which mark(draw, pen width) draws: clean or photographed."""
    sheet = Image.new("L", coverage.shape[::-1])
    mark(ImageDraw.Draw(sheet), int(rng.integers(4, 13)))
    scene = on_paper(np.maximum(coverage, np.asarray(sheet) / 255))
    return as_picture(scene) if rng.random() < 0.5 else noisy(scene, rng)


def tilted_sheet(image, rng):
    """A sheet, turned by 2 to 6 degrees, on a table in uneven light; the frame may cut it off."""
    sheet = as_picture(on_paper(place_on_sheet(wide_pen(image, 200), rng, False)))
    size = (np.array(sheet.size) / rng.uniform(0.8, 1.15)).astype(int)
    table = np.full(3, rng.uniform(10, 130)) * rng.choice([[1, 1, 1], [1, 0.75, 0.5]])
    scene = np.tile(table, (size[1], size[0], 1))
    scene += smooth_noise(scene.shape[:2], 2, rng)[..., None] * rng.uniform(0, 6)
    angle = rng.uniform(2, 6) * rng.choice([-1, 1])
    mask = Image.new("L", sheet.size, 255)
    sheet, mask = (x.rotate(angle, Image.Resampling.BICUBIC, expand=True) for x in (sheet, mask))
    scene = as_picture(scene)
    scene.paste(sheet, tuple((size - sheet.size) // 2), mask)
    ys, xs = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    turn = rng.uniform(0, 2 * np.pi)
    along = xs * np.cos(turn) + ys * np.sin(turn)
    if rng.random() < 0.5:  # a lamp at one side
        light = 0.825 + 0.225 * along.clip(-1, 1)
    else:  # and the soft shadow of a hand
        light = 0.925 + 0.125 * along.clip(-1, 1)
        light *= 1 - 0.4 / (1 + np.exp((along - rng.uniform(-0.6, 0.6)) / 0.1))
    return noisy(np.asarray(scene, float) * light[..., None], rng)


def shadow_edge(image, rng):
    """A shadow with a hard edge across the digit."""
    scene = on_paper(place_on_sheet(wide_pen(image, 300), rng, False))
    ys, xs = np.mgrid[-1 : 1 : scene.shape[0] * 1j, -1 : 1 : scene.shape[1] * 1j]
    turn = rng.uniform(0, 2 * np.pi)
    depth = xs * np.cos(turn) + ys * np.sin(turn) - rng.uniform(-0.3, 0.3)
    return noisy(scene * np.where(depth > 0, rng.uniform(0.5, 0.7), 1)[..., None], rng)


def three_digits(image, rng):
    """The digit three times in a row."""
    digit = cut_out(wide_pen(image, 200))
    gap = np.zeros((len(digit), int(rng.integers(30, 120))))
    row = np.concatenate([digit, gap, digit, gap, digit], axis=1)
    return as_picture(on_paper(np.pad(row, int(rng.integers(20, 100)))))


def tile(image, rng):
    """MNIST's image, pasted into a small white page."""
    size = int(rng.choice([56, 60]))
    return on_page(Image.fromarray(image).convert("RGB"), (size, size), rng)


def form(images, rng, gaps=True, faint=False, photo=False):
    """A digit in each box of a form: frames of 220 pixels on white paper."""
    margin, width = int(rng.integers(15, 80)), int(rng.integers(2, 6))
    step = 220 + (int(rng.integers(10, 60)) if gaps else -width)
    shade = rng.uniform(0.15, 0.5) if faint else rng.uniform(0.8, 1)
    coverage = np.zeros((2 * margin + 220, 2 * margin + step * (len(images) - 1) + 220))
    for index, image in enumerate(images):
        left = margin + step * index
        box = coverage[margin : margin + 220, left : left + 220]  # a view
        box[:] = np.maximum(box, shade)
        box[width:-width, width:-width] = 0
        digit = cut_out(wide_pen(image, int(rng.integers(120, 200))))
        y, x = ((220 - np.array(digit.shape)) * rng.uniform(0.3, 0.7, 2)).astype(int)
        box[y : y + digit.shape[0], x : x + digit.shape[1]] = digit
    scene = on_paper(coverage)
    if not photo:
        return as_picture(scene)
    return noisy(illuminate(scene, {rng.choice(["uneven", "shadow"])}, rng), rng)


def one_box(image, rng):
    return form([image], rng, faint=rng.random() < 0.5, photo=rng.random() < 0.5)


def pair(images, rng, axis=1, gap=(6, 15)):
    """A photograph of two digits beside (axis 1) or above each other, `gap` MNIST pixels apart."""
    one, two = (image.compress(image.any(axis=1 - axis), axis) for image in images)
    before = [(0, 0), (0, 0)]
    before[axis] = int(rng.integers(*gap)), 0
    both = np.concatenate([one, np.pad(two, before)], axis)
    return photograph(both, rng, rng.choice(DAMAGES))


def pasted(images, rng, axis=1):
    """Two photographs, each with its own paper and light, pasted beside (1) or above each other."""
    damage = rng.choice(DAMAGES)
    one, two = (photograph(image, rng, damage) for image in images)
    side = one.size[axis == 1]
    two = two.resize([n * side // two.size[axis == 1] for n in two.size])
    return Image.fromarray(np.concatenate([np.asarray(one), np.asarray(two)], axis))


def app(image, rng):
    """A drawing app: a white card on gray, a caption and a colored button below it."""
    coverage = np.pad(wide_pen(image, 280), 40)
    card = as_picture(np.repeat(255 - 255 * coverage[..., None], 3, axis=2))
    page = Image.new("RGB", (480, 620), (rng.integers(225, 248),) * 3)
    page.paste(card, (60, int(rng.integers(40, 90))))
    draw = ImageDraw.Draw(page)
    draw.text((60, 480), "Draw a digit from 0 to 9", (90, 90, 90), font_size=24)
    draw.rounded_rectangle([60, 530, 420, 580], 12, tuple(rng.integers(0, 200, 3)))
    draw.text((200, 540), "Recognize", "white", font_size=22)
    return page


def small(image, rng):
    """MNIST's image at less than half its size."""
    return Image.fromarray(image).resize((12, 12))


def letterbox(image, rng):
    return letterboxed(photograph(image, rng, "noise"), rng)


def desk(image, rng):
    return noisy(np.asarray(on_desk(photograph(image, rng, "plain"), rng), float), rng)


SCENES = {"letterbox": letterbox, "desk": desk, "crop": crop, "large crop": large_crop}
SCENES |= {"close photo": close_photo, "binary crop": binary_crop, "ring": ring}
SCENES |= {"underline": underline, "tilted sheet": tilted_sheet, "shadow edge": shadow_edge}
SCENES |= {"three digits": three_digits, "tile": tile, "app": app, "12 x 12": small}
SCENES |= {"one box": one_box}

SEVERAL_DIGITS = {  # each of so many images
    "side by side": (2, pair),
    "close together": (2, partial(pair, gap=(3, 6))),
    "one above the other": (2, partial(pair, axis=0, gap=(3, 11))),
    "pasted side by side": (2, pasted),
    "pasted above each other": (2, partial(pasted, axis=0)),
}
for count, gaps, faint, photo in product((2, 3), *[(False, True)] * 3):
    words = "faint" * faint, "photographed" * photo, f"{count} boxes", "apart" * gaps
    options = {"gaps": gaps, "faint": faint, "photo": photo}
    SEVERAL_DIGITS[" ".join(filter(None, words))] = count, partial(form, **options)
