"""Images with targets and patients, as a tensor block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from medistill.core.task import Task
from medistill.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one split.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``, float32 in ``[0, 1]`` by fixed public scaling.
        targets: Shape ``(n, k)``, one row of class probabilities (one-hot for hard labels, multi-hot for those of
            a multilabel task).
        patients: Pseudonym of each image's patient, length ``n``.
        task: What is diagnosed.

    Raises:
        DataError: If lengths disagree or a pixel is not finite and in ``[0, 1]``.
    """

    images: Tensor
    targets: Tensor
    patients: tuple[str, ...]
    task: Task

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.targets.shape != (n, self.task.n_classes) or len(self.patients) != n:
            raise DataError(
                f"Expected targets ({n}, {self.task.n_classes}) and {n} patients, got "
                f"{tuple(self.targets.shape)} and {len(self.patients)}."
            )
        if n and not (
            bool(torch.isfinite(self.images).all())
            and float(self.images.min()) >= 0.0
            and float(self.images.max()) <= 1.0
        ):
            raise DataError("Expected finite pixels in [0, 1].")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> Tensor:
        """Index of the most probable class, shape ``(n,)``; says nothing about a multilabel task."""
        return self.targets.argmax(1)

    @property
    def unique_patients(self) -> tuple[str, ...]:
        """Distinct pseudonyms, sorted."""
        return tuple(sorted(set(self.patients)))

    def select(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at some positions, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        patients = tuple(self.patients[i] for i in index.tolist())
        return replace(self, images=self.images[index], targets=self.targets[index], patients=patients)

    def of_patients(self, patients: set[str] | frozenset[str]) -> ImageSet:
        """All images of some patients."""
        return self.select([i for i, patient in enumerate(self.patients) if patient in patients])


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both, those of the first before those of the second."""
    return replace(
        first,
        images=torch.cat([first.images, second.images]),
        targets=torch.cat([first.targets, second.targets]),
        patients=first.patients + second.patients,
    )


def averaged(images: Tensor, *, plane: int, solid: int) -> Tensor:
    """Larger images averaged to ``plane`` pixels a side, larger volumes to ``solid``, for comparing many of them.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        plane: Side length of images.
        solid: Side length of volumes.

    Returns:
        The same where they are not larger.
    """
    axes = images.ndim - 2
    side = solid if axes == 3 else plane
    return interpolate(images, size=(side,) * axes, mode="area") if images.shape[-1] > side else images


def resized(images: Tensor, size: int) -> Tensor:
    """Images or volumes at another side length, by the triangle filter along every axis.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        size: Side length of the result.

    Returns:
        Shape ``(n, c, size, size)`` or ``(n, c, size, size, size)``; the images themselves where they have it.
    """
    sides = images.shape[2:]
    if all(side == size for side in sides):
        return images
    planes = interpolate(images.flatten(1, -3), size=(size, size), mode="bilinear", antialias=True)
    if len(sides) == 2:
        return planes
    columns = planes.view(*images.shape[:3], size * size)
    cubes = interpolate(columns, size=(size, size * size), mode="bilinear", antialias=True)
    return cubes.view(*images.shape[:2], size, size, size)
