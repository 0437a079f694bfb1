"""Trajectory matching against finite differences, written-out formulas and one graph of all steps."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.func import functional_call

from medistill.core.compute import Compute, fresh
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill import trajectory_matching as module
from medistill.distill.checkpoint import FileCheckpoint
from medistill.distill.experts import (
    Expert,
    architecture,
    flattened,
    teacher_labels,
    train_experts,
    trajectory,
    unflattened,
)
from medistill.distill.schedule import DEFAULT_SCHEDULE
from medistill.distill.trajectory_matching import (
    MEMORIES,
    StudentStep,
    TrajectoryMatching,
    hypergradients,
    matching_loss,
)
from medistill.distill.unrolled import descended
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.fit import fit, predict
from medistill.training.objectives import objective, probabilities
from tests.conftest import blobs, pseudonym

Named = dict[str, torch.Tensor]
PARTS = [torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 1]), torch.tensor([2, 3])]


class _Smooth(nn.Module):
    """Twice differentiable everywhere, so that finite differences converge."""

    def __init__(self, inputs: int = 9) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.layer(images.flatten(1))))
        return logits


class _Setting:
    """A student of a smooth network between two points of an expert."""

    def __init__(self, kind: TaskKind = TaskKind.BINARY, rate: float = 0.4) -> None:
        torch.manual_seed(0)
        self.kind, self.network = kind, _Smooth()
        self.start = {name: value.detach().clone() for name, value in self.network.named_parameters()}
        self.target = {name: value + 0.3 * torch.randn_like(value) for name, value in self.start.items()}
        self.images = torch.rand(4, 1, 3, 3, dtype=torch.float64).requires_grad_()
        self.scores = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
        self.rate = torch.tensor(rate, dtype=torch.float64).requires_grad_()

    @property
    def learned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.images, self.scores, self.rate

    def step(self, part: torch.Tensor) -> StudentStep:
        def step(parameters: Any, differentiable: bool) -> Named:
            labels = probabilities(self.kind, self.scores)[part]
            return descended(
                self.network,
                parameters,
                self.images[part],
                labels,
                self.rate,
                self.kind,
                differentiable=differentiable,
            )

        return step

    def gradients(self, memory: str, parts: list[torch.Tensor]) -> tuple[float, tuple[torch.Tensor, ...]]:
        steps = [self.step(part) for part in parts]
        return hypergradients(steps, self.start, self.target, self.learned, memory=memory)


def test_the_loss_is_a_ratio_of_squared_distances() -> None:
    setting = _Setting()
    found = {name: value + 0.1 for name, value in setting.start.items()}
    rows = [
        np.concatenate([value.numpy().ravel() for value in named.values()])
        for named in (found, setting.start, setting.target)
    ]
    expected = ((rows[0] - rows[2]) ** 2).sum() / ((rows[1] - rows[2]) ** 2).sum()
    assert matching_loss(found, setting.start, setting.target).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_student_is_trained_by_gradient_descent(memory: str) -> None:
    setting = _Setting()
    loss, _ = setting.gradients(memory, PARTS)
    optimizer = torch.optim.SGD(setting.network.parameters(), lr=setting.rate.item())
    for part in PARTS:
        optimizer.zero_grad()
        logs = setting.network(setting.images[part].detach()).log_softmax(1)
        (-(setting.scores.detach().softmax(1)[part] * logs).sum(1).mean()).backward()
        optimizer.step()
    found = {name: value.detach() for name, value in setting.network.named_parameters()}
    assert loss == pytest.approx(matching_loss(found, setting.start, setting.target).item(), rel=1e-12)


@pytest.mark.parametrize("kind", [TaskKind.BINARY, TaskKind.MULTILABEL])
@pytest.mark.parametrize("memory", ["unrolled", "recomputed"])
def test_gradients_of_images_labels_and_rate_are_finite_differences(memory: str, kind: TaskKind) -> None:
    setting = _Setting(kind)
    _, found = setting.gradients(memory, PARTS)
    for tensor, gradient in zip(setting.learned, found, strict=True):
        flat = tensor.data.view(-1)
        for position in range(0, flat.numel(), 3):
            value, losses = flat[position].item(), []
            for change in (1e-5, -1e-5):
                flat[position] = value + change
                losses.append(setting.gradients(memory, PARTS)[0])
            flat[position] = value
            numeric = (losses[0] - losses[1]) / 2e-5
            assert gradient.reshape(-1)[position].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS, PARTS * 3, [torch.arange(4)] * 5])
def test_recomputed_steps_give_the_gradients_of_the_whole_graph(parts: list[torch.Tensor]) -> None:
    setting = _Setting()
    (loss, whole), (again, stepwise) = (setting.gradients(memory, parts) for memory in ("unrolled", "recomputed"))
    assert loss == again
    torch.testing.assert_close(stepwise, whole, rtol=1e-10, atol=1e-13)


def test_tesla_is_the_gradient_of_its_rewritten_loss() -> None:
    """Both gradients of the paper written out, with the gradient of every step taken at fixed parameters."""
    setting = _Setting()
    value, found = setting.gradients("constant", PARTS)
    rate = setting.rate.item()
    parameters = {name: tensor.clone() for name, tensor in setting.start.items()}
    rows = []
    for part in PARTS:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        logits = functional_call(setting.network, leaves, (setting.images[part],))
        loss = objective(setting.kind, logits, setting.scores.softmax(1)[part])
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        stepped = zip(parameters.items(), gradients, strict=True)
        parameters = {name: tensor - rate * gradient.detach() for (name, tensor), gradient in stepped}
    begin, end = (torch.cat([v.flatten() for v in named.values()]) for named in (setting.start, setting.target))
    total, scale = torch.stack(rows).sum(0).detach(), (begin - end).square().sum()
    of_images, of_scores = torch.zeros_like(setting.images), torch.zeros_like(setting.scores)
    for row in rows:
        weighted = 2 * rate * (end - begin) @ row + 2 * rate**2 * total @ row
        parts = torch.autograd.grad(weighted / scale, [setting.images, setting.scores], retain_graph=True)
        of_images, of_scores = of_images + parts[0], of_scores + parts[1]
    of_rate = (2 * (end - begin) @ total + 2 * rate * total @ total) / scale
    rewritten = (2 * rate * (end - begin) @ total + rate**2 * total @ total + scale) / scale
    torch.testing.assert_close(found, (of_images, of_scores, of_rate), rtol=1e-10, atol=1e-13)
    assert value == pytest.approx(rewritten.item(), rel=1e-12)


def test_tesla_is_exact_for_one_step() -> None:
    setting = _Setting()
    (_, whole), (_, tesla) = (setting.gradients(memory, PARTS[1:2]) for memory in ("unrolled", "constant"))
    torch.testing.assert_close(tesla, whole, rtol=1e-10, atol=1e-13)


def test_tesla_is_exact_for_images_of_the_last_step_only() -> None:
    setting = _Setting()
    parts = [PARTS[0], PARTS[0], PARTS[1]]
    (_, whole), (_, tesla) = (setting.gradients(memory, parts) for memory in ("unrolled", "constant"))
    last, earlier = PARTS[1], PARTS[0]
    torch.testing.assert_close(tesla[0][last], whole[0][last], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(tesla[1][last], whole[1][last], rtol=1e-10, atol=1e-13)
    assert _apart(tesla[0][earlier], whole[0][earlier]) > 1e-3


def test_what_tesla_leaves_out_is_of_the_order_of_the_rate() -> None:
    gaps = []
    for rate in (0.04, 0.004, 0.0004):
        setting = _Setting(rate=rate)
        (_, whole), (_, tesla) = (setting.gradients(memory, PARTS) for memory in ("unrolled", "constant"))
        gaps.append(_apart(tesla[0], whole[0]))
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.3)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.3)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


class _Held:
    """A tensor that a graph holds, and how many bytes all graphs hold at most."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.tensor = tensor.detach()  # a graph that holds its own outputs would hold itself
        _Held.now += size
        _Held.most = max(_Held.most, _Held.now)
        weakref.finalize(self, _Held.release, size)

    @classmethod
    def release(cls, size: int) -> None:
        cls.now -= size


def _most_held(memory: str, steps: int) -> int:
    setting = _Setting()
    _Held.now = _Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.tensor):
        setting.gradients(memory, [torch.arange(4)] * steps)
    return _Held.most


def test_graphs_hold_as_much_for_many_steps_as_for_few() -> None:
    held = {memory: [_most_held(memory, steps) for steps in (4, 16)] for memory in MEMORIES}
    assert held["unrolled"][1] > 3.5 * held["unrolled"][0]
    assert held["recomputed"][0] == held["recomputed"][1] < held["unrolled"][0]
    assert held["constant"][0] == held["constant"][1] < held["unrolled"][0]


# -- experts ---------------------------------------------------------------------------------------------------


def _trained(data: ImageSet, jobs: int, numbers: range = range(2)) -> list[torch.Tensor]:
    compute = Compute(jobs=jobs)
    settings = {"epochs": 2, "rate": 0.05, "batch": 8, "width": 8}
    return list(train_experts(data, numbers, **settings, seed=5, compute=compute))  # type: ignore[arg-type]


@pytest.mark.long
def test_experts_in_two_processes_have_the_bits_of_one() -> None:
    data = blobs(patients=8)
    one, two = _trained(data, 1), _trained(data, 2)
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))
    assert torch.equal(_trained(data, 1, range(1, 2))[0], one[1])
    assert not torch.equal(one[0], one[1])


def test_a_trajectory_is_plain_training_with_a_copy_after_every_epoch() -> None:
    data = blobs(patients=6)
    expert = Expert(
        task=data.task,
        images=data.images.numpy(),
        targets=data.targets.numpy(),
        epochs=3,
        rate=0.1,
        batch=0,
        width=8,
        seed=1,
    )
    rows = torch.from_numpy(trajectory(expert))
    network = expert.untrained()
    assert torch.equal(rows[0], flattened(network))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for epoch in range(3):
        generator = _epoch_generator(expert, epoch)
        torch.randperm(len(data), generator=generator)  # the order, which a batch of all images does not need
        optimizer.zero_grad()
        loss = -(data.targets * network(augment(data.images, generator)).log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(rows[epoch + 1], flattened(network), rtol=1e-4, atol=1e-6)


def _epoch_generator(expert: Expert, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(expert.seed, "epoch", epoch))


def test_parameters_go_to_a_row_and_back() -> None:
    network = architecture(blobs(patients=2).task, (1, 16, 16), width=8, seed=3)
    back = unflattened(network, flattened(network))
    assert all(torch.equal(back[name], value) for name, value in network.named_parameters())


def test_teacher_labels_are_the_mean_opinion_of_the_experts() -> None:
    data = blobs(patients=8)
    experts = _trained(data, 1, range(2))
    network = architecture(data.task, (1, 16, 16), width=8, seed=3)
    expected = torch.zeros(4, 2)
    for rows in experts:
        other = architecture(data.task, (1, 16, 16), width=8, seed=9)
        nn.utils.vector_to_parameters(rows[-1], other.parameters())
        expected += other(data.images[:4]).softmax(1).detach() / 2
    torch.testing.assert_close(teacher_labels(network, experts, data.images[:4], TaskKind.BINARY), expected)


# -- the distiller ---------------------------------------------------------------------------------------------


def _quick(**changes: Any) -> TrajectoryMatching:
    quick = TrajectoryMatching(
        iterations=4,
        experts=2,
        epochs=2,
        expert_span=1,
        expert_batch=16,
        student_steps=3,
        width=8,
        checkpoint_every=2,
    )
    return replace(quick, **changes)


def _distilled(distiller: TrajectoryMatching, data: ImageSet, bench: Workbench | None = None) -> Synthetic:
    return distiller.distill(OpenCurator(data), ipc=2, seed=0, start=None, bench=bench or Workbench())


class _Stopping(Progress):
    """Ends the training of experts before the second is kept, as Ctrl-C would; counts how many are trained."""

    def __init__(self, *, stop: bool) -> None:
        self.stop, self.experts = stop, 0

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for item in items:
            if description == "experts":
                if self.stop and self.experts == 1:
                    raise KeyboardInterrupt
                self.experts += 1
            yield item


def test_an_interruption_loses_no_finished_expert(tmp_path: Path) -> None:
    distiller, data = _quick(experts=3), blobs(patients=8)
    whole = _distilled(distiller, data)
    checkpoint = FileCheckpoint(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        _distilled(distiller, data, Workbench(checkpoint=checkpoint, progress=_Stopping(stop=True)))
    assert list(checkpoint.load() or {}) == ["expert.0"]
    again = _Stopping(stop=False)
    resumed = _distilled(distiller, data, Workbench(checkpoint=checkpoint, progress=again))
    assert again.experts == 2
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.soft_labels, resumed.soft_labels)


def _of_shape(shape: tuple[int, ...], kind: TaskKind) -> ImageSet:
    targets = torch.eye(2).repeat(4, 1)
    if kind is TaskKind.MULTILABEL:
        targets = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).repeat(2, 1)
    return ImageSet(
        images=torch.rand((8, *shape), generator=torch.Generator().manual_seed(0)),
        targets=targets,
        patients=tuple(pseudonym(number) for number in range(8)),
        task=Task(kind=kind, class_names=("a", "b")),
    )


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param((3, 16, 16), TaskKind.BINARY, id="colour"),
        pytest.param((1, 16, 16, 16), TaskKind.BINARY, id="volumes"),
        pytest.param((1, 16, 16), TaskKind.MULTILABEL, id="multilabel"),
    ],
)
def test_it_works_for(shape: tuple[int, ...], kind: TaskKind, memory: str) -> None:
    made = _distilled(_quick(iterations=2, memory=memory, student_batch=3), _of_shape(shape, kind))
    assert made.images.shape == (4, *shape)
    assert made.schedule is None
    sums = made.soft_labels.sum(1)
    assert torch.allclose(sums, torch.ones(4), atol=1e-5) == (kind is not TaskKind.MULTILABEL)
    assert ((made.soft_labels > 0) & (made.soft_labels < 1)).all()


def test_matching_brings_the_student_closer_to_the_expert() -> None:
    losses: list[float] = []

    class Listening(Progress):
        def note(self, **values: float) -> None:
            losses.append(values["loss"])

    distiller = _quick(iterations=25, experts=1, max_start_epoch=1, expert_rate=0.05, epochs=1)
    _distilled(distiller, blobs(patients=16), Workbench(progress=Listening()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_labels_are_kept_or_learned_or_given_by_the_experts() -> None:
    data = blobs(patients=8)
    hard = torch.eye(2).repeat_interleave(2, 0)
    assert torch.equal(_distilled(_quick(soft_labels=False), data).soft_labels, hard)
    near = hard * 0.8 + 0.1
    learned = _distilled(_quick(), data).soft_labels
    assert 0 < (learned - near).abs().max() < 0.1
    given = _distilled(_quick(init="real"), data).soft_labels
    assert (given - near).abs().max() > (learned - near).abs().max()


def test_every_synthetic_image_serves_before_any_comes_again() -> None:
    seen: list[list[int]] = []
    distiller = _quick(iterations=1, student_batch=2, student_steps=4, memory="unrolled")

    class Recording(module._Run):
        def _student_step(self, part: torch.Tensor, seed: int) -> StudentStep:
            seen.append(part.tolist())
            return super()._student_step(part, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_Run", Recording)
        _distilled(distiller, blobs(patients=8))
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [0, 1, 2, 3]


def test_a_student_that_diverges_is_named_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"diverged at step 0.*Lower student_rate"):
        _distilled(_quick(student_rate=1e30), blobs(patients=8))


@pytest.mark.parametrize(
    "change",
    [
        {"memory": "small"},
        {"experts": 0},
        {"student_rate": 0.0},
        {"epochs": 1},
        {"confidence": 1.0},
        {"student_batch": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        _quick(**change)


# -- figures ---------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys
import torch
from tests.conftest import blobs
from tests.distill.test_trajectory_matching import _distilled, _quick
torch.set_num_threads(1)
memory, steps = sys.argv[1], int(sys.argv[2])
settings = {"memory": memory, "student_steps": steps, "iterations": 2, "experts": 1, "width": 32}
_distilled(_quick(**settings), blobs(patients=8, size=64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.benchmark
def test_peak_memory_of_the_process() -> None:
    """Megabytes of a process that matches with 5 or 40 steps of four images of 64 px."""
    peaks = {}
    for memory in MEMORIES:
        for steps in (5, 40):
            command = [sys.executable, "-c", _PEAK, memory, str(steps)]
            peaks[memory, steps] = float(subprocess.run(command, check=True, capture_output=True).stdout)
    print(peaks)
    for memory in ("recomputed", "constant"):
        assert peaks[memory, 40] - peaks[memory, 5] < 0.2 * (peaks["unrolled", 40] - peaks["unrolled", 5])


@pytest.mark.benchmark
@pytest.mark.parametrize("init", ["noise", "real"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("ipc", "original"), [(1, 0.893), (10, 0.934)])
def test_pneumonia_as_good_as_the_original(
    ipc: int, original: float, memory: str, init: str, shared_data: Path
) -> None:
    """Mean test AUROC of three fresh students; the original began at real images and took 164 CPU seconds."""
    parts = _pneumonia(shared_data)
    distiller = TrajectoryMatching(memory=memory, init=init)
    began = time.process_time()
    made = distiller.distill(
        OpenCurator(parts["train"]), ipc=ipc, seed=0, start=None, bench=Workbench(compute=Compute(jobs=1))
    )
    seconds, aurocs = time.process_time() - began, []
    for student in range(3):
        network = fresh(ConvNet, parts["test"].task, (1, 28, 28), 1000 + student)
        kind, schedule = parts["test"].task.kind, DEFAULT_SCHEDULE
        fit(network, made.images, made.soft_labels, kind=kind, schedule=schedule, seed=student)
        found = predict(network, parts["test"].images, kind=kind)[:, 1]
        aurocs.append(roc_auc_score(parts["test"].classes, found))
    print(f"{memory} {init} ipc {ipc}: {seconds:.0f} CPU s, AUROC {aurocs}")
    assert sum(aurocs) / 3 > original - 0.02


def _pneumonia(folder: Path) -> dict[str, ImageSet]:
    arrays, sets = np.load(folder / "pneumoniamnist" / "pneumoniamnist.npz"), {}
    for split in ("train", "test"):
        images = torch.from_numpy(arrays[f"{split}_images"]).float()[:, None] / 255
        classes = torch.from_numpy(arrays[f"{split}_labels"]).long().flatten()
        sets[split] = ImageSet(
            images=images,
            targets=torch.eye(2)[classes],
            patients=tuple(pseudonym(number) for number in range(len(images))),
            task=Task.single_label(("normal", "pneumonia")),
        )
    return sets
