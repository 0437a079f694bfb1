"""What every registered network must do; a new one is picked up from the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from medistill.core.compute import fresh
from medistill.core.distilled import Schedule
from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.registry import NETWORKS
from medistill.training.fit import fit, predict
from tests.conftest import blobs

TASK = Task.single_label(("normal", "benign", "malignant"))
NAMES = NETWORKS.names()
VOLUMES = ("convnet", "densenet121", "lenet", "mlp", "resnet", "resnet18", "ridge_convnet", "vit")
SHAPES = [(1, 28, 28), (3, 28, 28), (1, 64, 64), (3, 64, 64), (1, 30, 45)]
#: Large bodies are slow to train and have nothing of their own beyond the adapter.
LARGE = ("densenet121", "efficientnet", "mobilenet", "resnet18")


def _names(*late: str) -> list[Any]:
    """All networks; some of them only in the long run."""
    return [pytest.param(name, marks=pytest.mark.long) if name in late else name for name in NAMES]


#: MONAI takes ten seconds to import, and large bodies are slow in every pass.
EVERY, THOROUGH = _names("densenet121", "resnet18"), _names(*LARGE)


def _made(name: str, shape: tuple[int, ...] = (1, 28, 28), seed: int = 0) -> Any:
    return fresh(NETWORKS.load(name), TASK, shape, seed)


def _images(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY)
def test_logits_and_features_of_every_shape(name: str) -> None:
    for shape in SHAPES[::3] if name in LARGE else SHAPES:
        network = _made(name, shape).eval()
        images = _images(2, shape)
        with torch.no_grad():
            features, logits = network.features(images), network(images)
        assert logits.shape == (2, 3)
        assert features.ndim == 2
        assert features.shape == (2, network.feature_count)
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", EVERY)
def test_volumes_where_they_are_natural(name: str) -> None:
    shape = (1, 16, 16, 16)
    if name in VOLUMES:
        with torch.no_grad():
            assert _made(name, shape).eval()(_images(1, shape)).shape == (1, 3)
    else:
        with pytest.raises(ConfigError, match=r"For volumes take convnet"):
            _made(name, shape)


@pytest.mark.parametrize("name", THOROUGH)
def test_an_image_is_judged_alone(name: str) -> None:
    """In training as in evaluation: nothing of an image depends on those beside it."""
    network = _made(name)
    assert not [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    together = _images(3, (1, 28, 28))
    with torch.no_grad():
        for mode in (True, False):
            network.train(mode)
            apart = torch.cat([network(image[None]) for image in together])
            torch.testing.assert_close(network(together), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", THOROUGH)
def test_same_seed_same_weights_and_no_chance_in_passing(name: str) -> None:
    images = _images(2, (1, 28, 28))
    first, second, other = (_made(name, seed=seed).train() for seed in (1, 1, 2))
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
        assert not torch.equal(first(images), other(images))
    assert torch.equal(torch.random.get_rng_state(), state)
    _made(name, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", THOROUGH)
def test_every_weight_and_the_pixels_get_a_finite_gradient(name: str) -> None:
    network, images = _made(name), _images(2, (1, 28, 28)).requires_grad_()
    network(images).square().sum().backward()
    gradients = {key: value.grad for key, value in network.named_parameters()}
    assert not [key for key, value in gradients.items() if value is None or not torch.isfinite(value).all()]
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_can_be_differentiated_twice(name: str) -> None:
    """Matching gradients needs it."""
    network, images = _made(name), _images(1, (1, 28, 28)).requires_grad_()
    loss = network(images).logsumexp(1).sum()
    grads = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in grads), images)
    assert torch.isfinite(second).all()
    assert float(second.abs().max()) > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_learns_by_fit(name: str) -> None:
    _assert_learns(name, epochs=25)


@pytest.mark.long
@pytest.mark.parametrize("name", LARGE)
def test_large_ones_learn_by_fit(name: str) -> None:
    _assert_learns(name, epochs=25)


def _assert_learns(name: str, *, epochs: int) -> None:
    train = blobs(patients=16, per_patient=1, size=28)
    test = blobs(patients=30, per_patient=1, size=28, seed=9, first=100)
    network = fresh(NETWORKS.load(name), train.task, (1, 28, 28), 0)
    schedule = Schedule(epochs=epochs, learning_rate=1e-3, optimizer="adam", augment=False)
    fit(network, train.images, train.targets, kind=train.task.kind, schedule=schedule, seed=0)
    scores = predict(network, test.images, kind=test.task.kind)[:, 1]
    assert roc_auc_score(test.classes, scores) > 0.9


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("convnet", "resnet")])
@pytest.mark.parametrize("shape", [(28, 28), (1, 4), (1, 1, 28, 28, 28), (0, 28, 28)])
def test_what_is_no_image_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected images of shape"):
        _made(name, shape)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("lenet", (1, 8, 8), {}, "lenet: expected sides of at least 12 px, got 8"),
        ("alexnet", (1, 28, 4), {}, "alexnet: expected sides of at least 8 px, got 4"),
        ("alexnet", (1, 28, 28), {"norm": "layer"}, "norm to be one of instance, group, batch, none"),
        ("ridge_convnet", (1, 28, 28), {"members": 0}, "members >= 1 and ridge > 0, got 0"),
        ("ridge_convnet", (1, 28, 28), {"ridge": 0.0}, "got 4 and 0.0"),
        ("vit", (1, 28, 28), {"width": 90}, "expected a width"),
        ("vit", (1, 28, 28), {"stem": "conv"}, "stem 'convolution' or 'patch', got 'conv'"),
        ("mlp", (1, 28, 28), {"depth": 0}, "depth >= 1"),
        ("mobilenet", (2, 28, 28), {}, "1 or 3 channels"),
        pytest.param(
            "densenet121", (1, 28, 28), {"norm": "none"}, "norm 'group' or 'batch'", marks=pytest.mark.long
        ),
    ],
)
def test_wrong_settings_say_what_was_expected(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NETWORKS.load(name)(TASK, shape, **settings)
