"""One self-contained page of class-incremental learning: curves over the steps, and their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medistill.core.reports import Estimate
from medistill.report.chart import Point, Series, chart, colour
from medistill.report.templates import markup, style, template

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One arm over its steps.

    Args:
        arm: What the network is trained on.
        steps: Number of steps.
        seeds: Orders of the classes.
        classes: Classes seen after each step.
        images: Training images of each step, mean over orders.
        accuracy: Mean recall over the classes seen, after each step.
        auroc: Macro AUROC over the classes seen; ``None`` where only one class was seen.
        average_accuracy: Mean over the steps.
        average_auroc: Mean over the steps that have one.
        forgetting: Mean fall of a class's recall from its best earlier step to the last.
        deviation: Standard deviation of the average accuracy over orders.
        last_deviation: The same of the last step's accuracy.
        cpu_seconds: Mean CPU seconds, memory and networks together.
    """

    arm: str
    steps: int
    seeds: int
    classes: tuple[int, ...]
    images: tuple[int, ...]
    accuracy: tuple[Estimate, ...]
    auroc: tuple[Estimate | None, ...]
    average_accuracy: Estimate
    average_auroc: Estimate | None
    forgetting: Estimate
    deviation: float | None
    last_deviation: float | None
    cpu_seconds: float


def render_continual(curves: Sequence[Curve], *, facts: Mapping[str, str]) -> str:
    """Render the page.

    Args:
        curves: One per number of steps and arm.
        facts: What was done, for the head of the page.

    Returns:
        HTML without scripts and without a second file; the same arguments give the same text.
    """
    groups = []
    for steps in dict.fromkeys(curve.steps for curve in curves):
        own = [curve for curve in curves if curve.steps == steps]
        groups.append(
            {
                "steps": steps,
                "curves": own,
                "accuracy": _chart(own, "accuracy", "mean recall over the classes seen"),
                "auroc": _chart(own, "auroc", "macro AUROC over the classes seen"),
                "names": [curve.arm for curve in own],
            }
        )
    return template("continual.html.j2").render(
        groups=groups, facts=facts, style=style("page.css", "chart.css"), colour=colour
    )


def _chart(curves: Sequence[Curve], metric: str, label: str) -> Markup:
    series = []
    for curve in curves:
        found: tuple[Estimate | None, ...] = getattr(curve, metric)
        points = tuple(
            Point(x=count, y=one.value, low=one.low, high=one.high)
            for count, one in zip(curve.classes, found, strict=True)
            if one is not None and one.value == one.value
        )
        series.append(Series(name=curve.arm, points=points, joined=True))
    counts = [count for count in curves[0].classes if any(p.x == count for s in series for p in s.points)]
    drawn = chart(
        series, x_label="classes seen", y_label=label, categories=[(count, str(count)) for count in counts]
    )
    return markup(drawn)
