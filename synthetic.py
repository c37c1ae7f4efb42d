"""Synthetic digits in place of MNIST if it is unavailable: from fonts, randomly warped."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dataset import NUM_DIGITS, SIDE, affine_matrices, generator, warp


def synthetic_mnist(split, count):
    """A set of `count` synthetic digits, with `data` and `targets` as in MNIST; always the same."""
    import matplotlib  # for its fonts; not at the top, because the import takes a while

    directory = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [path for path in sorted(directory.glob("DejaVu*")) if "Display" not in path.name]
    glyphs = torch.stack([render(font, digit) for font in fonts for digit in range(NUM_DIGITS)])
    rng = generator("synthetic", split)
    digits = torch.randint(NUM_DIGITS, (count,), generator=rng)
    chosen = NUM_DIGITS * torch.randint(len(fonts), (count,), generator=rng) + digits
    matrices = affine_matrices(count, rng, rotate=15, translate=0.08, scale=0.2, shear=20)
    parts = zip(chosen.split(5_000), matrices.split(5_000), strict=True)
    data = torch.cat([warp(glyphs[i].unsqueeze(1), m).squeeze(1).round().byte() for i, m in parts])
    return SimpleNamespace(data=data, targets=digits)


def render(font, digit):
    """A digit in the middle of an image, light on dark: float32 (28, 28), 0 to 255."""
    image = Image.new("L", (SIDE, SIDE))
    face = ImageFont.truetype(str(font), 24)
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), str(digit), 255, face, anchor="mm")
    return torch.from_numpy(np.array(image, dtype=np.float32))
