"""The seams: what sources, curators, distillers, networks and attacks look like to the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from medistill.core.distilled import Schedule
from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.progress import Progress

#: Maps images ``(n, c, h, w)`` and targets ``(n, k)`` to one row per image, ``(n, d)``.
Embed = Callable[[Tensor, Tensor], Tensor]


class Curator(Protocol):
    """The party that holds the data and answers questions about it."""

    @property
    def task(self) -> Task:
        """What is diagnosed; public."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(c, h, w)``; public."""

    def sum(self, embed: Embed) -> Tensor:
        """One row per patient (the mean over the patient's images), summed over patients, shape ``(d,)``."""

    def images(self) -> ImageSet:
        """Raw access; a private curator refuses with :class:`medistill.errors.PrivacyError`."""

    def statement(self) -> PrivacyStatement:
        """What the answers given so far guarantee."""


class NetworkFactory(Protocol):
    """Makes a freshly initialised network for a task and an image shape."""

    def __call__(self, task: Task, image_shape: tuple[int, ...]) -> nn.Module:
        """Network from ``(n, c, h, w)`` to logits ``(n, k)``; its ``features`` method gives ``(n, d)``."""


class Checkpoint(Protocol):
    """Where a long computation keeps its state so that an interruption costs little."""

    def load(self) -> dict[str, Tensor] | None:
        """State of an interrupted run of the same work, or ``None``."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the kept state, atomically."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What one distiller hands on: images ``(m, c, h, w)``, labels, and a schedule where it has one."""

    images: Tensor
    soft_labels: Tensor
    hard_labels: Tensor
    schedule: Schedule | None = None


class Distiller(Protocol):
    """Turns a curator's answers into a few synthetic images. Fields are its published settings."""

    def distill(
        self,
        curator: Curator,
        *,
        ipc: int,
        seed: int,
        start: Synthetic | None,
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> Synthetic:
        """Run the algorithm; same arguments, same bits on CPU.

        Args:
            curator: Who answers questions about the data.
            ipc: Images per class.
            seed: Public seed.
            start: Result of the distiller before it in the recipe, or ``None`` for its own start.
            progress: Shows how far it is.
            checkpoint: Where its state is kept; a second call after an interruption goes on from there.
        """
