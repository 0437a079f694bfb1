"""Several smaller images in the place of one (multi-formation, Kim et al. 2022, arXiv:2205.14959, section 3.2).

An image of a release may be a mosaic: cut into tiles, each enlarged to the whole side and with a soft label of its
own, it gives a student several images of lower resolution. At a fixed number of released pixels variety is worth
more than resolution, as neighbouring pixels of a radiograph say nearly the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medistill.core.distilled import ViewLabels
from medistill.core.protocols import Curator, Synthetic
from medistill.distill.start import initial
from medistill.errors import ConfigError
from medistill.training.views import mosaics, picture_labels, tile_boxes


def check_formation(formation: int) -> None:
    """Refuse an impossible number of tiles.

    Raises:
        ConfigError: If it is not 1, 2, 3 or 4.
    """
    if formation not in (1, 2, 3, 4):
        raise ConfigError(f"Expected formation (tiles along one side of an image) 1, 2, 3 or 4, got {formation}.")


def initial_formation(
    curator: Curator, *, formation: int, init: str, ipc: int, seed: int, start: Synthetic | None
) -> Synthetic:
    """As :func:`medistill.distill.start.initial`; a start from real images lays as many side by side as fit."""
    if start is not None or init == "noise" or formation == 1:
        return initial(curator, init=init, ipc=ipc, seed=seed, start=start)
    tiles = formation ** (len(curator.image_shape) - 1)
    first = initial(curator, init=init, ipc=ipc * tiles, seed=seed, start=None)
    images = mosaics(first.images, formation)
    labels = first.soft_labels.view(len(images), tiles, -1)
    return formed(images, labels.flatten(0, 1), first.hard_labels[::tiles], formation=formation)


def labels_of_tiles(synthetic: Synthetic, formation: int) -> Tensor:
    """Soft labels of all tiles, image after image, shape ``(m * tiles, k)``; without such, those of the images."""
    tiles = formation ** (synthetic.images.ndim - 2)
    views = synthetic.views
    if views is not None and views.are_tiles and len(views) == tiles:
        return picture_labels(synthetic.soft_labels, views)
    return synthetic.soft_labels.repeat_interleave(tiles, dim=0)


def formed(images: Tensor, labels: Tensor, hard_labels: Tensor, *, formation: int) -> Synthetic:
    """Mosaics with the labels of their tiles; an image's own soft label is the mean of them.

    Args:
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
        labels: Shape ``(m * tiles, k)``, image after image.
        hard_labels: Shape ``(m,)``.
        formation: Tiles along one side.
    """
    if formation == 1:
        return Synthetic(images=images, soft_labels=labels, hard_labels=hard_labels)
    boxes = tile_boxes(formation, images.ndim - 2)
    by_tile = labels.view(len(images), len(boxes), -1).transpose(0, 1).contiguous()
    views = ViewLabels(
        boxes=boxes[:, None].expand(-1, len(images), -1).contiguous(), soft_labels=by_tile, temperature=1.0
    )
    return Synthetic(images=images, soft_labels=torch.mean(by_tile, 0), hard_labels=hard_labels, views=views)
