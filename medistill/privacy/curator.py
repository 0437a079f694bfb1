"""Curators: the only door to patients' images."""

from __future__ import annotations

import torch
from torch import Tensor

from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.protocols import Embed
from medistill.core.task import Task

_CHUNK = 256


class OpenCurator:
    """Answers every question exactly; guarantees nothing.

    Args:
        images: The images distilled from: the train split of a cohort.

    Privacy:
        Reads non-released data. :meth:`statement` says that nothing is proved.
    """

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    @property
    def task(self) -> Task:
        """What is diagnosed."""
        return self._images.task

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(c, h, w)``."""
        return tuple(self._images.images.shape[1:])

    @torch.no_grad()
    def sum(self, embed: Embed) -> Tensor:
        """One row per patient (the mean over the patient's images), summed over patients, shape ``(d,)``.

        Every patient weighs the same, however many images there are of them; memory does not grow with the
        number of images.
        """
        counts: dict[str, int] = {}
        for patient in self._images.patients:
            counts[patient] = counts.get(patient, 0) + 1
        shares = torch.tensor([1.0 / counts[patient] for patient in self._images.patients])
        total: Tensor | None = None
        for start in range(0, len(self._images), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = embed(self._images.images[part], self._images.targets[part])
            answer = shares[part].to(rows) @ rows
            total = answer if total is None else total + answer
        assert total is not None
        return total

    def images(self) -> ImageSet:
        """Raw access to all images."""
        return self._images

    def statement(self) -> PrivacyStatement:
        """Nothing is proved: answers are exact."""
        return PrivacyStatement.nothing_proved("distilled without differential privacy.")
