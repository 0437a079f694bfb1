"""Distribution matching and kernel ridge against naive versions and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from medistill.core.compute import Compute, fresh
from medistill.distill.distribution_matching import DistributionMatching, class_means, matching_loss
from medistill.distill.kernel_ridge import ridge_prediction
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from tests.conftest import blobs


def test_ridge_prediction_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(12, 30, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    queries = torch.randn(7, 30, dtype=torch.float64)
    found = ridge_prediction(features, labels, queries, ridge=0.05)
    penalty = 0.05 * features.square().sum(1).mean().item()
    model = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(found, torch.from_numpy(model.predict(queries.numpy())))


def test_ridge_gradient_is_finite_differences() -> None:
    torch.manual_seed(1)
    features = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    labels, queries = torch.randn(5, 2, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    fixed = features.detach()

    def loss(x: torch.Tensor) -> torch.Tensor:
        gram = x @ x.T
        penalty = 0.1 * (fixed @ fixed.T).diagonal().mean()  # the penalty is a constant of the step
        weights = torch.linalg.solve(gram + penalty * torch.eye(5, dtype=torch.float64), labels)
        return (queries @ x.T @ weights).square().sum()

    ridge_prediction(features, labels, queries, ridge=0.1).square().sum().backward()
    for position in range(0, 40, 7):
        step = torch.zeros(40, dtype=torch.float64)
        step[position] = 1e-6
        step = step.view(5, 8)
        numeric = (loss(fixed + step) - loss(fixed - step)) / 2e-6
        assert features.grad is not None
        assert features.grad.view(-1)[position].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-7)


def test_class_means_weigh_patients_equally() -> None:
    many = blobs(patients=6, per_patient=1)
    network = fresh(ConvNet, many.task, (1, 16, 16), 0)
    assert isinstance(network, ConvNet)
    repeated = many.select([0] * 20 + list(range(1, len(many))))  # one patient with twenty equal images
    torch.testing.assert_close(
        class_means(OpenCurator(repeated), network, Compute()),
        class_means(OpenCurator(many), network, Compute()),
        rtol=1e-4,
        atol=1e-5,
    )


def test_class_means_are_the_naive_means() -> None:
    data = blobs(patients=6, per_patient=2)
    network = fresh(ConvNet, data.task, (1, 16, 16), 0)
    assert isinstance(network, ConvNet)
    with torch.no_grad():
        features = network.features(data.images)
    expected = torch.stack([features[data.classes == c].mean(0) for c in range(2)])
    torch.testing.assert_close(class_means(OpenCurator(data), network, Compute()), expected, rtol=1e-4, atol=1e-5)


def test_matching_loss_is_the_naive_sum() -> None:
    features, means = torch.randn(6, 5), torch.randn(2, 5)
    naive = sum(
        sum((features[3 * c : 3 * c + 3, j].mean() - means[c, j]) ** 2 for j in range(5)) for c in range(2)
    )
    torch.testing.assert_close(matching_loss(features, means), naive / 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError):
        DistributionMatching(init="mean")
    with pytest.raises(ConfigError):
        DistributionMatching(networks=0)
