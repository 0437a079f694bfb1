r"""One-run audit: a lower bound of epsilon from a single run; a smoke test beside the mechanism audit.

Many canaries, each in the cohort by a fair coin of its own, are asked about at once. The attacker guesses the
coins of those with the highest and lowest scores and stays silent about the rest. If :math:`v` of :math:`r`
guesses are right, with :math:`m` canaries, then for an :math:`(\varepsilon, \delta)`-private mechanism that
happens with a probability of at most

.. math:: p = \beta + 2 m \delta \alpha, \qquad \beta = P[B \ge v], \qquad
    \alpha = \max_{1 \le i \le v} \tfrac1i P[v - i \le B < v], \qquad
    B \sim \mathrm{Bin}\Big(r, \tfrac{e^\varepsilon}{1 + e^\varepsilon}\Big)

and the bound is the largest epsilon that this rules out. With 1,000 canaries it shows about a fifth of an epsilon
of 1 and a third of one of 3.

References:
    Steinke, Nasr & Jagielski 2023, arXiv:2305.08846.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from medistill.audit.mechanism import stated_noise
from medistill.audit.worst_case import Mechanism, ask, grey_cohort, throw_away_curator
from medistill.core.guarantee import PrivacyPlan, PrivacyStatement
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.errors import ConfigError, PrivacyError
from medistill.privacy.accounting import LARGEST_EPSILON, check_delta
from medistill.seeds import derive_seed

#: Canaries of an audit; every twentieth is guessed, which can show an epsilon of 3.5 at most.
CANARIES, GUESSED = 2000, 20
_CONTROL_CONFIDENCE = 0.999

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]


def one_run_epsilon(correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Lower bound of epsilon from the guesses of one run.

    Args:
        correct: Guesses that were right.
        guesses: How many were made; fixed beforehand.
        canaries: How many coins were tossed.
        delta: Of the claim.
        confidence: With which the bound holds.

    Returns:
        0 where guessing as well by chance is not ruled out; 100 at most.

    Raises:
        ConfigError: If the counts contradict each other.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise ConfigError(f"Expected 0 <= correct <= guesses <= canaries, got {correct}, {guesses}, {canaries}.")
    low, high = 0.0, LARGEST_EPSILON
    if guess_probability(low, correct, guesses, canaries, delta) > 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        ruled_out = guess_probability(middle, correct, guesses, canaries, delta) <= 1 - confidence
        low, high = (middle, high) if ruled_out else (low, middle)
    return low


def guess_probability(epsilon: float, correct: int, guesses: int, canaries: int, delta: float) -> float:
    """Largest probability of so many right guesses under an epsilon; :math:`p` above, which may exceed 1."""
    right = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    if not correct:
        return 1.0
    just_below = right.pmf(np.arange(correct - 1, -1, -1)).cumsum()  # P[v - i <= B < v] for i from 1 to v
    alpha = float((just_below / np.arange(1, correct + 1)).max())
    return float(right.sf(correct - 1)) + 2 * canaries * delta * alpha


def audit_one_run(
    statement: PrivacyStatement,
    plan: PrivacyPlan,
    *,
    seed: int,
    canaries: int = CANARIES,
    confidence: float = 0.95,
) -> AttackOutcome:
    """Ask the private curator once about canaries, guess which of them are there, and compare with the claim.

    Args:
        statement: What is claimed, and with which noise; see
            :func:`~medistill.audit.mechanism.audit_mechanism`.
        plan: What was asked; it is asked in full.
        seed: Public seed of the coins; the noise is the operating system's.
        canaries: Made-up patients whose rows do not overlap; one in twenty is guessed.
        confidence: With which the bound holds.

    Returns:
        ``FAIL`` where epsilon is shown to be above the claim, ``NOT_ESTIMABLE`` where even guesses that are all
        right could not have shown it.

    Raises:
        PrivacyError: If nothing is claimed.
        ConfigError: If there are fewer than 40 canaries.

    Privacy:
        Reads nothing of any patient: the canaries are made up. A claim that is not contradicted is not proved.
    """
    if not math.isfinite(statement.epsilon):
        raise PrivacyError("No epsilon is claimed, so there is no claim of a mechanism to audit.")
    if canaries < 2 * GUESSED:
        raise ConfigError(f"Expected at least {2 * GUESSED} canaries, got {canaries}.")
    check_delta(statement.delta)
    guesses, claim, delta = 2 * (canaries // (2 * GUESSED)), statement.epsilon, statement.delta

    def bound(right: int) -> float:
        return one_run_epsilon(right, guesses, canaries, delta, confidence)

    mechanism = Mechanism(plan=plan, noise_multipliers=stated_noise(statement, plan))
    coins, others = (fair_coins(canaries, derive_seed(seed, name)) for name in ("coins", "other coins"))
    scores = canary_scores(mechanism, coins)
    right = right_guesses(scores, coins, guesses)
    bare, blind = right_guesses(coins.astype(np.float64), coins, guesses), right_guesses(scores, others, guesses)
    by_chance = one_run_epsilon(blind, guesses, canaries, delta, _CONTROL_CONFIDENCE)
    controls = (
        ControlOutcome(
            name="positive: canaries without noise",
            expected="every guess right",
            observed=f"{bare} of {guesses} right",
            passed=bare == guesses,
        ),
        ControlOutcome(
            name="negative: coins that the answers know nothing of",
            expected=f"a lower bound of at most {claim:.3g}",
            observed=f"{by_chance:.3g}",
            passed=by_chance <= claim,
        ),
    )
    found, most = bound(right), bound(guesses)
    verdict = Verdict.FAIL if found > claim else Verdict.PASS if most > claim else Verdict.NOT_ESTIMABLE
    if not all(control.passed for control in controls):
        verdict = Verdict.INVALID
    return AttackOutcome(
        attack="one_run",
        question="Can it be guessed from one run which of many made-up patients were in the cohort?",
        auroc=None,
        tpr_at_fpr={},
        p_value=min(1.0, guess_probability(claim, right, guesses, canaries, delta)),
        minimum_detectable_auroc=None,
        findings={
            "claimed_epsilon": claim,
            "epsilon_lower_bound": found,
            "largest_possible_bound": most,
            "canaries": float(canaries),
            "guesses": float(guesses),
            "right_guesses": float(right),
        },
        controls=controls,
        verdict=verdict,
        summary=_summary(verdict, claim, found, most),
    )


def fair_coins(count: int, seed: int) -> Coins:
    """Independent fair coins, shape ``(count,)``."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    coins: Coins = drawn.numpy()
    return coins


def canary_scores(mechanism: Mechanism, coins: Coins) -> Floats:
    """How much the answers of one run speak for each canary: sums of its own coordinate, by how sure each is.

    Args:
        mechanism: Gives plan and noise.
        coins: Which canaries are in the cohort.
    """
    pixels = 0.5 + 0.5 * torch.eye(len(coins))[torch.from_numpy(coins)]
    cohort = grey_cohort(pixels, tuple(f"canary {number}" for number in range(len(pixels))))
    total = torch.zeros(len(coins), dtype=torch.float64)
    with throw_away_curator(cohort, mechanism) as curator:
        for query, noise in zip(mechanism.plan.queries, mechanism.noise_multipliers, strict=True):
            for _ in range(query.count):
                total += query.sampling_rate / noise**2 * ask(curator, query).double()
    scores: Floats = total.numpy()
    return scores


def right_guesses(scores: Floats, coins: Coins, guesses: int) -> int:
    """How many are right if the highest half of the guesses says "in" and the lowest half "out"."""
    order = np.argsort(scores, kind="stable")
    lowest, highest = order[: guesses // 2], order[len(order) - guesses // 2 :]
    return int((~coins[lowest]).sum() + coins[highest].sum())


def _summary(verdict: Verdict, claim: float, found: float, most: float) -> str:
    if verdict is Verdict.INVALID:
        return "A control failed, so this result says nothing about the mechanism."
    if verdict is Verdict.FAIL:
        return f"The claim of epsilon {claim:.3g} is wrong: one run shows a loss of at least {found:.3g}."
    if verdict is Verdict.NOT_ESTIMABLE:
        return f"One run of so few canaries cannot show more than {most:.3g}, which is below what is claimed."
    return (
        f"One run does not contradict the claim of epsilon {claim:.3g}: it shows a loss of at least {found:.3g}."
    )
