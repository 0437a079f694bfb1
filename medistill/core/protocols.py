"""The seams: what sources, curators, distillers, networks and attacks look like to the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.guarantee import PrivacyPlan, PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.progress import Progress

#: Maps images ``(n, c, h, w)`` and targets ``(n, k)`` to one row per image, ``(n, d)``.
Embed = Callable[[Tensor, Tensor], Tensor]
#: Maps logits ``(n, k)`` and targets ``(n, k)`` to one loss per image, ``(n,)``.
Loss = Callable[[Tensor, Tensor], Tensor]


class Curator(Protocol):
    """The party that holds the data and answers questions about it."""

    @property
    def task(self) -> Task:
        """What is diagnosed; public."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(c, h, w)`` or ``(c, d, h, w)``; public."""

    def sum(self, embed: Embed, *, clip_norm: float = math.inf, sampling_rate: float = 1.0) -> Tensor:
        """One row per patient (the mean over the patient's images), summed over patients, shape ``(d,)``.

        Args:
            embed: Gives one row per image, whatever other images are beside it.
            clip_norm: A private curator shortens longer rows of patients to this l2 norm, and needs it finite.
            sampling_rate: Probability with which a private curator lets each patient take part.
        """

    def gradient(
        self, network: nn.Module, loss: Loss, *, clip_norm: float = math.inf, sampling_rate: float = 1.0
    ) -> dict[str, Tensor]:
        """Gradient of each patient's mean loss, summed over patients; divide by a public expected number.

        Args:
            network: Its trainable parameters are differentiated; nothing in it may tie images together.
            loss: Gives one loss per image.
            clip_norm: As in :meth:`sum`, of all parameters together.
            sampling_rate: As in :meth:`sum`.

        Returns:
            Names of the parameters and their sums.
        """

    def noise(self, position: int) -> float:
        """Standard deviation of the noise on an answer, over ``clip_norm``; public. 0 where answers are exact.

        Args:
            position: Which query of the plan, counted from 0.
        """

    def resume(self, answered: int) -> None:
        """Go on after this many queries: the distiller has kept what it made of the answers."""

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


class NoCheckpoint:
    """Keeps nothing; for short work and for tests."""

    def load(self) -> None:
        """There is never a kept state."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Forget the state."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What one distiller hands on: images (as in :class:`ImageSet`), labels, schedule and views if any."""

    images: Tensor
    soft_labels: Tensor
    hard_labels: Tensor
    schedule: Schedule | None = None
    views: ViewLabels | None = None


class Watch(Protocol):
    """Looks at the images as they form."""

    def __call__(self, step: int, steps: int, current: Callable[[], Synthetic]) -> bool:
        """Look now or not; ``True`` asks the distiller to stop here.

        Args:
            step: Steps done.
            steps: Steps in all.
            current: Gives the result as it would be if this were the last step.
        """


def never_look(step: int, steps: int, current: Callable[[], Synthetic]) -> bool:
    """A :class:`Watch` that never looks."""
    return False


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What a distiller works with, beside the data: none of it changes what the algorithm is.

    Args:
        compute: Device and precision.
        progress: Shows how far it is.
        checkpoint: Where its state is kept; a second call after an interruption goes on from there.
        watch: Looks at the images as they form.
    """

    compute: Compute = field(default_factory=Compute)
    progress: Progress = field(default_factory=Progress)
    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)
    watch: Watch = never_look

    def steps(
        self,
        done: int,
        steps: int,
        description: str,
        *,
        every: int,
        state: Callable[[int], Mapping[str, Tensor]],
        current: Callable[[], Synthetic],
    ) -> Iterator[int]:
        """Numbers of the steps still to do, under a bar; between them checkpoints are kept and the watch looks.

        Args:
            done: Steps done before an interruption.
            steps: Steps in all.
            description: Short present participle for the bar.
            every: Steps between checkpoints.
            state: Gives the state to keep from the number of steps done.
            current: Gives the result as it stands.
        """
        numbers = range(done, steps)
        for step in self.progress.track(numbers, description, total=steps, completed=done):
            yield step
            if (step + 1) % every == 0:
                self.checkpoint.save(state(step + 1))
            if self.watch(step + 1, steps, current):
                return


class Distiller(Protocol):
    """Turns a curator's answers into a few synthetic images. Fields are its published settings."""

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Everything it will ask a curator; follows from its settings and public facts alone.

        Raises:
            PrivacyError: If it needs the images themselves.
        """

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Run the algorithm; same arguments, same bits on CPU.

        Args:
            curator: Who answers questions about the data.
            ipc: Images per class.
            seed: Public seed.
            start: Result of the distiller before it in the recipe, or ``None`` for its own start.
            bench: Device, progress, checkpoint and watch.

        Returns:
            Images and labels on the CPU.
        """
