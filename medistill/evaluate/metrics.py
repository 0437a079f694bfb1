"""Diagnostic metrics under image weights, many weightings at once.

A weighting is one row of ``weights``: all ones for the plain metric, or the multiplicities of a bootstrap draw.
Metrics of more than two classes, and of multilabel tasks, are macro averages of one class against the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from medistill.core.task import TaskKind
from medistill.evaluate.calibration import calibration_error, confidences

Floats = NDArray[np.float64]

METRICS = (
    "auroc",
    "average_precision",
    "diagnostic_sensitivity",
    "specificity",
    "harmonic_mean",
    "balanced_accuracy",
    "ece",
)


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


def weighted_average_precision(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    r"""Average precision for every weighting; ties are taken together.

    .. math:: \sum_t (R_t - R_{t-1}) P_t

    over all thresholds ``t`` from the highest score on, with recall ``R`` and precision ``P``.

    Args:
        scores: Shape ``(n,)``; higher means more likely positive.
        positive: Shape ``(n,)``.
        weights: Shape ``(b, n)``, not negative.

    Returns:
        Shape ``(b,)`` in ``[0, 1]``, higher is better; ``nan`` where the positive class has no weight.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sorted_weights = weights[:, order]
    found = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    taken = np.cumsum(np.add.reduceat(sorted_weights, starts, axis=1), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(taken > 0, np.cumsum(found, axis=1) / taken, 0.0)
        area: Floats = (found * precision).sum(1) / found.sum(1)
    return area


def _rate(hit: NDArray[np.bool_], among: NDArray[np.bool_], weights: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        rate: Floats = (weights @ (hit & among)) / (weights @ among.astype(float))
    return rate


def operating_points(kind: TaskKind, probabilities: Floats, targets: Floats) -> tuple[float, ...]:
    """Thresholds chosen by :func:`operating_point`: one for two classes, one per class of a multilabel task.

    Args:
        kind: Kind of the task.
        probabilities: Shape ``(n, k)``, of patients who are neither trained on nor tested.
        targets: Shape ``(n, k)``.

    Returns:
        Nothing for more than two classes that exclude each other: the most probable one is decided for.
    """
    if kind is TaskKind.MULTICLASS:
        return ()
    if kind is TaskKind.BINARY:
        return (operating_point(probabilities, targets.argmax(1)),)
    return tuple(_best_cut(p, t > 0.5) for p, t in zip(probabilities.T, targets.T, strict=True))


def task_metrics(
    kind: TaskKind, probabilities: Floats, targets: Floats, weights: Floats, *, thresholds: tuple[float, ...]
) -> Mapping[str, Floats]:
    """All of :data:`METRICS` for every weighting, of any kind of task.

    Args:
        kind: Kind of the task.
        probabilities: Shape ``(n, k)``.
        targets: Shape ``(n, k)``, one-hot or multi-hot.
        weights: Shape ``(b, n)``.
        thresholds: From :func:`operating_points`.

    Returns:
        Metric name to shape ``(b,)``, as :func:`diagnostic_metrics`; for a multilabel task means
        over classes, each of them a task of two classes, and the harmonic mean of these means. A class that all
        images show, or none, does not count.
    """
    if kind is not TaskKind.MULTILABEL:
        cut = thresholds[0] if thresholds else None
        return diagnostic_metrics(probabilities, targets.argmax(1), weights, threshold=cut)
    shown = targets > 0.5
    both = np.flatnonzero(shown.any(0) & ~shown.all(0))
    if not len(both):
        return dict.fromkeys(METRICS, np.full(len(weights), np.nan))
    decided = probabilities >= np.asarray(thresholds)
    true_positive = [_rate(decided[:, c], shown[:, c], weights) for c in both]
    true_negative = [_rate(~decided[:, c], ~shown[:, c], weights) for c in both]
    areas = [weighted_auroc(probabilities[:, c], shown[:, c], weights) for c in both]
    precisions = [weighted_average_precision(probabilities[:, c], shown[:, c], weights) for c in both]
    errors = [calibration_error(probabilities[:, c], shown[:, c], weights) for c in both]
    return _averages(true_positive, true_negative, areas, precisions, errors, pairs=True)


def class_aurocs(probabilities: Floats, targets: Floats, weights: Floats) -> Floats:
    """AUROC of every class against the rest for every weighting, shape ``(k, b)``; see :func:`weighted_auroc`."""
    columns = zip(probabilities.T, targets.T, strict=True)
    return np.stack([weighted_auroc(p, t > 0.5, weights) for p, t in columns])


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
        for two classes or the mean recall for more. ``ece`` is the expected calibration error, of the most
        probable class where there are more than two; lower is better.
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
    precisions = [weighted_average_precision(probabilities[:, c], classes == c, weights) for c in labels]
    kind = TaskKind.BINARY if k == 2 else TaskKind.MULTICLASS
    predicted, shown = confidences(kind, probabilities, np.eye(k)[classes])
    errors = [calibration_error(predicted[:, 0], shown[:, 0], weights)]
    return _averages(true_positive, true_negative, areas, precisions, errors, pairs=k == 2)


def _averages(
    true_positive: list[Floats],
    true_negative: list[Floats],
    areas: list[Floats],
    precisions: list[Floats],
    errors: list[Floats],
    *,
    pairs: bool,
) -> Mapping[str, Floats]:
    """Means over classes; ``pairs`` where each class and its absence are two classes of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sensitivity = np.nanmean(true_positive, axis=0)
        specificity = np.nanmean(true_negative, axis=0)
        auroc = np.nanmean(areas, axis=0)
        average_precision = np.nanmean(precisions, axis=0)
        ece = np.nanmean(errors, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        harmonic = np.where(
            sensitivity + specificity > 0, 2 * sensitivity * specificity / (sensitivity + specificity), 0.0
        )
    balanced = (sensitivity + specificity) / 2 if pairs else sensitivity
    return {
        "auroc": auroc,
        "average_precision": average_precision,
        "diagnostic_sensitivity": sensitivity,
        "specificity": specificity,
        "harmonic_mean": harmonic,
        "balanced_accuracy": balanced,
        "ece": ece,
    }


def operating_point(probabilities: Floats, classes: NDArray[np.int64]) -> float:
    """Threshold on the positive probability with the best balanced accuracy (Youden's index).

    Args:
        probabilities: Shape ``(n, 2)``, of patients who are neither trained on nor tested.
        classes: Shape ``(n,)``.

    Returns:
        The middle between the two scores around the best cut.
    """
    return _best_cut(probabilities[:, 1], classes == 1)


def _best_cut(scores: Floats, shown: NDArray[np.bool_]) -> float:
    order = np.argsort(-scores, kind="stable")
    positive = shown[order]
    gain = np.cumsum(positive) / max(1, positive.sum()) - np.cumsum(~positive) / max(1, (~positive).sum())
    ranked = scores[order]
    last_of_ties = np.r_[ranked[1:] != ranked[:-1], True]
    best = int(np.flatnonzero(last_of_ties)[gain[last_of_ties].argmax()])
    following = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + following) / 2)
