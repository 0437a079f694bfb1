"""Several runs side by side: what they reach, what they cost in privacy, what their audits conclude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medistill.core.distilled import DistilledSet
from medistill.core.reports import ArmResult, AuditReport, DiagnosticReport, Estimate, Verdict
from medistill.errors import DataError
from medistill.report.chart import Point, Series, chart, colour
from medistill.report.templates import markup, style, template
from medistill.report.wording import mark, words

ARMS = ("real", "random", "random_soft", "herding", "distilled", "distilled_hard")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run as a row.

    Args:
        name: Name of its folder.
        cohort: Digest of the train split, empty where the run keeps none.
        method: Distillers.
        images: Number of released images.
        side: Their side length.
        epsilon: What is proved; infinite for nothing.
        verdict: Of its audit; ``None`` where none was made.
        network: First network that was evaluated.
        split: Patients that it was evaluated on.
        auroc: Arm to AUROC.
    """

    name: str
    cohort: str
    method: str
    images: int
    side: int
    epsilon: float
    verdict: Verdict | None
    network: str
    split: str
    auroc: dict[str, Estimate]

    @property
    def kind(self) -> str:
        """Style of the verdict's mark."""
        return mark(self.verdict)

    @property
    def audited(self) -> str:
        """The verdict in words."""
        return words(self.verdict.value) if self.verdict else "not audited"


def run_row(
    name: str,
    cohort: str,
    distilled: DistilledSet,
    audit: AuditReport | None,
    diagnosis: DiagnosticReport | None,
) -> RunRow:
    """What a page says of a run: its first network on the test split, or the split it has.

    Args:
        name: Name of its folder.
        cohort: Digest of its train split.
        distilled: Its distilled set.
        audit: Its audit, if one was made.
        diagnosis: Its evaluation, if one was made.
    """
    arms: list[ArmResult] = [] if diagnosis is None else [arm for arm in diagnosis.arms if "auroc" in arm.metrics]
    first = min(arms, key=lambda arm: arm.split != "test", default=None)
    chosen = [arm for arm in arms if first and (arm.network, arm.split) == (first.network, first.split)]
    return RunRow(
        name=name,
        cohort=cohort,
        method=distilled.recipe.method,
        images=len(distilled),
        side=int(distilled.images.shape[-1]),
        epsilon=distilled.privacy.epsilon,
        verdict=None if audit is None else audit.verdict,
        network="" if first is None else first.network,
        split="" if first is None else first.split,
        auroc={arm.arm: arm.metrics["auroc"] for arm in chosen},
    )


def render_runs(rows: Sequence[RunRow], *, title: str = "Runs side by side") -> str:
    """One self-contained page with a table and a chart.

    Args:
        rows: Runs in order.
        title: Title of the page.

    Returns:
        HTML; the same arguments give the same text.

    Raises:
        DataError: If there is no run.
    """
    if not rows:
        raise DataError("Expected at least one run to compare, got none.")
    arms = [arm for arm in ARMS if any(arm in row.auroc for row in rows)]
    series = [
        Series(
            name=words(arm),
            points=tuple(
                Point(x=float(i), y=found.value, low=found.low, high=found.high)
                for i, row in enumerate(rows)
                if (found := row.auroc.get(arm)) is not None
            ),
        )
        for arm in arms
    ]
    drawn = chart(
        series,
        x_label="run",
        y_label="AUROC",
        categories=[(float(i), row.name) for i, row in enumerate(rows)],
    )
    return template("runs.html.j2").render(
        title=title,
        style=style("page.css", "chart.css"),
        rows=rows,
        arms=arms,
        chart=markup(drawn),
        legend=[(colour(i), words(arm)) for i, arm in enumerate(arms)],
        warnings=warnings_of_runs(rows),
        infinite=math.inf,
    )


def warnings_of_runs(rows: Sequence[RunRow]) -> tuple[str, ...]:
    """Why figures of different rows may not be comparable."""
    found = []
    if len({row.cohort for row in rows}) > 1:
        found.append(
            "The runs were distilled from different patients; differences are not those of methods alone."
        )
    if len({(row.network, row.split) for row in rows if row.auroc}) > 1:
        found.append("The runs were evaluated with different networks or on different splits.")
    return tuple(found)
