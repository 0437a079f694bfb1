"""Copy alarm: does a released image depict one patient far better than it depicts anybody else?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from medistill.core.images import ImageSet, averaged

Floats = NDArray[np.float64]
_NEARLY_ONE = 1 - 1e-6
_FALSE_ALARMS = 0.01


@dataclass(frozen=True, kw_only=True)
class CopySearch:
    """What the search found, one entry per released image.

    Args:
        patients: Best-matching patient of the pool.
        correlation: Correlation with that patient's best image, in ``[-1, 1]``.
        gap: How far the best patient stands out from the second best, as a difference of Fisher's z.
        copies: Whether the match is closer than any seen between images of different people.
        gap_limit: Gap above which a match counts as a copy.
        correlation_limit: Correlation above which a match counts as a copy whatever the gap.
    """

    patients: tuple[str, ...]
    correlation: Floats
    gap: Floats
    copies: NDArray[np.bool_]
    gap_limit: float
    correlation_limit: float


@dataclass(frozen=True, kw_only=True)
class CopyAlarm:
    """Search every released image among all patients' images.

    Images are compared by correlation after reduction to ``side`` pixels, which takes away noise added on top of
    a copy. What two *different* people's images look like is learned from the reference: people outside the pool,
    searched in it the same way. A released image is a copy when its best patient stands out more than for any of
    them, and more than chance allows among so many images. An alarm, never a pass: closeness alone does not
    measure leakage.

    Args:
        side: Side length at which images are compared.
        volume_side: The same for volumes.

    References:
        Ganev & De Cristofaro 2023, arXiv:2312.05114, on what distance to the closest record cannot show.

    Privacy:
        Reads non-released data of the pool and the reference.
    """

    side: int = 32
    volume_side: int = 16

    def within(self, pool: ImageSet, reference: Tensor) -> CopiesWithin:
        """Learn what images of strangers reach, to search for several releases.

        Args:
            pool: Images of all patients that could have been copied, and of others.
            reference: Images of people outside the pool, shape ``(r, c, h, w)``.
        """
        return CopiesWithin(self.normalised, pool, reference)

    def nearest(self, released: Tensor, images: Tensor) -> tuple[list[int], list[float]]:
        """Position of the image that each released one correlates with most, and that correlation."""
        correlation = self.normalised(released) @ self.normalised(images).T
        best = correlation.argmax(1)
        return best.tolist(), correlation.max(1).tolist()

    def normalised(self, images: Tensor) -> Floats:
        """Images as rows of length 1 and mean 0, shape ``(n, d)``."""
        return unit_rows(averaged(images, plane=self.side, solid=self.volume_side).flatten(1).double().numpy())


class CopiesWithin:
    """A pool of patients with what images of strangers reach in it.

    Args:
        described: From images to rows of length 1 and mean 0, whose inner products say how alike images are.
        pool: Images of all patients that could have been copied, and of others.
        reference: Images of people outside the pool, shape ``(r, c, h, w)``.
    """

    def __init__(self, described: Callable[[Tensor], Floats], pool: ImageSet, reference: Tensor) -> None:
        self._described = described
        self._names, of_image = np.unique(np.asarray(pool.patients), return_inverse=True)
        order = np.argsort(of_image, kind="stable")
        self._pool = described(pool.images)[order]
        self._starts = np.flatnonzero(np.r_[True, np.diff(of_image[order]) > 0])
        _, self._usual_best, self._usual_gap = self._match(reference)

    def search(self, released: Tensor) -> CopySearch:
        """Search released images, shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``."""
        best, correlation, gap = self._match(released)
        gap_limit = limit_of_gaps(self._usual_gap, len(released))
        correlation_limit = float((1 + self._usual_best.max()) / 2)
        return CopySearch(
            patients=tuple(str(self._names[i]) for i in best),
            correlation=correlation,
            gap=gap,
            copies=(gap > gap_limit) | (correlation > correlation_limit),
            gap_limit=gap_limit,
            correlation_limit=correlation_limit,
        )

    @property
    def closest_stranger(self) -> float:
        """Largest correlation of an image of strangers with anybody in the pool."""
        return float(self._usual_best.max())

    def chance_of(self, gap: float, searched: int) -> float:
        """Probability that strangers' images reach such a gap in a search; see :func:`limit_of_gaps`."""
        return float(min(1.0, max(1, searched) * np.exp(-gap / max(float(self._usual_gap.mean()), 1e-12))))

    def _match(self, images: Tensor) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Best patient of each image, the correlation with it, and its gap to the second-best patient."""
        correlation = self._described(images) @ self._pool.T
        per_patient = np.maximum.reduceat(correlation, self._starts, axis=1)
        ranked = np.argsort(per_patient, axis=1)
        rows = np.arange(len(images))
        first = per_patient[rows, ranked[:, -1]]
        second = per_patient[rows, ranked[:, -2]]
        z_first, z_second = (np.arctanh(np.clip(c, -_NEARLY_ONE, _NEARLY_ONE)) for c in (first, second))
        return ranked[:, -1], first, z_first - z_second


def unit_rows(rows: Floats) -> Floats:
    """Rows less their mean, of length 1, so that inner products are correlations."""
    rows = rows - rows.mean(1, keepdims=True)
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def limit_of_gaps(usual: Floats, searched: int) -> float:
    """Gap that images of strangers exceed once in a hundred searches.

    The gap between the best two of many has a tail that is nearly exponential, so a small reference tells where
    rare ones lie; where it has seen a larger one, that counts.

    Args:
        usual: Gaps of images of people outside the pool, shape ``(r,)``.
        searched: Images that are searched together.
    """
    return float(max(usual.max(), usual.mean() * np.log(max(1, searched) / _FALSE_ALARMS)))


def source_lift(nearest: set[str], members: set[str], non_members: set[str]) -> tuple[float, float]:
    """Whether the patients nearest to the release are members more often than chance.

    Args:
        nearest: Distinct best-matching patients among members and non-members.
        members: Member patients of the pool.
        non_members: Others.

    Returns:
        The share of members among the nearest, and the exact one-sided p-value (hypergeometric: which patients
        count as members, drawn anew).
    """
    hits = len(nearest & members)
    return hits / max(1, len(nearest)), source_lift_p(hits, len(nearest), len(members), len(non_members))


def source_lift_p(hits: int, nearest: int, members: int, non_members: int) -> float:
    """Probability of as many members among the nearest when who is a member is drawn anew (hypergeometric)."""
    return float(stats.hypergeom.sf(hits - 1, members + non_members, members, nearest))
