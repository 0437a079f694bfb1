"""One self-contained page for the data protection officer.

No script, no network, no second file: style is inline, pictures are ``data:`` addresses, and a content security
policy in the page forbids the browser everything else. Whatever comes from outside (class names, reasons,
summaries) is escaped by the template engine. Numbers of real patients are rounded here, so a page can always be
passed on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medistill.core.distilled import DistilledSet, Recipe, Schedule
from medistill.core.reports import ArmResult, AttackOutcome, AuditReport, DiagnosticReport, Estimate, Verdict
from medistill.core.task import TaskKind
from medistill.errors import DataError
from medistill.ingest.quarantine import REASON_CODES
from medistill.report import wording
from medistill.report.disclosure import (
    NOT_COVERED_NOTE,
    ROUNDING_NOTE,
    public_cohort,
    public_commands,
)
from medistill.report.plots import Axis, Track, auroc_axis, full_axis, track
from medistill.report.png import MIDDLE_SLICES, picture_source
from medistill.report.templates import style, template
from medistill.report.wording import three_lines

if TYPE_CHECKING:
    pass

__all__ = ["render_report", "three_lines"]

_MOST_PICTURES = 120
_MOST_BARS = 5
_STAGE_PICTURES = 6
_VOLUME_AXES = 5
_AUROC = "AUROC (0.5 is chance)"
_SYMBOLS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.INVALID: "!", Verdict.NOT_ESTIMABLE: "?"}


def render_report(
    *,
    distilled: DistilledSet,
    audit: AuditReport | None,
    diagnosis: DiagnosticReport | None,
    cohort: Mapping[str, Any] | None,
    snapshots: Mapping[str, Tensor] | None = None,
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
        commands: Commands that make the release again; absolute paths and addresses are masked.
        forced_reason: Why it is released without regard to the gate; a prominent warning.
        name: Title of the page.
        licence: Terms of use in the data owner's words.
        versions: Software name to version.

    Returns:
        HTML; the same arguments give the same text.

    Raises:
        DataError: If a snapshot has another number of images than the set, or the summary of the cohort has
            an unknown part.

    Privacy:
        Reads counts and measurements of real patients; every count is rounded down to tens.
    """
    summary = three_lines(distilled, audit, diagnosis)
    return template("template.html.j2").render(
        name=wording.one_line(name),
        style=style("page.css"),
        summary=dict(zip(("What it is", "What is guaranteed", "What was measured"), summary, strict=True)),
        badges=_badges(distilled, audit),
        warnings=wording.warnings_of(distilled, audit, forced_reason),
        classes=_classes(distilled),
        multilabel=distilled.task.kind is TaskKind.MULTILABEL,
        mosaic=len(distilled.views) if distilled.views is not None and distilled.views.are_tiles else 0,
        volumes=MIDDLE_SLICES if distilled.images.ndim == _VOLUME_AXES else "",
        stages=_stages(distilled, snapshots),
        privacy=_privacy(distilled),
        audit=None if audit is None else _audit(audit, bool(snapshots)),
        diagnosis=None if diagnosis is None else _diagnosis(diagnosis, released=len(distilled)),
        flow=None if cohort is None else _flow(cohort),
        recipe=_recipe(distilled),
        versions={"medistill": distilled.recipe.version, **(versions or {})},
        commands=public_commands(commands),
        licence=licence,
        rounding_note=ROUNDING_NOTE,
        not_covered_note=NOT_COVERED_NOTE,
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


def _classes(distilled: DistilledSet) -> list[dict[str, Any]]:
    """Per class its pictures with soft labels; of large sets the first ones of each class."""
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    limit = max(1, _MOST_PICTURES // len(names))
    return [
        {
            "name": name,
            "count": labels.count(c),
            "five": labels.count(c) in (5, 10, 15, 20) and distilled.images.ndim < _VOLUME_AXES,
            "pictures": [_picture(distilled, i) for i in _of_class(labels, c)[:limit]],
        }
        for c, name in enumerate(names)
    ]


def _of_class(labels: list[int], wanted: int) -> list[int]:
    return [i for i, label in enumerate(labels) if label == wanted]


def _picture(distilled: DistilledSet, index: int) -> dict[str, Any]:
    names, own = distilled.task.class_names, int(distilled.hard_labels[index])
    shares: list[float] = distilled.soft_labels[index].tolist()
    order = list(range(len(names)))
    if len(names) > _MOST_BARS:
        order = sorted(order, key=lambda c: (-shares[c], c))[:_MOST_BARS]
    spoken = ", ".join(f"{names[c]} {shares[c]:.2f}" for c in order)
    what = "volume" if distilled.images.ndim == _VOLUME_AXES else "image"
    return {
        "number": index + 1,
        "source": picture_source(distilled.images[index]),
        "alt": f"Distilled {what} {index + 1} of {len(distilled)}, made for {names[own]}; soft label {spoken}",
        "bars": [
            {"name": names[c], "share": f"{shares[c]:.2f}", "width": f"{100 * shares[c]:.1f}", "own": c == own}
            for c in order
        ],
        "others": len(names) - len(order),
    }


def _stages(distilled: DistilledSet, snapshots: Mapping[str, Tensor] | None) -> dict[str, Any] | None:
    """A few images at each stage, the same ones throughout; nothing where the first stage would be a patient."""
    if not snapshots:
        return None
    if distilled.recipe.starts_from_real:
        return {"withheld": True, "rows": []}
    for stage in snapshots.values():
        if len(stage) != len(distilled):
            raise DataError(f"Expected snapshots of {len(distilled)} images, got {len(stage)}.")
    shown = _one_of_each(distilled)
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    rows = [
        {
            "name": stage.replace("_", " "),
            "pictures": [
                {
                    "source": picture_source(images[i]),
                    "alt": f"Image {i + 1}, made for {names[labels[i]]}, at stage {stage.replace('_', ' ')}",
                }
                for i in shown
            ],
        }
        for stage, images in _in_order(snapshots, distilled.recipe)
    ]
    return {"withheld": False, "rows": rows, "numbers": [i + 1 for i in shown]}


def _in_order(snapshots: Mapping[str, Tensor], recipe: Recipe) -> list[tuple[str, Tensor]]:
    """Stages as they followed each other: the start, what belongs to each step of the recipe, then the rest.

    Within a step the given order is kept; a file that sorted the names does not change the story.
    """
    steps = [step.distiller for step in recipe.steps]

    def place(stage: str) -> int:
        if stage == "start":
            return -1
        return next((i for i, name in enumerate(steps) if stage.startswith(name)), len(steps))

    return sorted(snapshots.items(), key=lambda item: place(item[0]))


def _one_of_each(distilled: DistilledSet) -> list[int]:
    """The first image of every class, then the second of every class, as long as there is room."""
    labels = distilled.hard_labels.tolist()
    by_class = [_of_class(labels, c) for c in range(distilled.task.n_classes)]
    order = [own[turn] for turn in range(distilled.ipc) for own in by_class if turn < len(own)]
    return sorted(order[:_STAGE_PICTURES], key=lambda i: (labels[i], i))


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
        **{key.replace("_", " "): f"{value:g}" for key, value in sorted(outcome.findings.items())},
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


def _diagnosis(diagnosis: DiagnosticReport, *, released: int) -> dict[str, Any]:
    found = {metric for arm in diagnosis.arms for metric in arm.metrics}
    metrics = [*(m for m in wording.METRICS if m in found), *sorted(found - wording.METRICS.keys())]
    axis = auroc_axis([arm.metrics["auroc"] for arm in diagnosis.arms if "auroc" in arm.metrics])
    confidences = sorted({e.confidence for arm in diagnosis.arms for e in arm.metrics.values()})
    return {
        "metrics": [wording.metric_label(metric) for metric in metrics],
        "networks": [
            {
                "name": name,
                "rows": [_arm(arm, metrics, axis, released) for arm in arms],
                "classes": _class_rows(arms),
            }
            for name, arms in _by_network(diagnosis)
        ],
        "class_names": [wording.one_line(name) for name in diagnosis.class_names],
        "axis": axis,
        "confidence": " / ".join(f"{100 * confidence:g} %" for confidence in confidences),
    }


def _by_network(diagnosis: DiagnosticReport) -> list[tuple[str, list[ArmResult]]]:
    names = dict.fromkeys(arm.network for arm in diagnosis.arms)
    return [(name, [arm for arm in diagnosis.arms if arm.network == name]) for name in names]


def _class_rows(arms: list[ArmResult]) -> list[dict[str, Any]]:
    """AUROC of every class, for tasks where it is not the AUROC of all."""
    return [
        {
            "arm": arm.arm.replace("_", " "),
            "released": arm.arm.startswith("distilled"),
            "split": arm.split.replace("_", " "),
            "cells": [wording.interval(estimate) for estimate in arm.class_auroc.values()],
        }
        for arm in arms
        if arm.class_auroc
    ]


def _arm(arm: ArmResult, metrics: list[str], axis: Axis, released: int) -> dict[str, Any]:
    auroc: Estimate | None = arm.metrics.get("auroc")
    place: Track | None = track(auroc, axis) if auroc else None
    exact = arm.images == released
    return {
        "arm": arm.arm.replace("_", " "),
        "meaning": wording.ARMS.get(arm.arm, ""),
        "released": arm.arm.startswith("distilled"),
        "network": arm.network,
        "split": arm.split.replace("_", " "),
        "images": str(arm.images) if exact else wording.at_least(arm.images),
        "seeds": arm.seeds,
        "patients": wording.at_least(min((e.n for e in arm.metrics.values()), default=0)),
        "cells": [_cell(arm, metric) for metric in metrics],
        "auroc": wording.interval(auroc),
        "track": place,
    }


def _cell(arm: ArmResult, metric: str) -> dict[str, str]:
    estimate = arm.metrics.get(metric)
    if estimate is None or not math.isfinite(estimate.value):
        return {"value": wording.NOT_ESTIMABLE, "interval": "", "seeds": ""}
    deviation = arm.seed_deviation.get(metric)
    return {
        "value": f"{estimate.value:.3f}",
        "interval": f"[{estimate.low:.3f}, {estimate.high:.3f}]",
        "seeds": f"± {deviation:.3f} over seeds" if deviation is not None and arm.seeds > 1 else "",
    }


def _flow(cohort: Mapping[str, Any]) -> dict[str, Any]:
    public = public_cohort(cohort)
    counts: dict[str, dict[str, int]] = public["splits"]
    columns = list(dict.fromkeys(column for row in counts.values() for column in row))
    rows = [
        {
            "split": split,
            "purpose": wording.SPLITS.get(split, ""),
            "cells": [wording.at_least(row[column]) if column in row else "–" for column in columns],
        }
        for split, row in counts.items()
        if any(cohort["splits"][split].values())
    ]
    quarantine = [
        {"code": code, "sentence": REASON_CODES.get(code, ""), "files": wording.at_least(files)}
        for code, files in public["quarantine"].items()
        if cohort["quarantine"][code]
    ]
    return {
        "columns": [name if name in ("images", "patients") else f"images: {name}" for name in columns],
        "rows": rows,
        "quarantine": quarantine,
        "quarantine_known": "quarantine" in cohort,
        "modality": [
            {"name": name or "not given", "images": wording.at_least(images)}
            for name, images in public["modality"].items()
        ],
        "profile": public["profile"],
    }


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
