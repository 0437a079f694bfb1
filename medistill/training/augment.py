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
_PLANE_AXES = 4


def augment(images: Tensor, generator: Generator, *, shared: bool = False) -> Tensor:
    """Randomly changed copies, differentiable with respect to the images.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)`` in ``[0, 1]``; a volume is turned in its planes.
        generator: Source of the random parameters; on the CPU, whatever the device of the images.
        shared: One draw for the whole batch (the siamese augmentation of Zhao & Bilen 2021, DSA) instead of one
            for each image.

    Returns:
        Images of the same shape; brightness and contrast may leave ``[0, 1]`` slightly.
    """
    n, plane = 1 if shared else len(images), images.ndim == _PLANE_AXES
    drawn = torch.rand((7 if plane else 9, n), generator=generator).to(images) * 2 - 1
    angle = drawn[0] * math.radians(MAX_ANGLE)
    scale_x, scale_y = (drawn[1] * MAX_SCALE).exp(), (drawn[2] * MAX_SCALE).exp()
    shift_x, shift_y = drawn[3] * 2 * MAX_SHIFT, drawn[4] * 2 * MAX_SHIFT  # the grid's side is 2
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * scale_x, -sin * scale_y, shift_x, sin * scale_x, cos * scale_y, shift_y]
    if not plane:  # the same in every slice, and the slices themselves closer or further, up or down
        none, scale_z, shift_z = torch.zeros_like(angle), (drawn[7] * MAX_SCALE).exp(), drawn[8] * 2 * MAX_SHIFT
        rows = [*rows[:2], none, rows[2], *rows[3:5], none, rows[5], none, none, scale_z, shift_z]
    axes = images.ndim - 2
    theta = torch.stack(rows, dim=1).view(n, axes, axes + 1).expand(len(images), axes, axes + 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    each = (n, *(1,) * (images.ndim - 1))
    contrast, brightness = (drawn[5] * MAX_CONTRAST).exp().view(each), (drawn[6] * MAX_BRIGHTNESS).view(each)
    mean = moved.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    return (moved - mean) * contrast + mean + brightness
