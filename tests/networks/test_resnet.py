"""The residual network against that of torchvision, and its shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import fresh
from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.resnet import ResNet
from medistill.registry import NETWORKS

TASK = Task.single_label(("a", "b", "c"))


def test_with_published_settings_it_is_the_resnet_18_of_torchvision() -> None:
    from torchvision.models import resnet18

    ours = ResNet(TASK, (3, 64, 64), width=64, depth=18, norm="batch").eval()
    theirs = resnet18(num_classes=3).eval()
    # The same layers in the order in which they are used; a shortcut's follow those of its block.
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    pairs = [[m for m in network.modules() if isinstance(m, kinds)] for network in (ours, theirs)]
    assert len(pairs[0]) == len(pairs[1])
    for mine, other in zip(*pairs, strict=True):
        mine.load_state_dict(other.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs((images - 0.5) / 0.25), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (1, 16, 16, 16)])
def test_shapes(norm: str, shape: tuple[int, ...]) -> None:
    network = ResNet(TASK, shape, width=8, norm=norm)
    images = torch.rand(2, *shape)
    assert network(images).shape == (2, 3)
    assert network.features(images).shape == (2, network.feature_count)
    torch.testing.assert_close(network(images), network.head(network.features(images)))


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_only_batch_normalisation_mixes_images(norm: str) -> None:
    def gradient(norm: str) -> Tensor:
        network = fresh(lambda task, shape: ResNet(task, shape, width=8, norm=norm), TASK, (1, 32, 32), 0)
        images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        network(images)[0].sum().backward()
        assert images.grad is not None
        return images.grad[1:].abs().max()

    assert float(gradient(norm)) == 0
    assert float(gradient("batch")) > 0


def test_small_images_keep_their_resolution_in_the_stem() -> None:
    assert ResNet(TASK, (1, 28, 28)).stem(torch.zeros(1, 1, 28, 28)).shape[2:] == (28, 28)
    assert ResNet(TASK, (1, 64, 64)).stem(torch.zeros(1, 1, 64, 64)).shape[2:] == (16, 16)


def test_registered_and_strict() -> None:
    assert NETWORKS.load("resnet") is ResNet
    published = NETWORKS.load("resnet18")(TASK, (1, 64, 64))
    assert (published.feature_count, len(list(published.stages))) == (512, 8)
    with pytest.raises(ConfigError, match="depth 10 or 18"):
        ResNet(TASK, (1, 28, 28), depth=12)
    with pytest.raises(ConfigError, match="norm"):
        ResNet(TASK, (1, 28, 28), norm="layer")
    with pytest.raises(ConfigError, match="8 px"):
        ResNet(TASK, (1, 6, 6))
