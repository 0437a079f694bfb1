"""Experts: networks trained on real images, with their parameters after every epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule
from medistill.core.images import ImageSet
from medistill.core.task import Task, TaskKind
from medistill.networks.convnet import ConvNet
from medistill.parallel import parallel_map, worth_processes
from medistill.seeds import derive_seed
from medistill.training.fit import fit
from medistill.training.objectives import probabilities

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One network to train on real images, complete enough to be sent to another process.

    Args:
        task: What is diagnosed.
        images: Real images, shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        targets: Shape ``(n, k)``.
        epochs: Passes over the images; parameters are kept after each.
        rate: Learning rate of SGD without momentum.
        batch: Images a step.
        width: Width of the ConvNet.
        seed: Public seed of weights, order and augmentation.
        compute: Device and precision.
    """

    task: Task
    images: Floats
    targets: Floats
    epochs: int
    rate: float
    batch: int
    width: int
    seed: int
    compute: Compute = field(default_factory=Compute)

    def untrained(self) -> ConvNet:
        """The network before the first epoch."""
        return architecture(self.task, tuple(self.images.shape[1:]), width=self.width, seed=self.seed)


def architecture(task: Task, image_shape: tuple[int, ...], *, width: int, seed: int) -> ConvNet:
    """The network of experts and students."""
    network = fresh(lambda task, shape: ConvNet(task, shape, width=width), task, image_shape, seed)
    assert isinstance(network, ConvNet)
    return network


def trajectory(expert: Expert) -> Floats:
    """Train an expert; its parameters before the first and after every epoch, shape ``(epochs + 1, p)``.

    One thread computes on a CPU, so that the bits depend neither on the number of cores nor of processes; cores go
    to experts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network = expert.untrained()
        rows = [flattened(network)]
        images, targets = _shared(expert.images), _shared(expert.targets)
        schedule = Schedule(
            epochs=1, learning_rate=expert.rate, momentum=0.0, decay="constant", batch_size=expert.batch
        )
        for epoch in range(expert.epochs):
            seed = derive_seed(expert.seed, "epoch", epoch)
            kind, compute = expert.task.kind, expert.compute
            fit(network, images, targets, kind=kind, schedule=schedule, seed=seed, compute=compute)
            rows.append(flattened(network))
        return torch.stack(rows).numpy()
    finally:
        torch.set_num_threads(threads)


def train_experts(
    real: ImageSet,
    numbers: Sequence[int],
    *,
    epochs: int,
    rate: float,
    batch: int,
    width: int,
    seed: int,
    compute: Compute,
) -> Iterator[Tensor]:
    """Trajectories of experts by number, in processes where that pays; in order, the same bits either way.

    Args:
        real: What they are trained on.
        numbers: Which experts; each has a seed of its own.
        epochs: See :class:`Expert`, as the next three.
        rate: Learning rate.
        batch: Images a step.
        width: Width of the ConvNet.
        seed: Public seed.
        compute: Device, precision and workers.
    """
    images, targets = real.images.numpy(), real.targets.numpy()
    work = [
        Expert(
            task=real.task,
            images=images,
            targets=targets,
            epochs=epochs,
            rate=rate,
            batch=batch,
            width=width,
            seed=derive_seed(seed, "expert", number),
            compute=compute.of_worker(number),
        )
        for number in numbers
    ]
    jobs = compute.workers() or worth_processes(float(images.size) * epochs * len(work))
    yield from map(torch.from_numpy, parallel_map(trajectory, work, jobs=jobs, engine=compute.engine))


def flattened(network: nn.Module) -> Tensor:
    """A copy of all parameters in one row on the CPU."""
    return torch.cat([value.detach().flatten().cpu() for value in network.parameters()])


def unflattened(network: nn.Module, row: Tensor) -> dict[str, Tensor]:
    """Parameters by name from a row; the network gives names and shapes."""
    named = list(network.named_parameters())
    parts = torch.split(row, [value.numel() for _, value in named])
    return {name: part.view_as(value) for (name, value), part in zip(named, parts, strict=True)}


@torch.no_grad()
def teacher_labels(network: ConvNet, experts: Sequence[Tensor], images: Tensor, kind: TaskKind) -> Tensor:
    """Mean prediction of all experts after their last epoch, shape ``(m, k)``.

    Args:
        network: Gives the architecture and the device.
        experts: Their trajectories, each ``(epochs + 1, p)``.
        images: Shape ``(m, c, h, w)``.
        kind: Kind of the task.
    """
    device = network.head.weight.device
    predictions = []
    for rows in experts:
        weights = unflattened(network, rows[-1].to(device))
        logits = functional_call(network, weights, (images.to(device),))
        predictions.append(probabilities(kind, logits).cpu())
    return torch.stack(predictions).mean(0)


def _shared(array: Floats) -> Tensor:
    """A tensor over the array, without a copy also where it is memory shared between processes; only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)
