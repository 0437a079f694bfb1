"""A folder of de-identified DICOM files from any source of DICOM files.

::

    out/
      manifest.csv                      one row per file of the source; pseudonyms, counts and reason codes only
      PATIENT/STUDY/2.25.….dcm          named by pseudonyms and the new SOP instance UID

The folder appears complete or not at all. Every file is read, rebuilt and searched in a child process that may
crash or hang without harming the rest; a file that fails is a row with a reason code and leaves no other trace.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from medistill.errors import ConfigError, OutputError, RejectedFile, SourceError
from medistill.ingest.burned_in import OCR_MEMORY_MB, OCR_SECONDS, Screen, TextPolicy
from medistill.ingest.cache import atomic_folder
from medistill.ingest.decode import read_dataset, silence
from medistill.ingest.deidentify.pixels import Box
from medistill.ingest.deidentify.profile import Profile, default_profile
from medistill.ingest.deidentify.rebuild import rebuild
from medistill.ingest.deidentify.verify import check
from medistill.ingest.deidentify.writing import encode
from medistill.ingest.frames import decode_dicom
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import Limits, isolated
from medistill.ingest.quarantine import Rejected
from medistill.ingest.reading import Item, Source
from medistill.ingest.sources import open_source
from medistill.progress import Progress

ACTIONS = ("kept", "replaced", "shifted", "remapped", "emptied", "removed")
_COLUMNS = ("ordinal", "outcome", "detail", "file", "sha256", "day", *ACTIONS, "masked", "flags")
_WRITTEN = "WRITTEN"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of a source.

    Args:
        written: Number of files written.
        patients: Number of patients among them.
        rejected: Files that were not written.
        actions: Elements by what was done to them, over all written files.
    """

    written: int
    patients: int
    rejected: tuple[Rejected, ...] = field(repr=False)
    actions: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Row:
    ordinal: int
    file: str
    sha256: str
    patient: str
    study_date: str
    actions: Mapping[str, int]
    masked: int
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Deidentifier:
    """Picklable function from one DICOM file to the bytes of a new one.

    Args:
        pseudonymiser: Replaces identifiers.
        profile: The allowlist.
        screen: What to do about text in pixels.
    """

    pseudonymiser: Pseudonymiser
    profile: Profile = field(default_factory=default_profile)
    screen: Screen = field(default_factory=Screen)

    def __call__(self, payload: Any, *, token: str = "") -> tuple[bytes, _Row]:
        """New file and its manifest row, verified.

        Args:
            payload: A path, the bytes of a file, a reference with a method ``read``, or a data set.
            token: Name of the file within the source; decides whether its text is read.

        Raises:
            RejectedFile: With the code of why it may not be written.
        """
        with silence():
            source = payload if isinstance(payload, Dataset) else _read(payload)
            boxes, flags = self._look(source, token)
            allow = self.screen.policy is TextPolicy.ALLOW
            built = rebuild(
                source, self.pseudonymiser, self.profile, masks=boxes, screened=not allow, allow_burned_in=allow
            )
            output = encode(built.dataset)
            check(source, output, self.profile)
        instance = str(built.dataset["SOPInstanceUID"].value)
        shifted = built.dataset.get("StudyDate", "")
        row = _Row(
            ordinal=0,
            file=f"{built.patient}/{built.study}/{instance}.dcm",
            sha256=hashlib.sha256(output).hexdigest(),
            patient=built.patient,
            study_date=str(shifted or ""),
            actions=built.actions,
            masked=len(boxes),
            flags=tuple(sorted({*built.flags, *flags})),
        )
        return output, row

    def _look(self, source: Dataset, token: str) -> tuple[tuple[Box, ...], set[str]]:
        """Boxes of text in any frame, and flags."""
        if self.screen.policy is TextPolicy.ALLOW:
            return (), {"burned_in_allowed"}
        boxes: dict[Box, None] = {}
        flags: set[str] = set()
        for image in decode_dicom(source, Policy.VOI):
            verdict = self.screen.look(
                image.grey(),
                declared=image.header.burned_in,
                risky=image.header.carries_text,
                token=self.pseudonymiser.digest("screen", f"{token} {image.frame}"),
                outside=image.header.outside,
            )
            verdict.check()
            boxes.update(dict.fromkeys(verdict.boxes))
            flags.update(verdict.flags)
        return tuple(boxes), flags


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """Runs in a child: writes the new file to the spool and returns its row."""

    deidentifier: Deidentifier
    spool: Path

    def __call__(self, item: Item) -> Iterator[_Row | Rejected]:
        if item.refused:
            yield Rejected(ordinal=item.ordinal, code=item.refused, detail=item.refused_detail)
            return
        try:
            output, row = self.deidentifier(item.payload, token=item.name)
        except RejectedFile as rejection:
            yield Rejected(ordinal=item.ordinal, code=rejection.code, detail=rejection.detail)
            return
        except MemoryError:
            yield Rejected(ordinal=item.ordinal, code="OOM_LIMIT")
            return
        except RecursionError:
            yield Rejected(ordinal=item.ordinal, code="NEST_LIMIT")
            return
        except Exception:
            yield Rejected(ordinal=item.ordinal, code="CODEC_CRASH", detail="unexpected error while rebuilding")
            return
        (self.spool / str(item.ordinal)).write_bytes(output)
        yield _Row(**{**vars(row), "ordinal": item.ordinal})


def deidentify_folder(
    source: Path | Source | Iterable[Item],
    out: Path,
    *,
    key: bytes,
    profile: Profile | None = None,
    burned_in: str = "reject",
    screen: Screen | None = None,
    notes: Path | None = None,
    progress: Progress | None = None,
    jobs: int | None = None,
    limits: Limits | None = None,
) -> Summary:
    """De-identify every file of a source.

    Args:
        source: A path or an open source of DICOM files; or items whose payloads are paths, bytes, or references
            with a method ``read`` that gives bytes.
        out: New folder.
        key: 32 secret bytes; see :func:`medistill.ingest.identity.load_or_create_key`.
        profile: The allowlist; the shipped one where not given.
        burned_in: ``reject``, ``mask`` or ``allow``, see :mod:`medistill.ingest.burned_in.screen`.
        screen: Screen to use instead of the usual one for ``burned_in``.
        read: Function from a payload to a data set.
        notes: Private file (mode 0600) that receives the original name of every ordinal; outside of ``out``.
        progress: Shown to the user.
        jobs: Children at work at once.
        limits: What one file may cost.

    Returns:
        Counts, and rejections by ordinal.

    Raises:
        SourceError: If the source holds no file.
        OutputError: If a folder or file cannot be written.
    """
    progress = progress or Progress()
    items = _items(source)
    if not items:
        raise SourceError("The source holds no file. Check the path.")
    if notes is not None:
        _write_notes(Path(notes), Path(out), items)
    deidentifier = Deidentifier(
        pseudonymiser=Pseudonymiser(key),
        profile=profile or default_profile(),
        screen=screen or Screen(policy=TextPolicy(burned_in)),
    )
    if limits is None:
        reads = deidentifier.screen.reads
        limits = Limits(memory_mb=OCR_MEMORY_MB, seconds=OCR_SECONDS) if reads else Limits()
    with atomic_folder(Path(out)) as folder:
        spool = folder / "spool"
        spool.mkdir()
        worker = _Worker(deidentifier=deidentifier, spool=spool)
        results = list(progress.track(_results(worker, items, jobs, limits), "de-identifying", total=len(items)))
        rows = sorted((result for result in results if isinstance(result, _Row)), key=lambda row: row.ordinal)
        rejected = [result for result in results if isinstance(result, Rejected)]
        rows, doubles = _place(folder, rows)
        rejected = sorted([*rejected, *doubles], key=lambda item: item.ordinal)
        shutil.rmtree(spool)
        _write_manifest(folder / "manifest.csv", rows, rejected)
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.actions)
    return Summary(
        written=len(rows),
        patients=len({row.patient for row in rows}),
        rejected=tuple(rejected),
        actions=dict(total),
    )


def _items(source: Path | Source | Iterable[Item]) -> list[Item]:
    """What is to be read, without holding the members of an archive."""
    if isinstance(source, (str, os.PathLike)):
        source = open_source("auto", Path(source))
    if isinstance(source, Iterable):
        return list(source)
    if "sop" not in source.keys:
        raise ConfigError("Expected DICOM files as source; found images of another kind.")
    if getattr(source, "local_only", False):
        raise ConfigError("Expected files, an archive or a DICOMweb address as source; DIMSE cannot be used here.")
    references = getattr(source, "references", source.items)
    return list(references())


def _read(payload: Any) -> Dataset:
    return read_dataset(payload.read() if hasattr(payload, "read") else payload)


def _results(
    worker: _Worker, items: Sequence[Item], jobs: int | None, limits: Limits | None
) -> Iterator[_Row | Rejected]:
    """One result for every item, whatever happens to the child that works on it."""
    last: dict[int, _Row | Rejected] = {}
    for outcome in isolated(worker, items, jobs=jobs, limits=limits):
        ordinal = outcome.item.ordinal
        if outcome.result is not None:
            last[ordinal] = outcome.result
        if outcome.ended:
            failed = Rejected(ordinal=ordinal, code=outcome.failure or "CODEC_CRASH")
            yield failed if outcome.failure else last.pop(ordinal, failed)


def _place(folder: Path, rows: Sequence[_Row]) -> tuple[list[_Row], list[Rejected]]:
    """Move files from the spool to their places; a second file of one SOP instance UID stays out."""
    placed: dict[str, _Row] = {}
    doubles = []
    for row in rows:
        spooled, target = folder / "spool" / str(row.ordinal), folder / row.file
        name = target.name
        if name in placed:
            code = "DUP_SOP_SAME" if placed[name].sha256 == row.sha256 else "DUP_SOP_DIFF"
            doubles.append(Rejected(ordinal=row.ordinal, code=code))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        spooled.rename(target)
        placed[name] = row
    return list(placed.values()), doubles


def _write_manifest(path: Path, rows: Sequence[_Row], rejected: Sequence[Rejected]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        if row.study_date:
            first[row.patient] = min(first.get(row.patient, row.study_date), row.study_date)
    lines: list[dict[str, Any]] = [
        {
            "ordinal": row.ordinal,
            "outcome": _WRITTEN,
            "file": row.file,
            "sha256": row.sha256,
            "day": _days(first.get(row.patient, ""), row.study_date),
            **{action: row.actions.get(action, 0) for action in ACTIONS},
            "masked": row.masked,
            "flags": " ".join(row.flags),
        }
        for row in rows
    ]
    lines += [{"ordinal": item.ordinal, "outcome": item.code, "detail": item.detail} for item in rejected]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: int(line["ordinal"])))


def _days(first: str, then: str) -> str:
    """Days from a patient's first study, both dates moved alike."""
    if not first or not then:
        return ""
    with suppress(ValueError):
        return str((date.fromisoformat(then) - date.fromisoformat(first)).days)
    return ""


def _write_notes(path: Path, out: Path, items: Sequence[Item]) -> None:
    """Original names, for the hospital only."""
    if path.absolute().is_relative_to(out.absolute()):
        raise OutputError("The notes hold original names and must lie outside the output folder.")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        raise OutputError("The notes file cannot be created, or exists already. Name another file.") from None
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("ordinal", "name"))
        writer.writerows((item.ordinal, item.name) for item in items)
