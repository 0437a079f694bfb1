"""One self-contained page for the data protection officer.

No script, no network, no second file: style is inline, pictures are ``data:`` addresses, and a content security
policy in the page forbids the browser everything else. Whatever comes from outside (class names, reasons,
summaries) is escaped by the template engine. Numbers of real patients are rounded here, so a page can always be
passed on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.reports import AttackOutcome, AuditReport, DiagnosticReport, Verdict
from medistill.core.task import TaskKind
from medistill.distill.watch import Look
from medistill.report import wording
from medistill.report.diagnosis import diagnosis_section
from medistill.report.disclosure import NOT_COVERED_NOTE, ROUNDING_NOTE, public_commands
from medistill.report.flow import data_flow
from medistill.report.pictures import compressed, formation, pictures_by_class
from medistill.report.plots import full_axis, track
from medistill.report.png import MIDDLE_SLICES
from medistill.report.templates import markup, style, template
from medistill.report.wording import three_lines

__all__ = ["render_report", "three_lines"]

_VOLUME_AXES = 5
_AUROC = "AUROC (0.5 is chance)"
_CHECK = ("medistill verify RELEASE --key OWNER.pub",)
_USE = ("medistill train RELEASE --out MODEL", "medistill predict MODEL FILE.dcm --out predictions.csv")
_WORDS = {
    "AUROC": "How well scores separate two kinds of patients: the chance that a patient with the finding scores "
    "higher than one without. 0.5 is a coin, 1 is perfect.",
    "average precision": "Mean share of true findings among the images that score highest, over all cut-offs; "
    "chance is the share of images with the finding.",
    "calibration error (ECE)": "Mean distance between predicted probability and what was so. 0 is best. Few "
    "patients look less calibrated than many, so that its interval, from patients drawn again, can lie above it.",
    "delta": "Small probability with which the bound of epsilon may fail.",
    "diagnostic sensitivity": "Share of those with the finding who are found. Specificity: share of those without "
    "who are left in peace. Both at a cut-off that was chosen on other patients. Harmonic mean and balanced "
    "accuracy sum up the two.",
    "epsilon": "Proved bound on what the release can tell about one patient, whatever an attacker knows. The "
    "smaller the better; 0 would tell nothing.",
    "hard label": "One class for each image, with no shares.",
    "interval": "Range in which a figure would lie if other patients of the same kind had been drawn.",
    "p-value": "How often chance alone would show this much. Small: chance is no good explanation. Large: nothing "
    "was shown either way.",
    "soft label": "The shares of the classes that a network is taught to answer for an image.",
}
_SYMBOLS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.INVALID: "!", Verdict.NOT_ESTIMABLE: "?"}


def render_report(
    *,
    distilled: DistilledSet,
    audit: AuditReport | None,
    diagnosis: DiagnosticReport | None,
    cohort: Mapping[str, Any] | None,
    snapshots: Mapping[str, Tensor] | None = None,
    moments: Sequence[Look] = (),
    commands: tuple[str, ...] = (),
    forced_reason: str | None = None,
    name: str = "Distilled image release",
    licence: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """Render the report.

    Args:
        distilled: Images with labels, recipe, schedule and privacy statement.
        audit: What the audit concluded; ``None`` where none was made, which the page says first.
        diagnosis: Arms side by side.
        cohort: Summary of the cohort: ``splits``, ``quarantine`` and ``profile``.
        snapshots: Named stages of how the images formed, in order, each like ``distilled.images``; not shown for a
            set that starts from real images.
        moments: Looks at the images as they formed, in order; shown instead of most stages, and no more than they
            for a set that starts from real images.
        commands: Commands that make the release again; absolute paths and addresses are masked.
        forced_reason: Why it is released without regard to the gate; a prominent warning.
        name: Title of the page.
        licence: Terms of use in the data owner's words.
        versions: Software name to version.

    Returns:
        HTML; the same arguments give the same text.

    Raises:
        DataError: If a snapshot or moment has another number of images than the set, or the summary of the cohort
            has an unknown part.

    Privacy:
        Reads counts and measurements of real patients; every count is rounded down to tens.
    """
    summary = three_lines(distilled, audit, diagnosis)
    classes, stages = pictures_by_class(distilled), formation(distilled, snapshots, moments)
    return template("template.html.j2").render(
        name=wording.one_line(name),
        style=style("page.css"),
        summary=dict(zip(("What it is", "What is guaranteed", "What was measured"), summary, strict=True)),
        badges=_badges(distilled, audit),
        warnings=wording.warnings_of(distilled, audit, forced_reason),
        classes=classes,
        exact=not compressed(one["source"] for own in classes for one in own["pictures"]),
        multilabel=distilled.task.kind is TaskKind.MULTILABEL,
        mosaic=len(distilled.views) if distilled.views is not None and distilled.views.are_tiles else 0,
        volumes=MIDDLE_SLICES if distilled.images.ndim == _VOLUME_AXES else "",
        stages=stages,
        privacy=_privacy(distilled),
        audit=None if audit is None else _audit(audit, stages is not None and not stages["withheld"]),
        diagnosis=None
        if diagnosis is None
        else markup(diagnosis_section(diagnosis, released=len(distilled), kind=distilled.task.kind)),
        flow=data_flow(cohort, distilled),
        recipe=_recipe(distilled),
        versions={"medistill": distilled.recipe.version, **(versions or {})},
        commands=public_commands(commands),
        licence=licence,
        rounding_note=ROUNDING_NOTE,
        not_covered_note=NOT_COVERED_NOTE,
        parts=template("parts.html.j2").module,
        words=_WORDS,
        check=_CHECK,
        use=_USE,
    )


def _badges(distilled: DistilledSet, audit: AuditReport | None) -> list[dict[str, str]]:
    privacy = distilled.privacy
    proved = math.isfinite(privacy.epsilon)
    guarantee = f"ε = {privacy.epsilon:.3g} per patient" if proved else "none"
    verdict = audit.verdict if audit is not None else None
    return [
        {"kind": "proved" if proved else "bad", "label": "Guarantee", "value": guarantee, "symbol": ""},
        {
            "kind": wording.mark(verdict),
            "label": "Audit",
            "value": wording.NOT_AUDITED if verdict is None else verdict.value.replace("_", " "),
            "symbol": "–" if verdict is None else _SYMBOLS[verdict],
        },
    ]


def _privacy(distilled: DistilledSet) -> dict[str, Any]:
    privacy = distilled.privacy
    proved = math.isfinite(privacy.epsilon)
    facts = {"Who is protected": "each patient, with all of the patient's images"} if proved else {}
    facts["Epsilon"] = f"{privacy.epsilon:.3g}" if proved else "infinite (nothing is proved)"
    if proved:
        facts["Delta"] = f"{privacy.delta:.1e}"
        facts["Compared cohorts"] = privacy.relation.value.replace("-", " ")
        facts["Computed by"] = ", ".join(privacy.accountants)
        facts["Best possible guess about one patient"] = (
            f"right at most {wording.at_most(wording.best_guess(privacy))} of the time, from even odds"
        )
    return {
        "proved": proved,
        "sentence": wording.one_line(privacy.sentence),
        "meaning": wording.guarantee_meaning(privacy),
        "facts": facts,
        "assumptions": privacy.assumptions,
    }


def _audit(audit: AuditReport, staged: bool) -> dict[str, Any]:
    not_tested = list(audit.not_tested)
    if staged:
        not_tested.append(
            "the intermediate images under “How the images formed”, which were not attacked on their own"
        )
    return {
        "verdict": audit.verdict.value.replace("_", " "),
        "kind": wording.mark(audit.verdict),
        "wording": wording.VERDICTS[audit.verdict],
        "threat_model": audit.threat_model,
        "members": wording.at_least(audit.members),
        "non_members": wording.at_least(audit.non_members),
        "not_tested": not_tested,
        "attacks": [_attack(outcome) for outcome in audit.outcomes],
    }


def _attack(outcome: AttackOutcome) -> dict[str, Any]:
    axis = full_axis()
    limit = outcome.minimum_detectable_auroc
    usable = limit is not None and math.isfinite(limit)
    absent = "this attack has no such figure"
    figures = {
        _AUROC: wording.interval(outcome.auroc) if outcome.auroc else absent,
        "Smallest detectable AUROC": wording.number(limit) if outcome.auroc or usable else absent,
        "p-value (chance of this without any leak)": wording.p_value(outcome.p_value),
        **{f"Members found at {_rate(fpr)}": wording.interval(rate) for fpr, rate in outcome.tpr_at_fpr.items()},
        **{key.replace("_", " "): f"{value:.4g}" for key, value in sorted(outcome.findings.items())},
    }
    return {
        "name": outcome.attack.replace("_", " "),
        "question": outcome.question,
        "summary": outcome.summary,
        "verdict": outcome.verdict.value.replace("_", " "),
        "kind": wording.mark(outcome.verdict),
        "symbol": _SYMBOLS[outcome.verdict],
        "figures": figures,
        "auroc": figures[_AUROC],
        "track": None if outcome.auroc is None else track(outcome.auroc, axis),
        "limit": axis.position(limit) if limit is not None and usable else None,
        "axis": axis,
        "controls": outcome.controls,
        "invalid": _first_upper("; ".join(wording.control_problems(outcome))),
    }


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rate(fpr: str) -> str:
    """A false-positive rate in words; keys that are no number are shown as they are."""
    try:
        return f"{float(fpr) * 100:g} % false alarms (TPR)"
    except ValueError:
        return fpr.replace("_", " ")


def _recipe(distilled: DistilledSet) -> dict[str, Any]:
    recipe = distilled.recipe
    return {
        "steps": [
            {"distiller": step.distiller, "settings": dict(sorted(step.settings.items()))} for step in recipe.steps
        ],
        "ipc": recipe.ipc,
        "seed": recipe.seed,
        "fingerprint": recipe.fingerprint(),
        "shape": " × ".join(map(str, distilled.images.shape[1:])),
        "schedule": dict(_schedule(distilled.schedule)),
    }


def _schedule(schedule: Schedule) -> Iterator[tuple[str, str]]:
    yield "epochs", str(schedule.epochs)
    yield "learning rate", f"{schedule.learning_rate:g} (cosine-decayed)"
    yield "optimizer", schedule.optimizer
    yield "batch size", str(schedule.batch_size) if schedule.batch_size else "the whole set"
    yield "weight decay", f"{schedule.weight_decay:g}"
    yield "augmentation", "label-preserving" if schedule.augment else "none"
