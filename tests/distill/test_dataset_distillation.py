"""Dataset distillation against finite differences, plain training and a graph of the whole training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill import make_recipe
from medistill.distill.dataset_distillation import DatasetDistillation, dealt, starting_network
from medistill.distill.unrolled import Training, before_softplus, descended, hypergradients, softplus
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from tests.conftest import blobs

BATCHES = [torch.tensor([0, 2]), torch.tensor([1, 3])] * 2


class Smooth(nn.Module):
    """Twice differentiable everywhere, so that finite differences converge."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.layer(images.flatten(1))))
        return logits


def setting() -> tuple[nn.Module, Training, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    training = Training(
        images=torch.rand(4, 1, 3, 3, dtype=torch.float64),
        soft_labels=torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0),
        rates=torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.float64),
        batches=BATCHES,
    )
    real, targets = torch.rand(6, 1, 3, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64).repeat(3, 1)
    return Smooth(), training, real, targets


def trained_plainly(network: nn.Module, training: Training) -> None:
    """The same training by torch's own optimiser."""
    for rate, rows in zip(training.rates.tolist(), training.batches, strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        optimizer.zero_grad()
        logs = network(training.images[rows].detach()).log_softmax(1)
        (-(training.soft_labels[rows].detach() * logs).sum(1).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["images", "soft_labels", "rates"])
def test_hypergradients_are_finite_differences(name: str) -> None:
    network, training, real, targets = setting()
    found = hypergradients(network, training, real, targets, kind=TaskKind.BINARY)
    flat, gradient = getattr(training, name).view(-1), getattr(found, name).view(-1)
    for position in range(0, flat.numel(), 3):
        value, losses = flat[position].item(), []
        for step in (1e-5, -1e-5):
            flat[position] = value + step
            losses.append(hypergradients(network, training, real, targets, kind=TaskKind.BINARY).loss.item())
        flat[position] = value
        numeric = (losses[0] - losses[1]) / 2e-5
        assert abs(numeric - gradient[position].item()) < 1e-8 + 1e-5 * abs(numeric)


def test_inner_training_is_gradient_descent_with_a_rate_for_each_step() -> None:
    network, training, real, targets = setting()
    found = hypergradients(network, training, real, targets, kind=TaskKind.BINARY).loss.item()
    trained_plainly(network, training)
    expected = -(targets * network(real).log_softmax(1)).sum(1).mean().item()
    assert abs(found - expected) < 1e-12


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_window_is_the_whole_graph_cut_before_its_first_step(window: int) -> None:
    network, training, real, targets = setting()
    found = hypergradients(network, training, real, targets, kind=TaskKind.BINARY, window=window)
    images, labels, rates = (
        tensor.clone().requires_grad_() for tensor in (training.images, training.soft_labels, training.rates)
    )
    weights = dict(network.named_parameters())
    for step, rows in enumerate(training.batches):
        if step == len(training.batches) - (window or len(training.batches)):
            weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
        weights = descended(network, weights, images[rows], labels[rows], rates[step], TaskKind.BINARY)
    loss = F.cross_entropy(torch.func.functional_call(network, weights, (real,)), targets)
    whole = torch.autograd.grad(loss, [images, labels, rates])
    for ours, theirs in zip((found.images, found.soft_labels, found.rates), whole, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)
    assert (found.rates[: len(BATCHES) - window] == 0).all() or not window


@pytest.mark.parametrize(("ipc", "steps"), [(1, 4), (3, 2), (4, 4), (10, 3)])
def test_images_are_dealt_out_over_the_steps(ipc: int, steps: int) -> None:
    hard = torch.arange(3).repeat_interleave(ipc)
    batches = dealt(hard, steps=steps)
    assert len(batches) == steps
    assert sorted(set(torch.cat(batches).tolist())) == list(range(3 * ipc))
    for rows in batches:
        assert len(set(hard[rows].tolist())) == 3
        assert len({(hard[rows] == label).sum().item() for label in range(3)}) == 1
    if ipc >= steps:
        assert all(not set(a.tolist()) & set(b.tolist()) for a, b in itertools.combinations(batches, 2))


@pytest.mark.parametrize("rate", [1e-4, 0.02, 3.0, 1e6])
def test_a_rate_survives_its_softplus(rate: float) -> None:
    assert softplus(torch.tensor(before_softplus(rate))).item() == pytest.approx(rate, rel=1e-3)


def quick(**changes: object) -> DatasetDistillation:
    settings = {"iterations": 12, "steps": 2, "epochs": 2, "batch_per_class": 8, "width": 8, **changes}
    return DatasetDistillation(**settings)  # type: ignore[arg-type]


def run(distiller: DatasetDistillation, data: ImageSet, *, ipc: int = 2) -> Synthetic:
    return distiller.distill(OpenCurator(data), ipc=ipc, seed=0, start=None, bench=Workbench())


def test_learned_images_train_better_than_noise() -> None:
    data = blobs(patients=20)
    noise, learned = run(quick(iterations=1, image_rate=1e-9), data), run(quick(iterations=40), data)
    losses = []
    for made in (noise, learned):
        training = Training(
            images=made.images,
            soft_labels=made.soft_labels,
            rates=torch.full((4,), learned.schedule.learning_rate),  # type: ignore[union-attr]
            batches=dealt(made.hard_labels, steps=2) * 2,
        )
        network = quick()._network(data.task, (1, 16, 16), 99, 0)
        losses.append(hypergradients(network, training, data.images, data.targets, kind=data.task.kind).loss)
    assert losses[1] < 0.75 * losses[0]


def test_rates_are_learned_and_the_schedule_carries_their_mean() -> None:
    made = run(quick(), blobs(patients=20))
    assert made.schedule is not None
    assert made.schedule.epochs == 4
    assert abs(made.schedule.learning_rate - 0.02) > 1e-4
    assert torch.equal(made.soft_labels, torch.eye(2).repeat_interleave(2, 0))


def test_fixed_weights_can_be_made_again_from_the_recipe() -> None:
    task = blobs(patients=4).task
    settings = {"dataset_distillation": {"initial": "fixed", "width": 8}}
    recipe = make_recipe(task, method="dataset_distillation", seed=7, settings=settings)
    network = starting_network(recipe, task, (1, 16, 16))
    from medistill.seeds import derive_seed

    distiller, seed = quick(initial="fixed"), derive_seed(7, "distill", 0)
    for step in (0, 11):
        used = distiller._network(task, (1, 16, 16), seed, step)
        pairs = zip(network.parameters(), used.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    random = [quick()._network(task, (1, 16, 16), seed, step) for step in (0, 1)]
    assert not torch.equal(*(next(one.parameters()) for one in random))
    with pytest.raises(ConfigError, match="initial='fixed'"):
        starting_network(make_recipe(task, method="dataset_distillation"), task, (1, 16, 16))


def test_fixed_images_suit_the_fixed_network_better_than_others() -> None:
    data = blobs(patients=20)
    made = run(quick(iterations=50, initial="fixed", steps=3, epochs=1, batch_per_class=4), data, ipc=3)
    assert made.schedule is not None
    training = Training(
        images=made.images,
        soft_labels=made.soft_labels,
        rates=torch.full((3,), made.schedule.learning_rate),
        batches=dealt(made.hard_labels, steps=3),
    )
    losses = []
    for step in range(6):
        network = quick(initial="random")._network(data.task, (1, 16, 16), 0, step)  # step 0 is the fixed one
        losses.append(
            hypergradients(network, training, data.images, data.targets, kind=data.task.kind).loss.item()
        )
    assert losses[0] < min(losses[1:])


def test_a_training_that_diverges_is_named_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"diverged at step 0: .*Lower inner_rate"):
        run(quick(inner_rate=1e25), blobs(patients=8))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param((3, 16, 16), TaskKind.BINARY, id="colour"),
        pytest.param((1, 16, 16, 16), TaskKind.BINARY, id="volumes"),
        pytest.param((1, 16, 16), TaskKind.MULTILABEL, id="multilabel"),
    ],
)
def test_it_works_for(shape: tuple[int, ...], kind: TaskKind) -> None:
    data = of_shape(shape, kind)
    made = run(quick(iterations=2), data, ipc=1)
    assert made.images.shape == (2, *shape)
    assert torch.isfinite(made.images).all()


def of_shape(shape: tuple[int, ...], kind: TaskKind) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    targets = torch.eye(2).repeat(6, 1)
    if kind is TaskKind.MULTILABEL:
        targets = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).repeat(3, 1)
    return ImageSet(
        images=torch.rand((12, *shape), generator=generator),
        targets=targets,
        patients=tuple(f"p{i}" for i in range(12)),
        task=Task(kind=kind, class_names=("a", "b")),
    )


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"initial": "zero"}, {"window": 7}, {"inner_rate": 0.0}, {"init": "copy"}]
)
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        quick(**change)


def test_a_random_window_trains_for_every_length_and_learns_late_rates() -> None:
    distiller = quick(iterations=12, window=1)
    lengths = {distiller._length(torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert lengths == {1, 2, 3, 4}
    made, whole = (run(replace(distiller, window=window), blobs(patients=8), ipc=1) for window in (1, 0))
    assert made.schedule != whole.schedule
    assert not torch.equal(made.images, whole.images)
