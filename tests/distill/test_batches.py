"""Real batches hold every class, and those without a finding; what is missing is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medistill.core.images import ImageSet
from medistill.core.protocols import Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.batches import balanced_batch, class_batch
from medistill.distill.labels import label_scores
from medistill.distill.runner import make_distiller
from medistill.errors import DataError
from medistill.privacy.curator import OpenCurator
from medistill.training.objectives import probabilities
from tests.conftest import blobs
from tests.contracts.test_distillers import QUICK


def _several(rows: list[list[float]]) -> ImageSet:
    data = blobs(patients=len(rows), per_patient=1)
    task = Task(kind=TaskKind.MULTILABEL, class_names=("a", "b", "c"))
    return replace(data, targets=torch.tensor(rows), task=task)


def test_batches_hold_every_class_equally() -> None:
    data = blobs(patients=9, classes=3)
    images, targets = balanced_batch(data, 5, torch.Generator().manual_seed(0))
    assert targets.argmax(1).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for image, target in zip(images, targets, strict=True):
        assert torch.equal(data.targets[_position(data, image)], target)


def _position(data: ImageSet, image: torch.Tensor) -> int:
    return int((data.images - image).abs().flatten(1).sum(1).argmin())


def test_of_several_labels_images_without_any_are_one_more_class() -> None:
    data = _several([[1, 1, 0], [0, 0, 1]] + [[0, 0, 0]] * 6)
    _, targets = balanced_batch(data, 4, torch.Generator().manual_seed(0))
    assert targets.sum(1).tolist() == [2] * 8 + [1] * 4 + [0] * 4
    images, _ = balanced_batch(data, 60, torch.Generator().manual_seed(0))
    assert {_position(data, image) for image in images[180:]} == set(range(2, 8))


def test_without_such_images_batches_hold_the_classes_only() -> None:
    data = _several([[1, 1, 0], [0, 0, 1]])
    _, targets = balanced_batch(data, 4, torch.Generator().manual_seed(0))
    assert targets.tolist() == [[1, 1, 0]] * 8 + [[0, 0, 1]] * 4


def test_unsure_labels_belong_to_their_most_probable_class() -> None:
    data = blobs(patients=6, per_patient=1, classes=3)
    unsure = replace(data, targets=0.3 + 0.1 * data.targets)
    for label in range(3):
        found = class_batch(unsure, label, 20, torch.Generator().manual_seed(0))
        assert set(found.tolist()) == {label, label + 3}


@pytest.mark.parametrize("name", [name for name in QUICK if name != "kernel_ridge"])
def test_a_class_without_images_is_named(name: str) -> None:
    data = blobs(patients=9, classes=3)
    without = data.select((data.classes != 1).nonzero().flatten())
    distiller = make_distiller(name, QUICK[name])
    with pytest.raises(DataError, match="'class1'"):
        distiller.distill(OpenCurator(without), ipc=1, seed=0, start=None, bench=Workbench())


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_scores_give_the_labels_back(kind: TaskKind) -> None:
    hard = torch.eye(3)
    expected = torch.full((3, 3), 0.05 if kind is TaskKind.MULTICLASS else 0.1).fill_diagonal_(0.9)
    found = probabilities(kind, label_scores(hard, kind, confidence=0.9))
    torch.testing.assert_close(found, expected)
    soft = torch.tensor([[0.7, 0.2, 0.1]])
    torch.testing.assert_close(probabilities(kind, label_scores(soft, kind, confidence=1 - 1e-7)), soft)
