"""Plan and write the phantom cohort: DICOM files in nested folders, labels, answer key, statement."""

from __future__ import annotations

import csv
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID

from medistill.errors import ConfigError, OutputError
from medistill.ingest.phantom.anatomy import Anatomy, draw_anatomy, draw_pose
from medistill.ingest.phantom.film import render, stomach_region
from medistill.ingest.phantom.identity import (
    MARKER,
    Header,
    Person,
    Visit,
    build_header,
    draw_person,
    draw_visit,
)
from medistill.ingest.phantom.pixels import TextBox, burn_in, draw_storage, quantise, set_pixels
from medistill.parallel import parallel_map
from medistill.progress import Progress

CLASSES = ("gastritis", "no_gastritis", "outside")
STATEMENT = (
    f"{MARKER}. Every image, person, place, date and number in this folder was made up by a program from a seed. "
    "The films imitate double-contrast X-ray examinations of the stomach; names and identifiers are strung "
    "together from syllables and refer to nobody. The data serve to test software and to show a method; they "
    "are of no use for diagnosis or for any statement about patients. dicom/ holds the files, labels.csv their "
    "classes, ground_truth.json what was planted in each of them.\n"
)
_IMPLEMENTATION_UID = UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, 'medistill phantom').int}")
_SILENT = Progress()


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """What decides every byte of a phantom cohort.

    Args:
        patients: Number of patients; half of them have gastritis.
        seed: Root of all randomness and of all UIDs.
        size: Rows and columns of a film.
        images_per_patient: Fewest and most films of a patient; the first shows the stomach, three in ten
            of the others a field outside it.
        difficulty: Overlap of gastritis and no_gastritis, 0 (apart) to 1 (hardly learnable).
        burned_in: Share of films with text in the pixels.

    Raises:
        ConfigError: If a value is out of range; all problems at once.
    """

    patients: int = 200
    seed: int = 0
    size: int = 256
    images_per_patient: tuple[int, int] = (2, 4)
    difficulty: float = 0.5
    burned_in: float = 0.05

    def __post_init__(self) -> None:
        low, high = self.images_per_patient
        checks = (
            (1 <= self.patients <= 99_999, f"Expected 1 <= patients={self.patients} <= 99999."),
            (self.seed >= 0, f"Expected seed={self.seed} >= 0."),
            (48 <= self.size <= 4096, f"Expected 48 <= size={self.size} <= 4096."),
            (1 <= low <= high <= 99, f"Expected 1 <= low <= high <= 99 in images_per_patient={(low, high)}."),
            (0.0 <= self.difficulty <= 1.0, f"Expected 0 <= difficulty={self.difficulty} <= 1."),
            (0.0 <= self.burned_in <= 1.0, f"Expected 0 <= burned_in={self.burned_in} <= 1."),
        )
        problems = [message for holds, message in checks if not holds]
        if problems:
            raise ConfigError(" ".join(problems))


@dataclass(frozen=True, kw_only=True)
class PhantomSummary:
    """What was written."""

    images: int
    patients: int
    studies: int
    per_class: dict[str, int]


def write_phantom(
    out: Path,
    config: PhantomConfig,
    *,
    regions: bool = False,
    progress: Progress = _SILENT,
    jobs: int | None = 1,
) -> PhantomSummary:
    """Write a synthetic double-contrast gastric X-ray cohort as DICOM.

    The bytes depend on ``config`` alone (and the versions of the codecs), not on ``jobs``. The folder appears only
    when it is complete: ``dicom/`` (nested, some files without extension), ``labels.csv``
    (``SOPInstanceUID,PatientID,file,label``), ``ground_truth.json`` and ``README.txt``.

    Args:
        out: Folder to make; may exist if empty.
        config: What to make.
        regions: Write ``regions/<SOPInstanceUID>.png`` as well, white where the stomach is; the other files stay
            the same.
        progress: Receives one tick per patient.
        jobs: Processes; ``None`` takes all cores.

    Raises:
        OutputError: If ``out`` is not an empty folder or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError("The output of the phantom must be a new or empty folder; name another one or empty it.")
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial_out.mkdir(parents=True)
        rows = _write_files(partial_out, config, regions=regions, progress=progress, jobs=jobs)
        _write_tables(partial_out, config, rows)
        if out.exists():
            out.rmdir()
        partial_out.rename(out)
    except OSError:
        raise OutputError(
            "The phantom could not be written, and nothing was left behind. Free space or name another folder."
        ) from None
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return PhantomSummary(
        images=len(rows),
        patients=len({row["patient"] for row in rows}),
        studies=len({row["study_uid"] for row in rows}),
        per_class={name: count for name in CLASSES if (count := sum(row["label"] == name for row in rows))},
    )


def _write_files(
    folder: Path, config: PhantomConfig, *, regions: bool, progress: Progress, jobs: int | None
) -> list[dict[str, Any]]:
    order = np.random.default_rng(np.random.SeedSequence(config.seed)).permutation(config.patients)
    tasks = [(index, bool(rank % 2)) for index, rank in enumerate(order)]
    if regions:
        (folder / "regions").mkdir()
    write = partial(_write_patient, folder=folder, config=config, regions=regions)
    written = parallel_map(write, tasks, jobs=jobs)
    rows: list[dict[str, Any]] = []
    for patient_rows in progress.track(written, "making patients", total=config.patients):
        rows.extend(patient_rows)
    return rows


def _write_patient(
    task: tuple[int, bool], *, folder: Path, config: PhantomConfig, regions: bool
) -> list[dict[str, Any]]:
    """Write all films of one patient; returns their rows of the answer key."""
    index, gastritis = task
    sequence = np.random.SeedSequence(config.seed, spawn_key=(index,))
    body, who, films = (np.random.default_rng(child) for child in sequence.spawn(3))
    anatomy = draw_anatomy(body, gastritis=gastritis, difficulty=config.difficulty)
    person = draw_person(who, index)
    count = int(films.integers(config.images_per_patient[0], config.images_per_patient[1] + 1))
    shots = _draw_shots(films, who, index, count, config)
    rows = []
    for number, shot in enumerate(shots):
        label = "outside" if shot.outside else CLASSES[0 if gastritis else 1]
        rng = np.random.default_rng(sequence.spawn(1)[0])
        row = _write_film(
            rng, anatomy, person, shot, folder=folder, config=config, key=(index, number), regions=regions
        )
        rows.append({"patient": index, "label": label, "severity": round(anatomy.severity, 4), **row})
    return rows


@dataclass(frozen=True, kw_only=True)
class _Shot:
    visit: Visit
    number: int
    outside: bool


def _draw_shots(
    films: np.random.Generator, who: np.random.Generator, index: int, count: int, config: PhantomConfig
) -> Iterator[_Shot]:
    """Spread the films of a patient over one study, or over two for two patients in five."""
    split = int(films.integers(1, count)) if count > 1 and films.random() < 0.4 else count
    visit = None
    for number in range(count):
        if number in {0, split}:
            study = int(number > 0)
            visit = draw_visit(who, study_uid=_uid(config, index, "study", study), earlier=visit)
        assert visit is not None
        outside = number > 0 and films.random() < 0.3
        yield _Shot(visit=visit, number=number + 1, outside=outside)


def _write_film(
    rng: np.random.Generator,
    anatomy: Anatomy,
    person: Person,
    shot: _Shot,
    *,
    folder: Path,
    config: PhantomConfig,
    key: tuple[int, int],
    regions: bool,
) -> dict[str, Any]:
    """Render, store and write one film; returns its row of the answer key."""
    fluoroscopy = rng.random() < 0.25
    storage = draw_storage(rng, fluoroscopy=fluoroscopy)
    header = build_header(
        person,
        shot.visit,
        fluoroscopy=fluoroscopy,
        series_uid=_uid(config, shot.visit.study_uid, "series", fluoroscopy),
        sop_uid=_uid(config, *key, "film"),
        instance_number=shot.number,
        rng=rng,
    )
    pose = draw_pose(rng, outside=shot.outside)
    stored = quantise(render(anatomy, pose, config.size), storage)
    if regions:
        region = Image.fromarray(stomach_region(anatomy, pose, config.size))
        region.save(folder / "regions" / f"{header.dataset.SOPInstanceUID}.png")
    boxes: list[TextBox] = []
    if rng.random() < config.burned_in:
        name = person.name.replace("^", " ").replace("é", "e")  # the default font has no accents
        lines = [name, person.patient_id, f"{shot.visit.day:%d.%m.%Y}"]
        stored, boxes = burn_in(stored, lines, rng)
    _set_burned_in(header, boxes, rng)
    set_pixels(header.dataset, stored, storage)
    extension = str(rng.choice([".dcm", ".dcm", "", ".DCM"]))
    path = Path(person.patient_id) / f"{shot.visit.day:%Y%m%d}" / f"IM{shot.number:06d}{extension}"
    header.meta.TransferSyntaxUID = storage.transfer_syntax
    _save(header, folder / "dicom" / path)
    return {
        "file": path.as_posix(),
        "sop_uid": header.dataset.SOPInstanceUID,
        "study_uid": shot.visit.study_uid,
        "patient_id": person.patient_id,
        "sop_class": header.dataset.SOPClassUID,
        "transfer_syntax": storage.transfer_syntax,
        "photometric": header.dataset.PhotometricInterpretation,
        "display": storage.display,
        "burned_in_annotation": header.dataset.get("BurnedInAnnotation"),
        "text_boxes": [asdict(box) for box in boxes],
        "identifiers": [asdict(planted) for planted in header.planted],
    }


def _set_burned_in(header: Header, boxes: list[TextBox], rng: np.random.Generator) -> None:
    """Declare burned-in text truly or not: two in three films with text say YES, the third says NO."""
    chance = rng.random()
    if boxes:
        header.dataset.BurnedInAnnotation = "YES" if chance < 2 / 3 else "NO"
    elif chance < 0.6:
        header.dataset.BurnedInAnnotation = "NO"


def _save(header: Header, path: Path) -> None:
    header.meta.MediaStorageSOPClassUID = header.dataset.SOPClassUID
    header.meta.MediaStorageSOPInstanceUID = header.dataset.SOPInstanceUID
    header.meta.ImplementationClassUID = _IMPLEMENTATION_UID
    header.meta.ImplementationVersionName = "MEDISTILL_0"
    header.dataset.file_meta = header.meta
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, header.dataset, enforce_file_format=True)


def _write_tables(folder: Path, config: PhantomConfig, rows: list[dict[str, Any]]) -> None:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["SOPInstanceUID", "PatientID", "file", "label"])
        table.writerows([row["sop_uid"], row["patient_id"], row["file"], row["label"]] for row in rows)
    key = {
        "schema_version": 1,
        "statement": STATEMENT.strip(),
        "config": asdict(config),
        "per_class": dict(Counter(row["label"] for row in rows)),
    }
    head = json.dumps(key, ensure_ascii=False, indent=1).removesuffix("\n}")
    files = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{head},\n "files": [\n{files}\n]\n}}\n'
    (folder / "ground_truth.json").write_text(text, encoding="utf-8", newline="\n")
    (folder / "README.txt").write_text(STATEMENT, encoding="utf-8", newline="\n")


def _uid(config: PhantomConfig, *parts: object) -> str:
    """UID of UUID form (PS3.5 B.2) that depends on the configuration and the parts."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr((config, parts))).int}"
