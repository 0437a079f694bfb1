"""Membership by calibrated nearest neighbour (Chen et al. 2020; van Breugel et al. 2023, DOMIAS)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from medistill.core.images import averaged

Floats = NDArray[np.float64]
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class CalibratedNeighbour:
    r"""Is a candidate closer to the release than to other people's images?

    .. math:: s(x) = \log d(x, \text{reference}) - \log d(x, \text{release})

    with :math:`d` the distance to the nearest image in the space of the reference's principal components.
    Dividing by the distance to the reference removes the part that makes ordinary images look close to everything.

    Args:
        components: Principal components, fewer where the reference is small.
        volume_side: Side length to which larger volumes are averaged, for the sake of memory.

    References:
        Chen et al. 2020, arXiv:1909.03935. van Breugel et al. 2023, arXiv:2302.12580.

    Privacy:
        Reads non-released data of the reference and the candidates.
    """

    components: int = 50
    volume_side: int = 32

    def score(self, released: Tensor, candidates: Tensor, reference: Tensor) -> Floats:
        """Score every candidate image without being told who is a member.

        Args:
            released: Images of the release, shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
            candidates: Shape ``(n, c, h, w)``, or that of volumes.
            reference: Images of patients who are neither members nor candidates, shape ``(r, c, h, w)``.

        Returns:
            Shape ``(n,)``; higher means more likely a member.
        """
        flat = [self._flat(images) for images in (released, candidates, reference)]
        count = min(self.components, len(flat[2]) - 1, flat[2].shape[1])
        space = PCA(n_components=count, svd_solver="randomized", random_state=0).fit(flat[2])
        near, who, other = (space.transform(images) for images in flat)
        to_release = nearest_distance(who, near)
        to_reference = nearest_distance(who, other)
        score: Floats = np.log(to_reference + _FLOOR) - np.log(to_release + _FLOOR)
        return score

    def _flat(self, images: Tensor) -> Floats:
        small = averaged(images, plane=images.shape[-1], solid=self.volume_side)
        return small.flatten(1).double().numpy()


def nearest_distance(points: Floats, others: Floats) -> Floats:
    """Euclidean distance of every point to the nearest of the others, shape ``(n,)``."""
    squared = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)[None]
    distance: Floats = np.sqrt(np.maximum(squared.min(1), 0.0))
    return distance
