"""An audit: attacks on member against holdout patients, each beside its controls."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill.audit import statistics
from medistill.audit.calibrated_neighbour import CalibratedNeighbour
from medistill.audit.copy_alarm import CopyAlarm, CopySearch, source_lift
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.guarantee import EPSILON_RANGE, Budget
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator
from medistill.core.reports import AttackOutcome, AuditReport, ControlOutcome, Estimate, Verdict
from medistill.distill.private import plan_of
from medistill.distill.runner import run_recipe
from medistill.distill.start import random_images
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import NAME, Ledger
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.views import pictures

THREAT_MODEL = (
    "The attacker holds the release and all images of a patient, and wants to know whether that patient was among "
    "those it was distilled from (T2); or holds nothing but the release and looks for copies of a patient (T5)."
)
NOT_TESTED = (
    "linking another image of the same patient (re-identification)",
    "inference of sex, age band or site",
    "leakage through soft labels alone",
    "shadow-model attacks",
    "several releases of one hospital together",
)
_ORDER = (Verdict.INVALID, Verdict.FAIL, Verdict.NOT_ESTIMABLE, Verdict.PASS)
_CONTROL_CONFIDENCE = 0.99
_FEWEST = 10
_SMALL_FPR = 0.01
_REAL_PER_CLASS = 10


@dataclass(frozen=True, kw_only=True)
class AuditPolicy:
    """When an audit passes.

    Args:
        auroc_high: The membership AUROC's interval must end below this, and begin above one minus this.
        tpr_high: The interval of every true-positive rate at a false-positive rate of 0.01 or less must end below
            this, where it can be resolved.
        fprs: False-positive rates at which the true-positive rate is reported.
        alpha: A membership result with a smaller p-value counts as found.
        fewest_patients: Patients attacked in all, below which the audit cannot pass.

    Raises:
        ConfigError: If a limit is one that no release could miss, or none could keep.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    auroc_high: float = 0.60
    tpr_high: float = 0.05
    fprs: tuple[float, ...] = (0.01, 0.1)
    alpha: float = 0.01
    fewest_patients: int = 200

    def __post_init__(self) -> None:
        problems = [
            message
            for holds, message in (
                (0.5 < self.auroc_high < 1, f"0.5 < auroc_high < 1, got {self.auroc_high}"),
                (0 < self.tpr_high < 1, f"0 < tpr_high < 1, got {self.tpr_high}"),
                (all(0 < fpr < 1 for fpr in self.fprs), "every one of fprs between 0 and 1"),
                (0 < self.alpha < 1, f"0 < alpha < 1, got {self.alpha}"),
                (self.fewest_patients >= 1, f"fewest_patients >= 1, got {self.fewest_patients}"),
            )
            if not holds
        ]
        if problems:
            raise ConfigError(f"Expected {'; '.join(problems)}.")


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Who is attacked: candidate members, non-members, and everybody else by role."""

    candidates: ImageSet
    rest: ImageSet
    train: ImageSet
    holdout: ImageSet
    reference: ImageSet


def audit(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    holdout: ImageSet,
    reference: ImageSet,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    folder: Path | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack a release and the controls beside it.

    As many member patients are attacked as there are holdout patients. The negative control is distilled by the
    same recipe from the *other* training patients, so that for it nobody attacked is a member.

    Args:
        distilled: The release.
        train: Images it was distilled from.
        holdout: Images of patients that distillation never saw.
        reference: Images of further patients, to calibrate on.
        policy: When the audit passes.
        seed: Public seed.
        folder: Where the negative control keeps its checkpoints.
        compute: Device and precision of the negative control.
        progress: Shows how far it is.

    Returns:
        Outcomes per patient with controls. ``INVALID`` unless every control passed.

    Raises:
        DataError: If a part has fewer than ten patients.

    Privacy:
        Reads non-released data. The result is a measurement for the data owner, never a guarantee.
    """
    progress, policy = progress or Progress(), policy or AuditPolicy()
    pool = _draw_pool(train, holdout, reference, derive_seed(seed, "candidates"))
    progress.say("audit: distilling the negative control from patients who are not attacked")
    with _control_curator(distilled, pool.rest, seed, folder) as curator:
        done = run_recipe(distilled.recipe, curator, folder=folder, compute=compute, progress=progress)
    released, control = (pictures(one.images, one.views) for one in (distilled, done.distilled))
    outcomes = (
        _membership(released, control, pool, policy, seed),
        _copies(released, control, pool, seed),
    )
    return AuditReport(
        outcomes=outcomes,
        verdict=min((outcome.verdict for outcome in outcomes), key=_ORDER.index),
        threat_model=THREAT_MODEL,
        members=len(pool.candidates.unique_patients),
        non_members=len(holdout.unique_patients),
        not_tested=NOT_TESTED,
        release=distilled.fingerprint(),
    )


@contextlib.contextmanager
def _control_curator(distilled: DistilledSet, rest: ImageSet, seed: int, folder: Path | None) -> Iterator[Curator]:
    """Who answers for the negative control: with as much noise as for the release.

    Of a private release nothing is spent: the control is compared here and thrown away, so its noise only has to
    make it like the release, and protects nobody. Its ledger is thrown away with it; the cohort's is not touched.
    """
    if math.isinf(distilled.privacy.epsilon):
        yield OpenCurator(rest)
        return
    plan = plan_of(distilled.recipe, rest.task, tuple(rest.images.shape[1:]))
    budget = Budget(epsilon=max(distilled.privacy.epsilon, EPSILON_RANGE[0]), delta=distilled.privacy.delta)
    work = hashlib.sha256(f"{distilled.fingerprint()} {seed}".encode()).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as throw_away:
        where = (folder or Path(throw_away)) / f"control-{work}"
        ledger = Ledger(where / NAME, lifetime=budget)
        curator = PrivateCurator(rest, budget=budget, plan=plan, ledger=ledger, store=where / "sealed")
        try:
            yield curator
        finally:
            curator.close()


def require_patients(**parts: ImageSet) -> None:
    """Refuse parts that are too small for an audit, before hours are spent on what could not be audited.

    Args:
        parts: Images by split name.

    Raises:
        DataError: If a part has fewer than ten patients; says how many were found and needed.
    """
    problems = [
        f"{name} has {len(part.unique_patients)}"
        for name, part in parts.items()
        if len(part.unique_patients) < _FEWEST
    ]
    if problems:
        raise DataError(
            f"An audit needs at least {_FEWEST} patients in each part; {', '.join(problems)}. "
            "Ingest more patients or give the part a larger fraction."
        )


def _draw_pool(train: ImageSet, holdout: ImageSet, reference: ImageSet, seed: int) -> _Pool:
    require_patients(train=train, holdout=holdout, validation=reference)
    patients = train.unique_patients
    count = min(len(holdout.unique_patients), len(patients) // 2)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {patients[i] for i in order[:count]}
    return _Pool(
        candidates=train.of_patients(chosen),
        rest=train.of_patients(set(patients) - chosen),
        train=train,
        holdout=holdout,
        reference=reference,
    )


Floats = NDArray[np.float64]


def _membership_scores(released: Tensor, pool: _Pool) -> tuple[Floats, Floats]:
    attack = CalibratedNeighbour()
    scored = [
        statistics.per_patient(attack.score(released, part.images, pool.reference.images), part.patients)
        for part in (pool.candidates, pool.holdout)
    ]
    return scored[0], scored[1]


def _membership(released: Tensor, control: Tensor, pool: _Pool, policy: AuditPolicy, seed: int) -> AttackOutcome:
    members, others = _membership_scores(released, pool)
    area = statistics.auroc(members, others)
    rates = {fpr: statistics.tpr_at_fpr(members, others, fpr=fpr) for fpr in policy.fprs}
    resolved = [fpr for fpr, rate in rates.items() if rate is not None]
    tests = 1 + len(resolved)
    single = [statistics.randomisation_p_value(members, others, seed=derive_seed(seed, "coins"))]
    single += [statistics.top_p_value(members, others, share=fpr) for fpr in resolved]
    p_value = min(1.0, tests * min(single))
    guilty = statistics.auroc(*_membership_scores(pool.candidates.images, pool))
    innocent = statistics.auroc(*_membership_scores(control, pool), confidence=_CONTROL_CONFIDENCE)
    controls = (
        ControlOutcome(
            name="positive: a release of all attacked members' real images",
            expected="AUROC of at least 0.99",
            observed=f"AUROC {guilty}",
            passed=guilty.value >= 0.99,
        ),
        ControlOutcome(
            name="negative: distilled by the same recipe from other patients",
            expected=f"the {_CONTROL_CONFIDENCE:.0%} interval of the AUROC covers 0.5",
            observed=f"AUROC {innocent}",
            passed=innocent.low <= 0.5 <= innocent.high,
        ),
    )
    detectable = statistics.minimum_detectable_auroc(len(members), len(others), alpha=policy.alpha / tests)
    exposed = [rate.high for fpr, rate in rates.items() if rate is not None and fpr <= _SMALL_FPR]
    within = max(area.high, 1 - area.low) <= policy.auroc_high and max(exposed, default=0.0) <= policy.tpr_high
    verdict = _membership_verdict(within, p_value, len(members) + len(others), controls, policy)
    return AttackOutcome(
        attack="calibrated_neighbour",
        question="Was this patient among those the release was distilled from?",
        auroc=area,
        tpr_at_fpr={f"{fpr:g}": rate for fpr, rate in rates.items()},
        p_value=p_value,
        minimum_detectable_auroc=detectable,
        findings={},
        controls=controls,
        verdict=verdict,
        summary=_membership_summary(verdict, area, detectable, p_value, found=p_value < policy.alpha),
    )


def _membership_verdict(
    within: bool, p_value: float, patients: int, controls: tuple[ControlOutcome, ...], policy: AuditPolicy
) -> Verdict:
    if not all(control.passed for control in controls):
        return Verdict.INVALID
    if not within and p_value < policy.alpha:
        return Verdict.FAIL
    if not within or patients < policy.fewest_patients:
        return Verdict.NOT_ESTIMABLE
    return Verdict.PASS


def _membership_summary(
    verdict: Verdict, area: Estimate, detectable: float, p_value: float, *, found: bool
) -> str:
    if verdict is Verdict.INVALID:
        return "A control failed, so this result says nothing about the release."
    if verdict is Verdict.FAIL:
        return f"Members were told from other patients with AUROC {area} (0.5 is chance; p = {p_value:.2g})."
    if verdict is Verdict.NOT_ESTIMABLE:
        return (
            f"No leak was shown (AUROC {area}), but with so few patients only an AUROC above {detectable:.2f} "
            "would have been seen."
        )
    if found:
        limits = f"p = {p_value:.2g} for no leak at all"
        return f"A small leak was measured, within the limits of the policy: AUROC {area}; {limits}."
    power = f"an AUROC above {detectable:.2f} would have been seen"
    return f"No relevant leak found at this power: AUROC {area}; {power}."


def _copies(released: Tensor, control: Tensor, pool: _Pool, seed: int) -> AttackOutcome:
    alarm, reference = CopyAlarm(), pool.reference.images
    everybody, balanced = _union(pool.train, pool.holdout), _union(pool.candidates, pool.holdout)
    found = alarm.search(released, everybody, reference)
    copies = _copies_of(found, set(pool.train.patients))
    nearest = alarm.search(released, balanced, reference)
    members, others = set(pool.candidates.patients), set(pool.holdout.patients)
    share, p_value = source_lift(set(nearest.patients), members, others)
    smallest = int(pool.train.targets.sum(0).min())
    real = random_images(pool.train, ipc=min(_REAL_PER_CLASS, smallest), seed=derive_seed(seed, "real release"))
    guilty = alarm.search(real.images, everybody, reference)
    caught = np.mean(
        [
            flag and who == true
            for flag, who, true in zip(guilty.copies, guilty.patients, real.patients, strict=True)
        ]
    )
    innocent = int(alarm.search(control, balanced, reference).copies.sum())
    controls = (
        ControlOutcome(
            name="positive: a release of real images",
            expected="at least 80 % of the copied patients found",
            observed=f"{caught:.0%} of {len(real)} found",
            passed=bool(caught >= 0.8),
        ),
        ControlOutcome(
            name="negative: distilled by the same recipe from other patients",
            expected="no copy found",
            observed=f"{innocent} copies found",
            passed=innocent == 0,
        ),
    )
    valid = all(control.passed for control in controls)
    verdict = Verdict.INVALID if not valid else Verdict.FAIL if copies else Verdict.PASS
    return AttackOutcome(
        attack="copy_alarm",
        question="Does a released image depict one training patient far better than anybody else?",
        auroc=None,
        tpr_at_fpr={},
        p_value=p_value,
        minimum_detectable_auroc=None,
        findings={
            "copies": float(copies),
            "released_images": float(len(released)),
            "largest_correlation_with_a_patient": round(float(found.correlation.max()), 2),
            "largest_gap": round(float(found.gap.max()), 2),
            "gap_limit": found.gap_limit,
            "members_among_nearest_patients": share,
        },
        controls=controls,
        verdict=verdict,
        summary=_copies_summary(verdict, copies, len(released)),
    )


def _copies_summary(verdict: Verdict, copies: int, released: int) -> str:
    if verdict is Verdict.INVALID:
        return "A control failed, so this result says nothing about the release."
    if verdict is Verdict.FAIL:
        return f"{copies} of {released} released images are copies of a training patient's image."
    return (
        f"None of the {released} released images stands out as a copy of one patient. "
        "This is the absence of an alarm, not a proof."
    )


def _copies_of(search: CopySearch, members: set[str]) -> int:
    return sum(
        bool(flag) and patient in members for flag, patient in zip(search.copies, search.patients, strict=True)
    )


def _union(first: ImageSet, second: ImageSet) -> ImageSet:
    return ImageSet(
        images=torch.cat([first.images, second.images]),
        targets=torch.cat([first.targets, second.targets]),
        patients=first.patients + second.patients,
        task=first.task,
    )
