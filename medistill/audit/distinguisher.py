r"""Telling two cohorts apart by a mechanism's answers, and what epsilon is at least if that succeeds too often."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from medistill.audit.statistics import clopper_pearson
from medistill.audit.worst_case import CROWD, Mechanism, neighbours
from medistill.core.guarantee import PrivacyPlan
from medistill.core.images import ImageSet
from medistill.privacy.accounting import LARGEST_EPSILON, analytic_epsilon, analytic_noise
from medistill.progress import Progress

Floats = NDArray[np.float64]
Counts = NDArray[np.float64] | NDArray[np.int64]

#: Runs for each of two cohorts: of a correct mechanism, about 0.93 of a claim of 1 and 0.97 of one of 3 are seen.
RUNS = 200_000
_SCORES = 2
_FEWEST, _MOST_NUMBERS, _PART = 2000, 10**7, 10**6
_LEVELS = 120
_CHOOSING = 1 - 1e-5  # so sure that no rule is chosen for a few lucky runs in a tail
_UNFAVOURABLE = 0.6  # of both rates, in standard deviations: together worse than in four of five audits


@dataclass(frozen=True, kw_only=True)
class Event:
    """How often something was seen that speaks for one cohort and against its neighbour.

    Args:
        true_positives: Runs of the one cohort in which it was seen.
        false_positives: Runs of the other.
        trials: Runs of each.
    """

    true_positives: int
    false_positives: int
    trials: int

    def epsilon(self, delta: float, confidence: float) -> float:
        """Lower bound of epsilon, whatever the mechanism."""
        return _direct(*self._limits(confidence), delta)

    def gaussian_epsilon(self, delta: float, confidence: float) -> float:
        """Lower bound of epsilon of a mechanism that is a Gaussian."""
        low, high = self._limits(confidence)
        return gaussian_epsilon(float(special.ndtri(low) - special.ndtri(high)), delta)

    def _limits(self, confidence: float) -> tuple[float, float]:
        hits = (self.true_positives, self.false_positives)
        low, high = (clopper_pearson(count, self.trials, confidence=confidence) for count in hits)
        return low.low, high.high


def _direct(low: float, high: float, delta: float) -> float:
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of two Gaussians ``mu`` standard deviations apart; 0 where they are not."""
    return analytic_epsilon(1 / mu, delta) if mu > 1e-6 else 0.0


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """What epsilon is at least.

    Args:
        epsilon: The largest of the bounds that hold for this mechanism.
        direct: Largest bound that holds for every mechanism.
        gaussian: Largest bound that holds for Gaussians.
        events: What was counted, for each score.
    """

    epsilon: float
    direct: float
    gaussian: float
    events: tuple[Event, ...]


Score = Callable[[tuple[Tensor, ...]], Floats]


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What the attacker chose: a pair of cohorts, a score, and when the score speaks for the patient."""

    pair: int
    score: Score
    threshold: float
    present: bool
    worth: float

    def event(self, without: tuple[Tensor, ...], with_: tuple[Tensor, ...]) -> Event:
        above = [int((self.score(answers) >= self.threshold).sum()) for answers in (without, with_)]
        trials = len(without[0])
        true, false = (above[1], above[0]) if self.present else (trials - above[0], trials - above[1])
        return Event(true_positives=true, false_positives=false, trials=trials)


def lower_bound(
    mechanism: Mechanism,
    *,
    delta: float,
    runs: int = RUNS,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> LowerBound:
    """What epsilon of a mechanism is at least, on worst-case cohorts.

    Args:
        mechanism: What is audited.
        delta: Of the claim.
        runs: For each cohort; fewer for plans of many queries. Half of them choose, the other half count.
        confidence: With which the bound holds.
        progress: Shows how far it is.
    """
    progress = progress or Progress()
    half, each = affordable(mechanism.plan, runs) // 2, each_score(confidence)
    gaussian = unsampled(mechanism.plan)
    chosen: dict[str, _Rule] = {}
    for number, pair in enumerate(progress.track(neighbours(), "auditing the mechanism")):
        without, with_ = (_collected(mechanism, cohort, half) for cohort in pair)
        for name, score in _scores(mechanism, without, with_):
            rule = _best_rule(number, score, without, with_, delta=delta, gaussian=gaussian)
            chosen[name] = max(rule, chosen.get(name, rule), key=lambda one: one.worth)
    fresh = {
        number: tuple(_collected(mechanism, cohort, half) for cohort in neighbours()[number])
        for number in sorted({rule.pair for rule in chosen.values()})
    }
    events = tuple(rule.event(*fresh[rule.pair]) for rule in chosen.values())
    direct = max(event.epsilon(delta, each) for event in events)
    of_gaussian = max(event.gaussian_epsilon(delta, each) for event in events)
    epsilon = max(direct, of_gaussian) if gaussian else direct
    return LowerBound(epsilon=epsilon, direct=direct, gaussian=of_gaussian, events=events)


def p_value(events: tuple[Event, ...], claim: float, delta: float, *, gaussian: bool) -> float:
    """Probability, at most, of events that speak as much against a claim that holds."""

    def above(event: Event, confidence: float) -> bool:
        bounds = [event.epsilon(delta, confidence)]
        bounds += [event.gaussian_epsilon(delta, confidence)] if gaussian else []
        return max(bounds) > claim

    smallest = 1.0
    for event in events:
        low, high = -30.0, 0.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if above(event, 1 - 10**middle) else (middle, high)
        smallest = min(smallest, 10**high)
    return min(1.0, len(events) * smallest)


def each_score(confidence: float) -> float:
    """Confidence of one score's bound, if all scores' bounds are to hold together."""
    return 1 - (1 - confidence) / _SCORES


def unsampled(plan: PrivacyPlan) -> bool:
    """Whether nobody is ever left out, so that all answers together are one Gaussian."""
    return all(query.sampling_rate == 1 for query in plan.queries)


def affordable(plan: PrivacyPlan, runs: int) -> int:
    """Runs that take some seconds: fewer for plans of many queries, but never too few to count."""
    numbers = plan.total * (2 if unsampled(plan) else 3 + CROWD)
    return max(_FEWEST, min(runs, int(_MOST_NUMBERS // numbers)))


def _collected(mechanism: Mechanism, cohort: ImageSet, runs: int) -> tuple[Tensor, ...]:
    """Answers of many runs; some runs at a time, for the sake of memory."""
    part = max(1, _PART // (mechanism.plan.total * (CROWD + 1)))
    sizes = [min(part, runs - first) for first in range(0, runs, part)]
    parts = [mechanism.answers(cohort, size) for size in sizes]
    return tuple(torch.cat(entry) for entry in zip(*parts, strict=True))


def _scores(
    mechanism: Mechanism, without: tuple[Tensor, ...], with_: tuple[Tensor, ...]
) -> list[tuple[str, Score]]:
    """The linear score, and likelihood ratios with and without the mixture that declared sampling leads to."""
    rates = [query.sampling_rate for query in mechanism.plan.queries]
    weights = [rate / noise**2 for rate, noise in zip(rates, mechanism.noise_multipliers, strict=True)]

    def linear(answers: tuple[Tensor, ...]) -> Floats:
        of_entries = (weight * entry[..., 0].sum(1) for weight, entry in zip(weights, answers, strict=True))
        return _added(of_entries)

    def fitted(rates: list[float]) -> Score:
        entries = zip(without, with_, rates, mechanism.noise_multipliers, strict=True)
        fits = [_Fit.of(*entry) for entry in entries]
        return lambda answers: _added(
            fit.log_ratio(entry).sum(1) for fit, entry in zip(fits, answers, strict=True)
        )

    scores = [("linear", linear), ("likelihood ratio", fitted([1.0] * len(rates)))]
    return scores if unsampled(mechanism.plan) else [*scores, ("likelihood ratio", fitted(rates))]


def _added(of_entries: Iterable[Tensor]) -> Floats:
    total: Floats = torch.stack(list(of_entries)).sum(0).numpy()
    return total


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Answers as a Gaussian without the patient, and as one of two Gaussians with the patient, by the rate."""

    means: tuple[Tensor, Tensor]
    variances: tuple[Tensor, Tensor]
    rate: float

    @classmethod
    def of(cls, without: Tensor, with_: Tensor, rate: float, noise: float) -> _Fit:
        without, with_ = without.flatten(0, 1), with_.flatten(0, 1)
        mean, variance = without.mean(0), without.var(0, correction=0).clamp_min(1e-12 * noise**2)
        moved = mean + (with_.mean(0) - mean) / rate
        inside = with_.var(0, correction=0) - rate * (1 - rate) * (moved - mean).square()
        other = (variance + (inside - variance) / rate).clamp(1e-3 * variance, 1e3 * variance)
        return cls(means=(mean, moved), variances=(variance, other), rate=rate)

    def log_ratio(self, answers: Tensor) -> Tensor:
        without, with_ = (
            -0.5 * ((answers - mean).square() / variance + variance.log()).sum(-1)
            for mean, variance in zip(self.means, self.variances, strict=True)
        )
        if self.rate >= 1:
            return with_ - without
        left_out = torch.full_like(without, math.log1p(-self.rate))
        return torch.logaddexp(left_out, math.log(self.rate) + with_ - without)


def _best_rule(
    pair: int,
    score: Score,
    without: tuple[Tensor, ...],
    with_: tuple[Tensor, ...],
    *,
    delta: float,
    gaussian: bool,
) -> _Rule:
    """The threshold, and what a score above it speaks for, that promise the largest bound."""
    scores = [np.sort(score(answers)) for answers in (without, with_)]
    tails = np.geomspace(1 / len(scores[0]), 0.5, _LEVELS // 2)
    thresholds = np.unique(np.quantile(np.concatenate(scores), np.r_[tails, 1 - tails]))
    absent, there = (len(one) - np.searchsorted(one, thresholds) for one in scores)
    trials, tail = len(scores[0]), (1 - _CHOOSING) / 2
    rules = []
    for present, true, false in ((True, there, absent), (False, trials - absent, trials - there)):
        low, high = limits(true, false, trials, tail)
        apart = special.ndtri(low) - special.ndtri(high)
        for i in {int(np.argmax((low - delta) / high)), int(np.argmax(apart))}:
            worth = _direct(float(low[i]), float(high[i]), delta)
            worth = max(worth, gaussian_epsilon(float(apart[i]), delta)) if gaussian else worth
            threshold = float(thresholds[i])
            rules.append(_Rule(pair=pair, score=score, threshold=threshold, present=present, worth=worth))
    return max(rules, key=lambda one: one.worth)


def limits(true: Counts, false: Counts, trials: int, tail: float) -> tuple[Floats, Floats]:
    """Low end of true-positive rates and high end of false-positive rates, for many counts at once."""
    low = special.betaincinv(np.maximum(true, 1e-9), trials - true + 1, tail)
    high = special.betainccinv(false + 1, np.maximum(trials - false, 1e-9), tail)
    return np.where(true > 0, low, 0.0), np.where(false < trials, high, 1.0)


def detectable_epsilon(claim: float, *, delta: float, trials: int, confidence: float, gaussian: bool) -> float:
    """Smallest epsilon of a Gaussian whose bound would be above the claim in four of five audits; 100 at most.

    Args:
        claim: The claimed epsilon.
        delta: Its delta.
        trials: Runs counted for each cohort.
        confidence: Of one score's bound.
        gaussian: Whether the form for Gaussians is used.
    """
    grid = np.linspace(-8.0, 8.0, 801)

    def shown(mu: float) -> float:
        true, false = (
            trials * rate - side * _UNFAVOURABLE * np.sqrt(trials * rate * (1 - rate))
            for side, rate in ((1, special.ndtr(mu - grid)), (-1, special.ndtr(-grid)))
        )
        low, high = limits(true.clip(0), false.clip(0, trials), trials, (1 - confidence) / 2)
        direct = float(np.log(np.maximum((low - delta) / high, 1.0)).max())
        if not gaussian:
            return direct
        return max(direct, gaussian_epsilon(float((special.ndtri(low) - special.ndtri(high)).max()), delta))

    low, high = 1 / analytic_noise(claim, delta), 1 / analytic_noise(LARGEST_EPSILON, delta)
    if shown(high) <= claim:
        return LARGEST_EPSILON
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) > claim else (middle, high)
    return gaussian_epsilon(high, delta)
