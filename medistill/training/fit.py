"""Training one network on images with soft labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule, ViewLabels
from medistill.core.task import TaskKind
from medistill.progress import Progress
from medistill.training.augment import augment
from medistill.training.closed_form import SolvedHead, solve_head
from medistill.training.objectives import objective, probabilities
from medistill.training.views import crop, picture_labels, pictures

_CACHED_PIXELS = 1 << 16
_DEVICE_BATCH = 512


def fit(
    network: nn.Module,
    images: Tensor,
    soft_labels: Tensor,
    *,
    kind: TaskKind,
    schedule: Schedule,
    seed: int,
    compute: Compute | None = None,
    views: ViewLabels | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a network in place; there is no parameter through which test images could enter.

    A network whose head is solved (:class:`medistill.training.closed_form.SolvedHead`) sees every image, or every
    tile of mosaics, once and as it is; the schedule and the seed are not used.

    Args:
        network: Freshly initialised; moved to the device.
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)`` in ``[0, 1]``; on the CPU, batches go to the device.
        soft_labels: Shape ``(n, k)``.
        kind: Chooses the loss.
        schedule: Epochs, learning rate, optimiser, batch size and augmentation.
        seed: Public seed of batch order and augmentation.
        compute: Device and precision; the CPU by default.
        views: Crops with labels; in epoch ``e`` view ``e`` (and round again) takes the place of the images and
            their labels, and the loss is taken at its temperature, times its square.
        progress: Shows the epochs.

    Returns:
        The same network in evaluation mode.
    """
    progress, compute = progress or Progress(), compute or Compute()
    if isinstance(network, SolvedHead):
        return _solved(network, images, soft_labels, kind=kind, compute=compute, views=views, progress=progress)
    network = compute.ready(network)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(network, schedule)
    batch = schedule.batch_size or len(images)
    steps = schedule.epochs * math.ceil(len(images) / batch)
    decay = None
    if schedule.decay == "cosine":
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if batch >= len(images):
        images, soft_labels = compute.put(images), compute.put(soft_labels)
    network.train()
    temperature = views.temperature if views is not None else 1.0
    for epoch in progress.track(range(schedule.epochs), "training"):
        order = torch.randperm(len(images), generator=generator)
        for index in torch.split(order, batch):
            inputs = images if batch >= len(images) else compute.put(images[index])
            targets = soft_labels if batch >= len(images) else compute.put(soft_labels[index])
            if views is not None:
                inputs, targets = _viewed(inputs, views, epoch, None if batch >= len(images) else index)
            if schedule.augment:
                inputs = augment(inputs, generator)
            with compute.autocast():
                loss = temperature**2 * objective(kind, network(inputs) / temperature, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if decay is not None:
                decay.step()
    return network.eval()


def _solved(
    network: nn.Module,
    images: Tensor,
    soft_labels: Tensor,
    *,
    kind: TaskKind,
    compute: Compute,
    views: ViewLabels | None,
    progress: Progress,
) -> nn.Module:
    network = network.to(compute.device).eval()
    assert isinstance(network, SolvedHead)
    images, soft_labels = pictures(images, views), picture_labels(soft_labels, views)
    parts = batches_of(images, compute)
    labels = torch.split(soft_labels, len(parts[0]))
    shown = progress.track(zip(parts, labels, strict=True), "solving", total=len(parts))
    solve_head(network, ((compute.put(x), compute.put(y)) for x, y in shown), images=len(images), kind=kind)
    return network


def _viewed(images: Tensor, views: ViewLabels, epoch: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """An epoch's crops of some images, and the labels of these crops; without an index, of all."""
    number, some = epoch % len(views), slice(None) if index is None else index
    return crop(images, views.boxes[number][some]), views.soft_labels[number][some].to(images)


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adam":
        return torch.optim.Adam(
            network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
    return torch.optim.SGD(
        network.parameters(),
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, *, kind: TaskKind, compute: Compute | None = None) -> Tensor:
    """Class probabilities of shape ``(n, k)`` on the CPU, computed in batches."""
    compute = compute or Compute()
    network.eval()
    batches = batches_of(images, compute)
    return torch.cat([probabilities(kind, network(compute.put(batch))).cpu() for batch in batches])


def batches_of(images: Tensor, compute: Compute) -> tuple[Tensor, ...]:
    """Images in the batches that forward passes without gradients are fastest in."""
    return cache_sized(images) if compute.device_type == "cpu" else torch.split(images, _DEVICE_BATCH)


def cache_sized(images: Tensor) -> tuple[Tensor, ...]:
    """Split images into batches whose activations stay in the processor's cache.

    For forward passes without gradients: four times faster on a CPU than batches of hundreds.
    """
    pixels = math.prod(images.shape[2:])
    return torch.split(images, max(1, _CACHED_PIXELS // pixels))
