"""Views of images: crops drawn at random or taken again from what a release says, tiles, and mirroring."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from medistill.core.distilled import ViewLabels
from medistill.core.task import Task, TaskKind

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


def tile_boxes(per_side: int, axes: int) -> Tensor:
    """Boxes of the tiles that an image is divided into, row after row, shape ``(per_side ** axes, 2 * axes)``."""
    places = torch.cartesian_prod(*[torch.arange(per_side)] * axes).reshape(-1, axes)
    return torch.cat([places, places + 1], dim=1) / per_side


def tiles(images: Tensor, per_side: int) -> Tensor:
    """Every tile of every image in the size of the whole image; differentiable in the images.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        per_side: Tiles along one side; with 1 the images come back as they are.

    Returns:
        The tiles of the first image, then those of the second, and so on.
    """
    if per_side == 1:
        return images
    boxes = tile_boxes(per_side, images.ndim - 2)
    return crop(images.repeat_interleave(len(boxes), dim=0), boxes.repeat(len(images), 1))


def pictures(images: Tensor, views: ViewLabels | None) -> Tensor:
    """What can be seen in the images of a release: the tiles of mosaics, one by one, or else the images.

    Args:
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
        views: Views of the release, if any.

    Returns:
        The tiles of the first image, then those of the second, and so on; shape ``(m * tiles, …)``.
    """
    if views is None or not views.are_tiles:
        return images
    return crop(images.repeat_interleave(len(views), dim=0), views.boxes.transpose(0, 1).flatten(0, 1))


def picture_labels(soft_labels: Tensor, views: ViewLabels | None) -> Tensor:
    """Soft labels of :func:`pictures`, in the same order, shape ``(m * tiles, k)``."""
    if views is None or not views.are_tiles:
        return soft_labels
    return views.soft_labels.transpose(0, 1).flatten(0, 1)


def hardened(soft_labels: Tensor, hard_labels: Tensor, task: Task) -> Tensor:
    """Labels of 0 and 1, shape ``(n, k)``: the class of each image, or of several findings the rounded labels.

    Args:
        soft_labels: Shape ``(n, k)``.
        hard_labels: Class of each image, shape ``(n,)``.
        task: What is diagnosed.
    """
    if task.kind is TaskKind.MULTILABEL:
        return (soft_labels >= 0.5).float()
    return F.one_hot(hard_labels, task.n_classes).float()


def hard_views(views: ViewLabels | None, labels: Tensor) -> ViewLabels | None:
    """Tiles with the hard labels of their whole images, shape ``(m, k)``; ``None`` where views are no tiles."""
    return views.with_labels(labels) if views is not None and views.are_tiles else None


def mosaics(images: Tensor, per_side: int) -> Tensor:
    """The reverse of :func:`tiles`, as far as there is one: images made smaller and laid side by side.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``; ``n`` a multiple of the tiles in an image.
        per_side: Tiles along one side.
    """
    sides, axes = images.shape[2:], images.ndim - 2
    laid = torch.empty(len(images) // per_side**axes, *images.shape[1:])
    for number, box in enumerate(tile_boxes(per_side, axes).tolist()):
        place = [
            slice(round(low * side), round(high * side))
            for low, high, side in zip(box[:axes], box[axes:], sides, strict=True)
        ]
        size = [part.stop - part.start for part in place]
        small = F.interpolate(images[number :: per_side**axes], size=size, mode="area")
        laid[(slice(None), slice(None), *place)] = small
    return laid


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
