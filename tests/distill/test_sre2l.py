"""SRe2L against hand computations: the distance of statistics, what recover sees, labels of views, resuming."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import Compute
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill import squeeze as squeezing
from medistill.distill import sre2l
from medistill.distill.norm_statistics import (
    MatchedNorm,
    average_from_now_on,
    statistics_distance,
    with_matched_norms,
)
from medistill.distill.squeeze import squeeze
from medistill.distill.sre2l import SRe2L, batches, labelled, recover, relabel, smallest_crop
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from medistill.training.views import crop, mirrored
from tests.conftest import blobs

QUICK = SRe2L(teacher="convnet", width=8, epochs=2, iterations=12, views=3, checkpoint_every=5)


class _Tiny(nn.Module):
    """Two BatchNorm layers that have seen something."""

    def __init__(self, *, axes: int = 2) -> None:
        super().__init__()
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.layers = nn.Sequential(
            convolution(1, 3, 3, dtype=torch.float64),
            norm(3, dtype=torch.float64),
            nn.Tanh(),
            convolution(3, 4, 3, dtype=torch.float64),
            norm(4, dtype=torch.float64),
        )
        self.head = nn.Linear(4, 2, dtype=torch.float64)
        with torch.no_grad():
            for layer in (self.layers[1], self.layers[4]):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                layer.weight.normal_()
                layer.bias.normal_()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images).flatten(2).mean(2))
        return logits


def _naive_distance(network: _Tiny, images: Tensor, first_weight: float) -> float:
    """The definition, with numpy, on what goes into each BatchNorm layer."""
    total = 0.0
    for number, layer, weight in ((1, network.layers[1], first_weight), (4, network.layers[4], 1.0)):
        hidden = network.layers[:number](images).detach().numpy()
        channels = np.moveaxis(hidden, 1, 0).reshape(hidden.shape[1], -1)
        gaps = (
            channels.var(axis=1) - layer.running_var.numpy(),
            channels.mean(axis=1) - layer.running_mean.numpy(),
        )
        total += weight * sum(float(np.sqrt((gap**2).sum())) for gap in gaps)
    return total


@pytest.mark.parametrize("axes", [2, 3])
def test_distance_of_statistics_is_the_definition_and_the_network_is_unchanged(axes: int) -> None:
    torch.manual_seed(axes)
    network = _Tiny(axes=axes)
    images = torch.rand(5, 1, *(7,) * axes, dtype=torch.float64)
    matched = with_matched_norms(network)
    torch.testing.assert_close(matched(images), network(images))
    found = statistics_distance(matched, first_weight=10.0).item()
    assert found == pytest.approx(_naive_distance(network, images, 10.0), rel=1e-10)
    assert not any(isinstance(module, MatchedNorm) for module in network.modules())


def test_its_gradient_is_finite_differences() -> None:
    torch.manual_seed(0)
    matched = with_matched_norms(_Tiny())

    def loss(images: Tensor) -> Tensor:
        logits = matched(images)
        return logits.square().sum() + 0.7 * statistics_distance(matched, first_weight=10.0)

    images = torch.rand(3, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (images,), eps=1e-6, atol=1e-6)


def test_gradient_is_finite_where_the_statistics_agree() -> None:
    norm = nn.BatchNorm2d(2, dtype=torch.float64)
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.running_mean = images.mean((0, 2, 3))
        norm.running_var = images.var((0, 2, 3), correction=0)
    matched = MatchedNorm(norm.eval())
    matched(images)
    matched.distance.backward()
    assert images.grad is not None
    assert bool(torch.isfinite(images.grad).all())


def test_running_statistics_become_the_average_of_later_batches() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2))
    generator = torch.Generator().manual_seed(0)
    network(torch.randn(4, 2, 3, 3, generator=generator))
    average_from_now_on(network)
    later = [torch.randn(4, 2, 3, 3, generator=generator) for _ in range(5)]
    for part in later:
        network(part)
    norm = network[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([part.mean((0, 2, 3)) for part in later]).mean(0))


def _teacher(data: ImageSet, settings: SRe2L = QUICK) -> nn.Module:
    return squeeze(OpenCurator(data), settings=settings.squeeze(), seed=0, bench=Workbench())


def _start(task: Task, ipc: int, size: int = 16) -> Synthetic:
    hard = torch.arange(task.n_classes).repeat_interleave(ipc)
    images = torch.rand(len(hard), 1, size, size, generator=torch.Generator().manual_seed(5))
    return Synthetic(images=images, soft_labels=torch.eye(task.n_classes)[hard], hard_labels=hard)


def test_only_squeeze_can_see_the_data() -> None:
    def seen(function: Any) -> str:
        return " ".join(map(str, inspect.signature(function).parameters.values()))

    assert "Curator" in seen(squeeze)
    for function in (recover, labelled, relabel, sre2l.recover_batch, sre2l.RecoverJob):
        assert "Curator" not in seen(function)
        assert "ImageSet" not in seen(function)


def test_recovered_images_are_of_their_class_and_have_the_teachers_statistics() -> None:
    data = blobs(patients=40, per_patient=1)
    settings = replace(QUICK, epochs=10, iterations=60, crop=1.0, roll=0.0)
    teacher, start = _teacher(data, settings), _start(data.task, 4)
    matched, distances = with_matched_norms(teacher), []
    for weight in (0.0, 1.0):
        images = recover(
            teacher, start, kind=data.task.kind, settings=replace(settings, bn_weight=weight), seed=1,
            bench=Workbench(),
        )  # fmt: skip
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        assert matched(images).argmax(1).tolist() == start.hard_labels.tolist()
        distances.append(statistics_distance(matched, first_weight=10.0).item())
    assert distances[1] < 0.5 * distances[0]


def test_batches_hold_every_class_and_are_alike_in_size() -> None:
    hard = torch.arange(3).repeat_interleave(11)
    parts = batches(hard, 15)
    assert sorted(torch.cat(parts).tolist()) == list(range(33))
    for part in parts:
        assert len(part) <= 15
        assert set(hard[part].tolist()) == {0, 1, 2}
    assert {len(part) for part in parts} == {12, 9}
    assert [len(part) for part in batches(hard, 1)] == [3] * 11


class _Kept:
    """A checkpoint in memory that interrupts at its ``stop``-th save."""

    def __init__(self, stop: int = 10**9) -> None:
        self._state: dict[str, Tensor] | None = None
        self._left = stop

    def load(self) -> dict[str, Tensor] | None:
        return self._state

    def save(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: value.detach().clone() for name, value in state.items()}
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [64, 2])
def test_every_interruption_resumes_with_the_same_bits(stop: int, batch: int) -> None:
    curator = OpenCurator(blobs(patients=12))
    settings = replace(QUICK, batch=batch)  # one batch of four images, or two batches of two

    def run(kept: _Kept) -> Synthetic:
        bench = Workbench(compute=Compute(jobs=1), checkpoint=kept)
        return settings.distill(curator, ipc=2, seed=3, start=None, bench=bench)

    whole, kept = run(_Kept()), _Kept(stop)
    with pytest.raises(KeyboardInterrupt):  # after an epoch, or in the middle of recovering
        run(kept)
    resumed = run(kept)
    assert whole.views is not None
    assert resumed.views is not None
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.views.soft_labels, resumed.views.soft_labels)


@pytest.mark.long
def test_processes_change_no_bit() -> None:
    data = blobs(patients=8)
    teacher, start = _teacher(data), _start(data.task, 2)
    settings = replace(QUICK, batch=2)

    def images(jobs: int) -> Tensor:
        bench = Workbench(compute=Compute(jobs=jobs))
        return recover(teacher, start, kind=data.task.kind, settings=settings, seed=1, bench=bench)

    assert torch.equal(images(1), images(2))


def test_labels_of_views_are_the_teachers_softmax_of_the_crop_at_the_temperature() -> None:
    data = blobs(patients=8, classes=3)
    teacher, settings = _teacher(data), replace(QUICK, temperature=2.5, batch=4)
    images = _start(data.task, 3).images
    views = relabel(teacher, images, kind=data.task.kind, settings=settings, seed=1, compute=Compute())
    assert views.temperature == 2.5
    assert views.boxes.shape == (3, 9, 4)
    assert not torch.equal(views.boxes[0], views.boxes[1])
    for view in range(3):
        for image in (0, 5, 8):
            part = crop(images[image : image + 1], views.boxes[view, image : image + 1])
            scores = np.exp(teacher(part)[0].double().numpy() / 2.5)
            found = views.soft_labels[view, image].numpy()
            np.testing.assert_allclose(found, scores / scores.sum(), atol=1e-5)
    made = labelled(
        teacher, images, torch.arange(3).repeat_interleave(3), kind=data.task.kind, settings=settings, seed=1,
        bench=Workbench(),
    )  # fmt: skip
    torch.testing.assert_close(made.soft_labels, views.soft_labels.mean(0))


def test_multilabel_views_are_probabilities_of_their_own() -> None:
    data = blobs(patients=9, classes=3)
    task = Task(kind=TaskKind.MULTILABEL, class_names=data.task.class_names)
    targets = data.targets.clone()
    targets[data.targets[:, 0] > 0, 1] = 1.0  # the first class comes with the second
    several = replace(data, task=task, targets=targets)
    made = replace(QUICK, epochs=6).distill(OpenCurator(several), ipc=2, seed=0, start=None, bench=Workbench())
    assert made.views is not None
    assert float((made.views.soft_labels.sum(2) - 1).abs().max()) > 1e-3
    assert float(made.views.soft_labels.max()) <= 1


def test_volumes_and_colours() -> None:
    volumes = blobs(patients=8, per_patient=1, size=8)
    solid = replace(volumes, images=volumes.images[:, :, None].repeat(1, 1, 8, 1, 1))
    colours = replace(volumes, images=volumes.images.repeat(1, 3, 1, 1))
    for data, axes in ((solid, 3), (colours, 2)):
        settings = replace(QUICK, teacher="resnet", epochs=1, iterations=3)
        made = settings.distill(OpenCurator(data), ipc=1, seed=0, start=None, bench=Workbench())
        assert made.images.shape[1:] == data.images.shape[1:]
        assert made.views is not None
        assert made.views.boxes.shape == (3, 2, 2 * axes)


def test_curriculum_goes_from_the_whole_to_small_crops() -> None:
    settings = replace(QUICK, crop=0.1, curriculum=0.5)
    found = [smallest_crop(done, settings) for done in (0.0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert smallest_crop(0.0, replace(settings, curriculum=0.0)) == 0.1


def test_nothing_is_mirrored_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for stage in (squeezing, sre2l):
        monkeypatch.setattr(stage, "mirrored", lambda images, generator: seen.append(1) or images)
    curator = OpenCurator(blobs(patients=6))
    for settings, count in ((QUICK, 0), (replace(QUICK, mirror=True), QUICK.epochs + QUICK.iterations)):
        settings.distill(curator, ipc=1, seed=0, start=None, bench=Workbench())
        assert len(seen) == count


def test_mirroring_turns_left_and_right() -> None:
    images = torch.zeros(40, 1, 4, 4)
    images[..., 0] = 1.0
    found = mirrored(images, torch.Generator().manual_seed(0))
    left = found[..., 0].mean((1, 2)) == 1
    assert 0 < int(left.sum()) < 40
    assert torch.equal(found[~left], images[~left].flip(-1))


@pytest.mark.parametrize(
    ("stage", "change"), [("teacher_rate", {"teacher_rate": 1e30}), ("rate", {"bn_weight": 1e38})]
)
def test_what_diverges_is_named_with_a_remedy(stage: str, change: dict[str, float]) -> None:
    with pytest.raises(DataError, match=f"sre2l diverged.*Lower {stage}"):
        replace(QUICK, first_weight=1e30, **change).distill(  # type: ignore[arg-type]
            OpenCurator(blobs(patients=6)), ipc=1, seed=0, start=None, bench=Workbench()
        )


def test_of_several_labels_the_teacher_also_sees_images_without_any() -> None:
    data = blobs(patients=12, per_patient=1, classes=3)
    task = Task(kind=TaskKind.MULTILABEL, class_names=("a", "b"))  # the third class is without a label
    teacher = _teacher(replace(data, targets=data.targets[:, :2], task=task), replace(QUICK, epochs=12, crop=1.0))
    with torch.no_grad():
        scores = teacher(data.images).sigmoid()
    healthy = data.targets[:, 2] > 0
    assert float(scores[healthy].max()) < 0.5
    assert float(scores[~healthy].amax(1).min()) > 0.5


def test_bad_settings_are_refused() -> None:
    for wrong in ({"crop": 0.0}, {"views": 0}, {"rate": 0.0}, {"curriculum": 2.0}, {"init": "mean"}):
        with pytest.raises(ConfigError):
            SRe2L(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="resnet"):
        SRe2L(teacher="resnett")
