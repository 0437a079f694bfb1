"""One self-contained page that compares distillers: table, charts, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medistill.core.reports import Estimate
from medistill.report.chart import Point, Series, chart, colour
from medistill.report.plots import Axis, track
from medistill.report.png import data_uri
from medistill.report.templates import markup, style, template


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one data set, with so many images per class, as one architecture sees it.

    Args:
        data: Name of the data.
        ipc: Images per class; 0 for all real images.
        method: Label of the method.
        network: Architecture of the students.
        seeds: Cells that are done.
        failed: Cells that failed.
        error: First error of a failed cell.
        arms: ``schedule/labels`` to metric to estimate; mean over seeds, interval by patient bootstrap.
        deviations: ``schedule/labels`` to metric to standard deviation over seeds, where there are several.
        cpu_seconds: Mean CPU seconds of the distillation.
        cell_cpu_seconds: Mean CPU seconds of a cell, students included.
        peak_rss_mb: Largest memory of the process until the distillation was done.
        start_rss_mb: What the process held before it read an image: Python, torch and this package.
        budget_seconds: CPU seconds that were allowed.
        iterations: Resolved iterations by distiller, first seed.
        schedule: Chosen schedule in words, first seed.
        nearest: Mean correlation with the nearest image of ``train`` and ``held_out`` in pools of equal size,
            their ``gap``, and ``train_all``; empty for real images as a whole.
        from_real: Whether images began as patients' images.
    """

    data: str
    ipc: int
    method: str
    network: str
    seeds: int
    failed: int
    error: str
    arms: Mapping[str, Mapping[str, Estimate]]
    deviations: Mapping[str, Mapping[str, float]]
    cpu_seconds: float
    cell_cpu_seconds: float
    peak_rss_mb: int
    start_rss_mb: int
    budget_seconds: float | None
    iterations: Mapping[str, int]
    schedule: str
    nearest: Mapping[str, float]
    from_real: bool

    def estimate(self, arm: str = "chosen/soft", metric: str = "auroc") -> Estimate | None:
        """One figure, where it was measured."""
        return self.arms.get(arm, {}).get(metric)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Images of one method as a picture; withheld where they began as patients' images."""

    data: str
    ipc: int
    method: str
    png: bytes | None


def render_comparison(
    rows: Sequence[Row],
    sheets: Sequence[Sheet],
    *,
    facts: Mapping[str, str],
    title: str = "Distillers side by side",
) -> str:
    """Render the page.

    Args:
        rows: Rows in the order of the table.
        sheets: Images of the methods.
        facts: What was done, for the head of the page.
        title: Heading.

    Returns:
        HTML without scripts and without a second file; the same arguments give the same text.
    """
    groups = []
    for data, ipc in _groups(rows):
        own = [row for row in rows if row.data == data and row.ipc in (ipc, 0)]
        own.sort(key=best_first)
        groups.append(
            {
                "data": data,
                "ipc": ipc,
                "rows": own,
                "axis": _axis(own),
                "against_cost": _against_cost(own),
                "sheets": [
                    {"method": sheet.method, "source": data_uri(sheet.png) if sheet.png else ""}
                    for sheet in sheets
                    if (sheet.data, sheet.ipc) == (data, ipc)
                ],
            }
        )
    return template("comparison.html.j2").render(
        title=title,
        facts=facts,
        groups=groups,
        by_ipc=[found for data in dict.fromkeys(row.data for row in rows) if (found := _by_ipc(data, rows))],
        style=style("page.css", "chart.css"),
        track=track,
        colour=colour,
        several_networks=len({row.network for row in rows}) > 1,
    )


def best_first(row: Row) -> tuple[float, str, str]:
    """Order of the table: AUROC by the chosen schedule, failed rows last."""
    auroc = row.estimate()
    value = -auroc.value if auroc is not None and auroc.value == auroc.value else 1.0
    return (value, row.method, row.network)


def _groups(rows: Sequence[Row]) -> list[tuple[str, int]]:
    found = sorted({(row.data, row.ipc) for row in rows if row.ipc})
    alone = [(data, 0) for data in dict.fromkeys(row.data for row in rows) if data not in {d for d, _ in found}]
    return found + alone


def _axis(rows: Sequence[Row]) -> Axis:
    lowest = min((auroc.low for row in rows if (auroc := row.estimate())), default=0.5)
    low = max(0.0, min(0.9, int(lowest * 20) / 20))
    count = round((1 - low) / 0.05)
    step = 0.05 if count <= 5 else 0.1
    marks = tuple(round(1 - i * step, 2) for i in range(int((1 - low) / step + 1e-9), -1, -1))
    return Axis(low=low, high=1.0, ticks=marks)


def _name(row: Row, rows: Sequence[Row]) -> str:
    return f"{row.method}, {row.network}" if len({r.network for r in rows}) > 1 else row.method


def _names(rows: Sequence[Row]) -> list[str]:
    return sorted({_name(row, rows) for row in rows if row.ipc})


def _point(x: float, estimate: Estimate) -> Point:
    return Point(x=x, y=estimate.value, low=estimate.low, high=estimate.high)


def _reference(rows: Sequence[Row]) -> tuple[str, float] | None:
    """The highest AUROC of all real images."""
    found = [auroc.value for row in rows if not row.ipc and (auroc := row.estimate())]
    return ("all real images", max(found)) if found else None


def _against_cost(rows: Sequence[Row]) -> dict[str, Any]:
    series = []
    for name in _names(rows):  # in one order everywhere, so that a method keeps its colour
        own = [row for row in rows if row.ipc and _name(row, rows) == name]
        points = [_point(max(row.cpu_seconds, 0.1), auroc) for row in own if (auroc := row.estimate())]
        series.append(Series(name=name, points=tuple(points)))
    drawn = chart(
        series, x_label="CPU seconds of the distillation", y_label="AUROC", log=True, reference=_reference(rows)
    )
    return {"svg": markup(drawn), "names": [one.name for one in series]}


def _by_ipc(data: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    own = [row for row in rows if row.data == data]
    counts = sorted({row.ipc for row in own if row.ipc and row.estimate()})
    if len(counts) < 2:
        return None
    series = []
    for name in _names(own):
        of_name = sorted((row for row in own if row.ipc and _name(row, own) == name), key=lambda row: row.ipc)
        points = tuple(_point(row.ipc, auroc) for row in of_name if (auroc := row.estimate()))
        series.append(Series(name=name, points=points, joined=True))
    drawn = chart(
        series,
        x_label="images per class",
        y_label="AUROC",
        categories=[(count, str(count)) for count in counts],
        reference=_reference(own),
    )
    return {"data": data, "svg": markup(drawn), "names": [one.name for one in series]}
