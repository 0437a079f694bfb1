"""A label table joined to images, without keeping an identifier.

References are replaced by keyed tokens while the table is read, and images carry the same tokens. Messages name
lines of the table and never a value.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medistill.core.task import Task, joined_names, joint_label
from medistill.errors import LabelError
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.reading import table_key
from medistill.ingest.table import KEY_COLUMNS, Row, Table, lines_text, read_table

SPLIT_VALUES = frozenset({"", "train", "validation", "val", "holdout", "test"})


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How a label is read.

    Args:
        multilabel: Whether it joins several classes by ``;`` or ``|``.
        no_class: Of a multilabel task the label of an image that shows none of the classes, for example ``none``;
            empty where an empty cell says so, ``None`` where every image shows a class.
    """

    multilabel: bool = False
    no_class: str | None = None

    def __call__(self, text: str) -> str:
        """The label as a cohort keeps it, or nothing where there is none."""
        if not self.multilabel:
            return text
        if self.no_class is not None and text.strip().casefold() == self.no_class.strip().casefold():
            return joint_label(())
        names = joined_names(text)
        return joint_label(names) if names else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the table says about one image or patient.

    Args:
        kind: How the row refers to it: ``sop``, ``file``, ``index`` or ``patient``.
        lines: Lines of the table that say so.
        label: Class, or empty.
        patient: Pseudonym, or empty.
        bare_patient: Pseudonym of the same number without an issuer.
        given_test: Whether the table puts it into the test split.
        by_number: Whether it refers to a patient by the number alone, without its issuer.
    """

    kind: str
    lines: tuple[int, ...]
    label: str = field(repr=False)
    patient: str
    bare_patient: str = ""
    given_test: bool
    by_number: bool = False


class LabelTable:
    """Rows by keyed token; remembers which rows found an image.

    Args:
        entries: What the table says, by token.
        has_labels: Whether the table has the label column.
        size: Number of rows.
    """

    def __init__(self, entries: dict[str, Entry], *, has_labels: bool, size: int) -> None:
        self.has_labels = has_labels
        self._entries = entries
        self._size = size
        self._matches: Counter[tuple[int, ...]] = Counter()

    def names(self, keys: Sequence[str]) -> bool:
        """Whether a row with a label is about an image; does not count as a match."""
        entry = self._entry(keys)
        return entry is not None and (not self.has_labels or bool(entry.label))

    def match(self, keys: Sequence[str]) -> Entry | None:
        """The row of an image, by its most specific reference."""
        entry = self._entry(keys)
        if entry is not None:
            self._matches[entry.lines] += 1
        return entry

    def _entry(self, keys: Sequence[str]) -> Entry | None:
        return next((self._entries[key] for key in keys if key in self._entries), None)

    def close(self) -> str:
        """Check the join after all images were seen.

        Returns:
            A warning that names rows without an image, or an empty string.

        Raises:
            LabelError: If no row found an image, or a row found several.
        """
        entries = {entry.lines: entry for entry in self._entries.values()}
        if not self._matches:
            raise LabelError(
                f"None of {self._size} label rows matches an image. Check that the table belongs to this source "
                "and that its key column holds SOPInstanceUID, the file path relative to the source, or PatientID."
            )
        several = [
            line
            for lines, count in self._matches.items()
            if count > 1 and entries[lines].kind in {"file", "index"}
            for line in lines
        ]
        if several:
            raise LabelError(
                f"{len(several)} label rows match several images each: {lines_text(several)}. "
                "Give the file path relative to the source, or a `split` column beside `index`."
            )
        missed = [line for lines in entries if lines not in self._matches for line in lines]
        if not missed:
            return ""
        return (
            f"{len(missed)} of {self._size} label rows belong to no image that was kept (quarantined or missing): "
            f"{lines_text(missed)}"
        )


def load_labels(
    path: Path,
    *,
    kinds: Sequence[str],
    label_column: str,
    labels_required: bool,
    pseudonymiser: Pseudonymiser,
    rule: LabelRule | None = None,
) -> LabelTable:
    """Read a label table.

    Args:
        path: CSV file with a heading.
        kinds: How rows may refer to images of this source, most specific first; the first column found is used.
        label_column: Name of the column with the class.
        labels_required: Whether the source has no labels of its own.
        pseudonymiser: Replaces references and patient numbers.
        rule: How labels are read; one class each by default.

    Raises:
        LabelError: Listing every problem of the table.
    """
    table = read_table(path)
    kind = next((kind for kind in kinds if table.key_column(kind)), None)
    column = table.column(label_column)
    if column is not None:
        table = table.changed(column, rule or LabelRule())
    split_column = table.column("split")
    problems = [_no_key(kinds)] if kind is None else []
    if column is None and labels_required:
        problems.append(_no_label(table, label_column))
    if split_column is not None:
        problems += _bad_splits(table.rows, split_column)
    if kind is None or problems:
        raise LabelError(_listed(problems))
    rows: dict[str, list[Row]] = defaultdict(list)
    for row, reference in references(table, kind):
        rows[pseudonymiser.token("key", reference)].append(row)
    patient_column = None if kind == "patient" else table.key_column("patient")
    problems = _conflicts(list(rows.values()), [column, split_column, patient_column])
    if problems:
        raise LabelError(_listed(problems))
    entries = {
        token: Entry(
            kind=kind,
            lines=tuple(row.line for row in group),
            label=group[0].cells[column] if column else "",
            patient=_patient(group[0], patient_column, pseudonymiser, issuer=_issuer(table, group[0])),
            bare_patient=_patient(group[0], patient_column, pseudonymiser, issuer=""),
            by_number=kind == "patient" and not _issuer(table, group[0]),
            given_test=bool(split_column) and group[0].cells[split_column or ""].casefold() == "test",
        )
        for token, group in rows.items()
    }
    return LabelTable(entries, has_labels=column is not None, size=len(table.rows))


def make_task(labels: Iterable[str], classes: tuple[str, ...] | None, *, multilabel: bool = False) -> Task:
    """The task that the labels define.

    Args:
        labels: Label of every image.
        classes: Order of the classes, ``(negative, positive)`` for two; sorted where not given.
        multilabel: Whether a label joins several classes.

    Raises:
        LabelError: If there are labels outside ``classes``, fewer than two classes, or nearly as many classes as
            images.
    """
    of_images = Counter(labels)
    counts: Counter[str] = Counter()
    for label, count in of_images.items():
        for name in joined_names(label) if multilabel else (label,):
            counts[name] += count
    if classes is not None:
        other = sum(count for label, count in counts.items() if label not in classes)
        if other:
            raise LabelError(f"{other} images have a label that is not among the {len(classes)} given classes.")
        absent = sum(name not in counts for name in classes)
        if absent:
            raise LabelError(f"{absent} of the {len(classes)} given classes have no image. Check their spelling.")
    if len(counts) < 2:
        raise LabelError(f"Expected at least 2 classes; found {len(counts)}. Is this the label column?")
    images = sum(of_images.values())
    if classes is None and len(counts) > max(2, images // 2):
        raise LabelError(
            f"Found {len(counts)} different labels for {images} images. Is this the label column? "
            "If so, name the classes."
        )
    names = classes or tuple(sorted(counts))
    return Task.multilabel(names) if multilabel else Task.single_label(names)


def references(table: Table, kind: str) -> Iterator[tuple[Row, str]]:
    """Rows with what they refer to; an index that is unique in the table needs no split beside it."""
    column = table.key_column(kind)
    split_column = table.column("split") if kind == "index" else None
    assert column is not None
    unique = len({row.cells[column] for row in table.rows}) == len(table.rows)
    for row in table.rows:
        value = row.cells[column]
        if value and kind == "patient":
            yield row, table_key(kind, value, _issuer(table, row))
            continue
        if value and split_column:
            yield row, table_key(kind, value, row.cells[split_column])
        if value and (unique or not split_column):
            yield row, table_key(kind, value)


def _issuer(table: Table, row: Row) -> str:
    column = table.column("IssuerOfPatientID")
    return row.cells[column] if column else ""


def _patient(row: Row, column: str | None, pseudonymiser: Pseudonymiser, *, issuer: str) -> str:
    value = row.cells[column] if column else ""
    return pseudonymiser.patient(issuer, value) if value else ""


def _conflicts(groups: list[list[Row]], columns: list[str | None]) -> list[str]:
    """Rows that refer to the same image but say different things."""
    lines: list[int] = []
    for group in groups:
        if any(len({row.cells[column] for row in group}) > 1 for column in columns if column):
            lines += [row.line for row in group]
    if not lines:
        return []
    return [f"{len(set(lines))} rows contradict another row for the same image or patient: {lines_text(lines)}"]


def _bad_splits(rows: Sequence[Row], column: str) -> list[str]:
    lines = [row.line for row in rows if row.cells[column].casefold() not in SPLIT_VALUES]
    if not lines:
        return []
    return [f"expected split to be train, validation, val, holdout or test; found another on {lines_text(lines)}"]


def _no_key(kinds: Sequence[str]) -> str:
    legal = " or ".join(KEY_COLUMNS[kind][0] for kind in kinds)
    return f"no column refers to an image: expected {legal}"


def _no_label(table: Table, label_column: str) -> str:
    """Names known columns only: the first line of a table without heading would be a patient's."""
    known = [column for kind in KEY_COLUMNS if (column := table.key_column(kind))]
    found = f"{', '.join(known) or 'no known column'} and {len(table.columns) - len(known)} other columns"
    return f"no label column: expected {label_column!r}, found {found}; set label_column to the one with the class"


def _listed(problems: Sequence[str]) -> str:
    return "The label table cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems)
