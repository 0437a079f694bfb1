"""Soft-label distillation against finite differences and plain training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import TaskKind
from medistill.distill.soft_label import SoftLabel
from medistill.distill.start import noise
from medistill.distill.unrolled import Hypergradients, Learned, Training, before_softplus, hypergradients, softplus
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from medistill.training.objectives import probabilities
from tests.conftest import blobs
from tests.distill.test_dataset_distillation import Smooth, of_shape

KINDS = [TaskKind.BINARY, TaskKind.MULTILABEL]


def _setting(kind: TaskKind) -> tuple[dict[str, torch.Tensor], object]:
    torch.manual_seed(0)
    network = Smooth()
    real, targets = torch.rand(6, 1, 3, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64).repeat(3, 1)
    learned = {
        "images": torch.rand(4, 1, 3, 3, dtype=torch.float64),
        "scores": torch.randn(4, 2, dtype=torch.float64),
        "raw_rate": torch.tensor(before_softplus(0.3), dtype=torch.float64),
    }
    learned = {name: tensor.requires_grad_() for name, tensor in learned.items()}

    def outputs() -> tuple[tuple[torch.Tensor, ...], Hypergradients]:
        labels, rates = probabilities(kind, learned["scores"]), softplus(learned["raw_rate"]).expand(4)
        training = Training(
            images=learned["images"], soft_labels=labels, rates=rates, batches=[torch.arange(4)] * 4
        )
        return (learned["images"], labels, rates), hypergradients(network, training, real, targets, kind=kind)

    return learned, outputs


@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_of_images_scores_and_rate_are_finite_differences(kind: TaskKind) -> None:
    learned, outputs = _setting(kind)
    functions, found = outputs()  # type: ignore[operator]
    torch.autograd.backward(functions, (found.images, found.soft_labels, found.rates))
    for tensor in learned.values():
        assert tensor.grad is not None
        flat, gradient = tensor.data.view(-1), tensor.grad.reshape(-1)
        for position in range(0, flat.numel(), 3):
            value, losses = flat[position].item(), []
            for step in (1e-5, -1e-5):
                flat[position] = value + step
                losses.append(outputs()[1].loss.item())  # type: ignore[operator]
            flat[position] = value
            numeric = (losses[0] - losses[1]) / 2e-5
            assert abs(numeric - gradient[position].item()) < 1e-8 + 1e-5 * abs(numeric)


def test_adam_takes_the_step_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    images, scores = torch.rand(2, 1, 2, 2, generator=generator), torch.randn(2, 2, generator=generator)
    learned = Learned({"images": images, "scores": scores}, step_sizes={"images": 0.05, "scores": 0.1}, clip=0.5)
    ours = torch.optim.Adam([{"params": [p := scores.clone().requires_grad_()], "lr": 0.1}], betas=(0.5, 0.999))
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    for _ in range(3):
        learned.descend((learned["images"], learned["scores"]), (torch.ones_like(images), gradient))
        p.grad = 0.5 * gradient / 5.0
        ours.step()
    assert torch.allclose(learned["scores"], p, atol=1e-6)
    assert float(learned["images"].detach().min()) >= 0.0
    learned.halve()
    assert learned.state(3, generator)["halvings"] == 1


def test_it_learns_images_labels_and_rate() -> None:
    data = blobs(patients=20)
    distiller = SoftLabel(iterations=8, unroll=4, batch_per_class=8, width=8)
    result = distiller.distill(OpenCurator(data), ipc=1, seed=0, start=None, bench=Workbench())
    assert result.schedule is not None
    assert abs(result.schedule.learning_rate - distiller.inner_rate) > 1e-3
    assert result.schedule.epochs == 4
    initial = torch.tensor([[0.98, 0.02], [0.02, 0.98]])
    assert (result.soft_labels - initial).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param((3, 16, 16), TaskKind.BINARY, id="colour"),
        pytest.param((1, 16, 16, 16), TaskKind.BINARY, id="volumes"),
        pytest.param((1, 16, 16), TaskKind.MULTILABEL, id="multilabel"),
    ],
)
def test_it_works_for(shape: tuple[int, ...], kind: TaskKind) -> None:
    distiller = SoftLabel(iterations=3, unroll=2, batch_per_class=4, width=8)
    made = distiller.distill(OpenCurator(of_shape(shape, kind)), ipc=1, seed=0, start=None, bench=Workbench())
    assert made.images.shape == (2, *shape)
    sums = made.soft_labels.sum(1)
    assert torch.allclose(sums, torch.ones(2), atol=1e-5) == (kind is not TaskKind.MULTILABEL)
    assert ((made.soft_labels > 0) & (made.soft_labels < 1)).all()


@pytest.mark.parametrize("change", [{"inner_rate": 0.0}, {"checkpoint_every": 0}, {"clip": 0.0}, {"init": "copy"}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        SoftLabel(**change)


def test_an_earlier_result_is_taken_up_with_its_labels() -> None:
    start = Synthetic(
        images=noise((2, 1, 16, 16), seed=1),
        soft_labels=torch.tensor([[0.7, 0.3], [0.4, 0.6]]),
        hard_labels=torch.tensor([0, 1]),
    )
    distiller = SoftLabel(iterations=1, unroll=1, batch_per_class=4, width=8, label_rate=1e-6, image_rate=1e-6)
    made = distiller.distill(OpenCurator(blobs(patients=8)), ipc=1, seed=0, start=start, bench=Workbench())
    torch.testing.assert_close(made.soft_labels, start.soft_labels, atol=0.02, rtol=0)
    torch.testing.assert_close(made.images, start.images, atol=1e-4, rtol=0)


def test_a_training_that_diverges_is_named_with_a_remedy() -> None:
    distiller = SoftLabel(iterations=2, unroll=3, batch_per_class=4, width=8, inner_rate=1e25)
    with pytest.raises(DataError, match="soft_label diverged at step 0"):
        distiller.distill(OpenCurator(blobs(patients=8)), ipc=1, seed=0, start=None, bench=Workbench())
