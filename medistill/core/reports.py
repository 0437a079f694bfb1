"""Measurements: estimates with intervals, what an audit concludes, what a diagnosis reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from medistill.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured number with its interval.

    Args:
        value: Point estimate.
        low: Lower end of the interval.
        high: Upper end.
        confidence: Coverage of the interval, for example ``0.95``.
        n: Number of patients (or released images) behind it.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise DataError(f"Expected low <= high, got {self.low} and {self.high}.")

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Estimate:
        """Inverse of :func:`dataclasses.asdict`."""
        return cls(**values)


class Verdict(StrEnum):
    """What an audit concludes."""

    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    FAIL = "FAIL"
    INVALID = "INVALID"
    NOT_ESTIMABLE = "NOT_ESTIMABLE"


@dataclass(frozen=True, kw_only=True)
class ControlOutcome:
    """Result of a known case that an attack must judge rightly before its verdict counts.

    Args:
        name: For example ``"release of real images"``.
        expected: What a working attack shows, in words.
        observed: What it showed.
        passed: Whether the two agree.
    """

    name: str
    expected: str
    observed: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """What one attack found, beside its controls.

    Args:
        attack: Registered name.
        question: What the attacker wants to know, in plain words.
        auroc: Area under the ROC curve of members against non-members, per patient; ``None`` where the attack
            has no such score.
        tpr_at_fpr: True-positive rate per false-positive rate; ``None`` below the resolution.
        p_value: One-sided probability of a result at least this strong without any leak.
        minimum_detectable_auroc: Smallest AUROC that would have been told from 0.5.
        findings: Further named numbers (for example copies found).
        controls: Positive and negative controls.
        verdict: Conclusion of this attack alone.
        summary: One plain sentence.
        roc: True-positive rate at false-positive rates from the smallest that can be resolved up to 1; empty where
            the attack has no such score.
    """

    attack: str
    question: str
    auroc: Estimate | None
    tpr_at_fpr: Mapping[str, Estimate | None]
    p_value: float
    minimum_detectable_auroc: float | None
    findings: Mapping[str, float]
    controls: tuple[ControlOutcome, ...]
    verdict: Verdict
    summary: str
    roc: tuple[tuple[float, float], ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AttackOutcome:
        """Inverse of :func:`dataclasses.asdict`."""
        rates = {k: None if v is None else Estimate.from_json(v) for k, v in values["tpr_at_fpr"].items()}
        return cls(
            **{
                **values,
                "auroc": None if values["auroc"] is None else Estimate.from_json(values["auroc"]),
                "tpr_at_fpr": rates,
                "controls": tuple(ControlOutcome(**control) for control in values["controls"]),
                "verdict": Verdict(values["verdict"]),
                "roc": tuple((float(fpr), float(tpr)) for fpr, tpr in values.get("roc", ())),
            }
        )


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit concludes. A measurement, never a guarantee.

    Args:
        outcomes: One entry per attack.
        verdict: Worst of the attacks; ``INVALID`` when a control is missing or failed.
        threat_model: What the attacker was assumed to hold.
        members: Number of member patients attacked.
        non_members: Number of holdout patients attacked.
        not_tested: Threats that were not examined.
        release: Fingerprint of the distilled set that was audited.
        refusals: Why it fails whatever the attacks found: limits of the policy that its claim does not keep.
    """

    outcomes: tuple[AttackOutcome, ...]
    verdict: Verdict
    threat_model: str
    members: int
    non_members: int
    not_tested: tuple[str, ...]
    release: str
    refusals: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"schema_version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AuditReport:
        """Inverse of :meth:`to_json`."""
        fields = {k: v for k, v in values.items() if k != "schema_version"}
        outcomes = tuple(AttackOutcome.from_json(outcome) for outcome in values["outcomes"])
        return cls(
            **{
                **fields,
                "outcomes": outcomes,
                "verdict": Verdict(values["verdict"]),
                "not_tested": tuple(values["not_tested"]),
                "refusals": tuple(values.get("refusals", ())),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Diagnostic performance of one training set on one evaluation split.

    Args:
        arm: ``real``, ``random``, ``distilled`` or ``distilled_hard``.
        network: Registered network name.
        split: Evaluation split, for example ``test``.
        images: Number of training images.
        seeds: Number of networks trained.
        metrics: Metric name to estimate, mean over seeds, interval by patient bootstrap.
        seed_deviation: Metric name to standard deviation over seeds.
        cpu_seconds: CPU time of training per seed.
        class_auroc: Class name to the AUROC of this class against all others; empty for two classes, where it is
            the AUROC among the metrics.
    """

    arm: str
    network: str
    split: str
    images: int
    seeds: int
    metrics: Mapping[str, Estimate]
    seed_deviation: Mapping[str, float]
    cpu_seconds: float
    class_auroc: Mapping[str, Estimate] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArmResult:
        """Inverse of :func:`dataclasses.asdict`."""
        tables = {
            name: {k: Estimate.from_json(v) for k, v in values.get(name, {}).items()}
            for name in ("metrics", "class_auroc")
        }
        return cls(**{**values, **tables})


@dataclass(frozen=True, kw_only=True)
class DiagnosticReport:
    """Arms side by side on every evaluation split.

    Args:
        arms: One entry per network, arm and split.
        class_names: Classes; for two, ``(negative, positive)``.
        release: Fingerprint of the distilled set that was evaluated.
    """

    arms: tuple[ArmResult, ...]
    class_names: tuple[str, ...]
    release: str

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"schema_version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DiagnosticReport:
        """Inverse of :meth:`to_json`."""
        arms = tuple(ArmResult.from_json(arm) for arm in values["arms"])
        return cls(arms=arms, class_names=tuple(values["class_names"]), release=str(values["release"]))
