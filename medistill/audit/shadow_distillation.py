"""Many small distillations at once, each of another half of the patients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.distill.decay import cosine
from medistill.distill.start import noise
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized

_DEVICE_IMAGES = 2048


@dataclass(frozen=True, kw_only=True)
class Shadows:
    """Some of the shadow releases.

    Args:
        numbers: Which they are, shape ``(g,)``.
        images: Shape ``(g, m, c, h, w)`` or ``(g, m, c, d, h, w)``.
        labels: Shape ``(g, m, k)``.
    """

    numbers: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class ShadowDistillation:
    r"""Distribution matching from noise, for all shadows together.

    For every shadow :math:`s`, a set of patients,

    .. math:: \min_{S_s} \sum_k \sum_c \lVert \tfrac{1}{|S_{s,c}|} \sum_{x \in S_{s,c}} \phi_k(x)
              - \mu_{k,s,c} \rVert^2

    The networks are the same for all shadows, so real images pass each network once: the class means of all
    shadows are the membership matrix times the features. The synthetic images of several shadows take their steps
    in one batch. Memory does not grow with the number of shadows, but for the class means.

    Args:
        networks: Random networks whose class means are matched.
        iterations: Steps on the synthetic images.
        rate: Adam step size, cosine-decayed to a hundredth.
        width: Width of the networks.
        most: Images of a shadow; with more classes than that, one a class.

    References:
        Zhao & Bilen, WACV 2023, arXiv:2110.04181.

    Privacy:
        Reads non-released data; its images are never released.
    """

    networks: int = 16
    iterations: int = 100
    rate: float = 0.05
    width: int = 16
    most: int = 20

    def __post_init__(self) -> None:
        if min(self.networks, self.iterations, self.width, self.most) < 1 or self.rate <= 0:
            raise ConfigError("Expected networks, iterations, width and most >= 1 and rate > 0.")

    def run(
        self, real: ImageSet, membership: Tensor, *, ipc: int, seed: int, compute: Compute, progress: Progress
    ) -> Iterator[Shadows]:
        """Distil every shadow; the same seed gives the same images whatever other shadows are beside it.

        Args:
            real: Images of all patients.
            membership: Which of ``real.unique_patients`` each shadow is distilled from, boolean ``(s, p)``.
            ipc: Images per class of the release that is imitated.
            seed: Public seed; shadow ``s`` starts from noise of its own.
            compute: Device of the networks.
            progress: Shows how far it is.

        Yields:
            A few shadows at a time, on the CPU.

        Raises:
            DataError: If a shadow has no patient of a class.
        """
        k, shape = real.task.n_classes, tuple(real.images.shape[1:])
        ipc = min(ipc, max(1, self.most // k))
        pool = [
            random_network(real.task, shape, self.width, derive_seed(seed, "network", i), compute)
            for i in range(self.networks)
        ]
        weights = image_weights(real, membership)
        labels = class_labels(real, weights)
        asked = progress.track(pool, "class means of shadows")
        means = torch.stack([class_means(real, weights, network, compute) for network in asked])
        sizes = cache_sized(real.images)[0] if compute.device_type == "cpu" else torch.empty(_DEVICE_IMAGES)
        at_once = max(1, len(sizes) // (k * ipc))
        groups = torch.split(torch.arange(len(membership)), at_once)
        for numbers in progress.track(groups, "shadow distillations"):
            start = torch.cat(
                [noise((k * ipc, *shape), seed=derive_seed(seed, "shadow", s)) for s in numbers.tolist()]
            )
            images = self._match(start, pool, means[:, numbers], compute)
            yield Shadows(
                numbers=numbers,
                images=images.view(len(numbers), k * ipc, *shape),
                labels=labels[numbers].repeat_interleave(ipc, dim=1),
            )

    def _match(self, start: Tensor, pool: list[ConvNet], means: Tensor, compute: Compute) -> Tensor:
        """Images of a group of shadows, from their class means ``(networks, g, k, d)``."""
        images, means = compute.put(start).requires_grad_(), compute.put(means)
        adam = torch.optim.Adam([images], lr=self.rate, betas=(0.9, 0.99))
        for step in range(self.iterations):
            adam.param_groups[0]["lr"] = self.rate * cosine(step / self.iterations, floor=0.01)
            wanted = means[step % self.networks]
            with compute.autocast():
                features = pool[step % self.networks].features(images)
            reached = features.float().view(*wanted.shape[:2], -1, wanted.shape[2]).mean(2)
            loss = (reached - wanted).square().sum(2).mean(1).sum()  # shadows do not share a gradient
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                images.clamp_(0.0, 1.0)
        return images.detach().cpu()


def random_network(task: Task, shape: tuple[int, ...], width: int, seed: int, compute: Compute) -> ConvNet:
    """A network with random weights that stay as they are."""

    def factory(task: Task, shape: tuple[int, ...]) -> nn.Module:
        return ConvNet(task, shape, width=width)

    network = fresh(factory, task, shape, seed)
    assert isinstance(network, ConvNet)
    compute.ready(network.requires_grad_(False))
    return network


def draw_membership(patients: int, shadows: int, seed: int) -> Tensor:
    """Fair coins of which every patient has exactly as many heads as tails, boolean ``(shadows, patients)``."""
    drawn = np.random.default_rng(seed).permuted(
        np.arange(shadows)[:, None].repeat(patients, 1) < shadows // 2, axis=0
    )
    return torch.from_numpy(drawn)


def image_weights(real: ImageSet, membership: Tensor) -> Tensor:
    """Weight of every image in every shadow, ``(s, n)``: one over its patient's images, or nothing."""
    of_image, counts = patient_numbers(real)
    return (membership.float() / counts)[:, of_image]


def patient_numbers(real: ImageSet) -> tuple[Tensor, Tensor]:
    """Position of each image's patient in ``unique_patients``, and the images of each patient."""
    numbers = {patient: number for number, patient in enumerate(real.unique_patients)}
    of_image = torch.tensor([numbers[patient] for patient in real.patients])
    return of_image, of_image.bincount(minlength=len(numbers)).float()


def class_labels(real: ImageSet, weights: Tensor) -> Tensor:
    """Mean targets of the images that have each class, in every shadow, ``(s, k, k)``.

    One-hot, but for a multilabel task.

    Raises:
        DataError: If a shadow has no patient of a class.
    """
    counts = weights @ real.targets
    if float(counts.min()) <= 0:
        rarest = int(counts.min(0).values.argmin())
        raise DataError(
            f"Class {real.task.class_names[rarest]!r} has {int((real.targets[:, rarest] > 0).sum())} images, and "
            "some shadow, which has half of the patients, got none: expected at least one in each. Audit with "
            "more patients of this class, or leave the class out of the task."
        )
    together = torch.stack([(weights * real.targets[:, c]) @ real.targets for c in range(real.task.n_classes)], 1)
    return together / counts[:, :, None]


@torch.no_grad()
def class_means(real: ImageSet, weights: Tensor, network: ConvNet, compute: Compute) -> Tensor:
    """Class means of features over the patients of every shadow, ``(s, k, d)``, from one pass over the images."""
    k, total = real.task.n_classes, torch.zeros(())
    batches = zip(*(_rows(real.images, part) for part in (real.images, real.targets, weights.T)), strict=True)
    for images, targets, weight in batches:
        features = network.features(compute.put(images)).float()
        each = compute.put((weight[:, :, None] * targets[:, None, :]).flatten(1))  # (b, s * k)
        total = total.to(features) + each.T @ features
    means = total.view(weights.shape[0], k, -1).cpu()
    return means / (weights @ real.targets)[:, :, None]


def _rows(images: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows that belong to images, split as the images are for a forward pass."""
    return torch.split(rows, len(cache_sized(images)[0]))
