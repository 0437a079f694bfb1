"""Soft-label distillation against finite differences and a naive loop."""

from __future__ import annotations

import torch
from torch import nn

from medistill.core.compute import Compute
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import TaskKind
from medistill.distill.batches import balanced_batch
from medistill.distill.soft_label import SoftLabel, _Learned, unrolled_loss
from medistill.privacy.curator import OpenCurator
from tests.conftest import blobs


class _Smooth(nn.Module):
    """Twice differentiable everywhere, so that finite differences converge."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.layer(images.flatten(1))))
        return logits


def _setting() -> tuple[nn.Module, _Learned, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    start = Synthetic(
        images=torch.rand(4, 1, 3, 3, dtype=torch.float64),
        soft_labels=torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0),
        hard_labels=torch.tensor([0, 0, 1, 1]),
    )
    learned = _Learned(start, SoftLabel(inner_rate=0.3), Compute())
    learned.raw_rate = learned.raw_rate.detach().double().requires_grad_()
    real, targets = torch.rand(6, 1, 3, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64).repeat(3, 1)
    return _Smooth(), learned, real, targets


def test_hypergradients_are_finite_differences() -> None:
    network, learned, real, targets = _setting()

    def loss() -> torch.Tensor:
        return unrolled_loss(network, learned, real, targets, kind=TaskKind.BINARY, unroll=4)

    loss().backward()
    for tensor in (learned.images, learned.scores, learned.raw_rate):
        assert tensor.grad is not None
        flat, gradient = tensor.data.view(-1), tensor.grad.reshape(-1)
        for position in range(0, flat.numel(), 5):
            value = flat[position].item()
            flat[position] = value + 1e-5
            above = loss().item()
            flat[position] = value - 1e-5
            below = loss().item()
            flat[position] = value
            numeric = (above - below) / 2e-5
            assert abs(numeric - gradient[position].item()) < 1e-7 + 1e-5 * abs(numeric)


def test_unrolled_training_is_gradient_descent() -> None:
    network, learned, real, targets = _setting()
    found = unrolled_loss(network, learned, real, targets, kind=TaskKind.BINARY, unroll=5).item()
    optimizer = torch.optim.SGD(network.parameters(), lr=learned.rate.item())
    for _ in range(5):
        optimizer.zero_grad()
        log_probabilities = network(learned.images.detach()).log_softmax(1)
        (-(learned.soft_labels.detach() * log_probabilities).sum(1).mean()).backward()
        optimizer.step()
    expected = -(targets * network(real).log_softmax(1)).sum(1).mean().item()
    assert abs(found - expected) < 1e-10


def test_batches_hold_every_class_equally() -> None:
    data = blobs(patients=9, classes=3)
    _, targets = balanced_batch(data, 5, torch.Generator().manual_seed(0))
    assert targets.sum(0).tolist() == [5, 5, 5]


def test_it_learns_images_labels_and_rate() -> None:
    data = blobs(patients=20)
    distiller = SoftLabel(iterations=12, unroll=4, batch_per_class=8, width=8)
    result = distiller.distill(OpenCurator(data), ipc=1, seed=0, start=None, bench=Workbench())
    assert result.schedule is not None
    assert abs(result.schedule.learning_rate - distiller.inner_rate) > 1e-3
    assert result.schedule.epochs == 4
    initial = torch.tensor([[2.0, -2.0], [-2.0, 2.0]]).softmax(1)
    assert (result.soft_labels - initial).abs().max() > 1e-3
