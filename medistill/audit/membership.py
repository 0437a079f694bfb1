"""From one attack's scores on a release and its controls to what it found, and to what it concludes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medistill.audit import statistics
from medistill.audit.attack import Detailed, Details, Exposed, Floats, Guilty, MembershipAttack, Prepared
from medistill.audit.policy import AuditPolicy
from medistill.audit.pool import Pool
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, ControlOutcome, Estimate, Verdict
from medistill.seeds import derive_seed

CONTROL_CONFIDENCE = 0.99
_SMALL_FPR = 0.01
_CLEARLY = 0.6
_TOLD = (
    "The release tells attributes of its own patients: at least {:.0%} more right guesses than it adds for others."
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score a patient.

    Args:
        members: Shape ``(m,)``.
        others: Shape ``(n,)``.
        member_classes: Class of each member, shape ``(m,)``.
        other_classes: Shape ``(n,)``.
    """

    members: Floats
    others: Floats
    member_classes: Floats
    other_classes: Floats

    def of_class(self, number: int) -> tuple[Floats, Floats]:
        """Scores of the patients of a class."""
        return self.members[self.member_classes == number], self.others[self.other_classes == number]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an attack measured, before all attacks' p-values are looked at together.

    Args:
        attack: Registered name.
        made: The attack.
        scores: Of members and non-members.
        auroc: Of members against non-members.
        rates: True-positive rate per false-positive rate; ``None`` below the resolution.
        p_value: That members score like others, corrected for the number of tests of this attack.
        tests: How many tests that were.
        controls: Positive and negative.
        worst_class: Index and AUROC of the class with the largest AUROC, among those that have enough members.
        details: What it found beside the scores.
    """

    attack: str
    made: MembershipAttack
    scores: Scores
    auroc: Estimate
    rates: Mapping[float, Estimate | None]
    p_value: float
    tests: int
    controls: tuple[ControlOutcome, ...]
    worst_class: tuple[int, Estimate] | None
    details: Details


def measure(
    attack: str,
    made: MembershipAttack,
    prepared: Prepared,
    guilty: Guilty,
    *,
    release: Exposed,
    control: Exposed,
    control_name: str,
    pool: Pool,
    policy: AuditPolicy,
    seed: int,
) -> Measured:
    """Score a release and its two controls.

    Args:
        attack: Registered name.
        made: The attack.
        prepared: The attack after its preparation on the candidates.
        guilty: The positive control.
        release: What is audited.
        control: A release of patients of whom none is a candidate.
        control_name: What that is, in words.
        pool: Who is attacked.
        policy: When an audit passes.
        seed: Public seed.
    """
    scores = _scored(prepared, release, pool)
    area = statistics.auroc(scores.members, scores.others)
    rates = {fpr: statistics.tpr_at_fpr(scores.members, scores.others, fpr=fpr) for fpr in policy.fprs}
    resolved = [fpr for fpr, rate in rates.items() if rate is not None]
    coins = derive_seed(seed, f"coins of {attack}")
    single = [statistics.randomisation_p_value(scores.members, scores.others, seed=coins)]
    single += [statistics.top_p_value(scores.members, scores.others, share=fpr) for fpr in resolved]
    return Measured(
        attack=attack,
        made=made,
        scores=scores,
        auroc=area,
        rates=rates,
        p_value=min(1.0, len(single) * min(single)),
        tests=len(single),
        controls=(
            _positive(made, prepared, guilty),
            _negative(prepared, control, control_name, pool),
        ),
        worst_class=_worst_class(scores, policy.class_patients),
        details=_details(prepared, release, pool),
    )


def split_scores(scores: Floats, candidates: ImageSet, members: frozenset[str]) -> Scores:
    """Scores of members apart from those of others."""
    first = dict(reversed(list(zip(candidates.patients, candidates.classes.tolist(), strict=True))))
    classes = np.array([first[patient] for patient in candidates.unique_patients], dtype=float)
    inside = np.array([patient in members for patient in candidates.unique_patients])
    return Scores(
        members=scores[inside],
        others=scores[~inside],
        member_classes=classes[inside],
        other_classes=classes[~inside],
    )


def _positive(made: MembershipAttack, prepared: Prepared, guilty: Guilty) -> ControlOutcome:
    scores = split_scores(prepared.score(guilty.release, guilty.candidates), guilty.candidates, guilty.members)
    found = statistics.auroc(scores.members, scores.others)
    return ControlOutcome(
        name=f"positive: {made.guilty_of}",
        expected=f"AUROC of at least {made.wanted:g}, with an interval above {_CLEARLY:g}",
        observed=f"AUROC {found}",
        passed=found.value >= made.wanted and found.low > _CLEARLY,
    )


def _scored(prepared: Prepared, release: Exposed, pool: Pool) -> Scores:
    return split_scores(prepared.score(release, pool.candidates), pool.candidates, pool.members)


def _details(prepared: Prepared, release: Exposed, pool: Pool) -> Details:
    if not isinstance(prepared, Detailed):
        return Details()
    return prepared.details(release, pool.candidates, pool.members)


def _negative(prepared: Prepared, control: Exposed, name: str, pool: Pool) -> ControlOutcome:
    scores = _scored(prepared, control, pool)
    found = statistics.auroc(scores.members, scores.others, confidence=CONTROL_CONFIDENCE)
    return ControlOutcome(
        name=f"negative: {name}",
        expected=f"the {CONTROL_CONFIDENCE:.0%} interval of the AUROC covers 0.5",
        observed=f"AUROC {found}",
        passed=found.low <= 0.5 <= found.high,
    )


def _worst_class(scores: Scores, fewest: int) -> tuple[int, Estimate] | None:
    found = []
    for number in np.unique(scores.member_classes):
        members, others = scores.of_class(int(number))
        if min(len(members), len(others)) >= fewest:
            found.append((int(number), statistics.auroc(members, others)))
    return max(found, key=lambda entry: entry[1].value, default=None)


def conclude(
    measured: Measured,
    *,
    corrected: float,
    attacks: int,
    policy: AuditPolicy,
    classes: tuple[str, ...],
    ceiling: float | None,
) -> AttackOutcome:
    """What follows from one attack.

    Args:
        measured: What it measured.
        corrected: Its p-value after Holm's correction over all attacks.
        attacks: How many attacks the correction is over.
        policy: When an audit passes.
        classes: Class names.
        ceiling: Largest membership AUROC that the claimed epsilon allows; ``None`` where none is claimed.
    """
    area, count = measured.auroc, len(measured.scores.members) + len(measured.scores.others)
    detectable = statistics.minimum_detectable_auroc(
        len(measured.scores.members), len(measured.scores.others), alpha=policy.alpha / (measured.tests * attacks)
    )
    found = corrected < policy.alpha
    exposed = [rate.high for fpr, rate in measured.rates.items() if rate is not None and fpr <= _SMALL_FPR]
    contradicted = ceiling is not None and found and max(area.low, 1 - area.high) > ceiling
    within = max(area.high, 1 - area.low) <= policy.auroc_high and max(exposed, default=0.0) <= policy.tpr_high
    told = measured.details.excess > policy.attribute_excess
    within &= not told
    verdict = _verdict(
        valid=all(control.passed for control in measured.controls),
        within=within and not contradicted,
        found=found,
        enough=count >= policy.fewest_patients,
    )
    return AttackOutcome(
        attack=measured.attack,
        question=measured.made.question,
        auroc=area,
        tpr_at_fpr={f"{fpr:g}": rate for fpr, rate in measured.rates.items()},
        p_value=corrected,
        minimum_detectable_auroc=detectable,
        findings=_findings(measured, classes, ceiling),
        controls=measured.controls,
        verdict=verdict,
        summary=_TOLD.format(measured.details.excess)
        if told and verdict is Verdict.FAIL
        else _summary(verdict, area, detectable, corrected, found=found),
        roc=statistics.roc(measured.scores.members, measured.scores.others),
    )


def _findings(measured: Measured, classes: tuple[str, ...], ceiling: float | None) -> dict[str, float]:
    found = dict(measured.details.findings)
    if measured.worst_class is not None:
        number, area = measured.worst_class
        found[f"largest_auroc_of_a_class_({classes[number]})"] = round(area.value, 3)
        found["largest_auroc_of_a_class,_upper_limit"] = round(area.high, 3)
    if ceiling is not None:
        found["largest_auroc_the_claimed_epsilon_allows"] = round(ceiling, 3)
    return found


def auroc_ceiling(epsilon: float, delta: float) -> float:
    r"""Largest AUROC of any membership attack on a Gaussian mechanism that is exactly (epsilon, delta)-private.

    The best test has the AUROC :math:`\Phi(\mu / \sqrt 2)`, with :math:`\mu` from

    .. math:: \delta = \Phi(-\epsilon/\mu + \mu/2) - e^\epsilon \Phi(-\epsilon/\mu - \mu/2).

    References:
        Dong, Roth & Su 2022, arXiv:1905.02383, corollary 2.13.
    """
    if math.isinf(epsilon):
        return 1.0
    low, high = 1e-6, 100.0
    while high - low > 1e-9 * high:
        mu = (low + high) / 2
        spent = stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(
            epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2)
        )
        low, high = (mu, high) if spent <= delta else (low, mu)
    return float(stats.norm.cdf(low / math.sqrt(2)))


def _verdict(*, valid: bool, within: bool, found: bool, enough: bool) -> Verdict:
    if not valid:
        return Verdict.INVALID
    if not within and found:
        return Verdict.FAIL
    if not within or not enough:
        return Verdict.NOT_ESTIMABLE
    return Verdict.PASS


def _summary(verdict: Verdict, area: Estimate, detectable: float, p_value: float, *, found: bool) -> str:
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
