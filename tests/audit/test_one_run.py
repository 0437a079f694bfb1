"""The one-run audit against its formula written out, and on a curator that keeps its claim or does not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from medistill.audit.one_run import (
    audit_one_run,
    canary_scores,
    fair_coins,
    guess_probability,
    one_run_epsilon,
    right_guesses,
)
from medistill.audit.worst_case import Mechanism
from medistill.core.guarantee import PrivacyPlan, PrivacyStatement, Query, QueryKind
from medistill.core.reports import AttackOutcome, Verdict
from medistill.errors import ConfigError, PrivacyError
from medistill.privacy import curator as curators
from medistill.privacy.accounting import analytic_noise
from tests.audit.bug_zoo import ONE_SUM

DELTA = 1e-5


def claimed(epsilon: float) -> PrivacyStatement:
    return PrivacyStatement(epsilon=epsilon, delta=DELTA, accountants=("analytic gaussian",))


def written_out(epsilon: float, v: int, r: int, m: int, delta: float) -> float:
    """The formula, term by term."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    beta = sum(mass[v:])
    alpha = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return beta + 2 * m * delta * alpha


@pytest.mark.parametrize(("right", "guesses"), [(1, 1), (3, 5), (9, 12), (12, 12), (20, 30)])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_probability_is_the_formula_term_by_term(right: int, guesses: int, delta: float) -> None:
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        expected = written_out(epsilon, right, guesses, 40, delta)
        assert guess_probability(epsilon, right, guesses, 40, delta) == pytest.approx(
            expected, rel=1e-9, abs=1e-14
        )


@pytest.mark.parametrize(("right", "guesses"), [(14, 16), (16, 16), (27, 30), (60, 80)])
def test_the_bound_is_the_largest_epsilon_ruled_out(right: int, guesses: int) -> None:
    found = one_run_epsilon(right, guesses, 100, DELTA)
    assert found > 0
    assert written_out(found - 1e-6, right, guesses, 100, DELTA) <= 0.05
    grid = found + np.linspace(1e-6, 8, 400)
    assert all(written_out(epsilon, right, guesses, 100, DELTA) > 0.05 for epsilon in grid)


def test_the_bound_moves_as_it_should() -> None:
    by_right = [one_run_epsilon(right, 50, 1000, DELTA) for right in range(51)]
    assert all(fewer <= more for fewer, more in pairwise(by_right))
    assert by_right[25] == 0 < by_right[50]
    by_delta = [one_run_epsilon(48, 50, 1000, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4)]
    assert all(less >= more for less, more in pairwise(by_delta))
    by_confidence = [one_run_epsilon(45, 50, 1000, DELTA, confidence) for confidence in (0.9, 0.95, 0.99)]
    assert all(less > more for less, more in pairwise(by_confidence))
    assert one_run_epsilon(0, 50, 1000, DELTA) == 0


@pytest.mark.parametrize("counts", [(3, 2, 10), (-1, 2, 10), (0, 0, 10), (5, 20, 10)])
def test_counts_that_contradict_each_other_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        one_run_epsilon(*counts, DELTA)


@pytest.mark.parametrize(("claim", "least", "most"), [(1.0, 0.12, 0.24), (3.0, 0.87, 1.25)])
def test_bounds_of_200_runs_are_below_the_claim_and_as_large_as_expected(
    claim: float, least: float, most: float
) -> None:
    """1,000 canaries and 50 guesses. The mean of 200 bounds is known to 0.012 for a claim of 1, to 0.04 for 3."""
    mechanism = Mechanism(plan=ONE_SUM, noise_multipliers=(analytic_noise(claim, DELTA),))
    bound = cache(lambda right: one_run_epsilon(right, 50, 1000, DELTA))
    bounds = []
    for run in range(200):
        coins = fair_coins(1000, run)
        right = right_guesses(canary_scores(mechanism, coins), coins, 50)
        bounds.append(bound(right))
    assert np.mean(np.array(bounds) <= claim) >= 0.95
    assert least <= np.mean(bounds) <= most


@pytest.mark.parametrize("claim", [1.0, 3.0])
def test_the_correct_mechanism_is_not_contradicted(claim: float) -> None:
    found = audit_one_run(claimed(claim), ONE_SUM, seed=0)
    assert found.verdict is Verdict.PASS
    assert found.findings["guesses"] == 100
    assert 0 <= found.findings["epsilon_lower_bound"] <= claim < found.findings["largest_possible_bound"]
    assert AttackOutcome.from_json(json.loads(json.dumps(asdict(found), allow_nan=False))) == found


def test_several_queries_are_put_together() -> None:
    """Ten answers with the noise of one: the root of ten times as far apart, a claim of 1 is broken by far."""
    plan = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="steps", count=10),))
    noise = (analytic_noise(1.0, DELTA),)
    coins = fair_coins(2000, 3)
    once, often = (
        right_guesses(canary_scores(Mechanism(plan=asked, noise_multipliers=noise), coins), coins, 100)
        for asked in (ONE_SUM, plan)
    )
    assert one_run_epsilon(once, 100, 2000, DELTA) < 1 < one_run_epsilon(often, 100, 2000, DELTA)


def test_too_little_noise_in_the_curator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = curators.gaussian
    monkeypatch.setattr(curators, "gaussian", lambda shape, sigma, **more: right(shape, sigma / 5, **more))
    found = audit_one_run(claimed(1.0), ONE_SUM, seed=0)
    assert found.verdict is Verdict.FAIL
    assert found.p_value < 0.05


def test_a_claim_beyond_what_guesses_can_show_is_not_estimable() -> None:
    found = audit_one_run(claimed(8.0), ONE_SUM, seed=0)
    assert found.verdict is Verdict.NOT_ESTIMABLE
    assert all(control.passed for control in found.controls)


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(PrivacyError, match="No epsilon is claimed"):
        audit_one_run(PrivacyStatement.nothing_proved("open."), ONE_SUM, seed=0)
    with pytest.raises(ConfigError, match="canaries"):
        audit_one_run(claimed(1.0), ONE_SUM, seed=0, canaries=30)


def test_coins_are_fair_and_guesses_counted_as_said() -> None:
    coins = fair_coins(10_000, 0)
    assert abs(coins.mean() - 0.5) < 0.025
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    in_cohort = np.array([True, False, False, True, True, True])
    assert right_guesses(scores, in_cohort, 4) == 2  # in: 0 right, 2 wrong; out: 1 right, 5 wrong
