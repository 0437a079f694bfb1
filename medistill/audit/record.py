"""An audit on disk, and images of somebody else's making read from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.audit.attack import Exposed
from medistill.audit.copies import closest_pairs
from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.reports import AuditReport
from medistill.core.task import Task, TaskKind
from medistill.errors import DataError
from medistill.release.durable import output_errors, replace_durably
from medistill.report.audit_page import render_audit

_PLANE_AXES = 3


def write_audit(
    folder: Path,
    report: AuditReport,
    release: Exposed,
    *,
    statement: PrivacyStatement | None,
    train: ImageSet,
    holdout: ImageSet,
    reference: ImageSet,
    version: str,
) -> None:
    """Write ``audit.json``, and ``audit.html`` with the closest pairs, which shows patients and stays inside.

    Args:
        folder: An existing folder; its name is the title of the page.
        report: What the audit concluded.
        release: What was audited.
        statement: What is proved about it; ``None`` where nothing is known.
        train: Images it was made from.
        holdout: Images of patients that had no part in it.
        reference: Images of further patients.
        version: Version of the software that made it, or audits it.

    Raises:
        OutputError: If a file cannot be written.
    """
    pairs = closest_pairs(release, train=train, holdout=holdout, reference=reference)
    page = render_audit(report, statement=statement, pairs=pairs, name=folder.name, version=version)
    texts = {"audit.json": json.dumps(report.to_json(), indent=2) + "\n", "audit.html": page}
    for name, text in texts.items():
        with output_errors(folder / name):
            replace_durably(folder / name, text.encode())


def outcome_lines(report: AuditReport) -> tuple[str, ...]:
    """What every attack found, and how its controls ended, as lines for a terminal."""
    lines = []
    for outcome in report.outcomes:
        lines.append(f"{outcome.attack}: {outcome.verdict.value}. {outcome.summary}")
        lines += [
            f"  {'ok    ' if control.passed else 'FAILED'} {control.name}: {control.observed}"
            for control in outcome.controls
        ]
    return tuple(lines)


def read_pictures(folder: Path, table: Path, *, task: Task, image_shape: tuple[int, ...]) -> Exposed:
    """Images that somebody else made, as a release.

    Args:
        folder: Holds PNG or JPEG files.
        table: CSV with a column ``file``, and either ``label`` with a class name, or one column of probabilities
            for every class name.
        task: What is diagnosed.
        image_shape: ``(channels, side, side)`` of the cohort's images; others are resized to it.

    Raises:
        DataError: If the table has no usable columns, names an unknown class or a file that cannot be read, or the
            cohort holds volumes; says which row.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    if len(image_shape) != _PLANE_AXES:
        raise DataError("Expected a cohort of images; pictures cannot be compared with volumes.")
    rows = _rows(table, task)
    images = []
    for number, (name, _) in enumerate(rows, start=1):
        place = (folder / name).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise DataError(f"Row {number} of the table names a file outside of the folder.")
        try:
            with Image.open(place) as opened:
                picture = opened.convert("L" if image_shape[0] == 1 else "RGB")
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        except (OSError, UnidentifiedImageError):
            raise DataError(
                f"The file of row {number} of the table cannot be read; expected a PNG or JPEG in the folder."
            ) from None
        plane = pixels.view(picture.height, picture.width, image_shape[0]).permute(2, 0, 1) / 255
        images.append(_resized(plane, image_shape[-1]))
    labels = torch.tensor([probabilities for _, probabilities in rows])
    ipc = max(1, len(images) // task.n_classes)
    return Exposed(images=torch.stack(images), soft_labels=labels, task=task, ipc=ipc)


def _resized(plane: Tensor, side: int) -> Tensor:
    if plane.shape[1:] == (side, side):
        return plane
    resized = F.interpolate(plane[None], size=(side, side), mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)


def _rows(table: Path, task: Task) -> list[tuple[str, list[float]]]:
    """File and probabilities of every row."""
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            read = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError("The table of labels cannot be read; expected a CSV file in UTF-8.") from None
    columns = set(read[0]) if read else set()
    names = task.class_names
    if not read or "file" not in columns or not ("label" in columns or set(names) <= columns):
        raise DataError(
            "Expected a table with a column 'file' and either 'label' or one column for every class "
            f"({', '.join(names)}), and at least one row."
        )
    return [(row["file"], _probabilities(row, number, task)) for number, row in enumerate(read, start=1)]


def _probabilities(row: dict[str, str], number: int, task: Task) -> list[float]:
    names = task.class_names
    if "label" in row:
        if row["label"] not in names:
            raise DataError(f"Row {number} of the table has an unknown label; expected one of {', '.join(names)}.")
        return [float(row["label"] == name) for name in names]
    try:
        found = [float(row[name]) for name in names]
    except (TypeError, ValueError):
        raise DataError(f"Row {number} of the table: expected a number for every class.") from None
    single = task.kind is not TaskKind.MULTILABEL
    if min(found) < 0 or max(found) > 1 or (single and abs(sum(found) - 1) > 0.01):
        raise DataError(f"Row {number} of the table: expected probabilities between 0 and 1 that add up to 1.")
    return found
