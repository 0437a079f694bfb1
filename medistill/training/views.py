"""Views of images: crops drawn at random or taken again from what a release says, and mirroring."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

#: Largest ratio of a crop's side to what it would be in a square crop, in both directions.
_MAX_STRETCH = math.sqrt(4 / 3)


def random_boxes(count: int, axes: int, generator: Generator, *, smallest: float) -> Tensor:
    """Boxes of random place, size and proportions, shape ``(count, 2 * axes)``.

    The share of the area (or volume) is uniform in ``[smallest, 1]``, the proportions log-uniform between 3/4 and
    4/3; what would stick out is cut off.

    Args:
        count: Boxes.
        axes: 2 for plane images, 3 for volumes.
        generator: Source of the random numbers, on the CPU.
        smallest: Smallest share of the area.

    Returns:
        Low corner, then high corner, in the order of the image's axes, as shares of the side.
    """
    drawn = torch.rand((count, 2 * axes), generator=generator)
    share = smallest + (1 - smallest) * drawn[:, :1]
    stretch = (drawn[:, 1:axes] * 2 - 1) * math.log(_MAX_STRETCH)
    stretch = torch.cat([stretch, -stretch.sum(1, keepdim=True)], dim=1)
    sides = (share ** (1 / axes) * stretch.exp()).clamp_max(1.0)
    low = drawn[:, axes:] * (1 - sides)
    return torch.cat([low, (low + sides).clamp_max(1.0)], dim=1)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """The part of every image in its box, in the size of the whole image; differentiable in the images.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        boxes: Shape ``(n, 4)`` or ``(n, 6)``, see :func:`random_boxes`.
    """
    corners = boxes.to(images).chunk(2, dim=1)
    low, high = (corner.flip(1) for corner in corners)  # the first axis of a grid is the last of an image
    theta = torch.cat([torch.diag_embed(high - low), (low + high - 1)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mirrored(images: Tensor, generator: Generator) -> Tensor:
    """Every image mirrored left and right, or not, at random; only where the side of an organ is no finding."""
    turned = torch.rand(len(images), *(1,) * (images.ndim - 1), generator=generator) < 0.5
    return torch.where(turned.to(images.device), images.flip(-1), images)
