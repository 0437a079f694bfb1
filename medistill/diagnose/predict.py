"""What a model says about files: probabilities, decisions, and which images are unlike those it was trained on."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill import __version__
from medistill.core.compute import Compute
from medistill.core.task import Task, TaskKind, joint_label
from medistill.diagnose.model import NOTICE, DiagnosticModel
from medistill.diagnose.reading import ReadImage, explained, open_files, read_images
from medistill.errors import ConfigError, OutputError
from medistill.ingest.isolation import Limits
from medistill.ingest.quarantine import Rejected
from medistill.progress import Progress
from medistill.release.durable import output_errors, replace_durably

READ = "OK"
POOLS = ("mean", "max", "vote")
_BATCH = 64
_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """One image, or a file that could not be read.

    Args:
        file: Position of the file from 1, in the order given (in a folder: sorted by path).
        frame: Number of the image within its file from 1; 0 where the file is one image.
        name: Name of the file as the user knows it; for the output file alone.
        status: ``OK``, or why it was not read, one of :data:`medistill.ingest.quarantine.REASON_CODES`.
        detail: What that means.
        patient: Number of the patient in order of appearance, from 1; 0 where the file was not read.
        probabilities: Calibrated, one for each class.
        decision: Class decided for; several joined by ``;`` for a multilabel task.
        distance: Distance from the release's images, 1 at the limit.
        out_of_distribution: Whether the distance is above 1.
    """

    file: int
    frame: int = 0
    name: str = field(default="", repr=False)
    status: str = READ
    detail: str = ""
    patient: int = 0
    probabilities: tuple[float, ...] = ()
    decision: str = ""
    distance: float = 0.0
    out_of_distribution: bool = False


@dataclass(frozen=True, kw_only=True)
class PatientPrediction:
    """One patient.

    Args:
        patient: Number in order of appearance.
        images: Images read.
        out_of_distribution: How many of them are unlike the release's images.
        probabilities: Of the images together, see :func:`pooled`.
        decision: As for an image.
    """

    patient: int
    images: int
    out_of_distribution: int
    probabilities: tuple[float, ...]
    decision: str


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Images in the order of their files, and patients in the order of their first image."""

    task: Task
    images: tuple[ImagePrediction, ...]
    patients: tuple[PatientPrediction, ...]
    pool: str

    @property
    def read(self) -> tuple[ImagePrediction, ...]:
        """Images that were read."""
        return tuple(image for image in self.images if image.status == READ)

    @property
    def refused(self) -> Mapping[str, int]:
        """Number of files and frames that were not read, by reason."""
        return dict(Counter(image.status for image in self.images if image.status != READ).most_common())


def predict_files(
    model: DiagnosticModel,
    paths: Sequence[Path],
    *,
    pool: str = "mean",
    compute: Compute | None = None,
    jobs: int | None = 1,
    limits: Limits | None = None,
    pictures: dict[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Apply a model to DICOM files, read exactly as those of the cohort were.

    A file that cannot be read becomes a row with a reason code. Patients are told apart by their identifier in the
    header (or else by study, or else each file is one) and numbered in order of appearance.

    Args:
        model: From :func:`medistill.diagnose.load_model`.
        paths: DICOM files, or one folder or archive of them.
        pool: How a patient's images are put together, see :func:`pooled`.
        compute: Device; the CPU by default.
        jobs: Processes that read.
        limits: What reading one file may cost.
        pictures: Filled with the images that were read, by their place among the rows; memory then grows with
            their number.
        progress: Shows how far it is.

    Returns:
        One row for each image and each file that could not be read.

    Raises:
        ConfigError: If ``pool`` is unknown or the paths do not go together.
        SourceError: If there is nothing to read.
    """
    if pool not in POOLS:
        raise ConfigError(f"Expected pool to be one of {', '.join(POOLS)}, got {pool!r}.")
    progress = progress or Progress()
    source = open_files(paths, model.preprocessing)
    names = {item.ordinal: item.name for item in source.items()}
    outcomes = read_images(source, model.preprocessing, jobs=jobs, limits=limits)
    rows: list[_Row] = []
    for batch in _batched(progress.track(outcomes, "predicting", total=len(source))):
        rows += _predict(model, batch, compute, keep=pictures is not None)
    rows.sort(key=lambda row: (row.ordinal, row.frame))
    if pictures is not None:
        pictures |= {place: row.picture for place, row in enumerate(rows) if row.picture is not None}
    images = tuple(_image_prediction(model, rows, names))
    patients = tuple(_patients(model, images, pool))
    return Predictions(task=model.task, images=images, patients=patients, pool=pool)


@dataclass(frozen=True, kw_only=True)
class _Row:
    ordinal: int
    frame: int
    patient: str = ""
    rejected: Rejected | None = None
    probabilities: tuple[float, ...] = ()
    distance: float = 0.0
    picture: Tensor | None = field(default=None, repr=False)


def _batched(outcomes: Iterator[list[ReadImage | Rejected]]) -> Iterator[list[ReadImage | Rejected]]:
    batch: list[ReadImage | Rejected] = []
    for found in outcomes:
        batch += found
        while len(batch) >= _BATCH:
            yield batch[:_BATCH]
            batch = batch[_BATCH:]
    if batch:
        yield batch


def _predict(
    model: DiagnosticModel, batch: Sequence[ReadImage | Rejected], compute: Compute | None, *, keep: bool
) -> Iterator[_Row]:
    images = [one for one in batch if isinstance(one, ReadImage)]
    yield from (
        _Row(ordinal=one.ordinal, frame=one.frame, rejected=one) for one in batch if isinstance(one, Rejected)
    )
    if not images:
        return
    block = torch.cat([model.preprocessing.tensor(image.pixels) for image in images])
    answers = model.probabilities(block, compute=compute).double().tolist()
    distances = model.distances(block, compute=compute).double().tolist()
    for image, picture, row, distance in zip(images, block, answers, distances, strict=True):
        yield _Row(
            ordinal=image.ordinal,
            frame=image.frame,
            patient=image.patient,
            probabilities=tuple(row),
            distance=distance,
            picture=picture.clone() if keep else None,
        )


def _image_prediction(
    model: DiagnosticModel, rows: Sequence[_Row], names: Mapping[int, str]
) -> Iterator[ImagePrediction]:
    numbers: dict[str, int] = {}
    for row in rows:
        blank = ImagePrediction(file=row.ordinal + 1, frame=row.frame, name=names[row.ordinal])
        if row.rejected is not None:
            yield replace(blank, status=row.rejected.code, detail=explained(row.rejected))
            continue
        yield replace(
            blank,
            patient=numbers.setdefault(row.patient, len(numbers) + 1),
            probabilities=row.probabilities,
            decision=decide(model.task, row.probabilities, model.calibration.thresholds),
            distance=row.distance,
            out_of_distribution=row.distance > 1,
        )


def decide(task: Task, probabilities: Sequence[float], thresholds: Sequence[float]) -> str:
    """The class decided for; for a multilabel task all classes from their thresholds on, joined by ``;``."""
    if task.kind is TaskKind.BINARY:
        return task.class_names[int(probabilities[1] >= thresholds[0])]
    if task.kind is TaskKind.MULTICLASS:
        return task.class_names[int(np.argmax(probabilities))]
    chosen = zip(task.class_names, probabilities, thresholds, strict=True)
    return joint_label(name for name, probability, cut in chosen if probability >= cut)


def pooled(
    task: Task, probabilities: NDArray[np.float64], decisions: Sequence[str], pool: str
) -> NDArray[np.float64]:
    """One patient's probabilities from those of the images.

    ``mean`` averages them. ``max`` takes the most suspicious image: of two classes the highest positive
    probability, of a multilabel task the highest of each class, of several classes the highest of each, made to
    sum to one. ``vote`` is the share of images decided for each class.

    Args:
        task: What is diagnosed.
        probabilities: Shape ``(n, k)``.
        decisions: Of each image.
        pool: ``mean``, ``max`` or ``vote``.
    """
    if pool == "mean":
        return np.asarray(probabilities.mean(0))
    if pool == "vote":
        votes = [[name in task.names_in(decision) for name in task.class_names] for decision in decisions]
        return np.asarray(np.mean(votes, axis=0))
    highest = probabilities.max(0)
    if task.kind is TaskKind.BINARY:
        return np.array([1 - highest[1], highest[1]])
    return np.asarray(highest if task.kind is TaskKind.MULTILABEL else highest / highest.sum())


def _patients(model: DiagnosticModel, images: Sequence[ImagePrediction], pool: str) -> Iterator[PatientPrediction]:
    own: dict[int, list[ImagePrediction]] = {}
    for image in images:
        if image.status == READ:
            own.setdefault(image.patient, []).append(image)
    cuts = (_HALF,) * len(model.calibration.thresholds) if pool == "vote" else model.calibration.thresholds
    for patient, members in own.items():
        answers = np.array([image.probabilities for image in members])
        together = pooled(model.task, answers, [image.decision for image in members], pool)
        yield PatientPrediction(
            patient=patient,
            images=len(members),
            out_of_distribution=sum(image.out_of_distribution for image in members),
            probabilities=tuple(together.tolist()),
            decision=decide(model.task, together.tolist(), cuts),
        )


def predictions_csv(found: Predictions, *, by_patient: bool = False) -> str:
    """Rows of images and refused files, or of patients, with a heading."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    classes = [f"probability:{name}" for name in found.task.class_names]
    if by_patient:
        table.writerow(["patient", "images", "out_of_distribution", "decision", *classes])
        for one in found.patients:
            shares = [f"{p:.6f}" for p in one.probabilities]
            table.writerow([one.patient, one.images, one.out_of_distribution, one.decision, *shares])
        return text.getvalue()
    table.writerow(
        ["file", "frame", "name", "patient", "status", "decision", "out_of_distribution", "distance", *classes]
    )
    for image in found.images:
        frame, place = image.frame or "", (image.file, image.name)
        if image.status != READ:
            table.writerow([place[0], frame, place[1], "", image.status, *[""] * (3 + len(classes))])
            continue
        shares = [f"{p:.6f}" for p in image.probabilities]
        flag = "yes" if image.out_of_distribution else "no"
        table.writerow(
            [
                place[0],
                frame,
                place[1],
                image.patient,
                READ,
                image.decision,
                flag,
                f"{image.distance:.3f}",
                *shares,
            ]
        )
    return text.getvalue()


def predictions_json(found: Predictions, model: DiagnosticModel) -> str:
    """Images and patients as JSON, with the model they come from."""
    values = {
        "schema_version": 1,
        "task": found.task.to_json(),
        "pool": found.pool,
        "model": {
            "network": model.network,
            "weights": model.digest,
            "calibration": model.calibration.to_json(),
            "preprocessing_stated_by_release": model.preprocessing.stated,
        },
        "images": [_image_json(image, found.task) for image in found.images],
        "patients": [
            {
                "patient": one.patient,
                "images": one.images,
                "out_of_distribution": one.out_of_distribution,
                "decision": one.decision,
                "probabilities": dict(zip(found.task.class_names, one.probabilities, strict=True)),
            }
            for one in found.patients
        ],
        "medistill": __version__,
        "notice": NOTICE,
    }
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _image_json(image: ImagePrediction, task: Task) -> dict[str, Any]:
    place = {"file": image.file, "frame": image.frame, "name": image.name, "status": image.status}
    if image.status != READ:
        return {**place, "detail": image.detail}
    return {
        **place,
        "patient": image.patient,
        "decision": image.decision,
        "out_of_distribution": image.out_of_distribution,
        "distance": image.distance,
        "probabilities": dict(zip(task.class_names, image.probabilities, strict=True)),
    }


def write_predictions(path: Path, text: str) -> None:
    """Write an output file, whole or not at all; an earlier one is replaced.

    Raises:
        OutputError: If it cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise OutputError("The output of predict is a file; found a folder. Name a .csv or .json file.")
    with output_errors(path):
        replace_durably(path, text.encode("utf-8", "surrogateescape"))
