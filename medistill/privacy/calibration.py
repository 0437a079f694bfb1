"""From a budget and a plan to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from medistill.core.guarantee import Budget, PrivacyPlan
from medistill.errors import PrivacyError
from medistill.privacy.accounting import (
    ACCOUNTANTS,
    NOISE_RANGE,
    PATIENCE,
    Bound,
    Mechanism,
    Selected,
    analytic_noise,
    epsilon_of,
)

_CLOSE = 0.995
_EVALUATIONS = 60
#: Sampled queries get no less noise than this: below, accountants take long and nobody would call it private.
LEAST_SAMPLED_NOISE = 0.2
_QUICK = 15.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Noise for every query of a plan.

    Args:
        noise_multipliers: One for each entry of the plan's queries.
        bound: Epsilon of the whole plan; at most the budget's.
    """

    noise_multipliers: tuple[float, ...]
    bound: Bound


def mechanisms_of(plan: PrivacyPlan, noise_multipliers: Sequence[float]) -> tuple[Mechanism, ...]:
    """What one run of a plan is to an accountant.

    Args:
        plan: What is asked.
        noise_multipliers: One for each entry of the plan's queries.
    """
    return tuple(
        Mechanism(noise_multiplier=sigma, sampling_rate=query.sampling_rate, count=query.count)
        for query, sigma in zip(plan.queries, noise_multipliers, strict=True)
    )


def whole(plan: PrivacyPlan, noise_multipliers: Sequence[float]) -> tuple[Mechanism | Selected, ...]:
    """What a plan with all its runs is to an accountant; arguments as for :func:`mechanisms_of`.

    Raises:
        PrivacyError: If the best of several runs is to be kept and patients are sampled.
    """
    once = mechanisms_of(plan, noise_multipliers)
    return (Selected(mechanisms=once, expected_runs=plan.expected_runs),) if plan.selects else once


@lru_cache(maxsize=16)  # what was shown before a release is asked for again when it begins
def calibrate(budget: Budget, plan: PrivacyPlan, *, seconds: float = PATIENCE) -> Calibrated:
    """The least noise with which a plan keeps to a budget: its epsilon is never above, and within 1 % below.

    One factor is found; a query gets it times its relative noise. Pure arithmetic: no data is touched. Sampled
    queries get a noise multiplier of at least 0.2, even where the budget would allow less.

    Args:
        budget: What may be spent.
        plan: What will be asked.
        seconds: Longest time for each accountant and evaluation.

    Raises:
        PrivacyError: If the noise would be outside the range in which accountants can be trusted.
    """
    spread = math.sqrt(sum(query.count / query.relative_noise**2 for query in plan.queries))
    enough = analytic_noise(budget.epsilon, budget.delta) * spread  # exact if nobody is left out
    if plan.selects:
        enough = _enough_for_the_best(budget, plan, enough)
    if all(query.sampling_rate == 1 for query in plan.queries):
        return _calibrated(budget, plan, enough, seconds)
    last: Calibrated | None = None
    for accountants in (("pld",), ACCOUNTANTS):
        factor = _least_factor(budget, plan, enough, accountants, seconds)
        last = _calibrated(budget, plan, factor, seconds)
        if last.bound.epsilon >= 0.99 * budget.epsilon or factor <= _floor(plan):
            break
    assert last is not None
    return last


def _calibrated(budget: Budget, plan: PrivacyPlan, factor: float, seconds: float) -> Calibrated:
    bound = epsilon_of(_mechanisms(plan, factor), budget.delta, seconds=seconds)
    while bound.epsilon > budget.epsilon:  # the last digits
        factor *= 1 + 1e-9
        bound = epsilon_of(_mechanisms(plan, factor), budget.delta, seconds=seconds)
    return Calibrated(
        noise_multipliers=tuple(factor * query.relative_noise for query in plan.queries), bound=bound
    )


def _enough_for_the_best(budget: Budget, plan: PrivacyPlan, low: float) -> float:
    """The least factor with which the best of several runs keeps to the budget, to a millionth; low is not."""

    def kept(factor: float) -> bool:
        return epsilon_of(_mechanisms(plan, factor), budget.delta).epsilon <= budget.epsilon

    most = NOISE_RANGE[1] / max(query.relative_noise for query in plan.queries)
    high = min(2 * low, most)
    while high < most and not kept(high):
        low, high = high, min(2 * high, most)
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def _mechanisms(plan: PrivacyPlan, factor: float) -> tuple[Mechanism | Selected, ...]:
    return whole(plan, [factor * query.relative_noise for query in plan.queries])


def _least_factor(
    budget: Budget, plan: PrivacyPlan, enough: float, accountants: Sequence[str], seconds: float
) -> float:
    """The factor returned was seen to keep to the budget, and a little less of it to break it."""

    def epsilon(factor: float) -> float:
        try:
            mechanisms = _mechanisms(plan, factor)
            return epsilon_of(
                mechanisms, budget.delta, accountants=accountants, seconds=min(seconds, _QUICK)
            ).epsilon
        except PrivacyError:
            return math.inf

    least = _floor(plan)
    high, kept = max(enough, least), epsilon(max(enough, least))
    low, broken = high, kept
    while broken <= budget.epsilon:  # from above: little noise is what accountants take long for
        high, kept = low, broken
        if low <= least:
            return low
        low = max(least, low / 2)
        broken = epsilon(low)
    for _ in range(_EVALUATIONS):
        if kept >= _CLOSE * budget.epsilon or high < low * (1 + 1e-6):
            break
        middle = _between(low, high, broken, kept, 0.5 * (1 + _CLOSE) * budget.epsilon)
        found = epsilon(middle)
        if found > budget.epsilon:
            low, broken = middle, found
        else:
            high, kept = middle, found
    return high


def _floor(plan: PrivacyPlan) -> float:
    return LEAST_SAMPLED_NOISE / min(query.relative_noise for query in plan.queries if query.sampling_rate < 1)


def _between(low: float, high: float, broken: float, kept: float, wanted: float) -> float:
    """Where a straight line through two logarithms meets the wanted epsilon, well inside the bracket."""
    share = 0.5
    if math.isfinite(broken) and kept > 0:
        share = math.log(broken / wanted) / math.log(broken / kept)
    return float(low * (high / low) ** min(0.9, max(0.1, share)))
