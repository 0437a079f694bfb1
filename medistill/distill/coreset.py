"""Real images chosen by a rule: baselines every distillation must beat. Their release *is* patients' images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule
from medistill.core.guarantee import PrivacyPlan
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task
from medistill.distill.start import Pick, choose_images, needs_images, random_images
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.fit import fit

SELECTIONS = ("random", "herding", "k_center")
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Coreset:
    r"""Choose ``ipc`` real images of every class, each of a different patient where possible.

    ``random`` draws them. The others look at features :math:`\phi` of length one under a ConvNet trained for a few
    epochs on all images, and choose one after the other among the images of a class:

    - ``herding`` keeps the mean of the chosen near the mean :math:`\mu` of the class,
      :math:`x_j = \arg\min_x \lVert \mu - \tfrac1j (\phi(x) + \sum_{i<j} \phi(x_i)) \rVert`;
    - ``k_center`` takes the image farthest from the chosen,
      :math:`x_j = \arg\max_x \min_{i<j} \lVert \phi(x) - \phi(x_i) \rVert`, beginning with the one nearest to
      :math:`\mu`.

    An image with several labels is chosen for one of them, which becomes its hard label.

    Where it deviates: patients come before images, as said; k-center works within classes and begins at their
    middle instead of with labelled images that are there already.

    Args:
        selection: ``"random"``, ``"herding"`` or ``"k_center"``.
        epochs: Epochs for which the network is trained (Adam 1e-3, batches of 64); ``0`` takes random weights.
        width: Width of the network.

    Raises:
        ConfigError: If the selection is unknown or a number is out of range.

    References:
        Welling 2009, Herding dynamical weights to learn; Rebuffi et al. 2017 (iCaRL), arXiv:1611.07725. Sener &
        Savarese 2018, arXiv:1708.00489.

    Privacy:
        The result consists of real images; a release made of it gives patients away, and the audit says so.
    """

    selection: str = "random"
    epochs: int = 4
    width: int = 32

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ConfigError(f"Expected selection to be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.epochs < 0 or self.width < 1:
            raise ConfigError(f"Expected epochs >= 0 and width >= 1, got {self.epochs} and {self.width}.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Refused: it needs the images themselves.

        Raises:
            PrivacyError: Always.
        """
        raise needs_images("coreset")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Choose the images; ``start`` is not needed."""
        images = curator.images()
        if self.selection == "random":
            chosen = random_images(images, ipc=ipc, seed=seed)
        else:
            rule = herding if self.selection == "herding" else k_center
            network = self._network(images, seed, bench)

            def picker(members: Tensor) -> Pick:
                return rule(_features(network, images.images, members, bench.compute))

            chosen = images.select(choose_images(images, ipc=ipc, seed=seed, picker=picker))
        hard = torch.arange(images.task.n_classes).repeat_interleave(ipc)
        return Synthetic(images=chosen.images, soft_labels=chosen.targets, hard_labels=hard)

    def _network(self, images: ImageSet, seed: int, bench: Workbench) -> ConvNet:
        def factory(task: Task, shape: tuple[int, ...]) -> ConvNet:
            return ConvNet(task, shape, width=self.width)

        shape = tuple(images.images.shape[1:])
        network = fresh(factory, images.task, shape, derive_seed(seed, "coreset"))
        if self.epochs:
            schedule = Schedule(epochs=self.epochs, learning_rate=1e-3, optimizer="adam", batch_size=64)
            fit(
                network,
                images.images,
                images.targets,
                kind=images.task.kind,
                schedule=schedule,
                seed=derive_seed(seed, "coreset", "order"),
                compute=bench.compute,
                progress=bench.progress,
            )
        assert isinstance(network, ConvNet)
        return network


def herding(features: Tensor) -> Pick:
    """Rule that keeps the mean of the chosen rows near the mean of all rows.

    Args:
        features: Shape ``(n, d)``.
    """
    mean, norms = features.mean(0), features.square().sum(1)

    def pick(candidates: Tensor, picked: list[int]) -> int:
        missing = (len(picked) + 1) * mean - features[picked].sum(0)
        rows = features[candidates]
        return int(candidates[(norms[candidates] - 2 * rows @ missing).argmin()])

    return pick


def k_center(features: Tensor) -> Pick:
    """Rule that takes the row farthest from the chosen ones; the first is the one nearest to the mean.

    Args:
        features: Shape ``(n, d)``.
    """
    nearest = torch.full((len(features),), torch.inf)

    def pick(candidates: Tensor, picked: list[int]) -> int:
        if not picked:
            return int(candidates[(features[candidates] - features.mean(0)).square().sum(1).argmin()])
        latest = (features - features[picked[-1]]).square().sum(1)
        torch.minimum(nearest, latest, out=nearest)
        return int(candidates[nearest[candidates].argmax()])

    return pick


@torch.no_grad()
def _features(network: ConvNet, images: Tensor, members: Tensor, compute: Compute) -> Tensor:
    """Features of length one of some images, on the CPU, shape ``(len(members), d)``."""
    network.eval().to(compute.device)
    batches = (compute.put(images[batch]) for batch in torch.split(members, _BATCH))
    return torch.cat([F.normalize(network.features(batch)).cpu() for batch in batches])
