"""One page with the synthetic patches and what networks trained on them diagnose, beside real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medistill.core.distilled import DistilledSet
from medistill.core.reports import DiagnosticReport
from medistill.report.plots import full_axis, track
from medistill.report.png import picture_source
from medistill.report.templates import template


def render_patients(report: DiagnosticReport, sets: Mapping[str, DistilledSet], *, metrics: Sequence[str]) -> str:
    """Draw what :func:`medistill.evaluate.evaluate_patients` found.

    Args:
        report: One entry per arm.
        sets: Name of an arm to the distilled set behind it, whose images are shown.
        metrics: Metrics in the order of the columns.

    Returns:
        HTML without script or second file; the same arguments give the same text.
    """
    axis = full_axis()
    rows = [
        {
            "arm": arm.arm.replace("_", " "),
            "images": arm.images,
            "seeds": arm.seeds,
            "cells": [(str(arm.metrics[name]), track(arm.metrics[name], axis)) for name in metrics],
        }
        for arm in report.arms
    ]
    return template("patients.html.j2").render(
        rows=rows,
        metrics=[name.replace("_", " ") for name in metrics],
        classes=report.class_names,
        patients=report.arms[0].metrics[metrics[0]].n,
        sets=[(name, _figures(made)) for name, made in sets.items()],
    )


def _figures(made: DistilledSet) -> list[tuple[str, str]]:
    names = made.task.class_names
    figures = []
    for image, label, soft in zip(made.images, made.hard_labels.tolist(), made.soft_labels.tolist(), strict=True):
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, soft, strict=True))
        figures.append((picture_source(image), f"made for {names[label]}: {shares}"))
    return figures
