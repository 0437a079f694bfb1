"""Membership by calibrated nearest neighbour (Chen et al. 2020; van Breugel et al. 2023, DOMIAS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

from medistill.audit.attack import Exposed, Floats, Guilty
from medistill.audit.statistics import per_patient
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, averaged, joined
from medistill.progress import Progress

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

    threat: ClassVar[str] = "T2"
    question: ClassVar[str] = "Was this patient among those the release was distilled from?"
    guilty_of: ClassVar[str] = "a release of all attacked members' real images"
    wanted: ClassVar[float] = 0.99

    components: int = 50
    volume_side: int = 32

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> Calibrated:
        """Find the principal components of the reference; nobody's membership matters."""
        other = self.flat(reference.images)
        count = min(self.components, len(other) - 1, other.shape[1])
        space = PCA(n_components=count, svd_solver="randomized", random_state=0).fit(other)
        return Calibrated(attack=self, space=space, reference=space.transform(other))

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """All images of all attacked members."""
        return Guilty(
            release=Exposed.of_images(members),
            members=frozenset(members.patients),
            candidates=joined(members, others),
        )

    def flat(self, images: Tensor) -> Floats:
        """Images as rows, volumes averaged, shape ``(n, d)``."""
        small = averaged(images, plane=images.shape[-1], solid=self.volume_side)
        return small.flatten(1).double().numpy()


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The attack with the space in which distances are taken.

    Args:
        attack: Its settings.
        space: Principal components of the reference.
        reference: The reference in that space, shape ``(r, components)``.
    """

    attack: CalibratedNeighbour
    space: PCA
    reference: Floats

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """Mean over each patient's images, shape ``(patients,)``; higher means more likely a member."""
        near, who = (self.space.transform(self.attack.flat(one.images)) for one in (release, candidates))
        to_release, to_reference = nearest_distance(who, near), nearest_distance(who, self.reference)
        return per_patient(np.log(to_reference + _FLOOR) - np.log(to_release + _FLOOR), candidates.patients)


def nearest_distance(points: Floats, others: Floats) -> Floats:
    """Euclidean distance of every point to the nearest of the others, shape ``(n,)``."""
    squared = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)[None]
    distance: Floats = np.sqrt(np.maximum(squared.min(1), 0.0))
    return distance
