"""How far predicted probabilities are from what happens: reliability and the expected calibration error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medistill.core.task import TaskKind

Floats = NDArray[np.float64]
BINS = 15


def confidences(kind: TaskKind, probabilities: Floats, targets: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """What was predicted with which probability, and whether it was so, each of shape ``(n, m)``.

    Two classes: the positive class, ``m = 1``. More that exclude each other: the most probable class, ``m = 1``.
    Several findings: each of them, ``m = k``.

    Args:
        kind: Kind of the task.
        probabilities: Shape ``(n, k)``.
        targets: Shape ``(n, k)``, one-hot or multi-hot.
    """
    if kind is TaskKind.BINARY:
        return probabilities[:, 1:], targets[:, 1:] > 0.5
    if kind is TaskKind.MULTICLASS:
        best = probabilities.argmax(1)
        return probabilities.max(1)[:, None], (targets.argmax(1) == best)[:, None]
    return probabilities, targets > 0.5


def calibration_error(confidence: Floats, shown: NDArray[np.bool_], weights: Floats) -> Floats:
    r"""Expected calibration error over 15 bins of equal width, for every weighting.

    .. math:: \sum_b \frac{|B_b|}{n} \Big| \frac1{|B_b|} \sum_{i \in B_b} (y_i - p_i) \Big|

    Reference: Guo et al. 2017, arXiv 1706.04599, section 2.

    Args:
        confidence: Predicted probabilities ``p``, shape ``(n,)``.
        shown: Whether it was so, ``y``, shape ``(n,)``.
        weights: Shape ``(b, n)``, not negative.

    Returns:
        Shape ``(b,)`` in ``[0, 1]``, lower is better.
    """
    in_bin = _bins(confidence)[:, None] == np.arange(BINS)
    gaps = np.abs(weights @ (in_bin * (shown - confidence)[:, None]))
    with np.errstate(invalid="ignore", divide="ignore"):
        error: Floats = gaps.sum(1) / weights.sum(1)
    return error


def reliability(confidence: Floats, shown: NDArray[np.bool_]) -> tuple[tuple[float, float, float], ...]:
    """Per bin that is not empty: mean prediction, share that was so, share of all predictions.

    Args:
        confidence: Any shape.
        shown: The same shape.
    """
    predicted, happened = confidence.ravel(), shown.ravel()
    bins = _bins(predicted)
    return tuple(
        (float(predicted[here].mean()), float(happened[here].mean()), float(here.mean()))
        for here in (bins == b for b in np.unique(bins))
    )


def _bins(confidence: Floats) -> NDArray[np.intp]:
    return np.minimum((confidence * BINS).astype(np.intp), BINS - 1)
