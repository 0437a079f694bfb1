"""Crops: drawn in range, taken exactly, and what a student on views sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import fresh
from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.task import Task, TaskKind
from medistill.errors import DataError
from medistill.networks.convnet import ConvNet
from medistill.training import fit as fitting
from medistill.training.fit import fit
from medistill.training.students import Student, train_student
from medistill.training.views import crop, random_boxes

TASK = Task.single_label(("a", "b"))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_boxes_are_in_the_image_and_not_too_small(axes: int, smallest: float) -> None:
    boxes = random_boxes(3000, axes, torch.Generator().manual_seed(0), smallest=smallest)
    low, high = boxes[:, :axes], boxes[:, axes:]
    assert float(low.min()) >= 0
    assert float(high.max()) <= 1
    share = (high - low).prod(1)
    assert float(share.min()) >= smallest * 0.75  # what sticks out is cut off
    if smallest < 1:
        assert abs(float(share.mean()) - (1 + smallest) / 2) < 0.05


def test_a_crop_is_that_part_of_the_image() -> None:
    image = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(crop(image, torch.tensor([[0.0, 0.0, 1.0, 1.0]])), image)
    found = crop(image, torch.tensor([[0.5, 0.0, 1.0, 0.5]]))  # the lower left quarter
    expected = nn.functional.interpolate(image[:, :, 3:, :5], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 3:-1, 1:-3])


def test_a_crop_of_a_volume_keeps_the_order_of_its_axes() -> None:
    ramps = torch.stack(torch.meshgrid(*(torch.arange(8.0),) * 3, indexing="ij"))[None]
    found = crop(ramps, torch.tensor([[0.5, 0.25, 0.0, 1.0, 0.75, 0.5]]))[0]
    for axis, (low, high) in enumerate([(4, 8), (2, 6), (0, 4)]):
        values = found[axis].movedim(axis, 0).flatten(1).mean(1).numpy()
        inner = low - 0.5 + (np.arange(8) + 0.5) * (high - low) / 8
        np.testing.assert_allclose(values[1:-1], inner[1:-1], atol=1e-4)


def _views(count: int, images: int = 4) -> ViewLabels:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.stack([random_boxes(images, 2, generator, smallest=0.2) for _ in range(count)])
    labels = torch.rand(count, images, 2, generator=generator).softmax(2)
    return ViewLabels(boxes=boxes, soft_labels=labels, temperature=3.0)


class _Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 2)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_student_sees_exactly_the_crops_and_their_labels(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, views, targets = torch.rand(4, 1, 8, 8), _views(2), []

    def objective(kind: TaskKind, logits: Tensor, labels: Tensor) -> Tensor:
        targets.append(labels)
        return logits.square().sum()

    monkeypatch.setattr(fitting, "objective", objective)
    network = _Recorder()
    schedule = Schedule(epochs=5, learning_rate=1e-3, batch_size=batch_size, augment=False)
    never = torch.full((4, 2), float("nan"))  # the images' own labels are not looked at
    fit(network, images, never, kind=TASK.kind, schedule=schedule, seed=0, views=views)
    seen, shown = iter(network.seen), iter(targets)

    def epoch(parts: Iterator[Tensor]) -> Tensor:
        return torch.cat([next(parts) for _ in range(2 if batch_size else 1)])

    for number in range(5):
        expected, labels = crop(images, views.boxes[number % 2]), views.soft_labels[number % 2]
        found, given = epoch(seen), epoch(shown)
        order = [int((found[i] - expected).abs().flatten(1).sum(1).argmin()) for i in range(4)]
        assert sorted(order) == [0, 1, 2, 3]
        torch.testing.assert_close(found, expected[order])
        torch.testing.assert_close(given, labels[order])
    assert next(seen, None) is None


def test_the_loss_is_taken_at_the_temperature() -> None:
    images, views = torch.rand(4, 1, 8, 8), _views(1)
    network = _Recorder()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    logits = network(crop(images, views.boxes[0])) / 3.0
    loss = 9.0 * -(views.soft_labels[0] * logits.log_softmax(1)).sum(1).mean()
    gradient = torch.autograd.grad(loss, network.layer.weight)[0]
    schedule = Schedule(epochs=1, learning_rate=0.1, momentum=0.0, decay="constant", augment=False)
    fit(network, images, views.soft_labels[0], kind=TASK.kind, schedule=schedule, seed=0, views=views)
    torch.testing.assert_close(network.layer.weight.detach(), before["layer.weight"] - 0.1 * gradient)


def test_without_views_nothing_changes_and_with_them_students_differ() -> None:
    images, labels = torch.rand(4, 1, 16, 16), torch.eye(2).repeat(2, 1)
    schedule = Schedule(epochs=2, learning_rate=0.01)

    def student(views: ViewLabels | None) -> Any:
        work = Student(
            network=ConvNet,
            task=TASK,
            images=images.numpy(),
            soft_labels=labels.numpy(),
            schedule=schedule,
            weights_seed=0,
            order_seed=1,
            apply_to={"same": images.numpy()},
            views=views,
        )
        return train_student(work).probabilities["same"]

    network = fresh(ConvNet, TASK, (1, 16, 16), 0)
    fit(network, images, labels, kind=TASK.kind, schedule=schedule, seed=1)
    np.testing.assert_allclose(student(None), network(images).detach().softmax(1).numpy(), atol=1e-6)
    assert not np.allclose(student(None), student(_views(2)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": torch.rand(2, 4, 3)}, "boxes of views"),
        ({"boxes": torch.tensor([0.5, 0.5, 0.4, 1.0]).expand(2, 4, 4)}, "not empty"),
        ({"boxes": torch.tensor([0.5, 0.5, 1.4, 1.0]).expand(2, 4, 4)}, r"\[0, 1\]"),
        ({"soft_labels": torch.rand(2, 3, 2)}, "soft_labels of views"),
        ({"soft_labels": torch.full((2, 4, 2), float("nan"))}, r"\[0, 1\]"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_views_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(_views(2), **wrong)
