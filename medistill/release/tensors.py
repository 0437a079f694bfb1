"""A distilled set as two files: ``images.safetensors`` and ``recipe.json``. Nothing is ever unpickled.

Used for the run folder and for the release. ``recipe.json`` carries the SHA-256 of the tensors, so that files of
two runs cannot be mixed by accident.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from medistill.core.distilled import DistilledSet, Recipe, Schedule, ViewLabels
from medistill.core.guarantee import PrivacyStatement
from medistill.core.task import Task
from medistill.errors import DataError, MedistillError, ReleaseError
from medistill.release.durable import output_errors, replace_durably, sync_folder

SCHEMA_VERSION = 1
IMAGES_FILE = "images.safetensors"
RECIPE_FILE = "recipe.json"
#: Characters of a line of JSON.
_WIDTH = 160

_TENSORS = {"images": torch.float32, "soft_labels": torch.float32, "hard_labels": torch.int64}
#: Beside them where a set has views; all or none.
_VIEWS = {"view_boxes": torch.float32, "view_soft_labels": torch.float32, "view_temperature": torch.float64}
_FIELDS = frozenset({"schema_version", "images_sha256", "ipc", "task", "recipe", "schedule", "privacy"})


def save_distilled(path_dir: Path, distilled: DistilledSet) -> None:
    """Write a distilled set into a folder, replacing an earlier one; each file is whole or absent.

    Args:
        path_dir: Folder; created where it does not exist.
        distilled: What to write.

    Raises:
        OutputError: If the folder cannot be written or the disk is full.
        DataError: If a setting of the recipe is not a plain value.
    """
    files = distilled_files(distilled)
    with output_errors(path_dir):
        path_dir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_durably(path_dir / name, content)
        sync_folder(path_dir)


def load_distilled(path_dir: Path) -> DistilledSet:
    """Read a distilled set and check every field of it.

    Raises:
        ReleaseError: If a file is missing, damaged, of another schema version, or does not fit the other.
    """
    if not (path_dir / RECIPE_FILE).is_file():
        raise ReleaseError(
            f"Expected a folder with a distilled set; found no {RECIPE_FILE} in it. Give the folder that "
            "`medistill distill` or `medistill run` wrote, or a release."
        )
    values = parse_json(_read(path_dir / RECIPE_FILE), name=RECIPE_FILE)
    if values.keys() != _FIELDS:
        raise ReleaseError(
            f"Expected {RECIPE_FILE} to hold exactly {sorted(_FIELDS)}, got {sorted(map(ascii, values))}."
        )
    content = _read(path_dir / IMAGES_FILE)
    if hashlib.sha256(content).hexdigest() != values["images_sha256"]:
        raise ReleaseError(
            f"{IMAGES_FILE} is not the file {RECIPE_FILE} was written with: damaged, changed, or of another run. "
            "Fetch or make the set again."
        )
    return _assemble(_tensors(content), values)


def distilled_files(distilled: DistilledSet) -> dict[str, bytes]:
    """Names and contents of the two files; the same set gives the same bytes."""
    from safetensors.torch import save  # noqa: PLC0415

    tensors = {
        name: getattr(distilled, name).detach().cpu().to(dtype).contiguous() for name, dtype in _TENSORS.items()
    }
    if distilled.views is not None:
        tensors |= _view_tensors(distilled.views)
    images: bytes = save(tensors)
    values = {
        "schema_version": SCHEMA_VERSION,
        "images_sha256": hashlib.sha256(images).hexdigest(),
        "ipc": distilled.ipc,
        "task": distilled.task.to_json(),
        "recipe": distilled.recipe.to_json(),
        "schedule": {field: getattr(distilled.schedule, field) for field in Schedule.__dataclass_fields__},
        "privacy": distilled.privacy.to_json(),
    }
    return {IMAGES_FILE: images, RECIPE_FILE: json_bytes(values)}


def _view_tensors(views: ViewLabels) -> dict[str, Tensor]:
    found = (views.boxes, views.soft_labels, torch.tensor(views.temperature, dtype=torch.float64))
    return {
        name: tensor.detach().cpu().to(dtype).contiguous()
        for (name, dtype), tensor in zip(_VIEWS.items(), found, strict=True)
    }


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Strict JSON, sorted, with a final newline; what fits on a line stands on one.

    Raises:
        DataError: If a value is not plain or not finite.
    """
    try:
        plain = json.loads(_line(values))
    except (TypeError, ValueError) as error:
        raise DataError("Expected plain, finite values for a JSON file; found another kind.") from error
    return (_lines(plain, indent=0) + "\n").encode()


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _lines(value: Any, *, indent: int) -> str:
    line = _line(value)
    if not isinstance(value, dict | list) or indent + len(line) <= _WIDTH:
        return line
    inner = indent + 1
    if isinstance(value, dict):
        items = [f"{_line(key)}: {_lines(item, indent=inner)}" for key, item in sorted(value.items())]
    else:
        items = [_lines(item, indent=inner) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{' ' * inner}" + f",\n{' ' * inner}".join(items) + f"\n{' ' * indent}{end}"


def parse_json(content: bytes, *, name: str) -> dict[str, Any]:
    """Strict JSON of this schema version.

    Raises:
        ReleaseError: If it is no JSON object, repeats a key, or has another ``schema_version``.
    """
    try:
        values = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"Expected {name} to be strict JSON; it is damaged.") from error
    if not isinstance(values, dict):
        raise ReleaseError(f"Expected {name} to hold one JSON object, got a {type(values).__name__}.")
    version = values.get("schema_version")
    if type(version) is not int:
        raise ReleaseError(f"Expected a whole schema_version in {name}; found none.")
    if version > SCHEMA_VERSION:
        raise ReleaseError(
            f"{name} has schema_version {version}; this medistill reads {SCHEMA_VERSION}. "
            "Install a newer medistill."
        )
    if version < SCHEMA_VERSION:
        raise ReleaseError(
            f"{name} has schema_version {version}, which no medistill wrote; expected {SCHEMA_VERSION}."
        )
    return values


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(
            f"Expected a readable {path.name}: {error.strerror or 'the operating system refused'}."
        ) from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"Expected finite numbers, got {constant}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("Expected every key once.")
    return values


def _tensors(content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ReleaseError(f"Expected {IMAGES_FILE} in safetensors form; it is damaged.") from error
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found not in (_TENSORS, _TENSORS | _VIEWS):
        raise ReleaseError(
            f"Expected the tensors {_described(_TENSORS)} in {IMAGES_FILE}, and perhaps {_described(_VIEWS)}, got "
            f"{_described(found)}."
        )
    return tensors


def _described(dtypes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{name!a} ({dtype})" for name, dtype in sorted(dtypes.items()))


def _views(tensors: Mapping[str, Tensor]) -> ViewLabels | None:
    if not tensors.keys() >= _VIEWS.keys():
        return None
    boxes, soft_labels, temperature = (tensors[name] for name in _VIEWS)
    return ViewLabels(boxes=boxes, soft_labels=soft_labels, temperature=temperature.item())


def _assemble(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> DistilledSet:
    try:
        distilled = DistilledSet(
            images=tensors["images"],
            soft_labels=tensors["soft_labels"],
            hard_labels=tensors["hard_labels"],
            ipc=int(values["ipc"]),
            task=Task.from_json(values["task"]),
            recipe=Recipe.from_json(values["recipe"]),
            schedule=Schedule(**values["schedule"]),
            privacy=PrivacyStatement.from_json(values["privacy"]),
            views=_views(tensors),
        )
    except MedistillError as error:
        raise ReleaseError(f"The set breaks an invariant. {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, IndexError) as error:
        raise ReleaseError(
            f"Expected {RECIPE_FILE} to describe a distilled set; a field is missing or odd."
        ) from error
    classes = distilled.hard_labels
    if (
        distilled.images.ndim not in (4, 5)
        or int(classes.min()) < 0
        or int(classes.max()) >= distilled.task.n_classes
    ):
        raise ReleaseError("Expected images with 4 or 5 axes and hard_labels that are classes of the task.")
    if float(distilled.soft_labels.min()) < 0:
        raise ReleaseError("Expected soft_labels >= 0.")
    return distilled
