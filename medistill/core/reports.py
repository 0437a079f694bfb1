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
        arm: ``real``, ``random``, ``random_soft``, ``herding``, ``distilled`` or ``distilled_hard``.
        network: Registered network name.
        split: Evaluation split, for example ``test``.
        images: Number of training images.
        seeds: Number of networks trained.
        metrics: Metric name to estimate, mean over seeds, interval by patient bootstrap.
        seed_deviation: Metric name to standard deviation over seeds.
        cpu_seconds: CPU time of training per seed.
        class_auroc: Class name to the AUROC of this class against all others; empty for two classes, where it is
            the AUROC among the metrics.
        reliability: Of images binned by predicted probability: mean prediction, share that shows the class, share
            of all predictions in the bin; pooled over seeds. Of the positive class for two, of the most probable
            one for more, of all findings for several.
        by_patient: Rule that joins the scores of a patient's images (``mean``, ``max``, ``vote``) to the metrics
            of patients; empty where no patient has several images.
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
    reliability: tuple[tuple[float, float, float], ...] = ()
    by_patient: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    @property
    def patients(self) -> int:
        """Patients behind the figures."""
        return min((estimate.n for estimate in self.metrics.values()), default=0)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArmResult:
        """Inverse of :func:`dataclasses.asdict`."""
        read = {
            "metrics": _estimates(values["metrics"]),
            "class_auroc": _estimates(values.get("class_auroc", {})),
            "reliability": tuple((float(x), float(y), float(s)) for x, y, s in values.get("reliability", ())),
            "by_patient": {rule: _estimates(found) for rule, found in values.get("by_patient", {}).items()},
        }
        return cls(**{**values, **read})


def _estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.from_json(found) for name, found in values.items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One training set minus another, judged on the same patients with the same network.

    Args:
        kind: What it says: ``against_real`` (any arm minus all real images), ``label_recovery`` (all real images
            minus distilled ones with hard labels) or ``improvement_over_random`` (distilled minus as many random
            real images, both with soft labels); the last two as in DD-Ranking.
        arm: Training set.
        against: The other one.
        network: Registered network name.
        split: Evaluation split.
        metric: What is compared.
        value: Mean over seeds of the difference, interval by bootstrap over patients, the same draws for both.
        p_value: Two-sided, of no difference, by the same bootstrap.
        delong_p_value: Two-sided, of no difference in AUROC, by DeLong's variance with patients as clusters;
            ``None`` for other metrics and tasks of more than two classes.
    """

    kind: str
    arm: str
    against: str
    network: str
    split: str
    metric: str
    value: Estimate
    p_value: float
    delong_p_value: float | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Difference:
        """Inverse of :func:`dataclasses.asdict`."""
        return cls(**{**values, "value": Estimate.from_json(values["value"])})


@dataclass(frozen=True, kw_only=True)
class SubgroupResult:
    """Performance on a part of an evaluation split's patients.

    Args:
        arm: Training set.
        network: Registered network name.
        split: Evaluation split.
        attribute: ``sex``, ``age_band``, ``site`` or ``view``.
        group: Value of the attribute; sites are numbered, the one with most patients first.
        patients: Patients in the group.
        metrics: Metric name to estimate, as in :class:`ArmResult`; empty where the group is too small to be shown.
        warning: Why the figures should not be relied on, or empty.
    """

    arm: str
    network: str
    split: str
    attribute: str
    group: str
    patients: int
    metrics: Mapping[str, Estimate]
    warning: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SubgroupResult:
        """Inverse of :func:`dataclasses.asdict`."""
        return cls(**{**values, "metrics": _estimates(values["metrics"])})


@dataclass(frozen=True, kw_only=True)
class DiagnosticReport:
    """Arms side by side on every evaluation split.

    Args:
        arms: One entry per network, arm and split.
        class_names: Classes; for two, ``(negative, positive)``.
        release: Fingerprint of the distilled set that was evaluated.
        differences: Arms against each other on the same patients.
        subgroups: Arms on parts of the patients.
    """

    arms: tuple[ArmResult, ...]
    class_names: tuple[str, ...]
    release: str
    differences: tuple[Difference, ...] = ()
    subgroups: tuple[SubgroupResult, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"schema_version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DiagnosticReport:
        """Inverse of :meth:`to_json`."""
        arms = tuple(ArmResult.from_json(arm) for arm in values["arms"])
        return cls(
            arms=arms,
            class_names=tuple(values["class_names"]),
            release=str(values["release"]),
            differences=tuple(Difference.from_json(found) for found in values.get("differences", ())),
            subgroups=tuple(SubgroupResult.from_json(found) for found in values.get("subgroups", ())),
        )
