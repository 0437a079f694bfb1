"""From a source to a cohort: read, join labels, find contradictions, divide by patient, write."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import medistill
from medistill.core.cohort import Cohort, Instance
from medistill.core.task import Task
from medistill.errors import ConfigError, OutputError, SourceError
from medistill.ingest.cache import Accepted, CohortWriter, load_cohort, open_writer
from medistill.ingest.geometry import Fit
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.intensity import Policy
from medistill.ingest.labels import LabelTable, load_labels, make_task
from medistill.ingest.quarantine import REASON_CODES, Rejected, count_codes
from medistill.ingest.reading import Reader, Reading, Source
from medistill.ingest.sources import source_for
from medistill.ingest.splits import Member, SplitFractions, assign_splits
from medistill.parallel import parallel_map
from medistill.progress import Progress

_FEW = 64
_CHOICES: dict[str, tuple[str, ...]] = {
    "fit": tuple(Fit),
    "intensity": tuple(Policy),
    "burned_in": ("reject", "allow"),
    "missing_patient": ("reject", "own"),
}


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How images enter a cohort.

    Args:
        size: Side length of the stored square images, 8 to 4096.
        fit: ``pad`` (aspect kept, black borders), ``crop`` (centre) or ``stretch``.
        intensity: ``voi`` (the header's window), ``percentile`` (of each image) or ``none`` (full range).
        burned_in: ``reject`` or ``allow`` images whose header says that text is burned in. Pixels are not searched
            for text in this version: check your images, or reject modalities that carry text.
        missing_patient: ``reject`` images without a patient, or treat each study (without a study, each image) as
            its ``own`` patient; then the privacy unit is only as good as that assumption.
        fractions: Share of patients per split.
        seed: Another seed divides the patients differently.
        label_column: Column of the label table with the class.
        classes: Order of the classes, ``(negative, positive)`` for two; sorted where not given.

    Raises:
        ConfigError: Listing every field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    size: int = 256
    fit: str = "pad"
    intensity: str = "voi"
    burned_in: str = "reject"
    missing_patient: str = "reject"
    fractions: SplitFractions = field(default_factory=SplitFractions)
    seed: int = 0
    label_column: str = "label"
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"expected {name} to be one of {', '.join(legal)}, got {getattr(self, name)!r}"
            for name, legal in _CHOICES.items()
            if getattr(self, name) not in legal
        ]
        if not 8 <= self.size <= 4096:
            problems.append(f"expected size from 8 to 4096, got {self.size}")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) != len(self.classes)):
            problems.append("expected classes to be at least 2 different names")
        if problems:
            raise ConfigError("Ingestion: " + "; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """An image on its way into the cohort."""

    reading: Reading
    label: str = field(repr=False)
    spooled: int


def ingest(
    source: Source | Path | str,
    out: Path,
    *,
    key: bytes,
    labels: Path | None = None,
    config: IngestConfig | None = None,
    progress: Progress | None = None,
    jobs: int | None = None,
    private_notes: Path | None = None,
) -> Cohort:
    """Turn a source into a de-identified cohort on disk.

    Identifiers are replaced under the key while a file is read. A file that cannot be used is quarantined with a
    reason code; the cohort accounts for every file by its position in the scan.

    Args:
        source: A source, or the path of a folder, ``.zip`` or ``.npz`` file.
        out: Folder of the cohort; new or empty. It appears when the cohort is complete.
        key: 32 secret bytes, see :func:`medistill.ingest.load_or_create_key`.
        labels: CSV with a heading: one of ``SOPInstanceUID``, ``file``, ``index`` or ``PatientID``, a label
            column, and optionally ``split`` and ``patient_id``. Images given for ``test`` stay there; all
            other patients are drawn for the remaining splits.
        config: Settings; defaults where not given.
        progress: Where to show progress.
        jobs: Processes; all cores where not given.
        private_notes: CSV that names the original path of each quarantined file, for the hospital only: readable
            by its owner, outside the cohort. No path is written anywhere else.

    Returns:
        The cohort, its pixels still on disk.

    Raises:
        ConfigError: If a setting cannot work.
        SourceError: If nothing usable is found, or there are too few patients to divide.
        LabelError: If the label table does not fit; lists every problem by line.
        OutputError: If ``out`` is not empty or cannot be written.
    """
    config, progress = config or IngestConfig(), progress or Progress()
    _check_notes(private_notes, Path(out))
    source = source_for(Path(source)) if isinstance(source, (str, Path)) else source
    pseudonymiser = Pseudonymiser(key)
    table = _load_table(source, labels, config, pseudonymiser)
    reader = _reader(source, config, pseudonymiser)
    with open_writer(Path(out), config.size) as writer:
        candidates, rejected = _read_all(source, reader, table, config, writer, progress, jobs)
        candidates = _without_conflicts(_one_name_each(candidates), rejected)
        _write_notes(private_notes, source, rejected)
        _check_usable(candidates, rejected, len(source))
        warning = table.close() if table else ""
        task = make_task((item.label for item in candidates), config.classes)
        accepted, spooled = _divide(candidates, rejected, config, pseudonymiser)
        _write_notes(private_notes, source, rejected)
        profile = _profile(source, config, task, accepted, rejected)
        writer.finish(accepted, spooled, rejected, profile)
    cohort = load_cohort(Path(out))
    _summarise(cohort, rejected, warning, progress)
    return cohort


def _load_table(
    source: Source, labels: Path | None, config: IngestConfig, pseudonymiser: Pseudonymiser
) -> LabelTable | None:
    if labels is None:
        if not source.labelled:
            raise SourceError("This source has no labels of its own. Give a label table (CSV).")
        return None
    return load_labels(
        Path(labels),
        kinds=source.keys,
        label_column=config.label_column,
        labels_required=not source.labelled,
        pseudonymiser=pseudonymiser,
    )


def _reader(source: Source, config: IngestConfig, pseudonymiser: Pseudonymiser) -> Reader:
    return Reader(
        decode=source.decode,
        keys=source.keys,
        pseudonymiser=pseudonymiser,
        size=config.size,
        fit=Fit(config.fit),
        policy=Policy(config.intensity),
        allow_burned_in=config.burned_in == "allow",
    )


def _read_all(
    source: Source,
    reader: Reader,
    table: LabelTable | None,
    config: IngestConfig,
    writer: CohortWriter,
    progress: Progress,
    jobs: int | None,
) -> tuple[list[_Labelled], list[Rejected]]:
    """Read every item; pixels of those with a label and a patient go to the spool."""
    candidates: list[_Labelled] = []
    rejected: list[Rejected] = []
    seen: dict[str, str] = {}
    total = len(source)
    results = parallel_map(reader, source.items(), jobs=1 if jobs is None and total < _FEW else jobs)
    for result in progress.track(results, "reading images", total=total):
        if isinstance(result, Rejected):
            rejected.append(result)
            continue
        reading, pixels = result
        if reading.uid in seen:
            same = seen[reading.uid] == reading.pixel_key
            rejected.append(Rejected(ordinal=reading.ordinal, code="DUP_SOP_SAME" if same else "DUP_SOP_DIFF"))
            continue
        seen[reading.uid] = reading.pixel_key
        found = _join(reading, table, config)
        if isinstance(found, Rejected):
            rejected.append(found)
        else:
            candidates.append(replace(found, spooled=writer.append(pixels)))
    return candidates, rejected


def _join(reading: Reading, table: LabelTable | None, config: IngestConfig) -> _Labelled | Rejected:
    """Add what the label table says; the header's patient comes before the table's."""
    entry = table.match(reading.keys) if table else None
    label = reading.label
    if table and table.has_labels:
        label = entry.label if entry else ""
    if not label:
        return Rejected(ordinal=reading.ordinal, code="NO_LABEL")
    patient, flags = reading.patient or (entry.patient if entry else ""), reading.flags
    if not patient:
        if config.missing_patient == "reject":
            return Rejected(ordinal=reading.ordinal, code="ID_MISSING")
        patient, flags = reading.study or reading.own_patient, (*flags, "no_patient_id")
    given_test = reading.given_test or bool(entry and entry.given_test)
    joined = replace(reading, patient=patient, flags=flags, given_test=given_test)
    return _Labelled(reading=joined, label=label, spooled=-1)


def _one_name_each(candidates: Sequence[_Labelled]) -> list[_Labelled]:
    """Give a patient one pseudonym where files name the issuer, or the patient, only sometimes.

    A number without an issuer is taken for the same number with one; an image without a patient for the only
    patient of its study. Taking two people for one costs a rejection or a little data; the reverse would put one
    patient into two splits.
    """
    names = {item.reading.patient for item in candidates}
    of_study: dict[str, set[str]] = defaultdict(set)
    renamed = []
    for item in candidates:
        reading = item.reading
        name = reading.bare_patient if reading.bare_patient in names else reading.patient
        renamed.append(replace(item, reading=replace(reading, patient=name)))
        if "no_patient_id" not in reading.flags:
            of_study[reading.study].add(name)
    return [_named_by_study(item, of_study) for item in renamed]


def _named_by_study(item: _Labelled, of_study: Mapping[str, set[str]]) -> _Labelled:
    reading = item.reading
    known = of_study.get(reading.study, set()) if reading.study else set()
    if "no_patient_id" not in reading.flags or len(known) != 1:
        return item
    return replace(item, reading=replace(reading, patient=next(iter(known))))


def _without_conflicts(candidates: list[_Labelled], rejected: list[Rejected]) -> list[_Labelled]:
    """Turn away patients with two sexes or two birth dates: the number may stand for two people."""
    facts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for item in candidates:
        reading = item.reading
        facts[reading.patient, "sex"] |= {reading.sex} - {""}
        facts[reading.patient, "birth"] |= {reading.birth} - {""}
    conflicting = {patient for (patient, _), values in facts.items() if len(values) > 1}
    for item in candidates:
        if item.reading.patient in conflicting:
            detail = "two sexes or two birth dates under one patient"
            rejected.append(Rejected(ordinal=item.reading.ordinal, code="ID_CONFLICT", detail=detail))
    return [item for item in candidates if item.reading.patient not in conflicting]


def _check_usable(candidates: Sequence[_Labelled], rejected: Sequence[Rejected], total: int) -> None:
    if candidates:
        return
    remedy = ""
    codes = count_codes(rejected)
    if "ID_MISSING" in codes:
        remedy = " Give a label table with a patient_id column, or set missing_patient to 'own'."
    elif "NO_LABEL" in codes:
        remedy = " Check that the label table belongs to this source and that its key column fits."
    raise SourceError(f"None of {total} files can be used: {_codes_text(codes)}.{remedy}")


def _divide(
    candidates: Sequence[_Labelled], rejected: list[Rejected], config: IngestConfig, pseudonymiser: Pseudonymiser
) -> tuple[list[Accepted], list[int]]:
    """Assign splits; images of a patient given for testing that are not for testing are turned away."""
    members = [
        Member(
            patient=item.reading.patient,
            label=item.label,
            pixel_key=item.reading.pixel_key,
            given_test=item.reading.given_test,
        )
        for item in candidates
    ]
    splits = assign_splits(members, fractions=config.fractions, pseudonymiser=pseudonymiser, seed=config.seed)
    accepted: list[Accepted] = []
    spooled: list[int] = []
    for item, split in zip(candidates, splits, strict=True):
        reading = item.reading
        if split is None:
            detail = "the patient is also given for testing"
            rejected.append(Rejected(ordinal=reading.ordinal, code="ID_CONFLICT", detail=detail))
            continue
        instance = Instance(
            uid=reading.uid,
            patient=reading.patient,
            label=item.label,
            split=split,
            row=len(accepted),
            study=reading.study,
            modality=reading.modality,
            view=reading.view,
            sex=reading.sex,
            age_band=reading.age_band,
            site=reading.site,
            pixel_key=reading.pixel_key,
        )
        accepted.append(Accepted(ordinal=reading.ordinal, instance=instance, flags=reading.flags))
        spooled.append(item.spooled)
    return accepted, spooled


def _profile(
    source: Source, config: IngestConfig, task: Task, accepted: Sequence[Accepted], rejected: Sequence[Rejected]
) -> dict[str, Any]:
    patients = {item.instance.patient for item in accepted}
    libraries = ("numpy", "pydicom", "imagecodecs", "pillow")
    return {
        "task": task.to_json(),
        "source": type(source).__name__,
        "config": asdict(config),
        "counts": {
            "files": len(source),
            "images": len(accepted),
            "patients": len(patients),
            "quarantine": count_codes(rejected),
        },
        "versions": {"medistill": medistill.__version__, **{name: version(name) for name in libraries}},
    }


def _summarise(cohort: Cohort, rejected: Sequence[Rejected], warning: str, progress: Progress) -> None:
    if warning:
        progress.say(f"Warning: {warning}.")
    progress.say(f"{len(cohort)} images of {len(cohort.patients)} patients, {len(rejected)} files in quarantine.")
    if cohort.task.n_classes == 2 and not cohort.profile["config"]["classes"]:
        progress.say(
            f"Positive class: {cohort.task.class_names[1]!r}, the second in alphabetical order. "
            "If that is wrong, give the classes as NEGATIVE,POSITIVE."
        )
    for code, count in count_codes(rejected).items():
        progress.say(f"  {count:6d} {code:18s} {REASON_CODES[code]}")


def _codes_text(codes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in codes.items())


def _check_notes(notes: Path | None, out: Path) -> None:
    if notes is not None and Path(notes).resolve().is_relative_to(out.resolve()):
        raise ConfigError("The private notes must lie outside the cohort: they name original files.")


def _write_notes(path: Path | None, source: Source, rejected: Sequence[Rejected]) -> None:
    """Original path of every quarantined file, readable by the owner only."""
    if path is None:
        return
    codes = {item.ordinal: item.code for item in rejected}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.chmod(path, 0o600)
            writer = csv.writer(file)
            writer.writerow(("ordinal", "code", "file"))
            items = source.items() if codes else iter(())
            writer.writerows(
                (item.ordinal, codes[item.ordinal], item.name) for item in items if item.ordinal in codes
            )
    except OSError as error:
        raise OutputError("The private notes cannot be written. Name a file in a writable folder.") from error
