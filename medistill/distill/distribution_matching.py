"""Distribution matching on cached class means (Zhao & Bilen 2023), from noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.guarantee import PrivacyPlan
from medistill.core.protocols import Curator, Embed, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.formation import check_formation, formed, initial_formation, labels_of_tiles
from medistill.distill.moments import Teacher, ask_moments, moments_plan
from medistill.distill.start import check_init, initial
from medistill.errors import ConfigError, DataError, PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized
from medistill.training.views import tiles


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    r"""Match the class means of random network features.

    For random networks :math:`\phi_k`, fixed in number and drawn once,

    .. math:: \min_S \sum_k \sum_c \lVert \tfrac{1}{|S_c|} \sum_{s \in S_c} \phi_k(s) - \mu_{k,c} \rVert^2

    where :math:`\mu_{k,c}` is the mean over patients. The data is touched once per network, by one sum over
    patients; every later step works on the cached means. In a multilabel task a class is the images that have it,
    and a synthetic image's soft label is their mean label, from one more sum.

    Where it deviates: DM draws a new network and a new real batch at each step, starts from real images and uses
    SGD; cached means are 25 times cheaper a step at the same result, and the start is noise.

    Args:
        networks: Random networks whose class means are matched.
        iterations: Steps on the synthetic images.
        rate: Adam step size, cosine-decayed to a hundredth.
        formation: Tiles along one side of an image, see :mod:`medistill.distill.formation`; 1 for none.
        init: ``"noise"`` or ``"real"``.
        width: Width of the networks.
        dimension: Most public features that a private curator is asked for.
        checkpoint_every: Steps between checkpoints.

    References:
        Zhao & Bilen, WACV 2023, arXiv:2110.04181.

    Privacy:
        Asks the curator for sums over patients only. A private curator is asked for two sums instead of one per
        network (:mod:`medistill.distill.moments`): the images match the class means of up to ``dimension`` public
        features, and have the soft labels of linear discriminants that follow from the same two answers.
    """

    networks: int = 15
    iterations: int = 1000
    rate: float = 0.01
    formation: int = 1
    init: str = "noise"
    width: int = 32
    dimension: int = 128
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        check_init(self.init)
        check_formation(self.formation)
        if min(self.networks, self.iterations, self.width, self.checkpoint_every) < 1 or self.rate <= 0:
            raise ConfigError("Expected networks, iterations, width and checkpoint_every >= 1 and rate > 0.")
        if self.dimension < 2:
            raise ConfigError(f"Expected dimension >= 2, got {self.dimension}.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Two sums.

        Raises:
            PrivacyError: If the start is real, or images are to be mosaics.
        """
        if self.init == "real" or self.formation > 1:
            raise PrivacyError("Under differential privacy expected init 'noise' and formation 1.")
        return moments_plan()

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Ask for the class means once, then match them; resumes with the same bits."""
        if curator.noise(0) > 0:
            return self._distill_privately(curator, ipc=ipc, seed=seed, start=start, bench=bench)
        first = initial_formation(
            curator, formation=self.formation, init=self.init, ipc=ipc, seed=seed, start=start
        )
        pool = [self._network(curator, derive_seed(seed, "network", k), bench) for k in range(self.networks)]
        images = bench.compute.put(first.images.clone()).requires_grad_()
        adam = torch.optim.Adam([images], lr=self.rate, betas=(0.9, 0.99))
        kept = bench.checkpoint.load()
        done, labels = 0, labels_of_tiles(first, self.formation)
        if kept is None:
            asked = bench.progress.track(pool, "class means")
            means = torch.stack([class_means(curator, network, bench.compute) for network in asked])
            if start is None and curator.task.kind is TaskKind.MULTILABEL:
                labels = label_means(curator).repeat_interleave(len(labels) // curator.task.n_classes, dim=0)
        else:
            means, labels, done = bench.compute.put(kept["means"]), kept["labels"], int(kept["step"])
            images.data.copy_(kept["images"])
            unpack_optimizer(adam, kept, "adam")

        def state(step: int) -> dict[str, Tensor]:
            counted = {"step": torch.tensor(step), "images": images, "means": means, "labels": labels}
            return {**counted, **pack_optimizer(adam, "adam")}

        def current() -> Synthetic:
            now = images.detach().cpu().clone()
            return formed(now, labels, first.hard_labels, formation=self.formation)

        def loss(step: int) -> Tensor:
            k = step % self.networks
            with bench.compute.autocast():
                features = pool[k].features(tiles(images, self.formation))
            return matching_loss(features.float(), means[k])

        self._match(images, adam, loss, done=done, state=state, current=current, bench=bench)
        return current()

    def _distill_privately(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Match noisy class means of public features; the curator gives the same answers again after a break."""
        moments = ask_moments(curator, dimension=self.dimension, compute=bench.compute)
        teacher = Teacher(moments, kind=curator.task.kind)
        means = (moments.sums / moments.counts[:, None]).to(moments.centre)
        first = initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        images = bench.compute.put(first.images.clone()).requires_grad_()
        adam = torch.optim.Adam([images], lr=self.rate, betas=(0.9, 0.99))
        kept, done = bench.checkpoint.load(), 0
        if kept is not None:
            done = int(kept["step"])
            images.data.copy_(kept["images"])
            unpack_optimizer(adam, kept, "adam")

        def state(step: int) -> dict[str, Tensor]:
            return {"step": torch.tensor(step), "images": images, **pack_optimizer(adam, "adam")}

        def current() -> Synthetic:
            now = images.detach().clone()
            return Synthetic(images=now.cpu(), soft_labels=teacher.soft_labels(now), hard_labels=first.hard_labels)

        def loss(step: int) -> Tensor:
            return matching_loss(moments.centred(images), means)

        self._match(images, adam, loss, done=done, state=state, current=current, bench=bench)
        return current()

    def _match(
        self,
        images: Tensor,
        adam: torch.optim.Adam,
        loss_of: Callable[[int], Tensor],
        *,
        done: int,
        state: Callable[[int], dict[str, Tensor]],
        current: Callable[[], Synthetic],
        bench: Workbench,
    ) -> None:
        """Descend the loss of every step from here to the last."""
        for step in bench.steps(
            done, self.iterations, "matching", every=self.checkpoint_every, state=state, current=current
        ):
            adam.param_groups[0]["lr"] = self.rate * cosine(step / self.iterations, floor=0.01)
            loss = loss_of(step)
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                images.clamp_(0.0, 1.0)
            bench.progress.note(loss=loss.item())

    def _network(self, curator: Curator, seed: int, bench: Workbench) -> ConvNet:
        def factory(task: Task, shape: tuple[int, ...]) -> nn.Module:
            return ConvNet(task, shape, width=self.width)

        network = fresh(factory, curator.task, curator.image_shape, seed)
        assert isinstance(network, ConvNet)
        bench.compute.ready(network.requires_grad_(False))
        return network


def matching_loss(features: Tensor, means: Tensor) -> Tensor:
    """Squared distance of the synthetic class means to the real ones, averaged over classes.

    Args:
        features: Shape ``(k * n, d)``, class after class.
        means: Shape ``(k, d)``.
    """
    gap = features.view(len(means), -1, features.shape[1]).mean(1) - means
    return gap.square().sum(1).mean()


def class_means(curator: Curator, network: ConvNet, compute: Compute) -> Tensor:
    """Class means of features over patients, shape ``(k, d)``, from one sum.

    Each patient contributes, for each class, the mean of the features of their images of that class weighted by
    the share of such images.

    Raises:
        DataError: If a class has no image.
    """
    k = curator.task.n_classes
    total = curator.sum(_embedding(network, compute))
    sums, counts = total[:-k].view(k, -1), total[-k:]
    for name, count in zip(curator.task.class_names, counts.tolist(), strict=True):
        if count <= 0:
            raise DataError(f"Class {name!r} has no image among those to distil: expected one of every class.")
    return sums / counts[:, None]


def label_means(curator: Curator) -> Tensor:
    """Mean targets of the images that have each class of a multilabel task, shape ``(k, k)``, from one sum."""
    k = curator.task.n_classes

    def embed(images: Tensor, targets: Tensor) -> Tensor:
        return (targets[:, :, None] * targets[:, None, :]).flatten(1)

    together = curator.sum(embed).view(k, k).cpu()
    return together / together.diagonal().clamp_min(1e-6)[:, None]


def _embedding(network: ConvNet, compute: Compute) -> Embed:
    def embed(images: Tensor, targets: Tensor) -> Tensor:
        features = torch.cat([network.features(compute.put(part)) for part in cache_sized(images)])
        targets = compute.put(targets)
        weighted = targets[:, :, None] * features[:, None, :]
        return torch.cat([weighted.flatten(1), targets], dim=1)

    return embed
