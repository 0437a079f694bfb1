"""A made-up cohort from two private sums, distilled by ridge regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule
from medistill.core.guarantee import PrivacyPlan
from medistill.core.images import ImageSet
from medistill.core.protocols import Checkpoint, Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.decay import cosine
from medistill.distill.formation import check_formation
from medistill.distill.kernel_ridge import KernelRidge
from medistill.distill.moments import Moments, Teacher, ask_moments, moments_plan
from medistill.distill.public_features import pink_noise
from medistill.errors import ConfigError
from medistill.privacy.curator import OpenCurator
from medistill.seeds import derive_seed

#: Fixed beforehand: a private method looks at no validation patient.
SCHEDULE = Schedule(epochs=600, learning_rate=0.03, weight_decay=0.01)
#: The fields that made-up images begin as are rather smooth, as radiographs are.
_POWERS = (1.5, 2.2)
_BATCH = 100
_BEGUN, _INNER = "made_up", "refined."


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    r"""Make up a cohort from noisy moments, label it by a noisy classifier, and distil that.

    The curator is asked for two sums over patients (:mod:`medistill.distill.moments`): the mean, then the class
    moments of centred public features :math:`v`. The rest follows from the answers: linear discriminants are the
    teacher; features :math:`t_i` are drawn from a Gaussian around every class mean, in those directions whose
    eigenvalue is above what noise alone gives; pink noise is turned into images :math:`x_i` by

    .. math:: \min_{x_i} \lVert u(x_i) - t_i \rVert^2

    where :math:`u` are the features before centring and :math:`t_i` is moved back by the centre; the teacher
    labels them, and :class:`~medistill.distill.kernel_ridge.KernelRidge` distils them as if they were patients.

    Args:
        dimension: Most features; fewer are taken where the noise is large for the smallest class.
        made_up: Made-up images per class.
        drawing: Steps on the made-up images.
        rate: Adam step size of the made-up images, cosine-decayed to zero.
        sharpness: Factor of the teacher's scores.
        least_variance: Directions of features with a smaller variance are left out and penalised like noise, also
            where the noise is smaller: fine detail of one hospital's films serves no other.
        iterations: Steps of ridge regression.
        formation: Tiles along one side of an image, see :mod:`medistill.distill.formation`; 1 for none.
        width: Width of its networks.
        init: ``"noise"``; there is no other start.
        checkpoint_every: Steps between checkpoints.

    References:
        Tramer & Boneh 2021, arXiv:2011.11660 (private linear classifiers of public features). Harder, Adamczewski
        & Park 2021 (DP-MERF), arXiv:2002.11603 (one sealed mean of features). Zhou et al. 2022, arXiv:2206.00719.

    Privacy:
        Two sums over patients; every patient's rows have a length known beforehand. All else is post-processing.
    """

    dimension: int = 128
    made_up: int = 1000
    drawing: int = 150
    rate: float = 0.1
    sharpness: float = 2.0
    least_variance: float = 0.005
    iterations: int = 600
    formation: int = 2
    width: int = 32
    init: str = "noise"
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.init != "noise":
            raise ConfigError(f"A made-up cohort starts from noise; expected init 'noise', got {self.init!r}.")
        check_formation(self.formation)
        whole = (self.made_up, self.drawing, self.iterations, self.width, self.checkpoint_every)
        if min(whole) < 1 or self.dimension < 2 or min(self.rate, self.sharpness) <= 0:
            raise ConfigError(
                "Expected made_up, drawing, iterations, width and checkpoint_every >= 1, dimension >= 2, and rate "
                "and sharpness > 0."
            )
        if not 0 <= self.least_variance < 1:
            raise ConfigError(f"Expected 0 <= least_variance < 1, got {self.least_variance}.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Two sums."""
        return moments_plan()

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Ask for the moments, make up a cohort, distil it; resumes with the same bits."""
        kept = bench.checkpoint.load() or {}
        if "targets" not in kept:
            moments = ask_moments(curator, dimension=self.dimension, compute=bench.compute)
            cohort = self._cohort(moments, curator.task, curator.image_shape, seed, bench, kept.get(_BEGUN))
            kept = {"images": cohort.images, "targets": cohort.targets}
            bench.checkpoint.save(kept)
        else:
            curator.resume(moments_plan().total)
        patients = tuple(str(number) for number in range(len(kept["images"])))
        cohort = ImageSet(images=kept["images"], targets=kept["targets"], patients=patients, task=curator.task)
        ridge = KernelRidge(
            iterations=self.iterations,
            formation=self.formation,
            width=self.width,
            checkpoint_every=self.checkpoint_every,
        )
        inner = replace(bench, checkpoint=_Inner(bench.checkpoint, {k: kept[k] for k in ("images", "targets")}))
        result = ridge.distill(OpenCurator(cohort), ipc=ipc, seed=seed, start=start, bench=inner)
        return replace(result, schedule=SCHEDULE)

    def _cohort(
        self,
        moments: Moments,
        task: Task,
        image_shape: tuple[int, ...],
        seed: int,
        bench: Workbench,
        begun: Tensor | None,
    ) -> ImageSet:
        """Images that have features drawn from the moments, with the teacher's labels; goes on after ``begun``."""
        teacher = Teacher(moments, kind=task.kind, sharpness=self.sharpness, least_variance=self.least_variance)
        generator = torch.Generator().manual_seed(derive_seed(seed, "surrogate"))
        wanted = moments.uncentred(teacher.draw(self.made_up, generator))
        first = pink_noise(len(wanted), image_shape, seed=derive_seed(seed, "pink noise"), powers=_POWERS)
        parts = list(zip(torch.split(first, _BATCH), torch.split(wanted, _BATCH), strict=True))
        images = torch.empty((0, *image_shape)) if begun is None else begun
        done = len(images) // _BATCH
        left = bench.progress.track(parts[done:], "making up patients", total=len(parts), completed=done)
        for part in left:
            images = torch.cat([images, self._drawn(moments, *part, bench.compute)])
            bench.checkpoint.save({_BEGUN: images})
        hard = torch.arange(task.n_classes).repeat_interleave(self.made_up)
        targets = every_class(teacher.soft_labels(images), hard, task)
        patients = tuple(str(number) for number in range(len(images)))
        return ImageSet(images=images, targets=targets, patients=patients, task=task)

    def _drawn(self, moments: Moments, first: Tensor, wanted: Tensor, compute: Compute) -> Tensor:
        free = compute.put(first.clone()).requires_grad_()
        adam = torch.optim.Adam([free], lr=self.rate, betas=(0.9, 0.99))
        for step in range(self.drawing):
            adam.param_groups[0]["lr"] = self.rate * cosine(step / self.drawing, floor=0.0)
            loss = (moments.uncentred_features(smooth(free)) - wanted).square().sum()
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        images = smooth(free.detach())
        flat = images.flatten(1)
        spread = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)
        return (0.5 + 0.17 * spread).clamp(0.0, 1.0).view_as(images).cpu()


class _Inner:
    """The checkpoint of the ridge regression, kept together with the made-up cohort."""

    def __init__(self, whole: Checkpoint, cohort: Mapping[str, Tensor]) -> None:
        self._whole, self._cohort = whole, cohort

    def load(self) -> dict[str, Tensor] | None:
        kept = self._whole.load() or {}
        inner = {name.removeprefix(_INNER): value for name, value in kept.items() if name.startswith(_INNER)}
        return inner or None

    def save(self, state: Mapping[str, Tensor]) -> None:
        self._whole.save({**self._cohort, **{_INNER + name: value for name, value in state.items()}})


def smooth(images: Tensor) -> Tensor:
    """Binomial blur of three pixels along every axis: neighbouring pixels of a radiograph are alike."""
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        padded = torch.cat([images.narrow(axis, 0, 1), images, images.narrow(axis, side - 1, 1)], dim=axis)
        images = (padded.narrow(axis, 0, side) + 2 * images + padded.narrow(axis, 2, side)) / 4
    return images


def every_class(targets: Tensor, drawn_for: Tensor, task: Task) -> Tensor:
    """Soft labels in which every class is the most probable one of some image, or has some image above a half.

    Where the teacher gives a class to nobody, the images drawn for it have it.

    Args:
        targets: Shape ``(n, k)``.
        drawn_for: Class that each image was drawn for, shape ``(n,)``.
        task: What is diagnosed.
    """
    multilabel = task.kind is TaskKind.MULTILABEL
    own = F.one_hot(drawn_for, task.n_classes).to(targets)
    has = targets > 0.5 if multilabel else F.one_hot(targets.argmax(1), task.n_classes) > 0
    missing = (~has.any(0))[drawn_for][:, None]
    mixed = torch.maximum(targets, 0.51 * own) if multilabel else 0.49 * targets + 0.51 * own
    return torch.where(missing, mixed, targets)
