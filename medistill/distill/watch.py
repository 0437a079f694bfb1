"""Looking at the images as they form: validation AUROC now and then, and early stopping on it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
#: Images a look shows, the same ones every time.
SHOWN = 6
_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Look:
    """A few of the images at one moment.

    Args:
        distiller: Registered name.
        step: Steps done.
        steps: Steps in all.
        pictures: The images of :func:`shown_images` in 8 bits, shape ``(k, c, h, w)`` or ``(k, c, d, h, w)``.
        validation_auroc: Of a student trained on all images for a short while, or ``None`` where that would take
            long or there are no validation patients.
        cpu_seconds: CPU time this distiller took so far, looking not counted.
    """

    distiller: str
    step: int
    steps: int
    pictures: Tensor
    validation_auroc: float | None
    cpu_seconds: float


Observer = Callable[[Look], None]


def shown_images(hard_labels: Tensor) -> list[int]:
    """Which images stand for all: the first of every class, then the second of every class, and so on."""
    turns, seen = [], Counter[int]()
    for i, label in enumerate(hard_labels.tolist()):
        turns.append((seen[label], label, i))
        seen[label] += 1
    return [i for *_, i in sorted(sorted(turns)[:SHOWN], key=lambda turn: turn[1:])]


def eight_bit(images: Tensor) -> Tensor:
    """Images in 0 to 1 as pictures show them: rounded to 256 levels."""
    return (images.detach().cpu().float().clamp(0, 1) * _LEVELS).round().to(torch.uint8)


@dataclass(kw_only=True)
class ValidationWatch:
    """Looks ``looks`` times at equal distances, the last time after the last step.

    What it sees comes from validation patients, who are neither distilled from nor tested on. The student is the
    same every time, so that looks can be compared; its AUROC is lower than after a whole training. After an
    interruption the observer is told again of every look before it, and no moment is looked at twice.

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
    _looks: dict[int, Look] = field(default_factory=dict)
    _best: Synthetic | None = None
    _started: float = field(default_factory=time.process_time)

    def __post_init__(self) -> None:
        state = self.kept.load()
        if state is None:
            return
        for look in unpack_looks(state, [self.distiller] * len(state["looks.steps"])):
            self._looks[look.step] = look
            self._started = time.process_time() - look.cpu_seconds
            self._tell(look)
        if "images" in state:
            self._best = unpack_synthetic(state)

    def __call__(self, step: int, steps: int, current: Callable[[], Synthetic]) -> bool:
        """Look when it is time; ``True`` when patience is at an end."""
        if step * self.looks // steps == (step - 1) * self.looks // steps:
            return False
        if step not in self._looks:
            self._look(step, steps, current())
        return self._stopped

    def _look(self, step: int, steps: int, synthetic: Synthetic) -> None:
        began = time.process_time()
        look = Look(
            distiller=self.distiller,
            step=step,
            steps=steps,
            pictures=eight_bit(synthetic.images[shown_images(synthetic.hard_labels)]),
            validation_auroc=self._auroc(synthetic),
            cpu_seconds=began - self._started,
        )
        self._looks[step] = look
        if self.patience and self._best_step == step:
            self._best = synthetic
        best = {} if self._best is None else pack_synthetic(self._best)
        self.kept.save({**pack_looks(tuple(self._looks.values())), **best})
        self._tell(look)
        self._started += time.process_time() - began

    def _tell(self, look: Look) -> None:
        if self.observer is not None:
            self.observer(look)
        if look.validation_auroc is not None:
            self.progress.note(validation_auroc=look.validation_auroc)

    def best(self, last: Synthetic) -> Synthetic:
        """The images of the best look if the distiller was stopped, and the last ones otherwise."""
        if not self._stopped or self._best is None:
            return last
        self.progress.say(f"{self.distiller}: stopped early; the images of step {self._best_step} are the best.")
        return self._best

    @property
    def _stopped(self) -> bool:
        best = self._best_step
        return best is not None and 0 < self.patience <= sum(step > best for step in self._aurocs)

    @property
    def _best_step(self) -> int | None:
        aurocs = self._aurocs
        return max(aurocs, key=lambda step: (aurocs[step], -step)) if aurocs else None

    @property
    def _aurocs(self) -> dict[int, float]:
        found = {step: look.validation_auroc for step, look in self._looks.items()}
        return {step: auroc for step, auroc in found.items() if auroc is not None}

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


def pack_looks(looks: Sequence[Look]) -> dict[str, Tensor]:
    """Looks without the names of their distillers, flat, for a file."""
    aurocs = [math.nan if look.validation_auroc is None else look.validation_auroc for look in looks]
    return {
        "looks.pictures": torch.stack([look.pictures for look in looks]),
        "looks.steps": torch.tensor([[look.step, look.steps] for look in looks]),
        "looks.aurocs": torch.tensor(aurocs, dtype=torch.float64),
        "looks.seconds": torch.tensor([look.cpu_seconds for look in looks], dtype=torch.float64),
    }


def unpack_looks(state: Mapping[str, Tensor], distillers: Sequence[str]) -> tuple[Look, ...]:
    """Inverse of :func:`pack_looks`."""
    columns = (state["looks.steps"].tolist(), state["looks.aurocs"].tolist(), state["looks.seconds"].tolist())
    return tuple(
        Look(
            distiller=distiller,
            step=step,
            steps=steps,
            pictures=pictures,
            validation_auroc=None if math.isnan(auroc) else auroc,
            cpu_seconds=seconds,
        )
        for distiller, pictures, (step, steps), auroc, seconds in zip(
            distillers, state["looks.pictures"], *columns, strict=True
        )
    )
