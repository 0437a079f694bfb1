"""Whether a release serves some patients worse than others: by sex, age, site and view, beside real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medistill.core.reports import SubgroupResult
from medistill.report import wording
from medistill.report.plots import Axis, auroc_axis, place

#: The question is whether the release differs from real images; the other training sets stand in the card.
SHOWN_ARMS = ("real", "distilled")
_METRICS = ("auroc", "diagnostic_sensitivity", "specificity", "ece")
_ATTRIBUTES = {"sex": "Sex", "age_band": "Age", "site": "Site", "view": "View"}
_MOST_NAMED = 6


def subgroups(found: Sequence[SubgroupResult]) -> dict[str, Any] | None:
    """Groups of a split, attribute after attribute, as one network judges them.

    Args:
        found: Results of one network on one split.

    Returns:
        ``None`` without groups.

    Privacy:
        Reads measurements on real patients; their numbers are rounded down to tens.
    """
    shown = [one for one in found if one.arm in SHOWN_ARMS] or list(found)
    measured = {metric for one in shown for metric in one.metrics}
    metrics = [metric for metric in _METRICS if metric in measured]
    if not shown:
        return None
    axis = auroc_axis([one.metrics["auroc"] for one in shown if "auroc" in one.metrics])
    return {
        "axis": axis,
        "metrics": [wording.metric_label(metric) for metric in metrics],
        "attributes": [
            {
                "name": _ATTRIBUTES.get(attribute, wording.words(attribute)),
                "groups": _groups(own, metrics, axis),
                "hidden": _hidden([one for one in own if not one.metrics]),
            }
            for attribute in dict.fromkeys(one.attribute for one in shown)
            for own in [[one for one in shown if one.attribute == attribute]]
        ],
    }


def _groups(found: Sequence[SubgroupResult], metrics: Sequence[str], axis: Axis) -> list[dict[str, Any]]:
    """Groups that have figures."""
    return [
        {
            "name": wording.one_line(name),
            "patients": wording.at_least(min(one.patients for one in own)),
            "rows": [_row(one, metrics, axis) for one in own],
            "warning": next((wording.one_line(one.warning) for one in own if one.warning), ""),
        }
        for name in dict.fromkeys(one.group for one in found if one.metrics)
        for own in [[one for one in found if one.group == name and one.metrics]]
    ]


def _hidden(found: Sequence[SubgroupResult]) -> list[dict[str, str]]:
    """Groups that have none, by reason; where they are many, their number."""
    reasons: dict[str, dict[str, None]] = {}
    for one in found:
        reasons.setdefault(wording.one_line(one.warning) or wording.TOO_FEW, {})[wording.one_line(one.group)] = (
            None
        )
    return [
        {"names": ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} groups", "reason": reason}
        for reason, names in reasons.items()
    ]


def _row(one: SubgroupResult, metrics: Sequence[str], axis: Axis) -> dict[str, Any]:
    auroc = one.metrics.get("auroc")
    return {
        "arm": wording.words(one.arm),
        "released": wording.is_released(one.arm),
        "auroc": wording.interval(auroc),
        "track": place(auroc, axis),
        "cells": [wording.cell(one.metrics.get(metric)) for metric in metrics],
    }
