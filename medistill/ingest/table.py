"""Tables in CSV files, read with tolerance for byte order marks, separators and spelling of column names.

Problems name lines, never values: a cell can hold a patient's name, and so can the first line of a table without a
heading.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from medistill.errors import LabelError

_SHOWN = 8
KEY_COLUMNS: dict[str, tuple[str, ...]] = {
    "sop": ("sopinstanceuid", "sopuid"),
    "file": ("file", "filename", "filepath", "path"),
    "index": ("index",),
    "patient": ("patientid", "patient"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table; cells are stripped."""

    line: int
    cells: dict[str, str] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with named columns.

    Args:
        columns: Column names in order.
        rows: Lines that are not empty.
    """

    columns: tuple[str, ...] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)

    def key_column(self, kind: str) -> str | None:
        """Column that refers to an image or patient; spelling, case and separators do not matter."""
        known = KEY_COLUMNS[kind]
        found = [column for column in self.columns if _plain(column) in known]
        return min(found, key=lambda column: known.index(_plain(column)), default=None)

    def column(self, name: str) -> str | None:
        """Column of a name, exact or else without regard to case and separators."""
        if name in self.columns:
            return name
        return next((column for column in self.columns if _plain(column) == _plain(name)), None)

    def changed(self, column: str, change: Callable[[str], str]) -> Table:
        """The same table with every cell of a column changed."""
        rows = (replace(row, cells={**row.cells, column: change(row.cells[column])}) for row in self.rows)
        return replace(self, rows=tuple(rows))


def lines_text(lines: Iterable[int]) -> str:
    """Line numbers for a message, for example ``"lines 3, 7, 9, …(+9)"``."""
    ordered = sorted(set(lines))
    shown = ", ".join(str(line) for line in ordered[:_SHOWN])
    rest = f", …(+{len(ordered) - _SHOWN})" if len(ordered) > _SHOWN else ""
    return f"line{'s' if len(ordered) > 1 else ''} {shown}{rest}"


def read_table(path: Path) -> Table:
    """Read a CSV file with a heading.

    Raises:
        LabelError: If the file cannot be read, is empty, repeats a column, or has lines of another width.
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise LabelError("The label table does not exist or cannot be read. Check the path.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return _parse(text)


def _parse(text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error:
        raise LabelError(
            f"The label table cannot be parsed near line {reader.line_num}. Save it as CSV."
        ) from None
    if len(lines) < 2:
        raise LabelError("The label table has no row. Expected a heading and one line per image or patient.")
    columns = tuple(cell.strip() for cell in lines[0][1])
    if len({_plain(column) for column in columns}) != len(columns):
        raise LabelError("The label table has two columns of the same name. Rename one of them.")
    odd = [line for line, cells in lines[1:] if len(cells) != len(columns)]
    if odd:
        raise LabelError(
            f"Expected {len(columns)} cells on every line of the label table; not so on {lines_text(odd)}."
        )
    rows = [
        Row(line=line, cells=dict(zip(columns, (cell.strip() for cell in cells), strict=True)))
        for line, cells in lines[1:]
    ]
    return Table(columns=columns, rows=tuple(rows))


def _delimiter(text: str) -> str:
    try:
        return csv.Sniffer().sniff(text.split("\n", 1)[0], delimiters=",;\t|").delimiter
    except csv.Error:
        return ","


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
