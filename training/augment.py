"""Random affine augmentation, and the generators for all randomness in the data."""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def generator(*key):
    """A CPU generator seeded with a hash of the key: `generator(seed, split, epoch, "order")`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Affine(NamedTuple):
    """Limits of a random affine augmentation, similar to torchvision's RandomAffine."""

    degrees: float  # rotation
    translate: float  # shift, as a fraction of the side
    scale: float  # sides divided by 1 - scale to 1 + scale, separately for each axis
    shear: float  # degrees


def affine_matrices(count, affine, rng):
    """Random matrices for `warp`, float32 (count, 2, 3), uniform within the limits of `affine`."""
    angle, shear, scale_x, scale_y, shift_x, shift_y = torch.rand(6, count, generator=rng) * 2 - 1
    angle = angle * math.radians(affine.degrees)
    shear = torch.tan(shear * math.radians(affine.shear))
    scale_x, scale_y = 1 + scale_x * affine.scale, 1 + scale_y * affine.scale
    cos, sin = torch.cos(angle), torch.sin(angle)
    # rotation @ shear @ scale; affine_grid measures shifts in half sides
    x = [cos * scale_x, (cos * shear - sin) * scale_y, 2 * affine.translate * shift_x]
    y = [sin * scale_x, (sin * shear + cos) * scale_y, 2 * affine.translate * shift_y]
    return torch.stack([torch.stack(x, dim=1), torch.stack(y, dim=1)], dim=1)


def warp(images, matrices):
    """Warp float images (B, 1, H, W) by matrices (B, 2, 3) from output to input coordinates."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
