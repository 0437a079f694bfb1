"""Networks, augmentation and training."""

from __future__ import annotations

import pytest
import torch

from medistill.core.compute import fresh
from medistill.core.distilled import Schedule
from medistill.core.task import Task, TaskKind
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.training.augment import augment
from medistill.training.fit import fit, predict
from medistill.training.objectives import objective
from tests.conftest import blobs

TASK = Task.single_label(("a", "b"))


@pytest.mark.parametrize(("size", "depth"), [(28, 3), (32, 3), (64, 4), (128, 5), (224, 6)])
def test_depth_follows_the_image_size(size: int, depth: int) -> None:
    assert len(ConvNet(TASK, (1, size, size)).convolutions) == depth


def test_the_literature_convnet_has_its_parameters() -> None:
    count = sum(p.numel() for p in ConvNet(TASK, (1, 32, 32)).parameters())
    assert count == 20_034


def test_no_layer_mixes_images_of_a_batch() -> None:
    network = fresh(ConvNet, TASK, (1, 28, 28), 0).eval()
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.functional.jacobian(lambda x: network(x)[0].sum(), images)
    assert gradient[1:].abs().max() == 0


def test_fresh_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second = fresh(ConvNet, TASK, (1, 28, 28), 3), fresh(ConvNet, TASK, (1, 28, 28), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        ConvNet(TASK, (1, 4, 4), depth=3)


def test_soft_label_loss_is_the_cross_entropy_of_its_definition() -> None:
    logits, targets = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective(TaskKind.MULTICLASS, logits, targets), expected)


def test_augmentation_is_differentiable_shared_on_request_and_never_mirrors() -> None:
    images = torch.rand(3, 1, 16, 16, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    augment(images, generator).sum().backward()
    assert images.grad is not None
    assert bool(torch.isfinite(images.grad).all())
    twins = torch.rand(1, 1, 16, 16).repeat(2, 1, 1, 1)
    first, second = augment(twins, generator, shared=True)
    torch.testing.assert_close(first, second)
    left = torch.zeros(1, 1, 32, 32)
    left[..., :8] = 1.0
    for _ in range(50):
        changed = augment(left, generator)[0, 0]
        assert changed[:, :4].mean() > changed[:, -4:].mean()


def test_training_learns_and_repeats() -> None:
    data = blobs(patients=20)
    schedule = Schedule(epochs=15, learning_rate=1e-3, optimizer="adam", batch_size=16)

    def train() -> torch.Tensor:
        network = fresh(ConvNet, data.task, (1, 16, 16), 0)
        fit(network, data.images, data.targets, kind=data.task.kind, schedule=schedule, seed=1)
        return predict(network, data.images, kind=data.task.kind)

    first = train()
    assert (first.argmax(1) == data.classes).float().mean() > 0.9
    assert torch.equal(first, train())
