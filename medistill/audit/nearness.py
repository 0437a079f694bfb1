"""Distances between many images, a block of them at a time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from medistill.audit.attack import Floats
from medistill.core.images import averaged

_AT_ONCE = 1024


def flat_rows(images: Tensor, *, plane: int, solid: int) -> Floats:
    """Images as rows, shape ``(n, d)``.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        plane: Side length to which larger images are averaged.
        solid: The same for volumes.
    """
    return averaged(images, plane=plane, solid=solid).flatten(1).double().numpy()


def projected(space: PCA, images: Tensor, *, plane: int, solid: int) -> Floats:
    """Images in the space of principal components, shape ``(n, components)``.

    Args:
        space: Fitted to :func:`flat_rows`.
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        plane: Side length to which larger images are averaged.
        solid: The same for volumes.
    """
    parts = torch.split(images, _AT_ONCE)
    found: Floats = np.concatenate([space.transform(flat_rows(one, plane=plane, solid=solid)) for one in parts])
    return found


def nearest(points: Floats, others: Floats, *, skip: int = 0) -> tuple[Floats, NDArray[np.intp]]:
    """Distance of every point to the nearest of the others, and which that is.

    Args:
        points: Shape ``(n, d)``.
        others: Shape ``(m, d)``.
        skip: How many of the nearest are passed over, but for the last; 1 where the points are the others.
    """
    distances, places = np.empty(len(points)), np.empty(len(points), dtype=np.intp)
    skip = min(skip, len(others) - 1)
    for start in range(0, len(points), _AT_ONCE):
        squared = _squared(points[start : start + _AT_ONCE], others)
        place = np.argpartition(squared, skip, axis=1)[:, skip]
        places[start : start + _AT_ONCE] = place
        distances[start : start + _AT_ONCE] = np.sqrt(squared[np.arange(len(place)), place])
    return distances, places


def weighted(points: Floats, others: Floats, scale: float, values: Floats) -> Floats:
    """Mean of the others' values, weighted by a Gaussian kernel, at every point.

    Args:
        points: Shape ``(n, d)``.
        others: Shape ``(m, d)``.
        scale: Standard deviation of the kernel.
        values: Shape ``(m, k)``.

    Returns:
        Shape ``(n, k)``.
    """
    found = []
    for start in range(0, len(points), _AT_ONCE):
        squared = _squared(points[start : start + _AT_ONCE], others)
        weights = np.exp((squared.min(1, keepdims=True) - squared) / (2 * scale**2))
        found.append(weights @ values / weights.sum(1, keepdims=True))
    return np.concatenate(found)


def _squared(points: Floats, others: Floats) -> Floats:
    squared: Floats = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)[None]
    return np.maximum(squared, 0.0)
