"""Students: networks trained from scratch on some images and applied to others, several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.task import Task
from medistill.parallel import parallel_map, worth_processes
from medistill.training.fit import fit, predict

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Student:
    """One network to train and to apply, complete enough to be sent to another process.

    Args:
        network: Makes the network from a task and an image shape.
        task: What is diagnosed.
        images: Shape ``(n, c, h, w)``.
        soft_labels: Shape ``(n, k)``.
        schedule: How to train.
        weights_seed: Public seed of the initial weights.
        order_seed: Public seed of batch order and augmentation.
        apply_to: Images to predict, by name, each ``(m, c, h, w)``.
        compute: Device and precision.
        views: Crops to train on with their labels, where there are any.
    """

    network: Callable[[Task, tuple[int, ...]], nn.Module]
    task: Task
    images: Floats
    soft_labels: Floats
    schedule: Schedule
    weights_seed: int
    order_seed: int
    apply_to: Mapping[str, Floats]
    compute: Compute = field(default_factory=Compute)
    views: ViewLabels | None = None

    @property
    def pixels(self) -> float:
        """Pixels that training passes through the network; a measure of the work."""
        return float(self.images.size) * self.schedule.epochs


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Class probabilities ``(m, k)`` by name, and the CPU seconds of training."""

    probabilities: Mapping[str, Floats]
    cpu_seconds: float


def train_student(student: Student) -> Trained:
    """Train one network from scratch and apply it."""
    task, began = student.task, time.process_time()
    network = fresh(student.network, task, tuple(student.images.shape[1:]), student.weights_seed)
    fit(
        network,
        _tensor(student.images),
        _tensor(student.soft_labels),
        kind=task.kind,
        schedule=student.schedule,
        seed=student.order_seed,
        compute=student.compute,
        views=student.views,
    )
    seconds = time.process_time() - began
    probabilities = {
        name: predict(network, _tensor(images), kind=task.kind, compute=student.compute).numpy()
        for name, images in student.apply_to.items()
    }
    return Trained(probabilities=probabilities, cpu_seconds=seconds)


def _tensor(array: Floats) -> Tensor:
    """A tensor over the array; copied where the array is a read-only view of memory shared between processes."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def train_students(students: Sequence[Student]) -> Iterator[Trained]:
    """Train several networks, in processes where that pays; results in order, the same bits either way."""
    if not students:
        return
    compute = students[0].compute
    jobs = compute.workers() or worth_processes(sum(student.pixels for student in students))
    work = [replace(s, compute=s.compute.of_worker(number)) for number, s in enumerate(students)]
    yield from parallel_map(train_student, work, jobs=jobs, engine=compute.engine)
