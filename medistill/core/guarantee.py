"""Guarantees: what is proved about a release. Measurements live in :mod:`medistill.core.reports`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from medistill.errors import PrivacyError


class Unit(StrEnum):
    """Whose presence is protected. There is one unit: the patient."""

    PATIENT = "patient"


class Relation(StrEnum):
    """Which cohorts count as neighbours."""

    ADD_OR_REMOVE = "add-or-remove-one-patient"


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What is proved about a release.

    Args:
        epsilon: Proved upper bound; ``inf`` when nothing is proved.
        delta: Failure probability in ``[0, 1)``.
        unit: Whose presence is protected.
        relation: Neighbouring relation.
        accountants: Names of the accountants behind a finite epsilon.
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
            "assumptions": list(self.assumptions),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> PrivacyStatement:
        """Inverse of :meth:`to_json`."""
        epsilon = values["epsilon"]
        accountants, assumptions = values["accountants"], values["assumptions"]
        assert isinstance(accountants, list)
        assert isinstance(assumptions, list)
        return cls(
            epsilon=math.inf if epsilon is None else float(str(epsilon)),
            delta=float(str(values["delta"])),
            unit=Unit(str(values["unit"])),
            relation=Relation(str(values["relation"])),
            accountants=tuple(map(str, accountants)),
            assumptions=tuple(map(str, assumptions)),
            reason=str(values["reason"]),
        )
