"""Digits drawn as strokes on a canvas, and what surrounds such a canvas in people's pictures."""

import numpy as np
from PIL import Image, ImageDraw, ImageOps

# A style per line: the digit, then its strokes, each a list of points x,y from 0 to 100. A stroke
# is a smooth curve through its points, with a corner where a point is repeated.
STYLE_LINES = """
0: 50,0 18,22 10,52 22,88 50,100 80,86 90,50 80,16 50,0
0: 62,4 30,10 8,45 14,84 44,100 78,82 92,42 78,8 48,2
0: 50,0 12,20 12,80 50,100 88,80 88,20 50,0 | 78,14 78,14 22,88
0: 70,8 44,0 14,30 14,76 46,100 84,78 88,34 66,4 40,8
1: 50,0 50,0 50,100
1: 62,0 62,0 38,100
1: 22,26 22,26 54,0 54,0 54,100
1: 6,48 6,48 56,0 56,0 56,100
1: 30,20 30,20 52,0 52,0 52,100 52,100 | 22,100 22,100 82,100
1: 32,18 32,18 50,0 50,0 50,72
2: 10,24 30,2 68,2 84,26 66,56 10,100 10,100 92,100
2: 14,22 40,0 80,12 78,42 40,78 12,98 26,84 48,92 92,96
2: 10,20 46,0 86,22 70,54 8,100 8,100 90,94
2: 18,30 30,4 70,4 82,30 58,62 20,94 14,84 32,82 60,98 92,88
3: 12,12 48,0 82,16 70,42 40,48 40,48 78,56 88,80 54,100 8,88
3: 10,2 10,2 84,2 84,2 40,42 40,42 80,52 86,82 50,100 8,88
3: 16,16 44,0 78,14 76,36 36,46 60,48 86,64 80,92 44,100 10,86
3: 8,8 50,0 88,18 66,44 30,50 66,52 92,74 70,98 20,96
4: 60,0 60,0 8,68 8,68 92,68 | 68,36 68,36 68,100
4: 20,0 20,0 14,52 14,52 84,52 | 78,2 78,2 74,100
4: 72,100 72,100 72,0 72,0 6,70 6,70 94,70
4: 26,4 18,32 14,54 14,54 50,54 84,46 | 82,0 82,0 70,100
4: 56,0 56,0 12,54 12,54 90,58 | 56,30 56,30 54,100
5: 84,2 84,2 24,2 24,2 18,44 18,44 56,36 88,62 70,94 10,92
5: 22,4 22,4 16,46 16,46 60,40 86,70 56,100 8,88 | 22,4 22,4 88,2
5: 88,0 88,0 30,4 30,4 20,40 54,38 84,60 76,92 40,100 10,84
5: 80,4 50,2 26,8 26,8 22,46 22,46 70,42 86,74 54,100 12,94
6: 72,0 34,22 12,62 24,96 58,100 82,76 62,52 18,66
6: 60,0 22,36 10,74 36,100 78,92 84,62 50,50 16,70
6: 64,0 30,20 8,50 10,86 46,100 86,84 88,44 52,30 12,56
6: 80,8 48,4 16,40 16,84 52,100 84,78 62,54 20,70
7: 8,4 8,4 90,4 90,4 36,100
7: 8,8 8,8 46,4 90,4 90,4 60,46 44,100
7: 8,4 8,4 88,4 88,4 38,100 38,100 | 22,52 22,52 78,52
7: 10,20 10,20 12,4 12,4 88,6 88,6 64,42 48,100
7: 6,12 30,4 56,12 90,2 90,2 58,50 46,100
8: 78,12 44,0 18,22 50,46 86,72 56,100 16,80 42,52 80,24 72,6
8: 50,0 22,12 26,38 50,47 74,38 78,12 50,0 50,0 | 50,47 16,62 18,92 50,100 82,92 84,62 50,47
8: 50,46 22,30 36,2 68,4 76,30 48,48 18,70 32,98 70,98 84,70 50,46
8: 84,6 40,0 20,24 60,50 80,80 46,100 18,78 50,48 84,14
9: 82,22 50,0 18,22 36,50 72,40 82,22 82,22 76,100
9: 80,18 44,0 14,30 40,56 76,38 80,14 80,60 54,98 20,92
9: 50,2 18,18 24,48 60,50 82,24 50,2 50,2 | 82,12 82,12 60,100
9: 76,12 42,2 16,28 40,52 78,30 78,30 74,64 40,100
9: 84,6 84,6 40,4 18,30 50,52 80,30 80,30 70,100
"""


def drawing(rng):
    """Draw a random digit as strokes; returns it and its ink coverage, 0 to 1, float (S, S).

    The pen is 6 to 28 pixels wide, the canvas 280 to 500; half of the drawings have smooth edges.
    """
    digit, strokes = STYLES[rng.integers(len(STYLES))]
    size, height = int(rng.integers(280, 501)), rng.uniform(0.35, 0.8)
    pen = min(rng.uniform(6, 28) / size, height / 5)
    angle, slant = rng.normal(0, 0.07), rng.uniform(-0.1, 0.35)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = matrix @ [[rng.uniform(0.55, 0.85), -slant], [0, 1]] * height
    lines = [curve(points + rng.normal(0, 0.02, points.shape)) @ matrix.T for points in strokes]
    low, high = (f(np.concatenate(lines), axis=0) for f in (np.min, np.max))
    margin = pen / 2 + 0.03
    largest = np.maximum(1 - margin - high + low, 0)
    shift = rng.uniform(np.minimum(np.minimum(margin, 0.5 - high / 2), largest), largest)
    scale = 4 * size  # four times the size, for smooth edges
    sheet = Image.new("L", (scale, scale))
    draw, radius = ImageDraw.Draw(sheet), pen / 2 * scale
    for line in lines:
        points = (line - low + shift) * scale
        draw.line(points.flatten().tolist(), 255, width=round(2 * radius))
        for x, y in points:  # round joints and ends
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], 255)
    coverage = np.asarray(sheet.reduce(4), dtype=float) / 255
    return digit, coverage if rng.random() < 0.5 else np.round(coverage)


def curve(points, steps=12):
    """Points along a Catmull-Rom spline through points (N, 2); a repeated point is a corner."""
    p = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, steps)[:, None]
    parts = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        if np.linalg.norm(c - b) > 0.1:
            square, cube = 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
            parts.append(b + (t * (c - a) + t**2 * square + t**3 * cube) / 2)
    return np.concatenate(parts)


def canvas(coverage, rng):
    """Black on white, white on black, or two colors that are easily told apart."""
    kind = rng.random()
    paper, ink = np.full(3, 255.0), np.zeros(3)
    if kind > 0.8:
        while np.linalg.norm(paper - ink) < 150:
            paper, ink = rng.uniform(0, 255, (2, 3)).round()
    elif kind > 0.6:
        paper, ink = ink, paper
    return as_picture(paper + coverage[..., None] * (ink - paper))


def framed(coverage, rng):
    """A canvas with a thin frame in the color of the ink, or nearly."""
    frame = np.ones_like(coverage)
    width = int(rng.integers(1, 6))
    frame[width:-width, width:-width] = 0
    return canvas(np.maximum(coverage, rng.uniform(0.5, 1) * frame), rng)


def dark_canvas(coverage, rng):
    """White ink on a dark canvas, on a light page."""
    shade = rng.uniform(0, 90)
    sheet = as_picture(np.repeat(shade + coverage[..., None] * (255 - shade), 3, axis=2))
    return on_page(sheet, (np.array(sheet.size) * rng.uniform(1.05, 2, 2)).astype(int), rng)


def transparent(coverage, rng):
    """White ink on transparency."""
    ink = Image.new("RGBA", coverage.shape[::-1], "white")
    ink.putalpha(Image.fromarray((255 * coverage).astype(np.uint8)))
    return ink


def screenshot(coverage, rng):
    """A phone's screenshot: a canvas on a white page below a dark status bar with icons."""
    picture = on_page(
        as_picture(np.repeat(255 - 255 * coverage[..., None], 3, axis=2)),
        (np.array(coverage.shape) * [1, rng.uniform(1.5, 2.1)]).astype(int),
        rng,
    )
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    bar = int(height * rng.uniform(0.03, 0.08))
    draw.rectangle([0, 0, width, bar], tuple(rng.integers(0, 90, 3)))
    for x in (0.04, 0.1, 0.82, 0.9):
        draw.rectangle([x * width, bar * 0.3, (x + 0.04) * width, bar * 0.7], (235, 235, 235))
    if rng.random() < 0.5:
        draw.rectangle([0, height - bar, width, height], tuple(rng.integers(0, 90, 3)))
    return picture


def on_page(picture, size, rng):
    """Paste a picture anywhere on a light page of (width, height) `size`."""
    page = Image.new("RGB", tuple(size), tuple(rng.integers(240, 256, 3)))
    page.paste(picture, tuple(rng.integers(0, np.array(size) - picture.size + 1)))
    return page


def letterboxed(picture, rng):
    """A picture with black bars at two opposite sides."""
    (width, height), bar = picture.size, rng.uniform(0.05, 0.3)
    x, y = (0, int(bar * height)) if rng.random() < 0.5 else (int(bar * width), 0)
    return ImageOps.expand(picture, (x, y), tuple(rng.integers(0, 12, 3)))


def on_desk(picture, rng):
    """A sheet on a dark desk, seen at a slight angle, with all four edges visible."""
    width, height = np.array(picture.size) * rng.uniform(1.2, 2, 2)
    corner = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    turn = rng.normal(0, 0.05)
    cos, sin = np.cos(turn), np.sin(turn)
    turned = (corner - 0.5) @ [[cos, sin], [-sin, cos]]
    spots = turned * picture.size + [width / 2, height / 2]
    spots += rng.normal(0, 0.02, (4, 2)) * picture.size
    spots += rng.uniform(-0.25, 0.25, 2) * ([width, height] - np.array(picture.size))
    # The coefficients of Pillow's perspective transform, which maps output to input coordinates.
    rows, values = [], (corner * picture.size).flatten()
    for (x, y), (u, v) in zip(spots, corner * picture.size, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    how = (Image.Transform.PERSPECTIVE, np.linalg.solve(rows, values), Image.Resampling.BICUBIC)
    size = int(width), int(height)
    sheet = picture.convert("RGB").transform(size, *how)
    mask = Image.new("L", picture.size, 255).transform(size, *how)
    wood = np.tile(rng.uniform(15, 110, 3) * rng.uniform(0.6, 1), (size[1], size[0], 1))
    wood += (rng.normal(0, 1, (size[1], 1, 1)) + rng.normal(0, 1, wood.shape)) * rng.uniform(1, 6)
    desk = as_picture(wood)
    desk.paste(sheet, mask=mask)
    return desk


def as_picture(scene):
    """A Pillow image of float RGB values."""
    return Image.fromarray(np.clip(scene + 0.5, 0, 255).astype(np.uint8))


def parse_styles(text):
    """Styles as (digit, strokes), where a stroke is an array of points (N, 2) from 0 to 1."""
    styles = []
    for line in text.strip().splitlines():
        digit, strokes = line.split(":")
        points = [[point.split(",") for point in stroke.split()] for stroke in strokes.split("|")]
        styles.append((int(digit), [np.array(stroke, dtype=float) / 100 for stroke in points]))
    return styles


STYLES = parse_styles(STYLE_LINES)
DRAWINGS = {"drawing": canvas, "frame": framed, "dark canvas": dark_canvas}
DRAWINGS |= {"transparent": transparent, "screenshot": screenshot}
