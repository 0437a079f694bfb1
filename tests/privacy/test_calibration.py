"""Noise from budgets: never above the budget, and little below."""

from __future__ import annotations

import math

import pytest

from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.errors import PrivacyError
from medistill.privacy.accounting import analytic_delta, epsilon_of
from medistill.privacy.calibration import calibrate, mechanisms_of


def queries(**values: float) -> Query:
    return Query(**{"kind": QueryKind.SUM, "purpose": "moments", **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5])
def test_without_sampling_the_whole_budget_is_used(epsilon: float, delta: float) -> None:
    plan = PrivacyPlan(queries=(queries(count=3), queries(relative_noise=2.0)))
    found = calibrate(Budget(epsilon=epsilon, delta=delta), plan)
    first, second = found.noise_multipliers
    assert second == pytest.approx(2 * first)
    together = 1 / math.sqrt(3 / first**2 + 1 / second**2)
    assert analytic_delta(together, epsilon) == pytest.approx(delta, rel=1e-4)
    assert 0.999 * epsilon < found.bound.epsilon <= epsilon


@pytest.mark.parametrize("epsilon", [1.0, pytest.param(4.0, marks=pytest.mark.long)])
def test_with_sampling_at_least_99_percent_is_used(epsilon: float) -> None:
    plan = PrivacyPlan(queries=(queries(count=20, sampling_rate=0.1), queries(relative_noise=3.0)))
    budget = Budget(epsilon=epsilon, delta=1e-5)
    found = calibrate(budget, plan)
    again = epsilon_of(mechanisms_of(plan, found.noise_multipliers), 1e-5, accountants=("pld",))
    assert 0.99 * epsilon <= found.bound.epsilon <= epsilon
    assert again.epsilon == pytest.approx(found.bound.epsilon, rel=1e-3)
    whole = calibrate(budget, PrivacyPlan(queries=(queries(count=20), queries(relative_noise=3.0))))
    assert found.noise_multipliers[0] < 0.5 * whole.noise_multipliers[0]


def test_noise_that_no_accountant_can_be_trusted_with_is_refused() -> None:
    plan = PrivacyPlan(queries=(queries(count=500_000, relative_noise=1000.0), queries(relative_noise=0.001)))
    with pytest.raises(PrivacyError, match="noise multiplier"):
        calibrate(Budget(epsilon=0.05, delta=1e-8), plan)


@pytest.mark.long
def test_patients_who_are_hardly_ever_sampled_still_get_noise() -> None:
    plan = PrivacyPlan(queries=(queries(count=2, sampling_rate=1e-6),))
    found = calibrate(Budget(epsilon=1.0, delta=1e-5), plan)
    assert found.noise_multipliers == (0.2,)
    assert 0 <= found.bound.epsilon <= 1.0
