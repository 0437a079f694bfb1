"""Temperature, calibration error and outliers against closed forms and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.covariance import shrunk_covariance
from sklearn.metrics import log_loss

from medistill.core.task import Task, TaskKind
from medistill.diagnose import DiagnosticModel
from medistill.diagnose.calibration import Calibration, best_temperature, stated_calibration
from medistill.diagnose.outliers import SHRINKAGE, fit_outliers
from medistill.errors import DataError
from medistill.release.verify import Release
from medistill.training.augment import augment
from tests.diagnose.conftest import noise, softmax

TWO = Task.single_label(("no", "yes"))


def test_the_temperature_is_that_of_an_independent_search() -> None:
    draw = np.random.default_rng(0)
    true = draw.normal(0, 1.5, (2000, 3))
    labels = np.array([draw.choice(3, p=row) for row in softmax(true)])
    logits = 2.5 * true
    found = best_temperature(TaskKind.MULTICLASS, torch.tensor(logits)[None], torch.eye(3)[labels])
    oracle = minimize_scalar(lambda t: log_loss(labels, softmax(logits / t)), bounds=(0.1, 10), method="bounded")
    assert found == pytest.approx(oracle.x, rel=1e-3)
    assert found == pytest.approx(2.5, rel=0.1)


def test_the_temperature_of_an_ensemble_and_of_several_findings() -> None:
    draw = np.random.default_rng(1)
    logits, targets = draw.normal(0, 2, (3, 400, 2)), draw.uniform(0, 1, (400, 2))

    def loss(t: float) -> float:
        p = (1 / (1 + np.exp(-logits / t))).mean(0)
        return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum())

    found = best_temperature(TaskKind.MULTILABEL, torch.tensor(logits), torch.tensor(targets))
    oracle = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6})
    assert loss(found) == pytest.approx(oracle.fun, rel=1e-6)


def test_what_the_data_owner_found_comes_first() -> None:
    card = {"calibration": {"convnet": {"temperature": 1.7, "thresholds": [0.3]}}}
    assert stated_calibration(card, "convnet", TWO) == Calibration(
        temperature=1.7, source="release", thresholds=(0.3,), decided_by="release"
    )
    assert stated_calibration(card, "resnet", TWO) is None
    assert stated_calibration({}, "convnet", TWO) is None


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 0, "thresholds": [0.3]},
        {"temperature": 1.0, "thresholds": [1.3]},
        {"temperature": 1.0, "thresholds": []},
        {"temperature": "hot", "thresholds": [0.3]},
        {"temperature": 1.0},
        "warm",
    ],
)
def test_an_odd_calibration_is_refused(odd: object) -> None:
    with pytest.raises(DataError):
        stated_calibration({"calibration": {"convnet": odd}}, "convnet", TWO)


def test_distances_are_those_of_a_shrunk_covariance(model: DiagnosticModel, release: Release) -> None:
    pictures = release.distilled.images
    fitted = fit_outliers(pictures, model.task, seed=9)
    generator, network = torch.Generator().manual_seed(9), fitted.network
    with torch.no_grad():
        rounds = -(-2000 // len(pictures))
        augmented = torch.cat([augment(pictures, generator).clamp(0, 1) for _ in range(rounds)])
        seen = network.features(augmented).double().numpy()
        images = torch.cat([noise(5, model.preprocessing.image_shape), pictures[:5]])
        away = network.features(images).double().numpy() - seen.mean(0)
        found = fitted.distances(images).numpy() * fitted.limit
        within = float((fitted.distances(augmented) <= 1).float().mean())
    covariance = shrunk_covariance(np.cov(seen.T, bias=True), SHRINKAGE)
    oracle = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away))
    np.testing.assert_allclose(found, oracle, rtol=0.02)
    assert within == pytest.approx(0.99, abs=0.002)


def test_noise_is_flagged_and_released_images_are_not(model: DiagnosticModel, release: Release) -> None:
    assert bool((model.distances(noise(20, model.preprocessing.image_shape)) > 1).all())
    assert bool((model.distances(release.distilled.images) <= 1).all())
