"""What distillation makes: a recipe and a set of synthetic images with soft labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medistill.core.guarantee import PrivacyStatement
from medistill.core.task import Task, TaskKind
from medistill.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Step:
    """One distiller of a recipe: its registered name and its settings as plain values."""

    distiller: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a set was distilled; everything needed to do it again except the data.

    Args:
        steps: Distillers in order; each starts from the result of the one before.
        ipc: Images per class.
        seed: Public seed of every random choice that is not secret.
        version: medistill version that ran it.
    """

    steps: tuple[Step, ...]
    ipc: int
    seed: int
    version: str

    def __post_init__(self) -> None:
        if not self.steps:
            raise DataError("Expected at least one distiller in a recipe.")
        if self.ipc < 1:
            raise DataError(f"Expected ipc >= 1, got {self.ipc}.")

    @property
    def method(self) -> str:
        """Names of the distillers, joined by ``+``."""
        return "+".join(step.distiller for step in self.steps)

    @property
    def starts_from_real(self) -> bool:
        """Whether a released image began as, or is, a patient's image."""
        return any(step.settings.get("init") == "real" or step.distiller == "coreset" for step in self.steps)

    def to_json(self) -> dict[str, object]:
        """Plain values; :meth:`from_json` gives the same recipe back."""
        steps = [{"distiller": step.distiller, "settings": dict(step.settings)} for step in self.steps]
        return {"steps": steps, "ipc": self.ipc, "seed": self.seed, "version": self.version}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_json`."""
        steps = tuple(
            Step(distiller=step["distiller"], settings=dict(step["settings"])) for step in values["steps"]
        )
        return cls(steps=steps, ipc=int(values["ipc"]), seed=int(values["seed"]), version=str(values["version"]))

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a student is trained on a distilled set; part of the release.

    Args:
        epochs: Full passes over the set.
        learning_rate: Peak learning rate; where the method learned one, that rate.
        optimizer: ``"sgd"`` or ``"adam"``.
        momentum: Momentum of ``sgd``.
        decay: ``"cosine"`` to zero, or ``"constant"``.
        batch_size: Images per step; ``0`` takes the whole set.
        weight_decay: L2 penalty.
        augment: Whether label-preserving augmentation is applied.
    """

    epochs: int
    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    decay: str = "cosine"
    batch_size: int = 0
    weight_decay: float = 0.0
    augment: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise DataError(
                f"Expected epochs >= 1 and learning_rate > 0, got {self.epochs} and {self.learning_rate}."
            )
        if self.optimizer not in ("sgd", "adam"):
            raise DataError(f"Expected optimizer 'sgd' or 'adam', got {self.optimizer!r}.")
        if self.decay not in ("cosine", "constant"):
            raise DataError(f"Expected decay 'cosine' or 'constant', got {self.decay!r}.")


@dataclass(frozen=True, kw_only=True)
class ViewLabels:
    """Crops of every image with a soft label each; a student trains on another view in every epoch.

    Args:
        boxes: Shape ``(v, m, 4)``, or ``(v, m, 6)`` for volumes: low corner, then high corner, in the order of
            the image's axes, as shares of the side in ``[0, 1]``.
        soft_labels: Shape ``(v, m, k)``, of the crop in the size of the whole image.
        temperature: What logits were divided by in these labels, and are in a student trained on them.

    Raises:
        DataError: If a shape or range is violated.
    """

    boxes: Tensor
    soft_labels: Tensor
    temperature: float

    def __post_init__(self) -> None:
        boxes, labels = self.boxes, self.soft_labels
        if boxes.ndim != 3 or boxes.shape[2] not in (4, 6) or not boxes.numel():
            raise DataError(f"Expected boxes of views (v, m, 4) or (v, m, 6), got {tuple(boxes.shape)}.")
        if labels.ndim != 3 or labels.shape[:2] != boxes.shape[:2]:
            raise DataError(
                f"Expected soft_labels of views {tuple(boxes.shape[:2])} x classes, got {tuple(labels.shape)}."
            )
        low, high = boxes.chunk(2, dim=2)
        if not (float(low.min()) >= 0 and float(high.max()) <= 1 and bool((low < high).all())):
            raise DataError("Expected every box of a view to be in [0, 1] and not empty.")
        if not (float(labels.min()) >= 0 and float(labels.max()) <= 1):
            raise DataError("Expected soft_labels of views in [0, 1].")
        if not 0 < self.temperature < math.inf:
            raise DataError(f"Expected temperature > 0, got {self.temperature}.")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def are_tiles(self) -> bool:
        """Whether the views of an image do not overlap: the image is a mosaic of several smaller ones."""
        low, high = self.boxes[:, None].chunk(2, dim=3)
        apart = ((high <= low.transpose(0, 1)) | (high.transpose(0, 1) <= low)).any(3)
        return len(self) > 1 and bool((apart | torch.eye(len(self), dtype=torch.bool)[:, :, None]).all())

    def with_labels(self, labels: Tensor) -> ViewLabels:
        """The same boxes, every view with the label of its whole image, shape ``(m, k)``, at temperature 1."""
        return ViewLabels(boxes=self.boxes, soft_labels=labels.expand(len(self), -1, -1), temperature=1.0)


@dataclass(frozen=True, kw_only=True)
class DistilledSet:
    """A few synthetic images with soft labels. No patient field exists in this type.

    Args:
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``, finite, in ``[0, 1]``.
        soft_labels: Shape ``(m, k)`` in ``[0, 1]``; rows sum to one, except for a multilabel task.
        hard_labels: Shape ``(m,)``, the class each image was made for.
        ipc: Images per class; ``m = ipc * k``.
        task: What is diagnosed.
        recipe: How it was made.
        schedule: How a student should be trained on it.
        privacy: What is guaranteed, with no default.
        views: Crops with soft labels of their own, where the method made them.

    Raises:
        DataError: If a shape or range is violated.
    """

    images: Tensor
    soft_labels: Tensor
    hard_labels: Tensor
    ipc: int
    task: Task
    recipe: Recipe
    schedule: Schedule
    privacy: PrivacyStatement
    views: ViewLabels | None = None

    def __post_init__(self) -> None:
        m = self.ipc * self.task.n_classes
        if len(self.images) != m:
            raise DataError(f"Expected {m} images (ipc {self.ipc} x classes), got {len(self.images)}.")
        if self.soft_labels.shape != (m, self.task.n_classes) or self.hard_labels.shape != (m,):
            raise DataError(
                f"Expected soft_labels ({m}, {self.task.n_classes}) and hard_labels ({m},), got "
                f"{tuple(self.soft_labels.shape)} and {tuple(self.hard_labels.shape)}."
            )
        if not bool(torch.isfinite(self.images).all() and torch.isfinite(self.soft_labels).all()):
            raise DataError("Expected finite images and soft_labels; the distillation diverged.")
        if float(self.images.min()) < 0 or float(self.images.max()) > 1:
            raise DataError("Expected released pixels in [0, 1].")
        self._check_labels(m)
        expected = (m, 2 * (self.images.ndim - 2)), (m, self.task.n_classes)
        if self.views is not None and (self.views.boxes.shape[1:], self.views.soft_labels.shape[1:]) != expected:
            raise DataError(f"Expected boxes and soft_labels of every view {expected}.")

    def _check_labels(self, m: int) -> None:
        if self.task.kind is TaskKind.MULTILABEL:
            if float(self.soft_labels.min()) < 0 or float(self.soft_labels.max()) > 1:
                raise DataError("Expected soft_labels of a multilabel task in [0, 1].")
        elif not torch.allclose(self.soft_labels.sum(1), torch.ones(m), atol=1e-4):
            raise DataError("Expected every row of soft_labels to sum to 1.")

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 of the recipe, the images and the labels, hexadecimal; binds reports to this very set."""
        digest = hashlib.sha256(self.recipe.fingerprint().encode())
        tensors = [self.images, self.soft_labels, self.hard_labels]
        if self.views is not None:
            temperature = torch.tensor(self.views.temperature, dtype=torch.float64)
            tensors += [self.views.boxes, self.views.soft_labels, temperature]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
