"""A model as a MONAI bundle.

A bundle's configuration names Python objects and may hold expressions: MONAI's tools execute it. This one is
written by us and names networks and readers of medistill; never open a stranger's bundle.
"""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medistill import __version__
from medistill.diagnose.model import NOTICE, DiagnosticModel, require_new, write_folder
from medistill.errors import DataError

#: Where MONAI keeps the schema of ``metadata.json``; named in the file, never fetched by us.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_PLANE_AXES = 3
_VOLUMES = (
    "\nThis model takes volumes: each file must hold one with all its frames. For a series of single slices use "
    "\n`medistill predict`."
)
_UNSTATED = (
    "The licence of the weights is that of the release they were trained on; the release that came with this "
    "model says which.\n"
)


def export_bundle(model: DiagnosticModel, out: Path) -> Path:
    """Write a folder that ``monai.bundle.load`` and ``monai.bundle.run`` take.

    ``models/model.pt`` is a plain state dictionary, checked to load with ``weights_only`` and to give the same
    probabilities; it is the one file of ours in a format of pickle, because MONAI's tools know no other. The
    weights stand beside it as ``model.safetensors``. ``configs/inference.json`` reads DICOM files by the readers
    of medistill, so that package must be installed where the bundle runs.

    Args:
        model: From :func:`medistill.diagnose.load_model`.
        out: New or empty folder.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder is not empty or cannot be written.
        DataError: If the written weights do not give the same probabilities.
    """
    from safetensors.torch import save  # noqa: PLC0415

    out = Path(out)
    require_new(out)
    state = {name: value.cpu().contiguous() for name, value in model.ensemble.state_dict().items()}
    content = io.BytesIO()
    torch.save(state, content)
    _check(model, content.getvalue())
    files = {
        "configs/metadata.json": _json(_metadata(model)),
        "configs/inference.json": _json(_inference(model)),
        "models/model.pt": content.getvalue(),
        "models/model.safetensors": save(state),
        "docs/README.md": _readme(model).encode(),
        "LICENSE": _UNSTATED.encode(),
    }
    write_folder(out, files)
    return out


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _network(model: DiagnosticModel) -> dict[str, Any]:
    return {
        "_target_": "medistill.diagnose.ensemble.empty_ensemble",
        "network": model.network,
        "kind": model.task.kind.value,
        "class_names": list(model.task.class_names),
        "image_shape": list(model.preprocessing.image_shape),
        "students": len(model.ensemble.members),
        "temperature": model.calibration.temperature,
    }


def _check(model: DiagnosticModel, content: bytes) -> None:
    """Load what was written as MONAI does, into a network made from what the bundle says, and compare."""
    from medistill.diagnose.ensemble import empty_ensemble  # noqa: PLC0415

    definition = {name: value for name, value in _network(model).items() if name != "_target_"}
    again = empty_ensemble(**definition)
    again.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    images = torch.rand(2, *model.preprocessing.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.equal(again(images), model.probabilities(images))
    if not same:
        raise DataError("The exported weights do not give the same probabilities. Nothing was written.")


def _metadata(model: DiagnosticModel) -> dict[str, Any]:
    shape, names = model.preprocessing.image_shape, model.task.class_names
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medistill {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"medistill": __version__},
        "optional_packages_version": {},
        "supported_apps": {},
        "name": "Diagnosis by a model trained on a distilled release",
        "task": f"Classification: {', '.join(names)}",
        "description": "Networks trained on a small synthetic release; calibrated probabilities.",
        "authors": "The data owner who made the release, and whoever trained on it",
        "copyright": "As the release says",
        "data_source": f"medistill release {model.origin.get('release', '')}",
        "data_type": "dicom",
        "image_classes": "float32 in [0, 1], 0 is black",
        "label_classes": ", ".join(names),
        "pred_classes": "calibrated probability of each class",
        "eval_metrics": {},
        "intended_use": NOTICE,
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "n/a",
                    "num_channels": shape[0],
                    "spatial_shape": list(shape[1:]),
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": dict.fromkeys(map(str, range(shape[0])), "image"),
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "classes",
                    "num_channels": len(names),
                    "spatial_shape": [1, len(names)],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {str(place): name for place, name in enumerate(names)},
                }
            },
        },
    }


def _inference(model: DiagnosticModel) -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "device": "cpu",
        "dataset_dir": "$@bundle_root + '/input'",
        "output": "$@bundle_root + '/predictions.csv'",
        "weights": "$@bundle_root + '/models/model.pt'",
        "network_def": _network(model),
        "preprocessing": {
            "_target_": "medistill.diagnose.transform.LoadAsReleased",
            "preprocessing": model.preprocessing.to_json(),
        },
        "datalist": {"_target_": "medistill.diagnose.transform.files_below", "folder": "@dataset_dir"},
        "dataset": {"_target_": "monai.data.Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": {"_target_": "monai.inferers.SimpleInferer"},
        "evaluator": {
            "_target_": "medistill.diagnose.transform.FolderEvaluator",
            "network": "@network_def",
            "weights": "@weights",
            "dataset": "@dataset",
            "inferer": "@inferer",
            "class_names": list(model.task.class_names),
            "device": "@device",
            "output": "@output",
        },
        "run": ["$@evaluator.run()"],
    }


def _readme(model: DiagnosticModel) -> str:
    cubes = len(model.preprocessing.image_shape) > _PLANE_AXES
    return f"""# Diagnosis by a model trained on a distilled release

{NOTICE} Trained by medistill {__version__} on a synthetic release; its calibration comes from
`{model.calibration.source}` (temperature {model.calibration.temperature:.3g}). The out-of-distribution flag of
`medistill predict` is not part of this bundle.

Requires medistill. DICOM files in `input/` are read exactly as those of the release's cohort were; probabilities
go to `predictions.csv`, one row per image, files in the order of their names.{_VOLUMES if cubes else ""}

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json
    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json

`python -m monai.bundle` needs the package `fire`. `models/model.pt` holds tensors only and loads with
`weights_only=True`; `models/model.safetensors` holds the same. A bundle's configuration is executed: use it only
from a source you trust.
"""
