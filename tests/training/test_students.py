"""Students give the same bits in this process and in others."""

from __future__ import annotations

import numpy as np
import pytest

from medistill.core.distilled import Schedule
from medistill.networks.convnet import ConvNet
from medistill.parallel import worth_processes
from medistill.training import students
from medistill.training.students import Student, train_students
from tests.conftest import blobs


def _students(count: int) -> list[Student]:
    data = blobs(patients=8)
    return [
        Student(
            network=ConvNet,
            task=data.task,
            images=data.images.numpy(),
            soft_labels=data.targets.numpy(),
            schedule=Schedule(epochs=3, learning_rate=0.01),
            weights_seed=number,
            order_seed=number,
            apply_to={"train": data.images.numpy()},
        )
        for number in range(count)
    ]


def test_processes_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [trained.probabilities["train"] for trained in train_students(_students(3))]
    monkeypatch.setattr(students, "worth_processes", lambda pixels: 2)
    there = [trained.probabilities["train"] for trained in train_students(_students(3))]
    assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))
    assert not np.array_equal(here[0], here[1])


def test_little_work_stays_in_this_process() -> None:
    assert worth_processes(1e6) == 1
    assert worth_processes(1e9) is None
