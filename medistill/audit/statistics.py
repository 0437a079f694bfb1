"""From attack scores to rates, intervals and p-values. One row per patient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medistill.core.reports import Estimate
from medistill.errors import DataError

Floats = NDArray[np.float64]


def per_patient(scores: Floats, patients: Sequence[str]) -> Floats:
    """Mean score of each patient's images, in the order of sorted pseudonyms."""
    distinct, of_image = np.unique(np.asarray(patients), return_inverse=True)
    total = np.bincount(of_image, weights=scores, minlength=len(distinct))
    mean: Floats = total / np.bincount(of_image, minlength=len(distinct))
    return mean


def _check(members: Floats, non_members: Floats) -> None:
    for name, scores in (("members", members), ("non_members", non_members)):
        if scores.ndim != 1 or not len(scores):
            raise DataError(f"Expected {name} of shape (n,) with n >= 1, got {scores.shape}.")
        if not np.isfinite(scores).all():
            raise DataError(f"Expected finite scores of {name}.")


def auroc(members: Floats, non_members: Floats, *, confidence: float = 0.95) -> Estimate:
    r"""Area under the ROC curve with the interval of DeLong, DeLong & Clarke-Pearson (1988).

    Args:
        members: Scores of member patients, shape ``(m,)``; higher means "more likely a member".
        non_members: Scores of patients never seen, shape ``(n,)``.
        confidence: Coverage of the interval.

    Raises:
        DataError: If a score set is empty, not one-dimensional or not finite.

    Privacy:
        Reads non-released data. The number is a measurement, not a guarantee.

    Example:
        >>> auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])).value
        1.0
    """
    _check(members, non_members)
    m, n = len(members), len(non_members)
    everything = stats.rankdata(np.r_[members, non_members])
    above = (everything[:m] - stats.rankdata(members)) / n
    below = 1 - (everything[m:] - stats.rankdata(non_members)) / m
    value = float(above.mean())
    variance = (above.var(ddof=1) / m if m > 1 else 0.0) + (below.var(ddof=1) / n if n > 1 else 0.0)
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * float(np.sqrt(variance))
    return Estimate(
        value=value, low=max(0.0, value - half), high=min(1.0, value + half), confidence=confidence, n=m + n
    )


def clopper_pearson(hits: int, trials: int, *, confidence: float = 0.95) -> Estimate:
    """Exact binomial interval (Clopper & Pearson 1934)."""
    if not 0 <= hits <= trials or trials < 1:
        raise DataError(f"Expected 0 <= hits <= trials and trials >= 1, got {hits} of {trials}.")
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return Estimate(value=hits / trials, low=low, high=high, confidence=confidence, n=trials)


def tpr_at_fpr(members: Floats, non_members: Floats, *, fpr: float) -> Estimate | None:
    r"""Largest true-positive rate an attacker reaches at a false-positive rate.

    Args:
        members: Scores of member patients, shape ``(m,)``.
        non_members: Scores of patients never seen, shape ``(n,)``.
        fpr: False-positive rate in ``(0, 1)``.

    Returns:
        Estimate with a Clopper-Pearson interval, or ``None`` with fewer than :math:`10 / fpr` non-members.

    Raises:
        DataError: If a score set is empty or ``fpr`` is outside ``(0, 1)``.

    Privacy:
        Reads non-released data. The number is a measurement, not a guarantee.

    References:
        Carlini et al. 2022, arXiv:2112.03570, section 4.
    """
    _check(members, non_members)
    if not 0 < fpr < 1:
        raise DataError(f"Expected fpr in (0, 1), got {fpr}.")
    if len(non_members) < round(10 / fpr):
        return None
    allowed = int(np.floor(fpr * len(non_members)))
    threshold = np.sort(non_members)[::-1][allowed]
    return clopper_pearson(int((members > threshold).sum()), len(members))


def roc(members: Floats, non_members: Floats, *, points: int = 30) -> tuple[tuple[float, float], ...]:
    """False- and true-positive rates, evenly spaced by the logarithm of the false-positive rate.

    Args:
        members: Scores of member patients, shape ``(m,)``.
        non_members: Scores of patients never seen, shape ``(n,)``.
        points: How many.

    Returns:
        From the smallest rate that ten non-members can resolve up to 1.
    """
    _check(members, non_members)
    n = len(non_members)
    order = np.sort(non_members)[::-1]
    curve = []
    for fpr in np.geomspace(min(1.0, 10 / n), 1.0, points):
        allowed = int(np.floor(fpr * n + 1e-9))
        found = 1.0 if allowed >= n else float((members > order[allowed]).mean())
        curve.append((round(float(fpr), 5), round(found, 5)))
    return tuple(curve)


def randomisation_p_value(members: Floats, non_members: Floats, *, draws: int = 10_000, seed: int = 0) -> float:
    """Probability of an AUROC at least as far from 0.5 when membership is drawn anew.

    Redraws which patients count as members, keeping how many there are; two-sided, since an attacker who is
    always wrong turns the score round; never zero (Phipson & Smyth 2010).
    """
    _check(members, non_members)
    ranks = stats.rankdata(np.r_[members, non_members])
    expected = ranks.mean() * len(members)
    observed = abs(ranks[: len(members)].sum() - expected)
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(draws):
        drawn = generator.permutation(ranks)[: len(members)].sum()
        hits += abs(drawn - expected) >= observed - 1e-9
    return (1 + hits) / (1 + draws)


def top_p_value(members: Floats, non_members: Floats, *, share: float) -> float:
    """Probability of as many members among the highest scores when membership is drawn anew.

    Finds a leak that exposes a few patients only, which the AUROC averages away. Exact (hypergeometric).

    Args:
        members: Scores of member patients, shape ``(m,)``.
        non_members: Scores of patients never seen, shape ``(n,)``.
        share: Share of all scores that counts as highest.
    """
    _check(members, non_members)
    total = len(members) + len(non_members)
    highest = max(1, round(share * total))
    order = np.argsort(-np.r_[members, non_members], kind="stable")[:highest]
    return float(stats.hypergeom.sf(int((order < len(members)).sum()) - 1, total, len(members), highest))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that one below ``alpha`` arises by chance at most that often at all.

    References:
        Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def minimum_detectable_auroc(members: int, non_members: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest AUROC told from 0.5 at the level ``alpha`` (two-sided) with a given power.

    Normal approximation of the Mann-Whitney statistic under the null.
    """
    deviation = np.sqrt((members + non_members + 1) / (12 * members * non_members))
    return float(min(1.0, 0.5 + (stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * deviation))
