"""State of an interrupted distillation, kept in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.protocols import Synthetic
from medistill.errors import OutputError


class FileCheckpoint:
    """Keeps state in a file, replaced atomically.

    Args:
        path: File that holds the state; its name should carry the fingerprint of the work, so that state of other
            work is never taken up.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Tensor] | None:
        """State of an interrupted run, or ``None`` when there is none.

        Raises:
            OutputError: If the file is damaged.
        """
        if not self._path.exists():
            return None
        try:
            found = load_file(self._path)
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"The checkpoint {self._path.name} is damaged. Delete it to start this distillation again."
            ) from error
        # As they lie in the file, tensors begin anywhere, and a matrix product can depend on that in its last bit.
        return {name: value.clone() for name, value in found.items()}

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the kept state: write beside it, flush to disk, rename."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as handle:
            handle.write(save({name: value.detach().contiguous().clone() for name, value in state.items()}))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self._path)


def pack_synthetic(result: Synthetic) -> dict[str, Tensor]:
    """Images, labels, views and schedule, flat, for a checkpoint."""
    packed = {"images": result.images, "soft_labels": result.soft_labels, "hard_labels": result.hard_labels}
    if result.views is not None:
        temperature = torch.tensor(result.views.temperature, dtype=torch.float64)
        packed |= {"views.boxes": result.views.boxes, "views.soft_labels": result.views.soft_labels}
        packed["views.temperature"] = temperature
    if result.schedule is not None:
        packed["schedule"] = torch.tensor(list(json.dumps(asdict(result.schedule)).encode()), dtype=torch.uint8)
    return packed


def unpack_synthetic(state: Mapping[str, Tensor]) -> Synthetic:
    """Inverse of :func:`pack_synthetic`."""
    views = None
    if "views.boxes" in state:
        views = ViewLabels(
            boxes=state["views.boxes"],
            soft_labels=state["views.soft_labels"],
            temperature=state["views.temperature"].item(),
        )
    schedule = Schedule(**json.loads(bytes(state["schedule"].tolist()))) if "schedule" in state else None
    return Synthetic(
        images=state["images"],
        soft_labels=state["soft_labels"],
        hard_labels=state["hard_labels"],
        schedule=schedule,
        views=views,
    )


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Per-parameter tensors of an optimiser's state, flat, for a checkpoint."""
    packed: dict[str, Tensor] = {}
    for position, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            packed[f"{prefix}.{position}.{name}"] = torch.as_tensor(value)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], prefix: str) -> None:
    """Restore what :func:`pack_optimizer` kept; hyper-parameters stay those of the optimiser."""
    complete = optimizer.state_dict()
    restored: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(prefix + "."):
            position, name = key[len(prefix) + 1 :].split(".", 1)
            restored.setdefault(int(position), {})[name] = value.clone()
    complete["state"] = restored
    optimizer.load_state_dict(complete)
