"""Counts of files, images and patients; :func:`inspect_cohort` puts everything together."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medistill.core.cohort import AGE_BANDS, Cohort, Instance, Split
from medistill.core.task import Task, TaskKind
from medistill.errors import SourceError
from medistill.ingest.cache import load_cohort
from medistill.ingest.quarantine import REASON_CODES
from medistill.report.disclosure import PUBLIC_PROFILE_KEYS
from medistill.report.quality.checks import judged
from medistill.report.quality.pixels import measure_intensity
from medistill.report.quality.records import (
    NOT_GIVEN,
    Attribute,
    Count,
    Duplicates,
    Part,
    PerPatient,
    Quality,
    Reason,
    Value,
)
from medistill.report.wording import one_line

_ACCEPTED = "ACCEPTED"
_ATTRIBUTES = ("modality", "view", "sex", "age_band", "site")


def inspect_cohort(path: Path, *, seed: int = 0) -> Quality:
    """Count what is in a cohort and look at the pixels of a sample.

    Args:
        path: Folder of the cohort.
        seed: Chooses the sample where the cohort has more than :data:`MOST_SAMPLED` images, and the pictures.

    Raises:
        SourceError: If the folder is no cohort, or damaged.

    Privacy:
        Reads non-released data and returns exact counts of patients; the result stays with the cohort.
    """
    cohort = load_cohort(path)
    manifest = list(_manifest(Path(path)))
    scanned = {row["ordinal"] for row in manifest}
    accepted = {row["ordinal"] for row in manifest if row["outcome"] == _ACCEPTED}
    counted = cohort.profile.get("counts") or {}
    flags = Counter(flag for row in manifest for flag in row["flags"].split())
    settings = cohort.profile.get("config") or {}
    quality = Quality(
        seed=seed,
        files=int(counted.get("files", len(scanned))),
        accepted=len(accepted),
        rejected=len(scanned - accepted),
        quarantine=_reasons(manifest),
        classes=cohort.task.class_names,
        whole=_part("all", cohort.instances, cohort.task),
        splits=tuple(_part(split.value, cohort.split(split).instances, cohort.task) for split in Split),
        attributes=tuple(_attribute(name, cohort) for name in _ATTRIBUTES),
        per_patient=_per_patient(cohort),
        flags=dict(sorted(flags.items(), key=lambda item: (-item[1], item[0]))),
        duplicates=_duplicates(cohort),
        intensity=measure_intensity(cohort, seed=seed),
        settings={key: str(settings[key]) for key in PUBLIC_PROFILE_KEYS if key in settings},
    )
    return judged(quality)


def _manifest(path: Path) -> Iterator[dict[str, str]]:
    """Rows of the manifest: every accepted image and every rejection."""
    try:
        with (path / "manifest.csv").open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, ValueError) as error:
        raise SourceError("The cohort is damaged: its manifest cannot be read. Ingest again.") from error


def _reasons(manifest: Sequence[Mapping[str, str]]) -> tuple[Reason, ...]:
    details: dict[str, Counter[str]] = defaultdict(Counter)
    for row in manifest:
        if row["outcome"] != _ACCEPTED:
            details[row["outcome"]][one_line(row["detail"])] += 1
    found = []
    for code, counts in details.items():
        named = [(detail, count) for detail, count in counts.most_common() if detail]
        detail, often = named[0] if named else ("", 0)
        found.append(
            Reason(
                code=code,
                sentence=REASON_CODES.get(code, "A reason that this version does not know."),
                files=counts.total(),
                detail=detail,
                detail_files=often,
            )
        )
    return tuple(sorted(found, key=lambda reason: (-reason.files, reason.code)))


def _count(instances: Iterable[Instance]) -> Count:
    patients = [instance.patient for instance in instances]
    return Count(images=len(patients), patients=len(set(patients)))


def _part(name: str, instances: Sequence[Instance], task: Task) -> Part:
    """Counts; images of several classes count for each of them."""
    of_class: dict[str, list[Instance]] = {label: [] for label in task.class_names}
    for instance in instances:
        for label in task.names_in(instance.label):
            of_class[label].append(instance)
    per_class = {label: _count(own) for label, own in of_class.items()}
    return Part(name=name, total=_count(instances), classes=per_class)


def _attribute(name: str, cohort: Cohort) -> Attribute:
    """Values by number of patients; a site is numbered, its pseudonym is not kept."""
    groups: dict[str, list[Instance]] = defaultdict(list)
    for instance in cohort.instances:
        groups[getattr(instance, name)].append(instance)
    parts = {value: _part(value, group, cohort.task) for value, group in groups.items()}
    order = sorted(parts, key=lambda value: (value == "", -parts[value].total.patients, value))
    if name == "age_band":
        order = [band for band in (*AGE_BANDS[1:], "") if band in parts]
    values = tuple(
        Value(
            name=NOT_GIVEN if not value else f"site {number}" if name == "site" else value,
            total=parts[value].total,
            classes={label: count.patients for label, count in parts[value].classes.items()},
        )
        for number, value in enumerate(order, start=1)
    )
    return Attribute(name=name, values=values, association=_association(values, cohort.task))


def _association(values: Sequence[Value], task: Task) -> float:
    """Between value and class; of a multilabel task the largest of any class and its absence."""
    table = np.array([list(value.classes.values()) for value in values], dtype=np.float64)
    if task.kind is not TaskKind.MULTILABEL:
        return _cramers_v(table)
    total = np.array([[value.total.patients] for value in values], dtype=np.float64)
    return max(_cramers_v(np.hstack([table[:, [c]], total - table[:, [c]]])) for c in range(task.n_classes))


def _cramers_v(table: NDArray[np.float64]) -> float:
    r"""Cramér's V with Bergsma's correction: 0 where there is one row or one column.

    References:
        Bergsma, Journal of the Korean Statistical Society 42 (2013) 323.
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0] if table.size else table
    n = table.sum()
    if min(table.shape) < 2 or n < 2:
        return 0.0
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / n
    squared = float((((table - expected) ** 2) / expected).sum() / n)
    rows, columns = table.shape
    corrected = max(0.0, squared - (rows - 1) * (columns - 1) / (n - 1))
    fewest = min(rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1)) - 1
    return round(float(min(1.0, corrected / fewest)) ** 0.5, 4) if fewest > 0 else 0.0


def _per_patient(cohort: Cohort) -> PerPatient:
    images = np.array(list(Counter(instance.patient for instance in cohort.instances).values()))
    counts = Counter(images.tolist())
    return PerPatient(
        minimum=int(images.min()),
        median=float(np.median(images)),
        maximum=int(images.max()),
        histogram=dict(sorted(counts.items())),
    )


def _duplicates(cohort: Cohort) -> Duplicates:
    groups: dict[str, list[Instance]] = defaultdict(list)
    for instance in cohort.instances:
        if instance.pixel_key:
            groups[instance.pixel_key].append(instance)
    repeated = [group for group in groups.values() if len(group) > 1]
    return Duplicates(
        images=sum(len(group) - 1 for group in repeated),
        groups=len(repeated),
        across_patients=sum(len({instance.patient for instance in group}) > 1 for group in repeated),
        across_classes=sum(len({instance.label for instance in group}) > 1 for group in repeated),
    )
