"""Records hold their invariants and survive a round trip through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from medistill.core.cohort import Cohort, Instance, Split
from medistill.core.distilled import DistilledSet, Recipe, Schedule, Step
from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet, resized
from medistill.core.task import Task, TaskKind, joined_names, joint_label
from medistill.errors import DataError, PrivacyError
from tests.conftest import blobs, pseudonym

TASK = Task.single_label(("normal", "ill"))


def test_task_refuses_wrong_class_counts() -> None:
    with pytest.raises(DataError):
        Task(kind=TaskKind.BINARY, class_names=("a", "b", "c"))
    with pytest.raises(DataError):
        Task(kind=TaskKind.MULTICLASS, class_names=("a", "a", "b"))
    assert Task.from_json(TASK.to_json()) == TASK


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_image_set_refuses_pixels_outside_the_unit_interval(value: float) -> None:
    images = torch.full((2, 1, 4, 4), 0.5)
    images[0, 0, 0, 0] = value
    with pytest.raises(DataError):
        ImageSet(images=images, targets=torch.eye(2), patients=("a", "b"), task=TASK)


def test_of_patients_keeps_all_images_of_a_patient() -> None:
    everything = blobs(patients=6, per_patient=3)
    wanted = set(everything.unique_patients[:2])
    part = everything.of_patients(wanted)
    assert len(part) == 6
    assert set(part.patients) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"patient": "Doe^Jane"},
        {"patient": "12345"},
        {"uid": "1.2.840.113619.2.55"},
        {"study": "1.2.3"},
        {"age_band": "47"},
        {"sex": "female"},
        {"view": "pa, bed 4"},
    ],
)
def test_instance_cannot_hold_an_original_identifier(change: dict[str, str]) -> None:
    instance = Instance(uid="2.25.7", patient=pseudonym(1), label="ill", split=Split.TRAIN, row=0)
    with pytest.raises(DataError) as caught:
        replace(instance, **change)
    assert next(iter(change.values())) not in str(caught.value)


class _Store:
    def read(self, rows: list[int]) -> np.ndarray:
        return np.full((len(rows), 1, 8, 8), 65535, dtype=np.uint16)


def _instance(number: int, patient: int, split: Split, pixel_key: str = "") -> Instance:
    return Instance(
        uid=f"2.25.{number + 1}",
        patient=pseudonym(patient),
        label="ill",
        split=split,
        row=number,
        pixel_key=pixel_key,
    )


def test_cohort_refuses_a_patient_in_two_splits() -> None:
    rows = (_instance(0, 1, Split.TRAIN), _instance(1, 1, Split.TEST))
    with pytest.raises(DataError, match="one split"):
        Cohort(instances=rows, task=TASK, profile={}, store=_Store())


def test_cohort_refuses_the_same_image_in_two_splits_under_two_patients() -> None:
    rows = (_instance(0, 1, Split.TRAIN, pseudonym(9)), _instance(1, 2, Split.TEST, pseudonym(9)))
    with pytest.raises(DataError, match="one split"):
        Cohort(instances=rows, task=TASK, profile={}, store=_Store())


def test_cohort_reads_and_resizes() -> None:
    rows = tuple(_instance(i, i, Split.TRAIN) for i in range(3))
    images = Cohort(instances=rows, task=TASK, profile={}, store=_Store()).images(4)
    assert images.images.shape == (3, 1, 4, 4)
    assert float(images.images.min()) == 1.0
    assert images.targets.tolist() == [[0, 1]] * 3


def test_privacy_statement_needs_a_reason_exactly_when_nothing_is_proved() -> None:
    with pytest.raises(PrivacyError):
        PrivacyStatement(epsilon=math.inf, delta=0.0)
    with pytest.raises(PrivacyError):
        PrivacyStatement(epsilon=1.0, delta=1e-5, accountants=("pld",), reason="why")
    with pytest.raises(PrivacyError):
        PrivacyStatement(epsilon=1.0, delta=1e-5)
    statement = PrivacyStatement.nothing_proved("exact answers.")
    again = PrivacyStatement.from_json(json.loads(json.dumps(statement.to_json(), allow_nan=False)))
    assert again == statement


def _distilled(**changes: object) -> DistilledSet:
    recipe = Recipe(steps=(Step(distiller="coreset", settings={}),), ipc=1, seed=0, version="0")
    values: dict[str, object] = {
        "images": torch.full((2, 1, 4, 4), 0.5),
        "soft_labels": torch.tensor([[0.9, 0.1], [0.2, 0.8]]),
        "hard_labels": torch.tensor([0, 1]),
        "ipc": 1,
        "task": TASK,
        "recipe": recipe,
        "schedule": Schedule(epochs=1, learning_rate=0.1),
        "privacy": PrivacyStatement.nothing_proved("test."),
    }
    return DistilledSet(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"images": torch.full((2, 1, 4, 4), 1.5)},
        {"images": torch.full((2, 1, 4, 4), float("nan"))},
        {"soft_labels": torch.ones(2, 2)},
        {"hard_labels": torch.tensor([0])},
        {"ipc": 3},
    ],
)
def test_distilled_set_refuses_what_may_not_be_released(changes: dict[str, object]) -> None:
    _distilled()
    with pytest.raises(DataError):
        _distilled(**changes)


def test_distilled_set_has_no_default_privacy_and_no_patient_field() -> None:
    fields = DistilledSet.__dataclass_fields__
    assert not any("patient" in name for name in fields)
    values = {name: getattr(_distilled(), name) for name in fields if name != "privacy"}
    with pytest.raises(TypeError, match="privacy"):
        DistilledSet(**values)


def test_recipe_round_trips() -> None:
    recipe = Recipe(
        steps=(Step(distiller="soft_label", settings={"unroll": 3, "init": "real"}),), ipc=2, seed=4, version="1"
    )
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert recipe.starts_from_real


def test_labels_of_several_classes_survive_joining() -> None:
    assert joined_names(" mass |effusion; mass;;") == ("effusion", "mass")
    assert joined_names(joint_label(["mass", "effusion"])) == ("effusion", "mass")
    assert joined_names(joint_label([])) == ()
    task = Task.multilabel(("mass", "effusion", "nodule"))
    assert Task.from_json(task.to_json()) == task
    assert task.names_in("effusion;mass") == ("effusion", "mass")
    assert TASK.names_in("a;b") == ("a;b",)


@pytest.mark.parametrize("names", [("mass",), ("mass", "a;b"), ("mass", ""), ("mass", "a|b"), ("mass", " a")])
def test_a_multilabel_task_refuses_names_that_could_not_be_joined(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        Task.multilabel(names)


class Volumes:
    """Pixels in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def read(self, rows: list[int]) -> np.ndarray:
        return self.pixels[rows]


def several(labels: list[str], pixels: np.ndarray) -> Cohort:
    instances = tuple(
        Instance(uid=f"2.25.{row + 1}", patient=pseudonym(row), label=label, split=Split.TRAIN, row=row)
        for row, label in enumerate(labels)
    )
    task = Task.multilabel(("mass", "effusion"))
    return Cohort(instances=instances, task=task, profile={}, store=Volumes(pixels))


def test_a_cohort_of_several_classes_per_volume() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (3, 1, 6, 6, 6)).astype(np.uint16)
    cohort = several(["effusion;mass", ";", "mass"], pixels)
    images = cohort.images(6)
    assert images.targets.tolist() == [[1, 1], [0, 0], [1, 0]]
    torch.testing.assert_close(images.images, torch.tensor(pixels / 65535.0).float())
    assert cohort.counts()["train"] == {"images": 3, "patients": 3, "mass": 2, "effusion": 1}
    with pytest.raises(DataError, match="class of the task"):
        several(["mass;nodule", ";", "mass"], pixels)
    with pytest.raises(DataError, match="class of the task"):
        several(["", ";", "mass"], pixels)


def triangle(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis resized by a loop over the triangle filter."""
    scale = len(values) / size
    support = max(1.0, scale)
    rows = []
    for at in range(size):
        centre = (at + 0.5) * scale
        weights = np.array([max(0.0, 1 - abs(i + 0.5 - centre) / support) for i in range(len(values))])
        rows.append(np.tensordot(weights / weights.sum(), values, 1))
    return np.array(rows)


@pytest.mark.parametrize(("side", "size"), [(6, 3), (7, 4), (4, 9)])
def test_volumes_are_resized_by_the_triangle_filter_on_every_axis(side: int, size: int) -> None:
    volume = np.random.default_rng(side).random((side, side, side))
    expected = volume
    for axis in range(3):
        expected = np.moveaxis(triangle(np.moveaxis(expected, axis, 0), size), 0, axis)
    found = resized(torch.tensor(volume)[None, None].float(), size)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-5)


def test_soft_labels_of_a_multilabel_set_need_not_sum_to_one() -> None:
    made = _distilled(soft_labels=torch.tensor([[0.9, 0.8], [0.1, 0.0]]), task=Task.multilabel(("a", "b")))
    assert made.soft_labels.sum(1).tolist() == pytest.approx([1.7, 0.1])
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        _distilled(soft_labels=torch.tensor([[1.1, 0.8], [0.1, 0.0]]), task=Task.multilabel(("a", "b")))
