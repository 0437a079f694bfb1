"""Arms of an evaluation: the training sets that are put beside a release, and the networks trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Schedule, ViewLabels
from medistill.core.images import ImageSet
from medistill.distill import distill
from medistill.distill.start import random_places
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.seeds import derive_seed
from medistill.training.students import Student, train_students
from medistill.training.students import Trained as Answers
from medistill.training.views import hard_views, hardened

ARMS: tuple[str, ...] = ("real", "random", "random_soft", "herding", "distilled", "distilled_hard")
#: Arms that need as many real images of every class as the release has.
CHOSEN_FROM_REAL = ("random", "random_soft", "herding")
OPERATING_POINT = "(operating point)"
REAL_SCHEDULE = Schedule(epochs=8, learning_rate=1e-3, optimizer="adam", batch_size=64)
_SOFT, _TEACHING = "random_soft", "(teaching)"
_Job = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What students of an arm are trained on, and how."""

    images: Tensor
    soft_labels: Tensor
    schedule: Schedule
    views: ViewLabels | None = None


@dataclass(frozen=True, kw_only=True)
class Arms:
    """Makes the training set of every arm.

    Args:
        distilled: The release; every arm but ``real`` is trained by its schedule.
        train: Real images of training patients.
        real_epochs: Epochs of the ``real`` arm.
        seed: Public seed of what is chosen at random.
        compute: Device of the network that herding looks through.
        progress: Shows its training.
    """

    distilled: DistilledSet
    train: ImageSet
    real_epochs: int
    seed: int
    compute: Compute = field(default_factory=Compute)
    progress: Progress = field(default_factory=Progress)

    def training_set(self, arm: str, repeat: int, *, teacher: NDArray[np.floating] | None = None) -> TrainingSet:
        """Images, labels and schedule of an arm.

        ``random`` and ``random_soft`` hold the same images, others for every repeat; herding chooses once.

        Args:
            arm: One of :data:`ARMS`.
            repeat: Number of the training.
            teacher: For ``random_soft``, class probabilities of all training images, shape ``(n, k)``.
        """
        made = self.distilled
        if arm == "real":
            schedule = replace(REAL_SCHEDULE, epochs=self.real_epochs)
            return TrainingSet(images=self.train.images, soft_labels=self.train.targets, schedule=schedule)
        if arm == "herding":
            return self._herding
        if arm in CHOSEN_FROM_REAL:
            places = random_places(self.train, ipc=made.ipc, seed=derive_seed(self.seed, "random", repeat))
            picked = self.train.select(places)
            chosen = TrainingSet(images=picked.images, soft_labels=picked.targets, schedule=made.schedule)
            if arm == "random":
                return chosen
            assert teacher is not None
            return replace(chosen, soft_labels=torch.from_numpy(np.asarray(teacher[places], dtype=np.float32)))
        hard = hardened(made.soft_labels, made.hard_labels, made.task)
        labels = made.soft_labels if arm == "distilled" else hard
        views = made.views if arm == "distilled" else hard_views(made.views, labels)
        return TrainingSet(images=made.images, soft_labels=labels, schedule=made.schedule, views=views)

    @cached_property
    def _herding(self) -> TrainingSet:
        made = distill(
            OpenCurator(self.train),
            method="coreset",
            ipc=self.distilled.ipc,
            seed=derive_seed(self.seed, "herding"),
            settings={"coreset": {"selection": "herding"}},
            compute=self.compute,
            progress=self.progress,
        ).distilled
        return TrainingSet(images=made.images, soft_labels=made.soft_labels, schedule=self.distilled.schedule)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the networks of one arm said.

    Args:
        outputs: Per network, split name to probabilities of shape ``(n, k)``.
        images: Training images.
        cpu_seconds: CPU time of training, mean over networks.
    """

    outputs: tuple[Mapping[str, NDArray[np.float64]], ...]
    images: int
    cpu_seconds: float


def train_arms(
    arms: Arms,
    names: Sequence[str],
    *,
    networks: Sequence[str],
    repeats: int,
    apply_to: Mapping[str, NDArray[np.floating]],
) -> Mapping[tuple[str, str], Trained]:
    """Train every network on every arm; those whose labels a network gives come last.

    Args:
        arms: Makes the training sets.
        names: Arms, some of :data:`ARMS`.
        networks: Registered networks; the first one of ``real`` labels the arm ``random_soft``.
        repeats: Trainings of each.
        apply_to: Images to predict by split, each ``(n, …)``.

    Returns:
        Network and arm to what was said.
    """
    jobs = [(network, arm, repeat) for network in networks for arm in names for repeat in range(repeats)]
    teaching = (networks[0], "real", 0) if _SOFT in names else None
    outputs: dict[tuple[str, str], list[Mapping[str, NDArray[np.float64]]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    sizes: dict[tuple[str, str], int] = {}

    def results() -> Iterator[tuple[_Job, Student, Answers]]:
        teacher: NDArray[np.floating] | None = None
        for last in (False, True):
            now = [job for job in jobs if (job[1] == _SOFT) is last]
            students = [_student(job, arms, apply_to, teacher, teaching) for job in now]
            for job, student, result in zip(now, students, train_students(students), strict=True):
                if job == teaching:
                    teacher = result.probabilities[_TEACHING]
                yield job, student, result

    for job, student, result in arms.progress.track(results(), "evaluating", total=len(jobs)):
        key = job[:2]
        said = {name: result.probabilities[name].astype(np.float64) for name in apply_to}
        outputs.setdefault(key, []).append(said)
        seconds[key] = seconds.get(key, 0.0) + result.cpu_seconds / repeats
        sizes[key] = len(student.images)
    return {
        key: Trained(outputs=tuple(said), images=sizes[key], cpu_seconds=round(seconds[key], 2))
        for key, said in outputs.items()
    }


def _student(
    job: _Job,
    arms: Arms,
    apply_to: Mapping[str, NDArray[np.floating]],
    teacher: NDArray[np.floating] | None,
    teaching: _Job | None,
) -> Student:
    network, arm, repeat = job
    chosen = arms.training_set(arm, repeat, teacher=teacher)
    also = {_TEACHING: arms.train.images.numpy()} if job == teaching else {}
    return Student(
        network=NETWORKS.load(network),
        task=arms.train.task,
        images=chosen.images.numpy(),
        soft_labels=chosen.soft_labels.numpy(),
        schedule=chosen.schedule,
        weights_seed=derive_seed(arms.seed, "student", arm, repeat),
        order_seed=derive_seed(arms.seed, "order", arm, repeat),
        apply_to={**apply_to, **also},
        views=chosen.views,
        compute=arms.compute,
    )
