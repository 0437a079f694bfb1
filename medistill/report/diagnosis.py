"""What networks trained on the release diagnose beside those trained on real images: words first, then figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from medistill.core.reports import ArmResult, DiagnosticReport, Difference, Estimate, SubgroupResult
from medistill.core.task import TaskKind
from medistill.report import wording
from medistill.report.disclosure import joined_bins
from medistill.report.plots import Axis, auroc_axis, place
from medistill.report.reliability import reliability_chart, spoken
from medistill.report.subgroups import SHOWN_ARMS, subgroups
from medistill.report.templates import markup, template

_Judged = TypeVar("_Judged", ArmResult, Difference, SubgroupResult)
_LOWER_IS_BETTER = frozenset({"ece"})
_KINDS = {
    "against_real": (
        "Against all real images",
        "Each training set minus all real images. Below 0 the network learned less from it.",
    ),
    "label_recovery": (
        "Label recovery",
        "All real images minus the distilled ones, both with hard labels (as DD-Ranking defines it, arXiv "
        "2505.13300): what is lost without the help of soft labels. At 0 or below nothing is.",
    ),
    "improvement_over_random": (
        "Improvement over random",
        "Distilled images minus as many real ones drawn at random, both with soft labels (DD-Ranking): what "
        "distillation adds to soft labels alone. Above 0 it was worth it.",
    ),
}
_RULES = {
    "mean": "mean of the images' probabilities",
    "max": "highest probability of any image",
    "vote": "share of the images on which the network decides for the class",
}
_OBSERVED = {
    TaskKind.BINARY: "Predicted is the probability of {positive}, observed the share of images that show it.",
    TaskKind.MULTICLASS: "Predicted is the probability of the likeliest class, observed how often it is right.",
    TaskKind.MULTILABEL: "Predicted is the probability of a class, observed the share of images that show it; all "
    "classes together.",
}


def diagnosis_section(diagnosis: DiagnosticReport, *, released: int, kind: TaskKind) -> str:
    """Render the part of a page that says what the release is worth.

    The first network is shown in full; of others the figures and differences, for a page that can be read.

    Args:
        diagnosis: Arms side by side.
        released: Number of released images; arms trained on exactly so many keep their exact number.
        kind: Kind of the task.

    Returns:
        HTML for the inside of a section; the same arguments give the same text.

    Privacy:
        Reads measurements on real patients. Counts are rounded down to tens, and bins and groups of fewer than ten
        patients are not shown on their own.
    """
    axis = auroc_axis([arm.metrics["auroc"] for arm in diagnosis.arms if "auroc" in arm.metrics])
    blocks = list(dict.fromkeys((arm.network, arm.split) for arm in diagnosis.arms))
    confidences = sorted({e.confidence for arm in diagnosis.arms for e in arm.metrics.values()})
    values = {
        "confidence": " / ".join(f"{100 * confidence:g} %" for confidence in confidences),
        "sentences": list(_sentences(diagnosis)),
        "chance": _chance(diagnosis),
        "sets": _training_sets(diagnosis, released),
        "axis": axis,
        "narrowed": _narrowed(diagnosis),
        "blocks": [
            _block(network, split, diagnosis, axis, full=network == blocks[0][0]) for network, split in blocks
        ],
        "observed": _OBSERVED[kind].format(positive=wording.one_line(diagnosis.class_names[-1])),
    }
    return markup(template("diagnosis.html.j2").render(**values, parts=template("parts.html.j2").module))


def _block(network: str, split: str, diagnosis: DiagnosticReport, axis: Axis, *, full: bool) -> dict[str, Any]:
    """What one network reaches on one split."""
    arms = _at(diagnosis.arms, network, split)
    metrics = wording.ordered_metrics(metric for arm in arms for metric in arm.metrics)
    return {
        "network": wording.words(network),
        "split": wording.words(split),
        "patients": wording.at_least(min((arm.patients for arm in arms), default=0)),
        "metrics": [wording.metric_label(metric) for metric in metrics],
        "rows": [_arm(arm, metrics, axis) for arm in arms],
        "classes": _classes(arms),
        "differences": list(_differences(_at(diagnosis.differences, network, split))),
        "calibration": [_calibration(arm) for arm in arms if arm.reliability] if full else [],
        "by_patient": _by_patient(arms) if full else None,
        "groups": subgroups(_at(diagnosis.subgroups, network, split)) if full else None,
    }


def _at(found: Sequence[_Judged], network: str, split: str) -> list[_Judged]:
    return [one for one in found if (one.network, one.split) == (network, split)]


def _narrowed(diagnosis: DiagnosticReport) -> str:
    """What this page leaves out for the sake of its reader."""
    networks = list(dict.fromkeys(arm.network for arm in diagnosis.arms))
    parts = []
    if len(networks) > 1:
        first = wording.words(networks[0])
        parts.append(f"Of the network {first} alone: calibration, decisions per patient, groups of patients.")
    if diagnosis.subgroups or any(arm.by_patient for arm in diagnosis.arms):
        sets = " and ".join(wording.words(arm) for arm in SHOWN_ARMS)
        parts.append(f"Of the training sets {sets} alone: decisions per patient, groups of patients.")
    return (
        f"Not everything is shown. {' '.join(parts)} The rest stands in card.json of the release." if parts else ""
    )


# -- in words ------------------------------------------------------------------------------------------------


def _sentences(diagnosis: DiagnosticReport) -> Iterator[str]:
    """Per network and split, what the release reaches of what real images reach; ``test`` first."""
    for network, split, made, real in _headlines(diagnosis):
        who = f"Trained on the release, the network {wording.words(network)}"
        where = f"on {wording.words(split)} patients"
        if real is None:
            yield f"{who} reaches AUROC {wording.interval(made)} {where}; real images were not tried."
            continue
        yield (
            f"{who} reaches {_percent(made.value / real.value)} of what all real images reach {where} (AUROC "
            f"{wording.interval(made)} against {wording.interval(real)}{_difference(diagnosis, network, split)})."
        )


def _headlines(diagnosis: DiagnosticReport) -> Iterator[tuple[str, str, Estimate, Estimate | None]]:
    """Network, split, AUROC of the release and of all real images where it is known and above 0."""
    auroc = {
        (arm.network, arm.split, arm.arm): arm.metrics["auroc"]
        for arm in diagnosis.arms
        if "auroc" in arm.metrics and arm.metrics["auroc"].value > 0
    }
    places = dict.fromkeys((network, split) for network, split, _ in auroc)
    for network, split in sorted(places, key=lambda at: at[1] != "test"):
        made = auroc.get((network, split, "distilled"))
        if made is not None:
            yield network, split, made, auroc.get((network, split, "real"))


def _difference(diagnosis: DiagnosticReport, network: str, split: str) -> str:
    wanted = ("against_real", "distilled", network, split, "auroc")
    for one in diagnosis.differences:
        if (one.kind, one.arm, one.network, one.split, one.metric) == wanted:
            p, found = wording.p_value(one.p_value), wording.cell(one.value, signed=True)
            equals = "" if p.startswith("<") else "= "
            return f"; difference {found['value']} {found['interval']}, p {equals}{p}"
    return ""


def _chance(diagnosis: DiagnosticReport) -> str:
    """What a coin would reach of the real images' AUROC, so that nobody reads the shares as from 0."""
    shares = sorted(0.5 / real.value for _, _, _, real in _headlines(diagnosis) if real is not None)
    if not shares:
        return ""
    span = [f"{100 * share:.0f}" for share in (shares[0], shares[-1])]
    return f"{' to '.join(dict.fromkeys(span))} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# -- in figures ----------------------------------------------------------------------------------------------


def _training_sets(diagnosis: DiagnosticReport, released: int) -> list[dict[str, Any]]:
    """What each arm was trained on, once for all tables."""
    arms = {arm.arm: arm for arm in reversed(diagnosis.arms)}
    return [
        {
            "name": wording.words(name),
            "meaning": wording.ARMS.get(name, ""),
            "released": wording.is_released(name),
            "images": str(arms[name].images)
            if arms[name].images == released
            else wording.at_least(arms[name].images),
            "seeds": arms[name].seeds,
        }
        for name in dict.fromkeys(arm.arm for arm in diagnosis.arms)
    ]


def _arm(arm: ArmResult, metrics: Sequence[str], axis: Axis) -> dict[str, Any]:
    auroc = arm.metrics.get("auroc")
    seeds = arm.seed_deviation if arm.seeds > 1 else {}
    return {
        **_names(arm),
        "cells": [wording.cell(arm.metrics.get(metric), seeds=seeds.get(metric)) for metric in metrics],
        "auroc": wording.interval(auroc),
        "track": place(auroc, axis),
    }


def _names(arm: ArmResult) -> dict[str, Any]:
    return {"arm": wording.words(arm.arm), "released": wording.is_released(arm.arm)}


def _classes(arms: Sequence[ArmResult]) -> dict[str, Any] | None:
    """AUROC of every class, for tasks where it is not the AUROC of all; arms are the columns, for they are few."""
    own = [arm for arm in arms if arm.class_auroc]
    names = dict.fromkeys(name for arm in own for name in arm.class_auroc)
    if not own:
        return None
    return {
        "arms": [wording.words(arm.arm) for arm in own],
        "rows": [
            {"name": wording.one_line(name), "cells": [wording.cell(arm.class_auroc.get(name)) for arm in own]}
            for name in names
        ],
    }


def _differences(found: Sequence[Difference]) -> Iterator[dict[str, Any]]:
    for kind in [*_KINDS, *dict.fromkeys(one.kind for one in found if one.kind not in _KINDS)]:
        own = [one for one in found if one.kind == kind]
        if own:
            title, meaning = _KINDS.get(kind, (wording.words(kind), ""))
            yield {
                "title": title,
                "meaning": meaning,
                "rows": [_compared(one) for one in own],
                "delong": any(one.delong_p_value is not None for one in own),
            }


def _compared(one: Difference) -> dict[str, Any]:
    delong = one.delong_p_value
    return {
        "what": f"{wording.words(one.arm)} minus {wording.words(one.against)}",
        "released": wording.is_released(one.arm),
        "metric": wording.metric_label(one.metric),
        "value": wording.cell(one.value, signed=True),
        "p": wording.p_value(one.p_value),
        "delong": "–" if delong is None else wording.p_value(delong),
        "reading": _reading(one),
    }


def _reading(one: Difference) -> str:
    """Which of the two is better as far as the interval tells."""
    if not math.isfinite(one.value.value):
        return wording.NOT_ESTIMABLE
    if one.value.low <= 0 <= one.value.high:
        return "not told apart"
    higher = one.arm if one.value.low > 0 else one.against
    lower = one.against if one.value.low > 0 else one.arm
    return f"{wording.words(lower if one.metric in _LOWER_IS_BETTER else higher)} better"


def _calibration(arm: ArmResult) -> dict[str, Any]:
    bins = joined_bins(arm.reliability, patients=arm.patients)
    error = wording.cell(arm.metrics.get("ece"))
    numbers = "; ".join(spoken(one) for one in bins) or wording.TOO_FEW
    label = f"Reliability of {wording.words(arm.arm)}: {numbers}. ECE {error['value']} {error['interval']}".strip()
    return {
        **_names(arm),
        "error": error,
        "chart": markup(reliability_chart(bins, label=label)),
        "numbers": "; ".join(f"{one.predicted:.2f} → {one.observed:.2f} ({100 * one.share:.0f} %)" for one in bins)
        or wording.TOO_FEW,
    }


def _by_patient(arms: Sequence[ArmResult]) -> dict[str, Any] | None:
    """Metrics of whole patients by every rule; nothing where every patient has one image."""
    shown = [arm for arm in arms if arm.by_patient and arm.arm in SHOWN_ARMS] or [
        arm for arm in arms if arm.by_patient
    ]
    metrics = wording.ordered_metrics(m for arm in shown for found in arm.by_patient.values() for m in found)
    if not metrics:
        return None
    rules = dict.fromkeys(rule for arm in shown for rule in arm.by_patient)
    return {
        "rules": [(rule, _RULES.get(rule, "")) for rule in rules],
        "metrics": [wording.metric_label(metric) for metric in metrics],
        "rows": [
            {**_names(arm), "rule": rule, "cells": [wording.cell(values.get(metric)) for metric in metrics]}
            for arm in shown
            for rule, values in arm.by_patient.items()
        ],
    }
