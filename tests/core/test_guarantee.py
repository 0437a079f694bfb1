"""Budgets, plans and statements hold their invariants and survive a round trip through JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from medistill.core.guarantee import Budget, PrivacyPlan, PrivacyStatement, Query, QueryKind
from medistill.errors import PrivacyError

MEANS = Query(kind=QueryKind.SUM, purpose="class moments", relative_noise=0.5)
STEPS = Query(kind=QueryKind.GRADIENT, purpose="teacher steps", count=3, sampling_rate=0.1)


@pytest.mark.parametrize("epsilon", [0.0, -1, 0.01, 100, math.nan, math.inf, True, "1", None])
def test_a_budget_refuses_an_epsilon_that_means_nothing(epsilon: Any) -> None:
    with pytest.raises(PrivacyError, match="epsilon"):
        Budget(epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize("delta", [0.0, -1e-5, 0.5, 1.0, math.nan, math.inf, "1e-5"])
def test_a_budget_refuses_a_delta_that_means_nothing(delta: Any) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        Budget(epsilon=1.0, delta=delta)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": ""},
        {"purpose": "/data/patients"},
        {"purpose": "Doe^Jane"},
        {"count": 0},
        {"count": 1.5},
        {"count": True},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"sampling_rate": math.nan},
        {"relative_noise": 0.0},
        {"relative_noise": math.inf},
    ],
)
def test_a_query_refuses_what_cannot_be_accounted(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError) as caught:
        Query(**{"kind": QueryKind.SUM, "purpose": "moments", **change})
    assert "Doe" not in str(caught.value)


def test_a_plan_knows_what_comes_when() -> None:
    plan = PrivacyPlan(queries=(MEANS, STEPS), assumptions=("a.",))
    assert [plan.at(position) for position in range(-1, 6)] == [None, MEANS, STEPS, STEPS, STEPS, None, None]
    assert plan.total == 4
    with pytest.raises(PrivacyError):
        PrivacyPlan(queries=())


def test_plans_are_joined_in_order() -> None:
    first = PrivacyPlan(queries=(MEANS,), assumptions=("a.", "b."))
    second = PrivacyPlan(queries=(STEPS,), assumptions=("b.", "c."))
    joined = PrivacyPlan.joined((first, second))
    assert joined == PrivacyPlan(queries=(MEANS, STEPS), assumptions=("a.", "b.", "c."))


def test_budget_plan_and_statement_round_trip() -> None:
    plan = PrivacyPlan(queries=(MEANS, STEPS), assumptions=("a.",))
    assert PrivacyPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    budget = Budget(epsilon=3, delta=1e-5)
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget
    statement = PrivacyStatement(epsilon=1.5, delta=1e-5, accountants=("pld",), event=("1 x Gaussian",))
    values = json.loads(json.dumps(statement.to_json()))
    assert PrivacyStatement.from_json(values) == statement
    del values["event"]
    assert PrivacyStatement.from_json(values).event == ()
