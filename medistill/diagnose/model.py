"""A model folder: ``model.safetensors`` and ``model.json``. Nothing but these two is needed to predict.

Nothing is ever unpickled; ``model.json`` carries the SHA-256 of the weights and is read strictly, because a model
may come from a stranger.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.task import Task
from medistill.diagnose.calibration import Calibration
from medistill.diagnose.ensemble import Ensemble, empty_ensemble
from medistill.diagnose.outliers import Outliers
from medistill.diagnose.preprocessing import Preprocessing
from medistill.errors import DataError, MedistillError, OutputError, SourceError
from medistill.release.durable import output_errors, partial_name, sync_folder, write_durably
from medistill.training.fit import cache_sized

SCHEMA_VERSION = 2
DESCRIPTION_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
MAX_STUDENTS = 100
_DEVICE_BATCH = 512
_OUTLIERS = "outliers."
NOTICE = "Research only. Not a medical device."


@dataclass(frozen=True, kw_only=True)
class DiagnosticModel:
    """Trained networks with all that prediction needs.

    Args:
        ensemble: Networks and temperature.
        network: Registered name of the network.
        task: What is diagnosed.
        preprocessing: How a file becomes an image.
        calibration: Temperature and thresholds, and where they come from.
        outliers: What images of this kind look like.
        origin: Release, recipe, schedule, seed, privacy statement and versions, as plain values.
    """

    ensemble: Ensemble
    network: str
    task: Task
    preprocessing: Preprocessing
    calibration: Calibration
    outliers: Outliers
    origin: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file, hexadecimal; names the model in what it predicts."""
        return hashlib.sha256(_weights(self)).hexdigest()

    @torch.no_grad()
    def probabilities(self, images: Tensor, *, compute: Compute | None = None) -> Tensor:
        """Calibrated probabilities of shape ``(n, k)`` on the CPU for images ``(n, *image_shape)`` in ``[0, 1]``.

        Raises:
            DataError: If the images have another shape.
        """
        self._check(images)
        compute = compute or Compute()
        ensemble = self.ensemble.to(compute.device).eval()
        return torch.cat([ensemble(compute.put(batch)).cpu() for batch in self._batches(images, compute)])

    @torch.no_grad()
    def distances(self, images: Tensor, *, compute: Compute | None = None) -> Tensor:
        """How far images are from those of the release, shape ``(n,)``, see :class:`Outliers`; 1 is the limit."""
        self._check(images)
        compute = compute or Compute()
        batches = self._batches(images, compute)
        return torch.cat([self.outliers.distances(compute.put(batch)).cpu() for batch in batches])

    def _batches(self, images: Tensor, compute: Compute) -> tuple[Tensor, ...]:
        return cache_sized(images) if compute.device_type == "cpu" else torch.split(images, _DEVICE_BATCH)

    def _check(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.preprocessing.image_shape or not len(images):
            raise DataError(
                f"Expected images of shape (n, {', '.join(map(str, self.preprocessing.image_shape))}), "
                f"got {tuple(images.shape)}."
            )


def require_new(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        OutputError: If it is not a new or empty folder.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(f"The output folder {out.name} is not empty. Choose a new one or empty it.")


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that is complete or not there at all.

    Args:
        out: New or empty folder.
        files: Contents by relative name with forward slashes.

    Raises:
        OutputError: If it cannot be written or the disk is full.
    """
    out = Path(out).absolute()
    partial = partial_name(out)
    try:
        with output_errors(out):
            partial.mkdir(parents=True)
            for name, content in files.items():
                write_durably(partial / name, content)
            if out.exists():
                out.rmdir()
            partial.replace(out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_files(model: DiagnosticModel) -> dict[str, bytes]:
    """Names and contents of the two files; the same model gives the same bytes."""
    weights = _weights(model)
    description = {
        "schema_version": SCHEMA_VERSION,
        "network": model.network,
        "students": len(model.ensemble.members),
        "task": model.task.to_json(),
        "preprocessing": model.preprocessing.to_json(),
        "pixels": "float32 in [0, 1], 0 black",
        "calibration": model.calibration.to_json(),
        "outliers": model.outliers.to_json(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "origin": dict(model.origin),
        "notice": NOTICE,
    }
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {WEIGHTS_FILE: weights, DESCRIPTION_FILE: text.encode()}


def _weights(model: DiagnosticModel) -> bytes:
    members = model.ensemble.state_dict()
    tensors = members | {f"{_OUTLIERS}{name}": value for name, value in model.outliers.tensors.items()}
    content: bytes = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    return content


def load_model(path: Path) -> DiagnosticModel:
    """Read a model folder written by ``medistill train``.

    Raises:
        SourceError: If the folder is no model, or one of another version.
        DataError: If it is damaged or contradicts itself.
        ConfigError: If it uses a network that is not installed here.
    """
    path = Path(path)
    description = _description(path / DESCRIPTION_FILE)
    try:
        weights = (path / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise SourceError(f"Expected {WEIGHTS_FILE} beside {DESCRIPTION_FILE}; it cannot be read.") from error
    if hashlib.sha256(weights).hexdigest() != description.get("weights_sha256"):
        raise DataError(f"{WEIGHTS_FILE} is not the file {DESCRIPTION_FILE} was written with. Train again.")
    try:
        return _assemble(description, load(weights))
    except MedistillError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise DataError(
            f"{DESCRIPTION_FILE} does not describe these weights: a field is missing or odd."
        ) from error


def _assemble(values: Mapping[str, Any], tensors: dict[str, Tensor]) -> DiagnosticModel:
    students = values["students"]
    if type(students) is not int or not 1 <= students <= MAX_STUDENTS:
        raise DataError(f"Expected 1 to {MAX_STUDENTS} students in {DESCRIPTION_FILE}.")
    task = Task.from_json(values["task"])
    preprocessing = Preprocessing.from_json(values["preprocessing"])
    calibration = Calibration.from_json(values["calibration"], task)
    ensemble = empty_ensemble(
        network=values["network"],
        kind=task.kind.value,
        class_names=task.class_names,
        image_shape=preprocessing.image_shape,
        students=students,
        temperature=calibration.temperature,
    )
    ensemble.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(_OUTLIERS)})
    known = {name.removeprefix(_OUTLIERS): t for name, t in tensors.items() if name.startswith(_OUTLIERS)}
    return DiagnosticModel(
        ensemble=ensemble,
        network=values["network"],
        task=task,
        preprocessing=preprocessing,
        calibration=calibration,
        outliers=Outliers.from_json(values["outliers"], known, task=task, image_shape=preprocessing.image_shape),
        origin=values["origin"],
    )


def _description(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise SourceError(
            f"Expected a model folder with {DESCRIPTION_FILE}, as `medistill train` writes it; found none."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{DESCRIPTION_FILE} is damaged. Train again.") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        remedy = (
            "Install a newer medistill" if isinstance(version, int) and version > SCHEMA_VERSION else "Train again"
        )
        raise SourceError(f"Expected {DESCRIPTION_FILE} of schema version {SCHEMA_VERSION}. {remedy}.")
    assert isinstance(values, dict)
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"Expected finite numbers, got {constant}.")
