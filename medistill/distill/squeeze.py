"""A teacher with BatchNorm layers, trained on the real images: all that an inversion of it sees of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, NetworkFactory, Workbench
from medistill.core.task import Task
from medistill.distill.batches import balanced_batch, groups
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.finite import check_finite
from medistill.distill.norm_statistics import average_from_now_on, has_norms
from medistill.errors import ConfigError
from medistill.registry import NETWORKS
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import objective
from medistill.training.views import crop, mirrored, random_boxes

#: Below this side the automatic teacher is a ConvNet.
_SMALL = 64
_TEACHER = "teacher."


@dataclass(frozen=True, kw_only=True)
class Squeeze:
    """Architecture and training of a teacher.

    Args:
        network: Registered name, or ``"auto"``: the ConvNet for sides below 64 px and the ResNet from there on.
        width: Width; ``0`` is the network's own choice.
        depth: Depth; ``0`` is the network's own choice.
        epochs: Passes over the real images.
        rate: Adam step size, cosine-decayed.
        batch: Real images per step.
        crop: Smallest share of the area of a random crop.
        mirror: Mirror left and right at random.
    """

    network: str
    width: int
    depth: int
    epochs: int
    rate: float
    batch: int
    crop: float
    mirror: bool

    def factory(self) -> NetworkFactory:
        """Makes the untrained teacher."""

        def factory(task: Task, image_shape: tuple[int, ...]) -> nn.Module:
            name = self.network
            if name == "auto":
                name = "convnet" if min(image_shape[1:]) < _SMALL else "resnet"
            chosen = {"width": self.width} if self.width else {}
            network: nn.Module = NETWORKS.load(name)(task, image_shape, depth=self.depth, norm="batch", **chosen)
            return network

        return factory


def squeeze(curator: Curator, *, settings: Squeeze, seed: int, bench: Workbench) -> nn.Module:
    """Train the teacher on random crops of the real images, equally many of every class in a batch.

    Args:
        curator: Gives the images; the only door through which the data comes.
        settings: Architecture and training of the teacher.
        seed: Public seed.
        bench: Device, progress and checkpoint; a checkpoint is kept after every epoch.

    Returns:
        The teacher, frozen and in evaluation mode, on the device.

    Raises:
        ConfigError: If the network has no BatchNorm layer.
        DataError: If a class has no image, or the training diverges.
    """
    run = _Run(curator, settings, seed=seed, compute=bench.compute)
    done = run.restore(bench.checkpoint.load() or {})
    epochs = range(done, settings.epochs)
    for epoch in bench.progress.track(epochs, "squeezing", total=settings.epochs, completed=done):
        bench.progress.note(loss=run.epoch(epoch, curator.images()))
        bench.checkpoint.save(run.state(epoch + 1))
    return run.teacher.requires_grad_(False).eval()


def squeezed_state(teacher: nn.Module, epochs: int) -> dict[str, Tensor]:
    """What a checkpoint keeps of a teacher, for :func:`squeeze` to find it again."""
    named = {f"{_TEACHER}{name}": value for name, value in teacher.state_dict().items()}
    return {"squeeze.epochs": torch.tensor(epochs), **named}


class _Run:
    """The teacher with what its training needs."""

    def __init__(self, curator: Curator, settings: Squeeze, *, seed: int, compute: Compute) -> None:
        teacher = fresh(settings.factory(), curator.task, curator.image_shape, derive_seed(seed, "teacher"))
        if not has_norms(teacher):
            raise ConfigError(f"Expected a teacher with BatchNorm layers; {settings.network!r} has none.")
        self.teacher = teacher.to(compute.device)
        self._settings, self._compute = settings, compute
        self._adam = torch.optim.Adam(teacher.parameters(), lr=settings.rate)
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "squeeze"))

    def epoch(self, epoch: int, real: ImageSet) -> float:
        """One pass over the real images; the mean loss."""
        kinds = len(groups(real))
        per_class = max(1, self._settings.batch // kinds)
        steps = math.ceil(len(real) / (per_class * kinds))
        total = 0.0
        self.teacher.train()
        if epoch == self._settings.epochs - 1:
            average_from_now_on(self.teacher)
        for step in range(steps):
            done = (epoch + step / steps) / self._settings.epochs
            self._adam.param_groups[0]["lr"] = self._settings.rate * cosine(done, floor=0.0)
            images, targets = map(self._compute.put, balanced_batch(real, per_class, self._generator))
            with self._compute.autocast():
                loss = objective(real.task.kind, self.teacher(self._changed(images)), targets)
            check_finite((loss,), distiller="sre2l", step=step, remedy="Lower teacher_rate.")
            self._adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._adam.step()
            total += loss.item() / steps
        return total

    def _changed(self, images: Tensor) -> Tensor:
        boxes = random_boxes(len(images), images.ndim - 2, self._generator, smallest=self._settings.crop)
        changed = augment(crop(images, boxes), self._generator)
        return mirrored(changed, self._generator) if self._settings.mirror else changed

    def state(self, epochs: int) -> dict[str, Tensor]:
        training = {"squeeze.generator": self._generator.get_state(), **pack_optimizer(self._adam, "squeeze.adam")}
        return {**squeezed_state(self.teacher, epochs), **training}

    def restore(self, kept: Mapping[str, Tensor]) -> int:
        if not kept:
            return 0
        self.teacher.load_state_dict(
            {name.removeprefix(_TEACHER): value for name, value in kept.items() if name.startswith(_TEACHER)}
        )
        if "squeeze.generator" in kept:
            self._generator.set_state(kept["squeeze.generator"])
            unpack_optimizer(self._adam, kept, "squeeze.adam")
        return int(kept["squeeze.epochs"])
