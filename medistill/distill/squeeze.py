"""A teacher, trained on the real images: all that an inversion of it sees of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap

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
#: Checkpoints of a private training; between them the curator gives its answers again.
_SAVES = 10


@dataclass(frozen=True, kw_only=True)
class Squeeze:
    """Architecture and training of a teacher.

    Args:
        network: Registered name, or ``"auto"``: the ConvNet for sides below 64 px and the ResNet from there on;
            without BatchNorm always the ConvNet.
        width: Width; ``0`` is the network's own choice.
        depth: Depth; ``0`` is the network's own choice.
        norm: ``"batch"``, ``"group"`` or ``"instance"``.
        epochs: Passes over the real images.
        rate: Adam step size, cosine-decayed.
        batch: Real images per step.
        crop: Smallest share of the area of a random crop.
        mirror: Mirror left and right at random.
        private_steps: Noisy gradients under privacy, where ``epochs`` and ``batch`` are not used.
        sampling_rate: Probability with which each patient takes part in one.
        clip_norm: Longest gradient of a patient.
    """

    network: str
    width: int
    depth: int
    norm: str
    epochs: int
    rate: float
    batch: int
    crop: float
    mirror: bool
    private_steps: int
    sampling_rate: float
    clip_norm: float

    def factory(self) -> NetworkFactory:
        """Makes the untrained teacher."""

        def factory(task: Task, image_shape: tuple[int, ...]) -> nn.Module:
            name = self.network
            if name == "auto":
                name = "convnet" if self.norm != "batch" or min(image_shape[1:]) < _SMALL else "resnet"
            chosen = {"width": self.width} if self.width else {}
            make = NETWORKS.load(name)
            network: nn.Module = make(task, image_shape, depth=self.depth, norm=self.norm, **chosen)
            return network

        return factory


def squeeze(curator: Curator, *, settings: Squeeze, seed: int, bench: Workbench) -> nn.Module:
    """Train the teacher on random crops of the real images, equally many of every class in a batch.

    A private curator is asked for noisy gradients instead: see :func:`squeeze_privately`.

    Args:
        curator: Gives the images or gradients; the only door through which the data comes.
        settings: Architecture and training of the teacher.
        seed: Public seed.
        bench: Device, progress and checkpoint; a checkpoint is kept after every epoch.

    Returns:
        The teacher, frozen and in evaluation mode, on the device.

    Raises:
        ConfigError: If the network should have BatchNorm layers and has none.
        DataError: If a class has no image, or the training diverges.
    """
    if curator.noise(0) > 0:
        return squeeze_privately(curator, settings=settings, seed=seed, bench=bench)
    run = _Run(curator, settings, seed=seed, compute=bench.compute)
    done = run.restore(bench.checkpoint.load() or {})
    epochs = range(done, settings.epochs)
    for epoch in bench.progress.track(epochs, "squeezing", total=settings.epochs, completed=done):
        bench.progress.note(loss=run.epoch(epoch, curator.images()))
        bench.checkpoint.save(run.state(epoch + 1))
    return run.teacher.requires_grad_(False).eval()


def squeeze_privately(curator: Curator, *, settings: Squeeze, seed: int, bench: Workbench) -> nn.Module:
    r"""Train the teacher by DP-SGD whose unit is the patient: only noisy gradients come from the data.

    Every step asks for the sum over sampled patients of the clipped gradient of a patient's mean loss
    (:mod:`medistill.privacy.gradients`; faster here than the hooks of Opacus, which is used for accounting only).
    All images of a step are cropped by one box, which the public seed draws: what a patient adds depends on no
    other patient. Adam takes the gradient over noise and clip norm; its steps do not depend on the scale, so that
    no number of patients is needed.

    Args:
        curator: Gives gradients; its first queries are these.
        settings: Architecture and training of the teacher.
        seed: Public seed.
        bench: Device, progress and checkpoint.

    Returns:
        The teacher, frozen and in evaluation mode, on the device. It leans towards classes with more patients.

    Raises:
        PrivacyError: If the network ties images together, as BatchNorm does.
        DataError: If the training diverges.

    References:
        Abadi et al. 2016, arXiv:1607.00133.
    """
    run = _Run(curator, settings, seed=seed, compute=bench.compute)
    done, steps = run.restore(bench.checkpoint.load() or {}), settings.private_steps
    curator.resume(done)
    for step in bench.progress.track(range(done, steps), "squeezing", total=steps, completed=done):
        run.private_step(curator, step)
        if (step + 1) % math.ceil(steps / _SAVES) == 0 or step + 1 == steps:
            bench.checkpoint.save(run.state(step + 1))
    return run.teacher.requires_grad_(False).eval()


def squeezed_state(teacher: nn.Module, epochs: int) -> dict[str, Tensor]:
    """What a checkpoint keeps of a teacher, for :func:`squeeze` to find it again."""
    named = {f"{_TEACHER}{name}": value for name, value in teacher.state_dict().items()}
    return {"squeeze.epochs": torch.tensor(epochs), **named}


class _Run:
    """The teacher with what its training needs."""

    def __init__(self, curator: Curator, settings: Squeeze, *, seed: int, compute: Compute) -> None:
        teacher = fresh(settings.factory(), curator.task, curator.image_shape, derive_seed(seed, "teacher"))
        if settings.norm == "batch" and not has_norms(teacher):
            raise ConfigError(f"Expected a teacher with BatchNorm layers; {settings.network!r} has none.")
        self.teacher = teacher.to(compute.device)
        self._settings, self._compute, self._kind = settings, compute, curator.task.kind
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

    def private_step(self, curator: Curator, step: int) -> None:
        """One step of Adam along a noisy gradient."""
        settings = self._settings
        box = random_boxes(1, len(curator.image_shape) - 1, self._generator, smallest=settings.crop)
        answer = curator.gradient(
            _Cropped(self.teacher, box),
            vmap(partial(objective, self._kind)),
            clip_norm=settings.clip_norm,
            sampling_rate=settings.sampling_rate,
        )
        scale = settings.clip_norm * curator.noise(step)
        for name, parameter in self.teacher.named_parameters():
            parameter.grad = answer[f"network.{name}"] / scale
        check_finite(answer.values(), distiller="sre2l", step=step, remedy="Lower teacher_rate.")
        self._adam.param_groups[0]["lr"] = settings.rate * cosine(step / settings.private_steps, floor=0.0)
        self._adam.step()

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


class _Cropped(nn.Module):
    """A network that sees one part of every image."""

    def __init__(self, network: nn.Module, box: Tensor) -> None:
        super().__init__()
        self.network, self._box = network, box

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(crop(images, self._box.expand(len(images), -1)))
        return logits
