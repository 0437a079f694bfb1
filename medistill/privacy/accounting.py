r"""Epsilon of a composition of Gaussian mechanisms, one patient added or removed.

Without sampling there is nothing to approximate: several Gaussians are one of
:math:`1/\sigma^2 = \sum_i 1/\sigma_i^2`, and its

.. math:: \delta(\varepsilon) = \Phi\big(\tfrac{1}{2\sigma} - \varepsilon\sigma\big)
    - e^\varepsilon \Phi\big(-\tfrac{1}{2\sigma} - \varepsilon\sigma\big)

is exact. With Poisson sampling of patients the smallest of several valid upper bounds is taken: privacy loss
distributions (dp-accounting), privacy random variables and Rényi divergences (Opacus), and the exact value without
the help of sampling, which is always there. Gaussian differential privacy ("GDP") is no such bound for sampled
mechanisms: it reports too little.

References:
    Balle & Wang 2018, arXiv:1805.06530 (the formula); Gopi et al. 2021, arXiv:2106.02848 (PRV); Doroshenko et al.
    2022, arXiv:2207.04380 (PLD); Mironov et al. 2019, arXiv:1908.10530 (RDP).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy.special import log_ndtr

from medistill.core.guarantee import MOST_QUERIES, MOST_RUNS
from medistill.errors import PrivacyError
from medistill.privacy.accountants import LIBRARIES, PROCESSES, Stopped
from medistill.privacy.selection import stretch

#: Noise multipliers outside this range are refused: accountants hang, or answer nonsense.
NOISE_RANGE = (0.01, 1e5)
#: Epsilon beyond which there is no guarantee to speak of.
LARGEST_EPSILON = 100.0
#: Accountant that needs no library.
CLOSED_FORM = "analytic gaussian"
ACCOUNTANTS = (CLOSED_FORM, *LIBRARIES)
#: Longest time for each accountant, in seconds.
PATIENCE = 60.0
_SILLY = 0.99
_LEAST_DELTA = 1e-300


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Gaussian noise on sums of clipped rows, ``count`` times.

    Args:
        noise_multiplier: Standard deviation of the noise over the l2 sensitivity, in ``[0.01, 1e5]``.
        sampling_rate: Probability with which each patient takes part, in ``(0, 1]``.
        count: How often, 1 to a million.

    Raises:
        PrivacyError: If a value is outside its range or not a number.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        low, high = NOISE_RANGE
        if not _between(low, self.noise_multiplier, high):
            raise PrivacyError(
                f"Expected a noise multiplier in [{low}, {high:g}], got {self.noise_multiplier!r}. "
                "Less noise protects nobody, and more leaves nothing."
            )
        if not (_between(0.0, self.sampling_rate, 1.0) and self.sampling_rate > 0):
            raise PrivacyError(f"Expected a sampling rate in (0, 1], got {self.sampling_rate!r}.")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MOST_QUERIES:
            raise PrivacyError(f"Expected a count of 1 to {MOST_QUERIES}, got {self.count!r}.")

    @property
    def sentence(self) -> str:
        """In a few words."""
        rate = f", each patient sampled at rate {self.sampling_rate:g}" if self.sampling_rate < 1 else ""
        return f"{self.count} x Gaussian, noise multiplier {self.noise_multiplier:.6g}{rate}"


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The best of a random number of runs, see :mod:`medistill.privacy.selection`.

    Args:
        mechanisms: What one run does.
        expected_runs: Mean number of runs, above 1.

    Raises:
        PrivacyError: If patients are sampled, or a value is out of range.
    """

    mechanisms: tuple[Mechanism, ...]
    expected_runs: float

    def __post_init__(self) -> None:
        if not self.mechanisms or any(one.sampling_rate < 1 for one in self.mechanisms):
            raise PrivacyError(
                "The best of several runs can be kept where every query takes all patients; here they are "
                "sampled. Take another method, or one run."
            )
        if not (_between(1.0, self.expected_runs, MOST_RUNS) and self.expected_runs > 1):
            raise PrivacyError(f"Expected above 1 and at most {MOST_RUNS:g} runs, got {self.expected_runs!r}.")

    @property
    def noise_multiplier(self) -> float:
        """Of all mechanisms of one run together."""
        return _single(self.mechanisms)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The smallest valid upper bound of epsilon.

    Args:
        epsilon: The bound.
        delta: At this delta.
        answers: What each accountant that gave a valid answer gave, the smallest first.
        silent: Why the others gave none.
    """

    epsilon: float
    delta: float
    answers: Mapping[str, float]
    silent: Mapping[str, str]

    @property
    def accountants(self) -> tuple[str, ...]:
        """Accountants with a valid answer; the first gave the bound."""
        return tuple(self.answers)


def epsilon_of(
    mechanisms: Sequence[Mechanism | Selected],
    delta: float,
    *,
    accountants: Sequence[str] = ACCOUNTANTS,
    seconds: float = PATIENCE,
) -> Bound:
    """Smallest valid upper bound of epsilon of several mechanisms together.

    A selection divides delta by its number of runs and adds to epsilon; what is left is that of its mechanisms.

    Args:
        mechanisms: What is done, in any order; which one comes next may depend on what the others gave.
        delta: In ``(0, 1)``.
        accountants: Which to ask; libraries are asked only if patients are sampled, as the closed form is exact
            otherwise. The closed form is always there.
        seconds: Longest time for each.

    Raises:
        PrivacyError: If an argument is out of range, or epsilon is above 100.
    """
    check_delta(delta)
    selections = [one for one in mechanisms if isinstance(one, Selected)]
    merged = _merged([one for each in mechanisms for one in _parts(each)])
    added = math.fsum(stretch(one.expected_runs, one.noise_multiplier) for one in selections)
    at, delta = delta, delta / math.prod(one.expected_runs for one in selections)
    if delta < _LEAST_DELTA:
        raise PrivacyError("So many selections leave nothing of delta: expected fewer, or fewer runs of each.")
    answers, silent = {CLOSED_FORM: analytic_epsilon(_single(merged), delta)}, {}
    least = max(_at_least(one, delta) for one in merged)
    for name in accountants if any(one.sampling_rate < 1 for one in merged) else ():
        if name == CLOSED_FORM:
            continue
        try:
            answer = _asked(name, tuple(merged), delta, seconds)
            floor = max(least, _SILLY * answers.get("pld", 0.0))
            if not floor <= answer < math.inf:
                raise Stopped(f"discarded: {answer:.3g} cannot be")
            answers[name] = answer
        except Stopped as error:
            silent[name] = str(error)
    ranked = {name: answer + added for name, answer in sorted(answers.items(), key=lambda item: item[1])}
    epsilon = next(iter(ranked.values()))
    if epsilon > LARGEST_EPSILON:
        raise PrivacyError(
            f"Epsilon is above {LARGEST_EPSILON:g}, which protects nobody: raise the noise, or ask less often."
        )
    return Bound(epsilon=epsilon, delta=at, answers=ranked, silent=silent)


def check_delta(delta: float) -> None:
    """Refuse a delta outside ``(0, 1)``.

    Raises:
        PrivacyError: If it is.
    """
    if not (_between(0.0, delta, 1.0) and 0 < delta < 1):
        raise PrivacyError(f"Expected delta in (0, 1), got {delta!r}.")


def analytic_delta(noise_multiplier: float, epsilon: float) -> float:
    """Exact delta of one Gaussian without sampling.

    Args:
        noise_multiplier: Positive.
        epsilon: At least 0.
    """
    half, moved = 0.5 / noise_multiplier, epsilon * noise_multiplier
    first, second = float(log_ndtr(half - moved)), float(log_ndtr(-half - moved))
    ratio = epsilon + second - first  # of the two terms, as a logarithm; below 0 but for rounding
    return 0.0 if ratio >= 0 else math.exp(first) * -math.expm1(ratio)


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    """Smallest epsilon of one Gaussian without sampling, rounded up in the last digits.

    Args:
        noise_multiplier: Positive.
        delta: In ``(0, 1)``.
    """
    if analytic_delta(noise_multiplier, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while analytic_delta(noise_multiplier, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if analytic_delta(noise_multiplier, middle) > delta else (low, middle)
    return high * (1 + 1e-9)


def analytic_noise(epsilon: float, delta: float) -> float:
    """Least noise multiplier of one Gaussian without sampling, rounded up in the last digits.

    Args:
        epsilon: Positive.
        delta: In ``(0, 1)``.
    """
    low, high = 1e-3, 1.0
    while analytic_delta(high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if analytic_delta(middle, epsilon) > delta else (low, middle)
    return high * (1 + 1e-9)


def _parts(one: Mechanism | Selected) -> tuple[Mechanism, ...]:
    return one.mechanisms if isinstance(one, Selected) else (one,)


def _merged(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """The same composition in as few mechanisms as possible: unsampled Gaussians are one."""
    if not mechanisms:
        raise PrivacyError("Expected at least one mechanism.")
    counts: Counter[tuple[float, float]] = Counter()
    for one in mechanisms:
        counts[one.noise_multiplier, one.sampling_rate] += one.count
    if counts.total() > MOST_QUERIES:
        raise PrivacyError(f"Expected at most {MOST_QUERIES} queries in all, got {counts.total()}.")
    sampled = [
        Mechanism(noise_multiplier=sigma, sampling_rate=rate, count=count)
        for (sigma, rate), count in counts.items()
        if rate < 1
    ]
    precision = sum(count / sigma**2 for (sigma, rate), count in counts.items() if rate >= 1)
    if not precision:
        return sampled
    together = 1 / math.sqrt(precision)
    if together < NOISE_RANGE[0]:
        raise PrivacyError("Epsilon is above 100, which protects nobody: raise the noise, or ask less often.")
    return [Mechanism(noise_multiplier=together), *sampled]


def _single(mechanisms: Sequence[Mechanism]) -> float:
    """Noise multiplier of the one Gaussian that all are together if nobody is left out."""
    return 1 / math.sqrt(sum(one.count / one.noise_multiplier**2 for one in mechanisms))


def _at_least(one: Mechanism, delta: float) -> float:
    """What a mechanism loses when it is used once: no valid bound of the whole is below it."""
    rate = one.sampling_rate
    if delta >= rate:
        return 0.0
    whole = analytic_epsilon(one.noise_multiplier, delta / rate)
    if whole > LARGEST_EPSILON:
        return whole + math.log(rate) - 1e-6
    return math.log1p(rate * math.expm1(whole)) * (1 - 1e-6)


@lru_cache(maxsize=256)  # a reservation and its statement ask again for what calibration has just asked for
def _asked(name: str, mechanisms: tuple[Mechanism, ...], delta: float, seconds: float) -> float:
    if name not in LIBRARIES:
        raise PrivacyError(f"Unknown accountant {name!r}. Known: {', '.join(ACCOUNTANTS)}.")
    gaussians = [(one.noise_multiplier, one.sampling_rate, one.count) for one in mechanisms]
    return PROCESSES[LIBRARIES[name]].ask(name, gaussians, delta, seconds)


def _between(low: float, value: object, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
