"""The quality of a cohort in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medistill.report.quality.checks import number, share
from medistill.report.quality.records import NOT_GIVEN, Attribute, Count, Levels, Quality, Value
from medistill.report.wording import one_line

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_MOST_VALUES = 8


def quality_lines(quality: Quality) -> Group:
    """What a terminal shows, 80 to 120 columns wide: print it with a :class:`rich.console.Console`."""
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    whole = quality.whole.total
    lines: list[Any] = [
        Text(
            f"{number(whole.images, 'image')} of {number(whole.patients, 'patient')} from "
            f"{number(quality.files, 'file')}; {quality.rejected} in quarantine "
            f"({share(quality.rejected, quality.files)})."
        ),
        Text(""),
        _splits_table(quality),
        _attributes_table(quality),
        _levels_table(quality),
    ]
    if quality.quarantine:
        lines.append(_quarantine_table(quality))
    for warned in quality.warnings:
        lines.append(Text.assemble((f"! {warned.title}. ", "bold"), warned.text))
    if not quality.warnings:
        lines.append(Text(f"No warning; looked for: {'; '.join(quality.checks)}."))
    return Group(*lines)


def _table(title: str, first: str, *columns: str) -> Table:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False, box=None)
    table.add_column(first)
    for column in columns:
        table.add_column(Text(one_line(column)), justify="right")
    return table


def _splits_table(quality: Quality) -> Table:
    from rich.text import Text  # noqa: PLC0415

    parts = (*quality.splits, quality.whole)
    table = _table("Images (patients)", "class", *(part.name for part in parts))
    for label in quality.classes:
        cells = [f"{part.classes[label].images} ({part.classes[label].patients})" for part in parts]
        table.add_row(Text(one_line(label)), *cells)
    table.add_row("all", *(f"{part.total.images} ({part.total.patients})" for part in parts), end_section=True)
    table.add_row("")
    return table


def _attributes_table(quality: Quality) -> Table:
    from rich.text import Text  # noqa: PLC0415

    table = _table("Patients", "attribute", "V")
    table.columns[1].header = Text("with class (V)")
    table.add_column("values", overflow="fold")
    given = [attribute for attribute in quality.attributes if is_given(attribute)]
    for attribute in given:
        shown = ", ".join(f"{value.name}: {value.total.patients}" for value in first_values(attribute))
        table.add_row(attribute.name.replace("_", " "), f"{attribute.association:.2f}", shown)
    absent = [attribute.name.replace("_", " ") for attribute in quality.attributes if attribute not in given]
    if absent:
        table.add_row(NOT_GIVEN, "", ", ".join(absent))
    each = quality.per_patient
    table.add_row("images each", "", f"{each.minimum} to {each.maximum}, median {each.median:g}")
    table.add_row("")
    return table


def is_given(attribute: Attribute) -> bool:
    """Whether any image has a value."""
    return any(value.name != NOT_GIVEN for value in attribute.values)


def first_values(attribute: Attribute) -> tuple[Value, ...]:
    """The first values, and the rest as one."""
    if len(attribute.values) <= _MOST_VALUES + 2:
        return attribute.values
    rest = attribute.values[_MOST_VALUES:]
    classes: Counter[str] = Counter()
    for value in rest:
        classes.update(value.classes)
    total = Count(
        images=sum(value.total.images for value in rest), patients=sum(value.total.patients for value in rest)
    )
    others = Value(name=f"{len(rest)} others", total=total, classes=dict(classes))
    return (*attribute.values[:_MOST_VALUES], others)


def _levels_table(quality: Quality) -> Table:
    from rich.text import Text  # noqa: PLC0415

    title = f"Grey levels of {quality.intensity.sampled} images, black to white"
    table = _table(title, "class", "black", "white", "brightness", "contrast")
    table.add_column("pixels that are neither")
    for level in (*quality.intensity.classes, quality.intensity.overall):
        figures = (share(level.black, 1), share(level.white, 1))
        middle = (f"{level.brightness[1]:.2f}", f"{level.contrast[1]:.2f}")
        table.add_row(Text(one_line(level.name) or "all"), *figures, *middle, _spark(between(level)))
    table.add_row("")
    return table


def between(level: Levels) -> list[float]:
    """The histogram without pixels that are quite black or quite white."""
    heights = list(level.histogram)
    heights[0] = max(0.0, heights[0] - level.black)
    heights[-1] = max(0.0, heights[-1] - level.white)
    return heights


def _spark(heights: Sequence[float], width: int = 16) -> str:
    """A histogram in one line of block characters."""
    joined = np.asarray(heights).reshape(width, -1).sum(1)
    top = joined.max()
    steps = np.ceil(8 * joined / top).astype(int) if top > 0 else np.zeros(width, dtype=int)
    return "".join(" ▁▂▃▄▅▆▇█"[step] for step in steps)


def _quarantine_table(quality: Quality) -> Table:
    table = _table("Quarantine", "code", "files")
    table.add_column("meaning", overflow="fold")
    for reason in quality.quarantine:
        table.add_row(reason.code, str(reason.files), reason.sentence)
    table.add_row("")
    return table
