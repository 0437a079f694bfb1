"""Plain words for what is guaranteed and what was measured; the two are never mixed in one sentence.

Rules: no release is called nameless or free of personal data; a diagnostic rate is always called *diagnostic
sensitivity*; without differential privacy the best wording is "no leak found at this power".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from medistill.core.distilled import DistilledSet, Recipe
from medistill.core.guarantee import PrivacyStatement
from medistill.core.reports import ArmResult, AttackOutcome, AuditReport, DiagnosticReport, Estimate, Verdict
from medistill.core.task import TaskKind
from medistill.report.disclosure import rounded

_VOLUME_AXES = 5
NOT_ESTIMABLE = "not estimable"
TOO_FEW = "too few patients to be shown"
NOT_AUDITED = "NOT AUDITED"
WEAK_GUESS = 0.96  #: a guarantee is called weak when a guess can be right more often (epsilon above 3.1)

VERDICTS = {
    Verdict.PASS: "no leak beyond the policy's limits found at this power",
    Verdict.FAIL: "a leak was found",
    Verdict.INVALID: "the audit does not count: a control is missing or failed",
    Verdict.NOT_ESTIMABLE: "too few patients to conclude anything",
}
METRICS = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "harmonic_mean": "harmonic mean",
    "diagnostic_sensitivity": "diagnostic sensitivity",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
    "ece": "calibration error (ECE)",
}
ARMS = {
    "real": "all real training images",
    "random": "as many real images, drawn at random",
    "random_soft": "as many real images, drawn at random, with soft labels of a network that saw all",
    "herding": "as many real images, chosen to match the mean of their class",
    "coreset": "as many real images, chosen",
    "distilled": "this release, soft labels",
    "distilled_hard": "this release, hard labels",
}
SPLITS = {
    "train": "distilled from",
    "validation": "chose schedules and operating points",
    "holdout": "never touched by distillation: the audit's non-members",
    "test": "measured the diagnosis",
}


@dataclass(frozen=True, kw_only=True)
class Warned:
    """One prominent warning: a short title and the sentence that explains it."""

    title: str
    text: str


def one_line(text: str) -> str:
    """Text from outside on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def at_most(share: float) -> str:
    """A proved upper bound as a percentage: rounded up, and never to 100 unless it is 1."""
    for decimals in range(1, 10):
        steps = math.ceil(share * 100 * 10**decimals - 1e-6)
        if steps < 100 * 10**decimals:
            return f"{steps / 10**decimals:.{decimals}f} %"
    return "100 %"


def number(value: float | None) -> str:
    """A figure with three decimals, or "not estimable"."""
    return NOT_ESTIMABLE if value is None or not math.isfinite(value) else f"{value:.3f}"


def p_value(value: float) -> str:
    """A p-value; very small ones are bounded, not printed as zero."""
    if not math.isfinite(value):
        return NOT_ESTIMABLE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(estimate: Estimate | None) -> str:
    """An estimate with its interval, or "not estimable"."""
    if estimate is None or not math.isfinite(estimate.value):
        return NOT_ESTIMABLE
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def cell(estimate: Estimate | None, *, seeds: float | None = None, signed: bool = False) -> dict[str, str]:
    """An estimate, its interval and its deviation over trainings apart, for a narrow cell of a table.

    Args:
        estimate: What was measured.
        seeds: Standard deviation over trainings.
        signed: Whether it is a difference, of which every number has its sign.
    """
    if estimate is None or not math.isfinite(estimate.value):
        return {"value": NOT_ESTIMABLE, "interval": "", "seeds": ""}
    write = _signed if signed else "{:.3f}".format
    return {
        "value": write(estimate.value),
        "interval": f"[{write(estimate.low)}, {write(estimate.high)}]",
        "seeds": "" if seeds is None else f"± {seeds:.3f}",
    }


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def ordered_metrics(found: Iterable[str]) -> list[str]:
    """Metrics in the order of :data:`METRICS`, others after them."""
    names = set(found)
    return [*(name for name in METRICS if name in names), *sorted(names - METRICS.keys())]


def is_released(arm: str) -> bool:
    """Whether a training set is the release itself."""
    return arm.startswith("distilled")


def metric_label(name: str) -> str:
    """A metric's name for a reader; a bare "sensitivity" becomes "diagnostic sensitivity"."""
    name = "diagnostic_sensitivity" if name == "sensitivity" else name
    return METRICS.get(name, name.replace("_", " "))


def best_guess(privacy: PrivacyStatement) -> float:
    r"""Largest chance of guessing rightly whether a patient took part, starting from even odds.

    Under :math:`(\varepsilon, \delta)` differential privacy no test separates two neighbouring cohorts better, so
    a guess is right with probability at most :math:`(e^\varepsilon + \delta) / (e^\varepsilon + 1)`.

    Returns:
        A number in ``[0.5, 1]``; ``1`` where nothing is proved.

    References:
        Kairouz, Oh and Viswanath, 2015, arXiv:1311.0776.
    """
    if privacy.epsilon > 700:
        return 1.0
    odds = math.exp(privacy.epsilon)
    return min(1.0, (odds + privacy.delta) / (odds + 1))


def guarantee_meaning(privacy: PrivacyStatement) -> str:
    """What the statement means for one patient, in words."""
    if math.isinf(privacy.epsilon):
        return (
            "Nothing is proved about any patient. What an attacker could learn is limited only by what the audit "
            "looked for, and an audit cannot show the absence of a leak."
        )
    return (
        "Take any one patient. Somebody who knows everything else and starts with even odds guesses at best "
        f"{at_most(best_guess(privacy))} of the time rightly whether this patient's images were used; 50 % is "
        "pure chance. This holds whatever else is known, now or later, and for everything that is computed from "
        "the released images."
    )


def method(recipe: Recipe) -> str:
    """The distillers in order, in words."""
    return ", then ".join(words(step.distiller) for step in recipe.steps)


def what_it_is(distilled: DistilledSet) -> str:
    """The release in one sentence."""
    names = ", ".join(one_line(name) for name in distilled.task.class_names)
    things = "volumes" if distilled.images.ndim == _VOLUME_AXES else "images"
    real = distilled.recipe.starts_from_real
    kind = f"{things} that began as real patients' {things}" if real else f"synthetic {things}"
    joint = "; an image may show several" if distilled.task.kind is TaskKind.MULTILABEL else ""
    return (
        f"{len(distilled)} {kind} with soft labels ({distilled.ipc} for each of {distilled.task.n_classes} "
        f"classes: {names}{joint}), made by {method(distilled.recipe)} to train a diagnostic model."
    )


def what_is_guaranteed(privacy: PrivacyStatement) -> str:
    """The guarantee in one sentence; no measurement enters it."""
    sentence = one_line(privacy.sentence)
    if math.isinf(privacy.epsilon):
        return sentence
    return (
        f"{sentence.removesuffix('.')}: from even odds, whether a certain patient's images were used can "
        f"be guessed rightly at most {at_most(best_guess(privacy))} of the time."
    )


def what_was_measured(audit: AuditReport | None, diagnosis: DiagnosticReport | None) -> str:
    """Audit and diagnosis in one sentence; no guarantee enters it."""
    return f"{_audit_clause(audit)}; {_diagnosis_clause(diagnosis)}."


def three_lines(
    distilled: DistilledSet, audit: AuditReport | None, diagnosis: DiagnosticReport | None
) -> tuple[str, str, str]:
    """What it is, what is guaranteed, what was measured: one plain sentence each.

    Privacy:
        Reads audit and diagnosis figures measured on real patients; numbers of patients are rounded down to tens.
    """
    return (
        what_it_is(distilled),
        what_is_guaranteed(distilled.privacy),
        what_was_measured(audit, diagnosis),
    )


def _audit_clause(audit: AuditReport | None) -> str:
    if audit is None:
        return "No attack was run, so nothing is known about leaks"
    attacks = len(audit.outcomes)
    power = weakest_power(audit)
    seen = f", able to see an AUROC of {power:.2f} or more" if power is not None else ""
    return (
        f"Audit {words(audit.verdict.value)}: {VERDICTS[audit.verdict]} "
        f"({attacks} attack{'' if attacks == 1 else 's'} on {at_least(audit.members)} members and "
        f"{at_least(audit.non_members)} other patients{seen})"
    )


def _diagnosis_clause(diagnosis: DiagnosticReport | None) -> str:
    released, real = headline(diagnosis, "distilled"), headline(diagnosis, "real")
    if released is None:
        return "how well a model trained on it diagnoses was not measured"
    reached, patients = interval(released.metrics["auroc"]), words(released.split)
    clause = f"a model trained on it reaches AUROC {reached} on {patients} patients"
    if real is not None:
        clause += f", against {interval(real.metrics['auroc'])} with all real images"
    return clause


def words(name: str) -> str:
    """A name of ours as words on one line."""
    return one_line(name).replace("_", " ")


def mark(verdict: Verdict | None) -> str:
    """Style of a verdict's mark on a page: ``good``, ``bad`` or ``unsure``."""
    if verdict is Verdict.PASS:
        return "good"
    return "bad" if verdict in (Verdict.FAIL, Verdict.INVALID) else "unsure"


def at_least(count: int) -> str:
    """A rounded number of patients in words, for example ``"at least 120"`` or ``"fewer than 10"``."""
    low = rounded(count)
    return f"at least {low}" if low else "fewer than 10"


def weakest_power(audit: AuditReport) -> float | None:
    """The largest of the attacks' smallest detectable AUROCs; ``None`` where no attack states one."""
    limits = [outcome.minimum_detectable_auroc for outcome in audit.outcomes]
    stated = [limit for limit in limits if limit is not None and math.isfinite(limit)]
    return max(stated, default=None)


def headline(diagnosis: DiagnosticReport | None, arm: str) -> ArmResult | None:
    """The first result of an arm with an AUROC (of the first network), on ``test`` where there is one."""
    if diagnosis is None:
        return None
    found = [result for result in diagnosis.arms if result.arm == arm and "auroc" in result.metrics]
    return min(found, key=lambda result: result.split != "test", default=None)


def _cause(outcome: AttackOutcome) -> str:
    """Why an attack has its verdict; what an invalid attack found is not repeated, as it does not count."""
    problems = control_problems(outcome) if outcome.verdict is Verdict.INVALID else ()
    return "; ".join(map(one_line, problems)) or one_line(outcome.summary)


def listed(*parts: str) -> str:
    """Clauses and sentences one after the other: a semicolon after a clause, a full stop after a sentence.

    Example:
        >>> listed("tracing: control failed", "shadow: no leak was shown.", "the claim is too large")
        'tracing: control failed; shadow: no leak was shown. The claim is too large'
    """
    text = ""
    for part in parts:
        if text.endswith((".", "!", "?")):
            text += f" {part[:1].upper()}{part[1:]}"
        else:
            text += f"; {part}" if text else part
    return text


def control_problems(outcome: AttackOutcome) -> tuple[str, ...]:
    """Why an attack's own verdict cannot count: controls that failed, or none at all."""
    if not outcome.controls:
        return ("no control was run",)
    return tuple(f"control failed: {control.name}" for control in outcome.controls if not control.passed)


def warnings_of(
    distilled: DistilledSet, audit: AuditReport | None, forced_reason: str | None
) -> tuple[Warned, ...]:
    """Everything a reader must not miss, most serious first."""
    found = []
    if forced_reason:
        found.append(
            Warned(
                title="Released without regard to the gate",
                text=f"The data owner decided so and gave this reason: {one_line(forced_reason)}",
            )
        )
    if distilled.recipe.starts_from_real:
        found.append(
            Warned(
                title="Starts from real images",
                text="At least one released image began as, or is, a patient's image. Treat the release as "
                "patient data.",
            )
        )
    if math.isinf(distilled.privacy.epsilon):
        found.append(Warned(title="No formal guarantee", text=guarantee_meaning(distilled.privacy)))
    elif best_guess(distilled.privacy) > WEAK_GUESS:
        found.append(
            Warned(
                title="Weak guarantee",
                text=f"Epsilon {distilled.privacy.epsilon:.3g} still allows a guess to be right "
                f"{at_most(best_guess(distilled.privacy))} of the time.",
            )
        )
    return (*found, *_audit_warnings(audit))


def _audit_warnings(audit: AuditReport | None) -> tuple[Warned, ...]:
    if audit is None:
        return (Warned(title="Not audited", text="No attack was run. Nothing is known about leaks."),)
    if audit.verdict is Verdict.PASS:
        return ()
    causes = [
        f"{words(outcome.attack)}: {_cause(outcome)}"
        for outcome in audit.outcomes
        if outcome.verdict is audit.verdict
    ]
    sentence = VERDICTS[audit.verdict].capitalize() + "."
    named = listed(sentence, *causes, *map(one_line, audit.refusals))
    title = f"Audit verdict: {audit.verdict.value.replace('_', ' ')}"
    return (Warned(title=title, text=named),)
