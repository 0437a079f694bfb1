"""Looking at the images as they form: validation AUROC now and then, and early stopping on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.images import ImageSet
from medistill.core.protocols import Checkpoint, NetworkFactory, Synthetic
from medistill.distill.checkpoint import pack_synthetic, unpack_synthetic
from medistill.distill.schedule import DEFAULT_SCHEDULE, choose_schedule
from medistill.progress import Progress

#: A look that would pass more pixels than this through the student gives no AUROC, only images.
_MOST_PIXELS = 2e7
_QUICK = replace(DEFAULT_SCHEDULE, epochs=40)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The images at one moment.

    Args:
        distiller: Registered name.
        step: Steps done.
        steps: Steps in all.
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
        validation_auroc: Of a student trained on them for a short while, or ``None`` where that would take long or
            there are no validation patients.
    """

    distiller: str
    step: int
    steps: int
    images: Tensor
    validation_auroc: float | None


Observer = Callable[[Look], None]


@dataclass(kw_only=True)
class ValidationWatch:
    """Looks ``looks`` times at equal distances, the last time after the last step.

    What it sees comes from validation patients, who are neither distilled from nor tested on. The student is the
    same every time, so that looks can be compared; its AUROC is lower than after a whole training.

    Args:
        distiller: Registered name.
        validation: Validation patients, or ``None``.
        network: Architecture of the student.
        seed: Public seed of the student.
        looks: Times to look.
        patience: Looks without a better AUROC after which the distiller is asked to stop; ``0`` never asks.
        compute: Device and precision.
        kept: Where the looks of an interrupted run are kept.
        progress: Shows the AUROC beside the bar.
        observer: Told of every look.
    """

    distiller: str
    validation: ImageSet | None
    network: NetworkFactory
    seed: int
    looks: int
    patience: int
    compute: Compute
    kept: Checkpoint
    progress: Progress
    observer: Observer | None
    _aurocs: dict[int, float] = field(default_factory=dict)
    _best: Synthetic | None = None

    def __post_init__(self) -> None:
        state = self.kept.load()
        if state is not None:
            self._aurocs = dict(zip(state["steps"].tolist(), state["aurocs"].tolist(), strict=True))
            self._best = unpack_synthetic(state)

    def __call__(self, step: int, steps: int, current: Callable[[], Synthetic]) -> bool:
        """Look when it is time; ``True`` when patience is at an end."""
        if step * self.looks // steps == (step - 1) * self.looks // steps:
            return False
        synthetic = current()
        auroc = self._auroc(synthetic)
        if self.observer is not None:
            look = Look(
                distiller=self.distiller, step=step, steps=steps, images=synthetic.images, validation_auroc=auroc
            )
            self.observer(look)
        if auroc is None:
            return False
        self.progress.note(validation_auroc=auroc)
        if self.patience:
            self._remember(step, auroc, synthetic)
        return self._stopped

    def best(self, last: Synthetic) -> Synthetic:
        """The images of the best look if the distiller was stopped, and the last ones otherwise."""
        if not self._stopped or self._best is None:
            return last
        self.progress.say(f"{self.distiller}: stopped early; the images of step {self._best_step} are the best.")
        return self._best

    @property
    def _stopped(self) -> bool:
        later = [step for step in self._aurocs if step > self._best_step]
        return 0 < self.patience <= len(later)

    @property
    def _best_step(self) -> int:
        return max(self._aurocs, key=lambda step: (self._aurocs[step], -step))

    def _remember(self, step: int, auroc: float, synthetic: Synthetic) -> None:
        self._aurocs[step] = auroc
        if self._best_step != step and self._best is not None:
            synthetic = self._best
        self._best = synthetic
        self.kept.save(
            {
                "steps": torch.tensor(list(self._aurocs)),
                "aurocs": torch.tensor(list(self._aurocs.values()), dtype=torch.float64),
                **pack_synthetic(synthetic),
            }
        )

    def _auroc(self, synthetic: Synthetic) -> float | None:
        schedule = synthetic.schedule or _QUICK
        if self.validation is None or synthetic.images.numel() * schedule.epochs > _MOST_PIXELS:
            return None
        ranked = choose_schedule(
            replace(synthetic, schedule=None),
            self.validation,
            network=self.network,
            seed=self.seed,
            students=1,
            candidates=(schedule,),
            compute=self.compute,
            progress=Progress(),
        )
        return ranked[0].auroc
