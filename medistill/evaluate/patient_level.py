"""From the images of a patient to one decision about the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medistill.core.task import TaskKind
from medistill.evaluate.metrics import Floats


def rules(kind: TaskKind) -> tuple[str, ...]:
    """Rules that join the scores of a patient's images.

    ``mean`` and ``max`` of the probabilities (``max`` not for classes that exclude each other), and ``vote``, the
    share of images decided for.
    """
    return ("mean", "vote") if kind is TaskKind.MULTICLASS else ("mean", "max", "vote")


@dataclass(frozen=True, kw_only=True)
class Patients:
    """Patients behind some images, and what they have.

    A patient has what one of the images shows. Of classes of which an image shows exactly one, more than two,
    patients whose images disagree have no class and are left out.

    Args:
        kind: Kind of the task.
        of_image: Position of each image's patient among the distinct ones, ``-1`` where left out, shape ``(n,)``.
        names: Pseudonyms, sorted.
        targets: Shape ``(p, k)``.
    """

    kind: TaskKind
    of_image: NDArray[np.intp]
    names: tuple[str, ...]
    targets: Floats

    @classmethod
    def of(cls, kind: TaskKind, patients: Sequence[str], targets: Floats) -> Patients:
        """Group images by patient.

        Args:
            kind: Kind of the task.
            patients: Pseudonym of each image's patient, length ``n``.
            targets: Shape ``(n, k)``, one-hot or multi-hot.
        """
        names, of_image = np.unique(np.asarray(patients), return_inverse=True)
        shown = np.zeros((len(names), targets.shape[1]))
        np.maximum.at(shown, of_image, targets)
        keep = np.ones(len(names), dtype=bool)
        if kind is TaskKind.BINARY:
            shown[:, 0] = 1 - shown[:, 1]
        elif kind is TaskKind.MULTICLASS:
            keep = shown.sum(1) == 1
        position = np.where(keep, np.cumsum(keep) - 1, -1)
        return cls(kind=kind, of_image=position[of_image], names=tuple(names[keep].tolist()), targets=shown[keep])

    @property
    def several(self) -> bool:
        """Whether some patient has more than one image."""
        counts = np.bincount(self.of_image[self.of_image >= 0], minlength=1)
        return bool(counts.max() > 1)

    def joined(self, rule: str, probabilities: Floats, thresholds: tuple[float, ...]) -> Floats:
        """Scores of patients, shape ``(p, k)``.

        Args:
            rule: One of :func:`rules`.
            probabilities: Of images, shape ``(n, k)``.
            thresholds: Operating points of images, as ``vote`` needs them.
        """
        here = self.of_image >= 0
        places, values = self.of_image[here], probabilities[here]
        if rule == "vote":
            values = _decided(self.kind, values, thresholds)
        if rule == "max":
            found = np.full_like(self.targets, -np.inf)
            np.maximum.at(found, places, values)
        else:
            found = np.zeros_like(self.targets)
            np.add.at(found, places, values)
            found /= np.bincount(places, minlength=len(found))[:, None]
        if self.kind is TaskKind.BINARY:
            found[:, 0] = 1 - found[:, 1]
        return found


def _decided(kind: TaskKind, probabilities: Floats, thresholds: tuple[float, ...]) -> Floats:
    if kind is TaskKind.MULTICLASS:
        chosen: Floats = (probabilities.argmax(1)[:, None] == np.arange(probabilities.shape[1])).astype(np.float64)
        return chosen
    if kind is TaskKind.BINARY:
        positive = (probabilities[:, 1] >= thresholds[0]).astype(np.float64)
        return np.stack([1 - positive, positive], axis=1)
    return (probabilities >= np.asarray(thresholds)).astype(np.float64)
