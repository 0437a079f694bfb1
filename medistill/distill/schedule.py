"""Choosing how a student is trained on a distilled set; the choice travels with the release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule
from medistill.core.images import ImageSet
from medistill.core.protocols import NetworkFactory, Synthetic
from medistill.core.task import TaskKind
from medistill.errors import DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.students import Floats, Student, train_students

#: Without validation patients to choose on, this schedule is used.
DEFAULT_SCHEDULE = Schedule(epochs=300, learning_rate=0.01)

CANDIDATES = (
    Schedule(epochs=40, learning_rate=0.01),
    Schedule(epochs=100, learning_rate=0.01),
    DEFAULT_SCHEDULE,
    Schedule(epochs=300, learning_rate=0.03, weight_decay=0.01),
    Schedule(epochs=600, learning_rate=0.03, weight_decay=0.01),
)
_MOST_IMAGES = 600
_COPIES = 3
#: Pixels a candidate passes through a student: above the first, one student must do; above the second, none is.
_LONG, _TOO_LONG = 2e6, 1e8


@dataclass(frozen=True, kw_only=True)
class ScheduleScore:
    """A schedule with the mean validation AUROC of students trained by it."""

    schedule: Schedule
    auroc: float


def choose_schedule(
    synthetic: Synthetic,
    validation: ImageSet,
    *,
    network: NetworkFactory,
    seed: int,
    students: int = 0,
    candidates: Sequence[Schedule] = CANDIDATES,
    compute: Compute | None = None,
    progress: Progress,
) -> tuple[ScheduleScore, ...]:
    """Train students by every candidate and rank the candidates by validation AUROC, best first.

    The validation images are augmented as training images are: on images as they are, all candidates are nearly
    alike, and what little tells them apart prefers students that do worse on films of another look.

    Args:
        synthetic: What to train on; its own schedule, where it has one, is a candidate too.
        validation: Images of validation patients: never distilled from, never test.
        network: Architecture of the students.
        seed: Public seed.
        students: Networks per candidate; ``0`` takes two, or one where training is long.
        candidates: Schedules to compare.
        compute: Device and precision.
        progress: Shows the trainings.

    Privacy:
        Reads non-released data of validation patients; refused under differential privacy by the caller.
    """
    pixels = synthetic.images.numel()
    affordable = [c for c in candidates if pixels * c.epochs <= _TOO_LONG] or [
        min(candidates, key=attrgetter("epochs"))
    ]
    everything = (*affordable, *((synthetic.schedule,) if synthetic.schedule else ()))
    part = _varied(_part(validation, seed), seed)
    students = students or (1 if pixels * DEFAULT_SCHEDULE.epochs > _LONG else 2)
    jobs = [(schedule, student) for schedule in everything for student in range(students)]
    work = [
        Student(
            network=network,
            task=part.task,
            images=synthetic.images.numpy(),
            soft_labels=synthetic.soft_labels.numpy(),
            schedule=schedule,
            weights_seed=derive_seed(seed, "student", student),
            order_seed=derive_seed(seed, "student", student, "order"),
            apply_to={"validation": part.images.numpy()},
            compute=compute or Compute(),
            views=synthetic.views,
        )
        for schedule, student in jobs
    ]
    scores: dict[Schedule, float] = dict.fromkeys(everything, 0.0)
    trained = progress.track(train_students(work), "choosing the schedule", total=len(work))
    for (schedule, _), result in zip(jobs, trained, strict=True):
        scores[schedule] += _auroc(part, result.probabilities["validation"]) / students
    ranked = sorted(everything, key=lambda schedule: -scores[schedule])
    return tuple(ScheduleScore(schedule=schedule, auroc=scores[schedule]) for schedule in ranked)


def _part(validation: ImageSet, seed: int) -> ImageSet:
    """A few hundred images, as many of every class as there are up to an equal share; none is left without one.

    Of a multilabel task images that show none of the classes have a share too.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation part"))
    order = torch.randperm(len(validation), generator=generator)
    if validation.task.kind is TaskKind.MULTILABEL:
        shown = validation.targets[order] > 0.5
        groups = torch.cat([shown, ~shown.any(1, keepdim=True)], dim=1).T
        most = _MOST_IMAGES // len(groups)
        parts = [order[group][:most].tolist() for group in groups]
        return validation.select(list(dict.fromkeys(i for part in parts for i in part)))
    classes = validation.classes[order]
    most = _MOST_IMAGES // validation.task.n_classes
    chosen = torch.cat([order[classes == label][:most] for label in range(validation.task.n_classes)])
    return validation.select(chosen)


def _varied(part: ImageSet, seed: int) -> ImageSet:
    """Augmented copies, each cut to ``[0, 1]``."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation copies"))
    index = torch.arange(len(part)).repeat(_COPIES)
    copies = part.select(index)
    changed = [augment(images, generator).clamp(0.0, 1.0) for images in torch.split(copies.images, 256)]
    return replace(copies, images=torch.cat(changed))


def _auroc(part: ImageSet, probabilities: Floats) -> float:
    """Mean over the classes that some of the images show and some do not."""
    shown = part.targets.numpy() > 0.5
    both = shown.any(0) & ~shown.all(0)
    if not both.any():
        raise DataError("Expected a class that some validation images show and some do not; found none.")
    return float(np.mean([roc_auc_score(shown[:, c], probabilities[:, c]) for c in np.flatnonzero(both)]))
