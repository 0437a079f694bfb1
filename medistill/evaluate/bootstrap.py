"""Bootstrap over patients: images of one patient come and go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medistill.core.reports import Estimate

CONFIDENCE = 0.95
#: Metrics that patients drawn twice raise: their draws are moved back by as much as they are too high on average.
_RAISED = ("ece",)


def patient_weights(patients: Sequence[str], *, draws: int, seed: int) -> NDArray[np.float64]:
    """Multiplicity of every image in every bootstrap draw.

    Args:
        patients: Pseudonym of each image's patient, length ``n``.
        draws: Bootstrap draws ``b``; each draws as many patients as there are, with replacement.
        seed: Public seed.

    Returns:
        Shape ``(b, n)``.
    """
    distinct, of_image = np.unique(np.asarray(patients), return_inverse=True)
    generator = np.random.default_rng(seed)
    share = np.full(len(distinct), 1 / len(distinct))
    counts = generator.multinomial(len(distinct), share, size=draws)
    return counts[:, of_image].astype(np.float64)


def percentile_estimate(
    value: float, draws: NDArray[np.float64], *, n: int, limits: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Estimate with a percentile interval; draws without both classes are left out.

    Args:
        value: The plain metric.
        draws: The metric of every bootstrap draw, shape ``(b,)``.
        n: Patients behind it.
        limits: Smallest and largest possible value, the interval where nothing can be estimated.
    """
    usable = draws[np.isfinite(draws)]
    if not len(usable) or not np.isfinite(value):
        return Estimate(value=float("nan"), low=limits[0], high=limits[1], confidence=CONFIDENCE, n=n)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(usable, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high), confidence=CONFIDENCE, n=n)


def over_networks(
    values: Sequence[Mapping[str, NDArray[np.float64]]],
    draws: Sequence[Mapping[str, NDArray[np.float64]]],
    *,
    n: int,
) -> tuple[dict[str, Estimate], dict[str, float]]:
    """Mean over networks of every metric with its interval, and the standard deviation over networks.

    Args:
        values: Per network, metric name to the plain metric, shape ``(1,)``.
        draws: Per network, metric name to the metric of every bootstrap draw, shape ``(b,)``.
        n: Patients behind the interval.
    """
    estimates, deviations = {}, {}
    for metric in values[0]:
        each = np.array([value[metric][0] for value in values])
        per_draw = np.mean([draw[metric] for draw in draws], axis=0)
        if metric in _RAISED:
            per_draw = np.maximum(per_draw - (np.nanmean(per_draw) - each.mean()), 0.0)
        estimates[metric] = percentile_estimate(float(each.mean()), per_draw, n=n)
        deviations[metric] = float(each.std(ddof=1)) if len(each) > 1 else 0.0
    return estimates, deviations
