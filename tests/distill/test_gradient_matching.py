"""Gradient matching against naive loops and finite differences, and on every kind of image and task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill import gradient_matching
from medistill.distill.gradient_matching import (
    GradientMatching,
    alike,
    gradient_distance,
    matching_distance,
    unchanged,
)
from medistill.distill.start import noise
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from medistill.training.fit import fit, predict
from tests.conftest import blobs

QUICK = GradientMatching(iterations=3, outer=2, inner=2, batch_per_class=4, width=8)


class _Smooth(nn.Module):
    """Twice differentiable everywhere, so that finite differences converge."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)
        self.head = nn.Linear(48, outputs, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.convolution(images)).flatten(1))
        return logits


def _naive_distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    total = 0.0
    for layer, other in zip(found, wanted, strict=True):
        for unit in range(layer.shape[0]):
            a, b = layer[unit].reshape(-1).tolist(), other[unit].reshape(-1).tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            total += 1 - dot / (lengths + 1e-6)
    return total


@pytest.mark.parametrize("volume", [False, True])
def test_distance_is_a_double_loop_over_layers_and_output_units(volume: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 1, 3, 3, 3) if volume else (4, 1, 3, 3), (2, 12)]
    found, wanted = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
    )
    assert matching_distance(found, wanted).item() == pytest.approx(_naive_distance(found, wanted), abs=1e-12)
    assert matching_distance(found, found).item() == pytest.approx(0, abs=1e-4)


def test_a_silent_unit_neither_breaks_the_distance_nor_its_gradient() -> None:
    found = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    distance = matching_distance([found], [torch.ones(2, 2, dtype=torch.float64)])
    (gradient,) = torch.autograd.grad(distance, found)
    assert bool(gradient.isfinite().all())
    assert distance.item() == pytest.approx(2 - 3 / math.sqrt(10), abs=1e-6)


@pytest.mark.parametrize("kind", [TaskKind.BINARY, TaskKind.MULTILABEL])
@pytest.mark.parametrize("siamese", [False, True])
def test_gradient_of_the_distance_is_a_finite_difference(kind: TaskKind, siamese: bool) -> None:
    torch.manual_seed(0)
    network, images = _Smooth(), torch.rand(2, 1, 4, 4, dtype=torch.float64).requires_grad_()
    real = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([[1.0, 0.0]] * 5, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    change = alike(torch.Generator().manual_seed(1)) if siamese else unchanged

    def distance() -> Tensor:
        return gradient_distance(network, (images, labels), real, kind=kind, change=change, compute=Compute())

    (gradient,) = torch.autograd.grad(distance(), images)
    flat, step = images.data.view(-1), 1e-5
    for position in range(0, flat.numel(), 3):
        value = flat[position].item()
        flat[position] = value + step
        above = distance().item()
        flat[position] = value - step
        below = distance().item()
        flat[position] = value
        numeric = (above - below) / (2 * step)
        assert gradient.reshape(-1)[position].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_the_distance_is_that_of_the_gradients_of_two_losses() -> None:
    torch.manual_seed(0)
    network = _Smooth()
    batches = [
        (torch.rand(n, 1, 4, 4, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:1]) for n in (2, 5)
    ]
    pairs = [(images, target.expand(len(images), 2)) for images, target in batches]
    gradients = []
    for images, targets in pairs:
        network.zero_grad()
        (-(targets * network(images).log_softmax(1)).sum(1).mean()).backward()
        gradients.append([network.convolution.weight.grad.clone(), network.head.weight.grad.clone()])  # type: ignore[union-attr]
    found = gradient_distance(
        network, pairs[0], pairs[1], kind=TaskKind.BINARY, change=unchanged, compute=Compute()
    )
    assert found.item() == pytest.approx(_naive_distance(*gradients), abs=1e-10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 8)])
def test_siamese_changes_real_and_synthetic_images_alike(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    change, image = alike(generator), torch.rand(shape, generator=generator)
    real, synthetic = change(image.expand(5, *shape)), change(image.expand(2, *shape))
    assert torch.equal(real, real[:1].expand_as(real))
    assert torch.equal(real[:2], synthetic)
    assert not torch.equal(synthetic[0], image)
    assert not torch.equal(alike(generator)(image[None]), real[:1])


@pytest.mark.parametrize("siamese", [False, True])
def test_both_batches_of_a_class_go_through_one_change(siamese: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, object]] = []
    measure = gradient_distance

    def spy(
        network: nn.Module, synthetic: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor], **rest: object
    ) -> Tensor:
        seen.append((int(synthetic[1].argmax(1)[0]), rest["change"]))
        for _, targets in (synthetic, real):
            assert bool((targets.argmax(1) == seen[-1][0]).all())
        return measure(network, synthetic, real, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gradient_matching, "gradient_distance", spy)
    settings = replace(QUICK, iterations=1, siamese=siamese)
    settings.distill(OpenCurator(blobs(patients=9, classes=3)), ipc=2, seed=0, start=None, bench=Workbench())
    assert [label for label, _ in seen] == [0, 1, 2] * 2
    assert len({change for _, change in seen}) == (6 if siamese else 1)


@pytest.mark.parametrize(
    ("ipc", "loops"), [(1, (1, 1)), (9, (1, 1)), (10, (10, 50)), (30, (30, 20)), (60, (50, 10))]
)
def test_loops_are_the_published_ones_unless_set(ipc: int, loops: tuple[int, int]) -> None:
    assert replace(QUICK, outer=0, inner=0).loops(ipc) == loops
    assert replace(QUICK, outer=3, inner=0).loops(ipc) == (3, loops[1])
    assert replace(QUICK, outer=0, inner=7).loops(ipc) == (loops[0], 7)


def test_without_a_number_of_iterations_there_are_200_matching_steps() -> None:
    seen = []

    def watch(step: int, steps: int, current: object) -> bool:
        seen.append((step, steps))
        return True

    settings, curator = replace(QUICK, iterations=0, outer=3), OpenCurator(blobs(patients=8))
    settings.distill(curator, ipc=1, seed=0, start=None, bench=Workbench(watch=watch))
    assert seen == [(1, 67)]


def _kinds() -> dict[str, ImageSet]:
    grey = blobs(patients=12)
    lungs = Task(kind=TaskKind.MULTILABEL, class_names=("mass", "effusion", "nodule"))
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand((len(grey), 3), generator=generator) < 0.5).float()
    targets[:3] = torch.eye(3)
    return {
        "rgb": replace(grey, images=grey.images.expand(-1, 3, -1, -1).contiguous()),
        "volume": replace(grey, images=grey.images[:, :, None].expand(-1, -1, 16, -1, -1).contiguous()),
        "multilabel": replace(grey, targets=targets, task=lungs),
    }


@pytest.mark.parametrize("name", ["rgb", "volume", "multilabel"])
@pytest.mark.parametrize("siamese", [False, True])
def test_every_kind_of_image_and_task(name: str, siamese: bool) -> None:
    data = _kinds()[name]
    bench, classes = Workbench(), data.task.n_classes
    result = replace(QUICK, siamese=siamese).distill(OpenCurator(data), ipc=2, seed=0, start=None, bench=bench)
    assert result.images.shape == (2 * classes, *data.images.shape[1:])
    assert bool(result.images.isfinite().all())
    assert 0 <= float(result.images.min()) <= float(result.images.max()) <= 1
    start = replace(QUICK, iterations=1, rate=1e-9).distill(
        OpenCurator(data), ipc=2, seed=0, start=None, bench=bench
    )
    assert torch.allclose(result.soft_labels, torch.eye(classes).repeat_interleave(2, 0))
    assert bool(((result.images - start.images).flatten(1).abs().amax(1) > 1e-4).all())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_earlier_result_is_taken_up_with_its_labels(optimizer: str) -> None:
    start = Synthetic(
        images=noise((2, 1, 16, 16), seed=1),
        soft_labels=torch.tensor([[0.8, 0.2], [0.3, 0.7]]),
        hard_labels=torch.tensor([0, 1]),
    )
    settings = replace(QUICK, optimizer=optimizer, rate=0.001)
    result = settings.distill(OpenCurator(blobs()), ipc=1, seed=0, start=start, bench=Workbench())
    assert torch.equal(result.soft_labels, start.soft_labels)
    assert 0 < float((result.images - start.images).abs().max()) < 0.1


def test_a_student_of_matched_images_knows_the_classes() -> None:
    train, test = blobs(patients=20), blobs(patients=20, seed=9, first=100)
    settings = GradientMatching(iterations=40, batch_per_class=16, width=16)
    result = settings.distill(OpenCurator(train), ipc=1, seed=0, start=None, bench=Workbench())
    accuracies = []
    for images in (result.images, noise(tuple(result.images.shape), seed=0)):
        torch.manual_seed(0)
        network = fit(
            ConvNet(train.task, (1, 16, 16), width=16),
            images,
            result.soft_labels,
            kind=train.task.kind,
            schedule=Schedule(epochs=60, learning_rate=0.01),
            seed=0,
        )
        found = predict(network, test.images, kind=train.task.kind).argmax(1)
        accuracies.append((found == test.classes).float().mean().item())
    assert accuracies[0] > 0.9 > accuracies[1]


class _Memory:
    """A checkpoint in memory that interrupts at its second save."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None
        self.saves = 0

    def load(self) -> dict[str, Tensor] | None:
        return self.state

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.detach().clone() for name, value in state.items()}
        self.saves += 1
        if self.saves == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.5), ("adam", 0.5)])
def test_an_interruption_resumes_with_the_same_bits(optimizer: str, momentum: float) -> None:
    settings = replace(QUICK, optimizer=optimizer, momentum=momentum, siamese=True, checkpoint_every=1)

    def images(bench: Workbench) -> Tensor:
        return settings.distill(OpenCurator(blobs(patients=6)), ipc=1, seed=0, start=None, bench=bench).images

    bench = Workbench(checkpoint=_Memory())
    with pytest.raises(KeyboardInterrupt):
        images(bench)
    assert torch.equal(images(bench), images(Workbench()))


def test_a_network_that_diverges_is_named_with_a_remedy() -> None:
    settings = replace(QUICK, network_rate=1e30)
    with pytest.raises(DataError, match=r"gradient_matching diverged at step 0.*Lower network_rate"):
        settings.distill(OpenCurator(blobs(patients=6)), ipc=1, seed=0, start=None, bench=Workbench())


def test_wrong_settings_are_refused() -> None:
    wrong = {"iterations": -1, "inner": -1, "rate": 0.0, "optimizer": "lbfgs", "momentum": 1.0, "init": "copies"}
    for name, value in wrong.items():
        with pytest.raises(ConfigError):
            replace(QUICK, **{name: value})  # type: ignore[arg-type]
