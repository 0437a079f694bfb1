"""One row per patient: the mean over the patient's images, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from medistill.core.images import ImageSet
from medistill.errors import DataError

#: From images ``(n, ...)`` and targets ``(n, k)`` to one row per image, ``(n, d)``.
Rows = Callable[[Tensor, Tensor], Tensor]


def images_of(patients: Sequence[str]) -> list[list[int]]:
    """Positions of each patient's images, patients in the order in which they first appear."""
    positions: dict[str, list[int]] = {}
    for position, patient in enumerate(patients):
        positions.setdefault(patient, []).append(position)
    return list(positions.values())


def patient_rows(
    images: ImageSet, patients: Sequence[Sequence[int]], rows: Rows, *, chunk: int
) -> Iterator[Tensor]:
    """Rows of patients, some patients at a time, in double precision.

    Args:
        images: Holds the images.
        patients: Positions of each patient's images.
        rows: Gives one row per image; an image's row must not depend on the other images.
        chunk: Images at a time; memory does not grow beyond it, not even for a patient with many images.

    Yields:
        Shape ``(patients, d)``.
    """
    for group in _groups(patients, chunk):
        flat = torch.tensor([position for own in group for position in own])
        owner = torch.tensor([number for number, own in enumerate(group) for _ in own])
        share = torch.tensor([1.0 / len(own) for own in group for _ in own], dtype=torch.float64)
        total: Tensor | None = None
        for first in range(0, len(flat), chunk):
            part = slice(first, first + chunk)
            found = rows(images.images[flat[part]], images.targets[flat[part]]).detach().cpu().double()
            if found.ndim != 2 or len(found) != len(flat[part]):
                raise DataError(f"Expected one row per image, got shape {tuple(found.shape)}.")
            if len(flat) == len(group):  # one image each
                total = found
                break
            if total is None:
                total = torch.zeros(len(group), found.shape[1], dtype=torch.float64)
            total.index_add_(0, owner[part], found * share[part, None])
        assert total is not None
        yield total


def _groups(patients: Sequence[Sequence[int]], chunk: int) -> Iterator[list[Sequence[int]]]:
    """Whole patients with at most ``chunk`` images together, or one patient with more."""
    group: list[Sequence[int]] = []
    size = 0
    for own in patients:
        if group and size + len(own) > chunk:
            yield group
            group, size = [], 0
        group.append(own)
        size += len(own)
    if group:
        yield group
