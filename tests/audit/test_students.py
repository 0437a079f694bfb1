"""Students by ridge regression: closed form against scikit-learn, likelihoods against plain sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from medistill.audit.students import (
    RandomNetworks,
    RidgeStudents,
    halves,
    log_likelihoods,
    log_odds,
)
from medistill.core.compute import Compute
from medistill.core.task import TaskKind
from medistill.errors import ConfigError, DataError
from medistill.training.objectives import probabilities

SMALL = RandomNetworks(networks=2, width=4)
KINDS = (TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.MULTILABEL)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def true_labels(kind: TaskKind, n: int) -> Tensor:
    if kind is TaskKind.MULTILABEL:
        return (normal(n, 3, seed=8) > 0).float()
    k = 2 if kind is TaskKind.BINARY else 3
    return torch.nn.functional.one_hot(torch.arange(n) % k, k).float()


@pytest.mark.parametrize(("n", "d"), [(12, 30), (30, 12), (20, 20), (1, 5)])
def test_every_student_is_the_ridge_regression_of_scikit_learn(n: int, d: int) -> None:
    features, targets, unseen = normal(3, n, d), normal(4, n, 2, seed=1), normal(3, 7, d, seed=2)
    found = RidgeStudents.fit(features, targets, ridge=0.05).predict(unseen)
    assert found.shape == (3, 4, 7, 2)
    for network in range(3):
        rows = features[network].double().numpy()
        trace = ((rows - rows.mean(0)) ** 2).sum()
        for labels in range(4):
            oracle = Ridge(alpha=max(0.05 * trace / n, 1e-12), solver="svd")
            expected = oracle.fit(rows, targets[labels].double().numpy()).predict(unseen[network].double().numpy())
            np.testing.assert_allclose(found[network, labels].numpy(), expected, rtol=1e-7, atol=1e-9)


def test_several_sets_of_labels_are_solved_as_one_at_a_time() -> None:
    features, targets = normal(2, 9, 14), normal(3, 9, 2, seed=1)
    together = RidgeStudents.fit(features, targets, ridge=0.1).predict(features)
    for number in range(3):
        alone = RidgeStudents.fit(features, targets[number], ridge=0.1).predict(features)
        torch.testing.assert_close(together[:, number : number + 1], alone, rtol=1e-12, atol=1e-12)


def test_a_small_ridge_interpolates() -> None:
    features, targets = normal(1, 8, 40), normal(8, 2, seed=1)
    fitted = RidgeStudents.fit(features, targets, ridge=1e-9).predict(features)[0, 0]
    torch.testing.assert_close(fitted, targets.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [torch.zeros(0, 2), torch.zeros(4, 2)])
def test_nothing_to_learn_from_and_unequal_numbers_are_refused(targets: Tensor) -> None:
    with pytest.raises(DataError, match="as many targets as images"):
        RidgeStudents.fit(torch.zeros(2, 0 if not len(targets) else 5, 3), targets, ridge=0.1)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="ridge > 0"):
        RidgeStudents.fit(torch.zeros(1, 2, 3), torch.zeros(2, 2), ridge=0.0)
    with pytest.raises(ConfigError, match="networks and width >= 1"):
        RandomNetworks(networks=0)
    with pytest.raises(ConfigError, match=">= 4"):
        RandomNetworks(side=2)


@pytest.mark.parametrize("kind", KINDS)
def test_log_odds_are_the_inverse_of_probabilities(kind: TaskKind) -> None:
    labels = probabilities(kind, normal(6, 3).double())
    torch.testing.assert_close(probabilities(kind, log_odds(labels, kind, floor=1e-9)), labels)
    assert bool(torch.isfinite(log_odds(true_labels(kind, 6), kind, floor=0.01)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_the_true_label(kind: TaskKind) -> None:
    targets = true_labels(kind, 6)
    logits = normal(2, *targets.shape, seed=3).double()
    likely = log_likelihoods(logits, targets, kind)
    single = kind is not TaskKind.MULTILABEL
    assert likely.shape == (2, 6, 1 if single else 3)
    for network in range(2):
        for image in range(6):
            sure = probabilities(kind, logits[network])[image]
            truth = targets[image].bool()
            of_truth = sure[truth] if single else torch.where(truth, sure, 1 - sure)
            torch.testing.assert_close(likely[network, image], of_truth.log())


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (1, 40, 40), (1, 12, 12, 12), (1, 20, 20, 20)])
def test_features_of_an_image_do_not_depend_on_the_others(shape: tuple[int, ...]) -> None:
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    features = SMALL.draw(shape, seed=4, compute=Compute())
    together, again = features(images), SMALL.draw(shape, seed=4, compute=Compute())(images)
    assert together.shape[:2] == (2, 5)
    assert torch.equal(together, again)
    alone = torch.cat([features(one[None]) for one in images], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    other = SMALL.draw(shape, seed=5, compute=Compute())(images)
    assert not torch.allclose(together, other)
    assert not torch.allclose(together[0], together[1])


def test_larger_images_are_averaged_first() -> None:
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(images, 2)
    of_large = SMALL.draw((1, 64, 64), seed=1, compute=Compute())(images)
    of_small = SMALL.draw((1, 32, 32), seed=1, compute=Compute())(small)
    torch.testing.assert_close(of_large, of_small)


def test_halves_cut_between_patients() -> None:
    patients = tuple("aabbbcddeffg")
    for first, second in halves(patients, splits=3, seed=2):
        assert bool((first ^ second).all())
        one = {p for p, inside in zip(patients, first.tolist(), strict=True) if inside}
        other = {p for p, inside in zip(patients, second.tolist(), strict=True) if inside}
        assert not one & other
        assert (len(one), len(other)) == (3, 4)
    drawn = [tuple(first.tolist()) for first, _ in halves(patients, splits=8, seed=2)]
    assert len(set(drawn)) > 1
