"""Differentiable augmentation that keeps the label of a radiograph.

Rotation, scale, shift, contrast and brightness. No mirroring: the side of an organ is a finding (situs inversus),
and text markers would be mirrored.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

#: Largest change of each kind: degrees, relative scale, share of the side, relative contrast, brightness.
MAX_ANGLE, MAX_SCALE, MAX_SHIFT, MAX_CONTRAST, MAX_BRIGHTNESS = 15.0, 0.15, 0.10, 0.30, 0.15


def augment(images: Tensor, generator: Generator, *, shared: bool = False) -> Tensor:
    """Randomly changed copies, differentiable with respect to the images.

    Args:
        images: Shape ``(n, c, h, w)`` in ``[0, 1]``.
        generator: Source of the random parameters; on the images' device.
        shared: One draw for the whole batch (the siamese augmentation of Zhao & Bilen 2021, DSA) instead of one
            for each image.

    Returns:
        Images of the same shape; brightness and contrast may leave ``[0, 1]`` slightly.
    """
    n = 1 if shared else len(images)
    draw = torch.rand((7, n), generator=generator, device=images.device).to(images.dtype) * 2 - 1
    angle = draw[0] * math.radians(MAX_ANGLE)
    scale_x, scale_y = (draw[1] * MAX_SCALE).exp(), (draw[2] * MAX_SCALE).exp()
    shift_x, shift_y = draw[3] * 2 * MAX_SHIFT, draw[4] * 2 * MAX_SHIFT  # the grid's side is 2
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * scale_x, -sin * scale_y, shift_x, sin * scale_x, cos * scale_y, shift_y]
    theta = torch.stack(rows, dim=1).view(n, 2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = (draw[5] * MAX_CONTRAST).exp().view(n, 1, 1, 1)
    brightness = (draw[6] * MAX_BRIGHTNESS).view(n, 1, 1, 1)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    return (moved - mean) * contrast + mean + brightness
