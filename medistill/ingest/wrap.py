"""Ordinary images wrapped as DICOM files, for people who have PNG or JPEG instead of DICOM.

The result is valid DICOM with 8-bit grey pixels, so the rest of the toolkit (and any viewer) can work with it. The
files keep the patient numbers of the table: they are as sensitive as the table itself and are for use inside only.
"""

from __future__ import annotations

import csv
import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from medistill.errors import ConfigError, LabelError, RejectedFile, SourceError
from medistill.ingest.cache import atomic_folder
from medistill.ingest.decode import silence
from medistill.ingest.frames import Decoded
from medistill.ingest.headers import MODALITIES, Header
from medistill.ingest.intensity import Policy
from medistill.ingest.labels import references
from medistill.ingest.quarantine import Rejected, count_codes
from medistill.ingest.reading import Item, item_keys
from medistill.ingest.sources import source_for
from medistill.ingest.sources.folder import FolderSource
from medistill.ingest.table import Row, Table, lines_text, read_table
from medistill.parallel import parallel_map
from medistill.progress import Progress

LABELS = "labels.csv"
_COLUMNS = ("SOPInstanceUID", "PatientID", "file", "label", "split")
_LONG_STRING = re.compile(r"[^\\\x00-\x1f\x7f]{1,64}")
_NOT_IN_NAMES = str.maketrans("^=", "__")
_JPEG = b"\xff\xd8"


@dataclass(frozen=True, kw_only=True)
class WrapSummary:
    """What was wrapped.

    Args:
        images: DICOM files written.
        patients: Different patients among them.
        skipped: Images left out, by reason code.
        labels: The label table beside the files.
    """

    images: int
    patients: int
    skipped: dict[str, int]
    labels: Path


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One image with what the table says about it."""

    item: Item
    patient: str = field(repr=False)
    label: str = field(default="", repr=False)
    split: str = ""


def wrap_images(
    source: Path,
    out: Path,
    *,
    table: Path | None = None,
    label_column: str = "label",
    label_names: Mapping[str, str] | None = None,
    modality: str = "CR",
    progress: Progress | None = None,
    jobs: int | None = None,
) -> WrapSummary:
    """Wrap images as single-frame DICOM files.

    Grey levels become 8-bit MONOCHROME2 without a window; colour becomes luminance. UIDs follow from content, file
    name and patient, so wrapping twice gives the same files. All images of a patient are one study.

    Args:
        source: Folder or ``.zip`` of images, or an ``.npz`` file.
        out: New or empty folder for ``images/*.dcm`` and ``labels.csv``; appears when complete.
        table: CSV with ``file`` (or ``index``), ``patient_id``, and optionally a label and a ``split`` column.
            Images without a row or patient are left out. Without a table every image is its own patient, and its
            folder is its label.
        label_column: Column with the class.
        label_names: New names for classes, for example ``{"0": "normal", "1": "pneumonia"}``.
        modality: ``CR`` writes Computed Radiography; others write Secondary Capture of that modality.
        progress: Where to show progress.
        jobs: Processes; all cores where not given.

    Returns:
        Counts and the path of the label table.

    Raises:
        ConfigError: If the modality is unknown.
        SourceError: If the source holds no image.
        LabelError: If the table does not fit.
        OutputError: If ``out`` is not empty or cannot be written.
    """
    progress = progress or Progress()
    if modality not in MODALITIES:
        raise ConfigError("Expected modality to be a DICOM modality such as CR, DX, US or OP; found another.")
    images = source_for(Path(source))
    if isinstance(images, FolderSource):
        raise SourceError("The source holds no PNG, JPEG, TIFF, BMP or WebP images. DICOM needs no wrapping.")
    rows = _rows(table, images.keys, label_column) if table else None
    skipped: list[Rejected] = []
    with atomic_folder(Path(out)) as folder:
        (folder / "images").mkdir()
        work = partial(_wrap_one, decode=images.decode, folder=folder / "images", modality=modality)
        ambiguous: list[int] = []
        pending = _jobs(images.items(), images.keys, rows, label_names or {}, skipped, ambiguous)
        written = []
        for result in progress.track(parallel_map(work, pending, jobs=jobs), "wrapping images", total=len(images)):
            if isinstance(result, Rejected):
                skipped.append(result)
            else:
                written.append(result)
        if ambiguous:
            found = lines_text(ambiguous)
            raise LabelError(f"Rows match several images each: {found}. Give the path within the source.")
        if not written:
            raise SourceError("No image could be wrapped. Check that the table belongs to this source.")
        _write_labels(folder / LABELS, written)
    return WrapSummary(
        images=len(written),
        patients=len({row["PatientID"] for row in written}),
        skipped=count_codes(skipped),
        labels=Path(out) / LABELS,
    )


def _rows(path: Path, kinds: tuple[str, ...], label_column: str) -> dict[str, Row]:
    """Rows of the table by what they refer to, with their cells under canonical names."""
    table = read_table(Path(path))
    kind = next((kind for kind in kinds if table.key_column(kind)), None)
    patient = table.key_column("patient")
    if kind is None or patient is None:
        raise LabelError(
            "Expected columns `file` (or `index`) and `patient_id` in the table; found no such columns."
        )
    _check_patients(table, patient)
    names = {"patient": patient, "label": table.column(label_column), "split": table.column("split")}
    rows: dict[str, Row] = {}
    repeated: list[int] = []
    for row, reference in references(table, kind):
        cells = {name: row.cells[column] if column else "" for name, column in names.items()}
        if reference in rows:
            repeated.append(row.line)
        rows[reference] = Row(line=row.line, cells=cells)
    if repeated:
        raise LabelError(f"The table refers to the same image more than once: {lines_text(repeated)}.")
    return rows


def _check_patients(table: Table, column: str) -> None:
    lines = [row.line for row in table.rows if row.cells[column] and not _LONG_STRING.fullmatch(row.cells[column])]
    if lines:
        raise LabelError(
            "Expected patient numbers of at most 64 characters without backslash and control characters; "
            f"found others on {lines_text(lines)}."
        )


def _jobs(
    items: Iterator[Item],
    kinds: tuple[str, ...],
    rows: dict[str, Row] | None,
    label_names: Mapping[str, str],
    skipped: list[Rejected],
    ambiguous: list[int],
) -> Iterator[_Job]:
    """Images with a patient; the others go to ``skipped``, rows used twice to ``ambiguous``."""
    used: set[int] = set()
    for item in items:
        if rows is None:
            patient = item.patient or f"IMAGE{item.ordinal:06d}"
            label = label_names.get(item.label, item.label)
            yield _Job(item=item, patient=patient, label=label, split=item.split)
            continue
        row = next((rows[key] for key in item_keys(kinds, item, Header()) if key in rows), None)
        if row is None or not row.cells["patient"]:
            skipped.append(Rejected(ordinal=item.ordinal, code="ID_MISSING"))
            continue
        if row.line in used:
            ambiguous.append(row.line)
            continue
        used.add(row.line)
        label = row.cells["label"] or item.label
        yield _Job(
            item=item,
            patient=row.cells["patient"],
            label=label_names.get(label, label),
            split=row.cells["split"] or item.split,
        )


def _wrap_one(job: _Job, *, decode: Any, folder: Path, modality: str) -> dict[str, str] | Rejected:
    """Write one file; returns its row of the label table."""
    try:
        with silence():
            decoded: Decoded = next(decode(job.item.payload, Policy.NONE))
    except RejectedFile as rejection:
        return Rejected(ordinal=job.item.ordinal, code=rejection.code, detail=rejection.detail)
    pixels = np.rint(np.clip(decoded.grey(), 0, 1) * 255).astype(np.uint8)
    dataset = _dataset(job, pixels, modality)
    if (content := _jpeg_content(job.item.payload)) is not None:
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionMethod = "ISO_10918_1"
        dataset.LossyImageCompressionRatio = f"{max(1.0, pixels.size / len(content)):.4g}"
    dataset.save_as(folder / f"{job.item.ordinal:06d}.dcm", enforce_file_format=True)
    return {
        "SOPInstanceUID": str(dataset.SOPInstanceUID),
        "PatientID": job.patient,
        "file": job.item.name,
        "label": job.label,
        "split": job.split,
    }


def _dataset(job: _Job, pixels: NDArray[np.uint8], modality: str) -> Dataset:
    """Computed Radiography (PS3.3 A.2) or Secondary Capture (A.8.1) with all mandatory attributes."""
    radiography = modality == "CR"
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = ComputedRadiographyImageStorage if radiography else SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = _uid("image", job.item.name.encode("utf-8", "surrogateescape"), pixels.tobytes())
    dataset.StudyInstanceUID = _uid("study", job.patient.encode())
    dataset.SeriesInstanceUID = _uid("series", job.patient.encode())
    dataset.Modality = modality
    dataset.PatientID = job.patient
    dataset.PatientName = f"WRAPPED^{job.patient.translate(_NOT_IN_NAMES)}"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = "1", 1, job.item.ordinal + 1
    empty = [
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "ReferringPhysicianName",
        "AccessionNumber",
    ]
    empty += ["PatientOrientation", "Manufacturer"]
    empty += ["BodyPartExamined", "ViewPosition"] if radiography else []
    for keyword in empty:
        setattr(dataset, keyword, "")
    if not radiography:
        dataset.ConversionType = "WSD"
    _set_pixels(dataset, pixels)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _set_pixels(dataset: Dataset, pixels: NDArray[np.uint8]) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    content = pixels.tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OB"


def _jpeg_content(payload: Path | bytes | NDArray[Any]) -> bytes | None:
    """Bytes of a JPEG file, or nothing for other payloads."""
    if isinstance(payload, np.ndarray):
        return None
    content = payload if isinstance(payload, bytes) else payload.read_bytes()
    return content if content.startswith(_JPEG) else None


def _uid(domain: str, *parts: bytes) -> str:
    """UID under ``2.25.`` that depends on nothing but its inputs (PS3.5 B.2)."""
    digest = hashlib.sha256(b"\0".join((b"medistill wrap", domain.encode(), *parts))).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def _write_labels(path: Path, rows: list[dict[str, str]]) -> None:
    columns = _COLUMNS if any(row["split"] for row in rows) else _COLUMNS[:-1]
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
