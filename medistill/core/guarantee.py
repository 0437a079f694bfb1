"""Guarantees: what is proved about a release. Measurements live in :mod:`medistill.core.reports`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from medistill.errors import PrivacyError

#: Budgets outside this range are refused: below it nothing useful is left, above it nothing is protected.
EPSILON_RANGE = (0.05, 50.0)
LARGEST_DELTA = 1e-2
#: Most queries of one plan.
MOST_QUERIES = 1_000_000
#: Most runs that may be expected where the best of several is kept.
MOST_RUNS = 100.0
_PURPOSE = re.compile(r"[a-z0-9][a-z0-9 ,.()+-]{0,79}")


class Unit(StrEnum):
    """Whose presence is protected. There is one unit: the patient."""

    PATIENT = "patient"


class Relation(StrEnum):
    """Which cohorts count as neighbours."""

    ADD_OR_REMOVE = "add-or-remove-one-patient"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may be learned of one patient.

    Args:
        epsilon: In ``[0.05, 50]``.
        delta: In ``(0, 0.01]``; well below one over the number of patients.
        unit: Whose presence is protected.
        relation: Neighbouring relation.

    Raises:
        PrivacyError: If a value is outside its range or not a number.
    """

    epsilon: float
    delta: float
    unit: Unit = Unit.PATIENT
    relation: Relation = Relation.ADD_OR_REMOVE

    def __post_init__(self) -> None:
        low, high = EPSILON_RANGE
        if not (_is_number(self.epsilon) and low <= self.epsilon <= high):
            raise PrivacyError(
                f"Expected epsilon in [{low}, {high:g}], got {self.epsilon!r}. Customary values are 1 to 8."
            )
        if not (_is_number(self.delta) and 0 < self.delta <= LARGEST_DELTA):
            raise PrivacyError(
                f"Expected delta in (0, {LARGEST_DELTA}], got {self.delta!r}. "
                "Take 1e-5, or a tenth of one over the number of patients if that is smaller."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit.value,
            "relation": self.relation.value,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Budget:
        """Inverse of :meth:`to_json`."""
        unit, relation = Unit(values["unit"]), Relation(values["relation"])
        return cls(epsilon=values["epsilon"], delta=values["delta"], unit=unit, relation=relation)


class QueryKind(StrEnum):
    """What a curator is asked for."""

    SUM = "sum"
    GRADIENT = "gradient"


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question to a curator, or ``count`` of the same form in a row.

    Args:
        kind: A sum of rows or of gradients over patients.
        purpose: What for, in a few plain words; it is written to the ledger, so it names no patient and no file.
        count: How often it is asked.
        sampling_rate: Probability with which each patient takes part, each time anew.
        relative_noise: Noise of this query relative to the others of its plan; how much noise that is follows
            from the budget.

    Raises:
        PrivacyError: If a value is outside its range.
    """

    kind: QueryKind
    purpose: str
    count: int = 1
    sampling_rate: float = 1.0
    relative_noise: float = 1.0

    def __post_init__(self) -> None:
        if not _PURPOSE.fullmatch(self.purpose):
            raise PrivacyError(
                "Expected the purpose of a query in 1 to 80 lower-case letters, digits and spaces. It is written "
                "to the ledger, so it must not name a patient or a file."
            )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MOST_QUERIES:
            raise PrivacyError(f"Expected 1 to {MOST_QUERIES} queries, got {self.count!r}.")
        if not (_is_number(self.sampling_rate) and 0 < self.sampling_rate <= 1):
            raise PrivacyError(f"Expected a sampling rate in (0, 1], got {self.sampling_rate!r}.")
        if not (_is_number(self.relative_noise) and 1e-3 <= self.relative_noise <= 1e3):
            raise PrivacyError(f"Expected relative noise in [0.001, 1000], got {self.relative_noise!r}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind.value,
            "purpose": self.purpose,
            "count": self.count,
            "sampling_rate": self.sampling_rate,
            "relative_noise": self.relative_noise,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Query:
        """Inverse of :meth:`to_json`."""
        return cls(**{**values, "kind": QueryKind(values["kind"])})


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything that will be asked, in order, declared before data is touched.

    Args:
        queries: At least one.
        assumptions: What is taken as public, one plain sentence each.
        expected_runs: Above 1, the queries are asked in a random number of runs, so many on average, each run ends
            with a score, and only the best run is kept; see :mod:`medistill.privacy.selection`.

    Raises:
        PrivacyError: If there is no query, or there are too many.
    """

    queries: tuple[Query, ...]
    assumptions: tuple[str, ...] = ()
    expected_runs: float = 1.0

    def __post_init__(self) -> None:
        if not self.queries:
            raise PrivacyError("Expected a plan of at least one query; without one there is nothing to protect.")
        if not (_is_number(self.expected_runs) and 1 <= self.expected_runs <= MOST_RUNS):
            raise PrivacyError(f"Expected 1 to {MOST_RUNS:g} runs on average, got {self.expected_runs!r}.")
        if self.total > MOST_QUERIES:
            raise PrivacyError(f"Expected at most {MOST_QUERIES} queries in a plan, got {self.total}.")

    @property
    def total(self) -> int:
        """Queries in all, of one run."""
        return sum(query.count for query in self.queries)

    @property
    def selects(self) -> bool:
        """Whether the best of several runs is kept."""
        return self.expected_runs > 1

    @property
    def per_run(self) -> int:
        """Answers of one run: the queries, and the score where there is one."""
        return self.total + self.selects

    def at(self, position: int) -> Query | None:
        """What may be asked at a position of a run, counted from 0; ``None`` past the end and for the score."""
        for query, first in self._firsts():
            if first <= position < first + query.count:
                return query
        return None

    def _firsts(self) -> Iterator[tuple[Query, int]]:
        first = 0
        for query in self.queries:
            yield query, first
            first += query.count

    @classmethod
    def joined(cls, plans: Sequence[PrivacyPlan]) -> PrivacyPlan:
        """One plan after the other, each assumption once; each is asked in one run."""
        queries = tuple(query for plan in plans for query in plan.queries)
        return cls(
            queries=queries, assumptions=tuple(dict.fromkeys(a for plan in plans for a in plan.assumptions))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        runs = {"expected_runs": self.expected_runs} if self.selects else {}
        return {
            "queries": [query.to_json() for query in self.queries],
            "assumptions": list(self.assumptions),
            **runs,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PrivacyPlan:
        """Inverse of :meth:`to_json`."""
        queries = tuple(Query.from_json(query) for query in values["queries"])
        runs = values.get("expected_runs", 1.0)
        return cls(queries=queries, assumptions=tuple(values["assumptions"]), expected_runs=runs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What is proved about a release.

    Args:
        epsilon: Proved upper bound; ``inf`` when nothing is proved.
        delta: Failure probability in ``[0, 1)``.
        unit: Whose presence is protected.
        relation: Neighbouring relation.
        accountants: Names of the accountants behind a finite epsilon; the first gave the smallest valid bound.
        event: What was asked and with how much noise, in words: what a finite epsilon is the epsilon of.
        assumptions: What must be true for the guarantee to hold.
        reason: Why nothing is proved; given exactly when ``epsilon`` is infinite.

    Raises:
        PrivacyError: If the fields contradict each other.
    """

    epsilon: float
    delta: float
    unit: Unit = Unit.PATIENT
    relation: Relation = Relation.ADD_OR_REMOVE
    accountants: tuple[str, ...] = ()
    event: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.epsilon) or self.epsilon <= 0:
            raise PrivacyError(f"Expected epsilon > 0, got {self.epsilon}.")
        if not 0 <= self.delta < 1:
            raise PrivacyError(f"Expected delta in [0, 1), got {self.delta}.")
        if math.isinf(self.epsilon) != bool(self.reason):
            raise PrivacyError("A reason is given exactly when epsilon is infinite.")
        if math.isfinite(self.epsilon) and not self.accountants:
            raise PrivacyError("A finite epsilon needs the accountants that proved it.")

    @classmethod
    def nothing_proved(cls, reason: str) -> PrivacyStatement:
        """The statement of a release without differential privacy."""
        return cls(epsilon=math.inf, delta=0.0, reason=reason)

    @property
    def sentence(self) -> str:
        """The statement in one plain sentence."""
        if math.isinf(self.epsilon):
            return f"No formal privacy guarantee (epsilon is infinite): {self.reason}"
        return (
            f"Differentially private for each patient with epsilon {self.epsilon:.3g} and delta "
            f"{self.delta:.1e} ({self.relation.value})."
        )

    def to_json(self) -> dict[str, object]:
        """Plain values; infinity is written as ``null`` so that the file is strict JSON."""
        return {
            "epsilon": None if math.isinf(self.epsilon) else self.epsilon,
            "delta": self.delta,
            "unit": self.unit.value,
            "relation": self.relation.value,
            "accountants": list(self.accountants),
            "event": list(self.event),
            "assumptions": list(self.assumptions),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> PrivacyStatement:
        """Inverse of :meth:`to_json`."""
        epsilon = values["epsilon"]
        accountants, assumptions = values["accountants"], values["assumptions"]
        event = values.get("event", [])  # releases before version 0.3 have none
        assert isinstance(accountants, list)
        assert isinstance(assumptions, list)
        assert isinstance(event, list)
        return cls(
            epsilon=math.inf if epsilon is None else float(str(epsilon)),
            delta=float(str(values["delta"])),
            unit=Unit(str(values["unit"])),
            relation=Relation(str(values["relation"])),
            accountants=tuple(map(str, accountants)),
            event=tuple(map(str, event)),
            assumptions=tuple(map(str, assumptions)),
            reason=str(values["reason"]),
        )
