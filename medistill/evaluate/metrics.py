"""Diagnostic metrics under image weights, many weightings at once.

A weighting is one row of ``weights``: all ones for the plain metric, or the multiplicities of a bootstrap draw.
Metrics of more than two classes are macro averages of one class against the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METRICS = ("auroc", "diagnostic_sensitivity", "specificity", "harmonic_mean", "balanced_accuracy")


def weighted_auroc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    r"""Area under the ROC curve for every weighting.

    .. math:: \frac{\sum_{i \in +, j \in -} w_i w_j ([s_i > s_j] + \tfrac12 [s_i = s_j])}
              {\sum_{i \in +} w_i \sum_{j \in -} w_j}

    Args:
        scores: Shape ``(n,)``; higher means more likely positive.
        positive: Shape ``(n,)``.
        weights: Shape ``(b, n)``, not negative.

    Returns:
        Shape ``(b,)`` in ``[0, 1]``, higher is better; ``nan`` where a class has no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sorted_weights = weights[:, order]
    on_positive = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    on_negative = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(on_negative, axis=1) - 0.5 * on_negative
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = (on_positive * below).sum(1) / (on_positive.sum(1) * on_negative.sum(1))
    return area


def _rate(hit: NDArray[np.bool_], among: NDArray[np.bool_], weights: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        rate: Floats = (weights @ (hit & among)) / (weights @ among.astype(float))
    return rate


def diagnostic_metrics(
    probabilities: Floats, classes: NDArray[np.int64], weights: Floats, *, threshold: float | None
) -> Mapping[str, Floats]:
    r"""All of :data:`METRICS` for every weighting.

    Args:
        probabilities: Shape ``(n, k)``.
        classes: True class of each image, shape ``(n,)``.
        weights: Shape ``(b, n)``.
        threshold: For two classes, the operating point on the positive probability, chosen on other patients;
            ``None`` decides for the most probable class.

    Returns:
        Metric name to shape ``(b,)``. Diagnostic sensitivity is the true-positive rate, specificity the
        true-negative rate, the harmonic mean is :math:`2ab/(a+b)` of the two, and balanced accuracy their mean
        for two classes or the mean recall for more.
    """
    k = probabilities.shape[1]
    if k == 2 and threshold is not None:
        decided = (probabilities[:, 1] >= threshold).astype(np.int64)
    else:
        decided = probabilities.argmax(1)
    labels = [1] if k == 2 else list(range(k))
    true_positive = [_rate(decided == c, classes == c, weights) for c in labels]
    true_negative = [_rate(decided != c, classes != c, weights) for c in labels]
    areas = [weighted_auroc(probabilities[:, c], classes == c, weights) for c in labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sensitivity = np.nanmean(true_positive, axis=0)
        specificity = np.nanmean(true_negative, axis=0)
        auroc = np.nanmean(areas, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        harmonic = np.where(
            sensitivity + specificity > 0, 2 * sensitivity * specificity / (sensitivity + specificity), 0.0
        )
    balanced = (sensitivity + specificity) / 2 if k == 2 else sensitivity
    return {
        "auroc": auroc,
        "diagnostic_sensitivity": sensitivity,
        "specificity": specificity,
        "harmonic_mean": harmonic,
        "balanced_accuracy": balanced,
    }


def operating_point(probabilities: Floats, classes: NDArray[np.int64]) -> float:
    """Threshold on the positive probability with the best balanced accuracy (Youden's index).

    Args:
        probabilities: Shape ``(n, 2)``, of patients who are neither trained on nor tested.
        classes: Shape ``(n,)``.

    Returns:
        The middle between the two scores around the best cut.
    """
    scores = probabilities[:, 1]
    order = np.argsort(-scores, kind="stable")
    positive = (classes == 1)[order]
    gain = np.cumsum(positive) / max(1, positive.sum()) - np.cumsum(~positive) / max(1, (~positive).sum())
    ranked = scores[order]
    last_of_ties = np.r_[ranked[1:] != ranked[:-1], True]
    best = int(np.flatnonzero(last_of_ties)[gain[last_of_ties].argmax()])
    following = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + following) / 2)
