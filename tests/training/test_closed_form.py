"""A head that is solved, against scikit-learn's ridge regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.task import Task, TaskKind
from medistill.networks.ridge_convnet import RidgeConvNet
from medistill.training.closed_form import SHARPNESS, SolvedHead, solve_head
from medistill.training.fit import fit, predict
from medistill.training.views import picture_labels, pictures, tile_boxes

TASK = Task.single_label(("normal", "benign", "malignant"))
FINDINGS = Task.multilabel(("effusion", "mass", "nodule"))
SCHEDULE = Schedule(epochs=1, learning_rate=0.1)


class _Flat(nn.Module):
    def __init__(self, count: int, ridge: float) -> None:
        super().__init__()
        self.ridge = ridge
        self.head = nn.Linear(count, 3)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def _random(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


def _by_sklearn(features: Tensor, labels: Tensor, ridge: float) -> Ridge:
    spread = (features - features.mean(0)).double().square().sum(1).mean().item()
    return Ridge(alpha=ridge * spread).fit(features.double().numpy(), labels.double().numpy())


@pytest.mark.parametrize("count", [5, 12, 13, 200])
@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_the_head_is_that_of_scikit_learn(count: int, kind: TaskKind) -> None:
    """Fewer images than the 12 features, as many, and more."""
    images, labels, others = _random(count, 3, 4), _random(count, 3, seed=1), _random(7, 3, 4, seed=2)
    network = _Flat(12, ridge=0.05)
    batches = list(zip(torch.split(images, 4), torch.split(labels, 4), strict=True))
    solve_head(network, batches, images=count, kind=kind)
    expected = _by_sklearn(images.flatten(1), labels, 0.05).predict(others.flatten(1).double().numpy())
    sharp, middle = (2 * SHARPNESS, 0.5) if kind is TaskKind.MULTILABEL else (SHARPNESS, 0.0)
    with torch.no_grad():
        found = network.head(network.features(others)).numpy()
    np.testing.assert_allclose(found, sharp * (expected - middle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 30])
def test_images_that_are_all_the_same_give_their_mean_label(count: int) -> None:
    images, labels = torch.full((count, 3, 4), 0.5), _random(count, 3)
    network = _Flat(12, ridge=1e-2)
    solve_head(network, [(images, labels)], images=count, kind=TaskKind.MULTICLASS)
    with torch.no_grad():
        found = network.head(network.features(images[:1]))
    torch.testing.assert_close(found, SHARPNESS * labels.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_fit_solves_on_tiles_and_changes_nothing_else() -> None:
    images = _random(6, 1, 32, 32)
    boxes = tile_boxes(2, 2)
    labels = torch.softmax(4 * _random(4 * 6, 3, seed=1), 1).reshape(4, 6, 3)
    views = ViewLabels(boxes=boxes[:, None].repeat(1, 6, 1), soft_labels=labels, temperature=1.0)
    network = fresh(RidgeConvNet, TASK, (1, 32, 32), 3)
    assert isinstance(network, RidgeConvNet)
    assert isinstance(network, SolvedHead)
    before = {name: value.clone() for name, value in network.members.state_dict().items()}
    fit(network, images, labels.mean(0), kind=TASK.kind, schedule=SCHEDULE, seed=0, views=views)
    assert all(torch.equal(before[name], value) for name, value in network.members.state_dict().items())
    with torch.no_grad():
        seen = network.features(pictures(images, views))
        others = _random(5, 1, 32, 32, seed=8)
        asked = network.features(others)
    expected = _by_sklearn(seen, picture_labels(labels.mean(0), views), network.ridge).predict(asked.numpy())
    found = predict(network, others, kind=TASK.kind)
    np.testing.assert_allclose(found, torch.from_numpy(SHARPNESS * expected).softmax(1), rtol=1e-3, atol=1e-4)


def test_neither_schedule_nor_seed_matters_and_the_weights_do() -> None:
    images, labels = _random(9, 1, 28, 28), torch.eye(3).repeat(3, 1)

    def answers(weights: int, seed: int, epochs: int) -> Tensor:
        network = fresh(RidgeConvNet, FINDINGS, (1, 28, 28), weights)
        schedule = Schedule(epochs=epochs, learning_rate=0.1)
        fit(network, images, labels, kind=FINDINGS.kind, schedule=schedule, seed=seed, compute=Compute())
        return predict(network, _random(4, 1, 28, 28, seed=5), kind=FINDINGS.kind)

    assert torch.equal(answers(0, 0, 1), answers(0, 7, 50))
    assert not torch.equal(answers(0, 0, 1), answers(1, 0, 1))
