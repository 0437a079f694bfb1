"""Two training sets judged on the same patients: their difference, its interval, and whether it is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from medistill.evaluate.metrics import Floats


def bootstrap_p_value(draws: Floats) -> float:
    """Two-sided p-value of no difference, from bootstrap draws of a difference.

    Twice the smaller share of draws on one side of 0, with one added above and below so that it is never 0.

    Args:
        draws: Shape ``(b,)``; draws that are not finite do not count.

    Returns:
        In ``(0, 1]``.
    """
    usable = draws[np.isfinite(draws)]
    below, above = (usable <= 0).sum(), (usable >= 0).sum()
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(usable))))


def delong_p_value(
    first: Sequence[Floats], second: Sequence[Floats], positive: NDArray[np.bool_], patients: Sequence[str]
) -> float:
    r"""Two-sided p-value of equal AUROC, averaged over networks, with the images of a patient as one cluster.

    DeLong's structural components (DeLong et al. 1988) with the variance for clustered data of Obuchowski 1997;
    where every patient has one image it is DeLong's.

    Args:
        first: Scores of each network of the first training set, each of shape ``(n,)``.
        second: The same of the second.
        positive: Shape ``(n,)``.
        patients: Pseudonym of each image's patient, length ``n``.

    Returns:
        In ``[0, 1]``; ``nan`` where one class is absent or has one patient only.
    """
    others = _components(first, positive)
    parts = [one - other for one, other in zip(_components(second, positive), others, strict=True)]
    variance = _clustered_variance(parts[0], parts[1], positive, patients)
    difference = float(parts[0].mean()) if len(parts[0]) else math.nan
    if not math.isfinite(variance):
        return math.nan
    if variance <= 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / math.sqrt(2 * variance))


def _components(scores: Sequence[Floats], positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Of every positive image the share of negatives below it, of every negative the share of positives above."""
    above, below = [], []
    for one in scores:
        ranks = rankdata(one)
        here, there = ranks[positive], ranks[~positive]
        above.append((here - rankdata(one[positive])) / max(1, len(there)))
        below.append(1 - (there - rankdata(one[~positive])) / max(1, len(here)))
    return np.mean(above, axis=0), np.mean(below, axis=0)


def _clustered_variance(
    of_positive: Floats, of_negative: Floats, positive: NDArray[np.bool_], patients: Sequence[str]
) -> float:
    m, n = len(of_positive), len(of_negative)
    names, cluster = np.unique(np.asarray(patients), return_inverse=True)
    of_clusters = len(names)
    with_positive = len(np.unique(cluster[positive]))
    with_negative = len(np.unique(cluster[~positive]))
    if min(with_positive, with_negative) < 2:
        return math.nan
    value = of_positive.mean()
    x = np.bincount(cluster[positive], weights=of_positive - value, minlength=of_clusters)
    y = np.bincount(cluster[~positive], weights=of_negative - value, minlength=of_clusters)
    s10 = with_positive / ((with_positive - 1) * m) * (x**2).sum()
    s01 = with_negative / ((with_negative - 1) * n) * (y**2).sum()
    s11 = of_clusters / (of_clusters - 1) * (x * y).sum()
    return float(s10 / m + s01 / n + 2 * s11 / (m * n))
