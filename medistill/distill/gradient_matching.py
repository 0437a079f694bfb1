"""Gradient matching: dataset condensation, its siamese augmentation, and matching of noisy gradients (PSG)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import vmap

from medistill.core.compute import Compute, fresh
from medistill.core.guarantee import PrivacyPlan, Query, QueryKind
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.batches import class_batch
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.finite import check_finite
from medistill.distill.labels import MOST_LABELS
from medistill.distill.start import check_init, initial
from medistill.errors import ConfigError, PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import objective

#: Published matching steps for each network, and epochs of training between two of them, by images per class.
PUBLISHED_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
_TRAINING_BATCH = 256
_FEW_STEPS = 200  # matching steps of a run whose number of iterations is not set
_SEEDS = 1 << 62
_REMEDY = "Lower network_rate, rate or inner."
_COUNTS_NOISE = 10.0  # of the one count, relative to every gradient's
_ASSUMPTIONS = (
    "Fresh networks, their training and the images follow from a public seed and the noisy answers alone.",
    "Clip norm, sampling rate and number of matching steps were fixed without looking at these patients.",
)


@dataclass(frozen=True, kw_only=True)
class GradientMatching:
    r"""Make synthetic images pull a network's weights in the direction in which real images pull them.

    Every iteration begins with a fresh network. For each class :math:`c`, with a real batch :math:`T_c` and the
    synthetic images :math:`S_c` of that class, the images descend

    .. math:: \sum_c D\big(\nabla_\theta \ell(S_c; \theta), \nabla_\theta \ell(T_c; \theta)\big), \qquad
        D(A, B) = \sum_{\text{layers}} \sum_{i} \Big(1 - \frac{A_i \cdot B_i}{\lVert A_i \rVert
        \lVert B_i \rVert}\Big)

    where :math:`A_i` is the gradient of all weights into output unit :math:`i` of a layer; biases and the scales
    of normalisation are left out. Between ``outer`` such steps the network is trained for ``inner`` epochs on the
    synthetic set. With ``siamese`` (DSA) one augmentation is drawn for each class and step and given to the real
    and the synthetic images alike, and the network is trained on augmented images too; without it this is DC. On
    chest radiographs DC was the better of the two with one image per class (AUROC .900 against .795, from noise)
    and as good with ten (.919 and .921), so it is the default.

    Where it deviates: the defaults are for a few minutes of one processor: 200 matching steps in all, 32 real
    images, and 5 epochs between steps where 50 are published for ten images; the start is noise for DSA too; the
    augmentation is that of :mod:`medistill.training.augment`, without mirroring, cutout and colours; real images
    are drawn with replacement; pixels are projected to ``[0, 1]`` after each step. Images have a standard
    deviation of about .25 here and of 1 there, so that the published step size of .1 is .1 x .25^2 here: the
    default is 16 times longer. As published: ``iterations=1000, inner=0, batch_per_class=256, rate=0.00625``,
    ``width=128``, and for DSA ``siamese=True, init="real"``.

    In a multilabel task the real batch of a class are images that have it, with all their labels. Images without
    any label belong to no class and are not drawn.

    A private curator is asked once how many patients each class has, and at every matching step for

    .. math:: G = \sum_{p \in B} \operatorname{clip}_C\Big(\nabla_\theta \tfrac{1}{n_p} \sum_j
        \ell(x_{pj}; \theta)\Big) + \sigma C \, \mathcal{N}(0, I)

    over the weights that are matched, with each patient in :math:`B` at the ``sampling_rate``. One gradient of a
    patient holds all classes: a query for each class would ask as many times for the same privacy. So the images
    descend one distance :math:`D\big(\sum_c w_c \nabla_\theta \ell(S_c; \theta), G / q \hat n\big)`, in which
    the classes weigh what they weigh among patients by the noisy counts :math:`\hat n`. Networks are trained on
    the synthetic images only. This is PSG with the patient as its unit; there, images are sampled and clipped.

    Args:
        iterations: Fresh networks; ``0`` are as many as make 200 matching steps.
        outer: Matching steps on each network; ``0`` is the published number for the images per class (see
            :data:`PUBLISHED_LOOPS`; in between, that of the next smaller).
        inner: Epochs on the synthetic set between two matching steps; ``0`` is the published number.
        batch_per_class: Real images per class and matching step.
        optimizer: ``"sgd"`` or ``"adam"``, of the images.
        rate: Step size of the images.
        momentum: Of SGD; Adam has betas 0.5 and 0.999.
        network_rate: SGD step size of the network.
        siamese: The same augmentation for real and synthetic images (DSA).
        init: ``"noise"`` or ``"real"``.
        width: Width of the ConvNet.
        sampling_rate: Probability with which each patient takes part in a matching step under privacy, where
            ``batch_per_class`` is not used.
        clip_norm: Longest gradient of a patient under privacy; most are longer, and only directions are matched.
        checkpoint_every: Iterations between checkpoints.

    References:
        Zhao, Mopuri, Bilen, ICLR 2021, arXiv:2006.05929. Zhao & Bilen, ICML 2021, arXiv:2102.08259. Chen,
        Kerkouche, Fritz, NeurIPS 2022, arXiv:2211.04446 (PSG).

    Privacy:
        With an open curator it needs raw images, and nothing is proved about the result. A private curator is
        asked for one sum and as many noisy gradients as there are matching steps; all else is post-processing.
    """

    iterations: int = 0
    outer: int = 0
    inner: int = 5
    batch_per_class: int = 32
    optimizer: str = "sgd"
    rate: float = 0.1
    momentum: float = 0.5
    network_rate: float = 0.01
    siamese: bool = False
    init: str = "noise"
    width: int = 32
    sampling_rate: float = 0.05
    clip_norm: float = 0.1
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        check_init(self.init)
        if min(self.batch_per_class, self.width, self.checkpoint_every) < 1:
            raise ConfigError("Expected batch_per_class, width and checkpoint_every >= 1.")
        if min(self.iterations, self.outer, self.inner) < 0 or min(self.rate, self.network_rate) <= 0:
            raise ConfigError("Expected iterations, outer and inner >= 0, rate and network_rate > 0.")
        if self.optimizer not in ("sgd", "adam") or not 0 <= self.momentum < 1:
            raise ConfigError("Expected optimizer 'sgd' or 'adam' and momentum in [0, 1).")
        if not 0 < self.sampling_rate <= 1 or not 0 < self.clip_norm < math.inf:
            raise ConfigError("Expected sampling_rate in (0, 1] and a finite clip_norm > 0.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """One sum, and a gradient for every matching step.

        Raises:
            PrivacyError: If the start is real, or real images are to be augmented like synthetic ones.
        """
        if self.init == "real" or self.siamese:
            raise PrivacyError(
                "gradient_matching under differential privacy: expected init 'noise' and siamese false. Real "
                "starts and augmented real batches need the images themselves."
            )
        return PrivacyPlan(
            queries=(
                Query(kind=QueryKind.SUM, purpose="patients per class", relative_noise=_COUNTS_NOISE),
                Query(
                    kind=QueryKind.GRADIENT,
                    purpose="gradients to match",
                    count=self.networks(ipc) * self.loops(ipc)[0],
                    sampling_rate=self.sampling_rate,
                ),
            ),
            assumptions=_ASSUMPTIONS,
        )

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Match gradients on one fresh network after the other; resumes with the same bits."""
        if private := curator.noise(0) > 0:
            self.plan(curator.task, curator.image_shape, ipc)  # refuses what cannot be private
        first = initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        matched = (_Private if private else _Open)(curator, first, self, ipc, bench.compute)
        done = matched.restore(bench.checkpoint.load())
        network = bench.compute.ready(self._network(curator, derive_seed(seed, "network", done)))
        for step in bench.steps(
            done,
            self.networks(ipc),
            "gradient matching",
            every=self.checkpoint_every,
            state=matched.state,
            current=matched.result,
        ):
            initialised = self._network(curator, derive_seed(seed, "network", step))
            network.load_state_dict(initialised.state_dict())  # one module, so that it is compiled only once
            generator = torch.Generator().manual_seed(derive_seed(seed, "gradient_matching", step))
            bench.progress.note(distance=matched.iterate(network, step, generator))
        return matched.result()

    def loops(self, ipc: int) -> tuple[int, int]:
        """Matching steps for each network and epochs between them, for a number of images per class."""
        outer, inner = PUBLISHED_LOOPS[max(known for known in PUBLISHED_LOOPS if known <= ipc)]
        return self.outer or outer, self.inner or inner

    def networks(self, ipc: int) -> int:
        """Fresh networks for a number of images per class."""
        return self.iterations or math.ceil(_FEW_STEPS / self.loops(ipc)[0])

    def _network(self, curator: Curator, seed: int) -> nn.Module:
        def factory(task: Task, shape: tuple[int, ...]) -> nn.Module:
            return ConvNet(task, shape, width=self.width)

        return fresh(factory, curator.task, curator.image_shape, seed)


class _Matched(ABC):
    """The images that are matched, with their optimiser."""

    def __init__(
        self, curator: Curator, first: Synthetic, settings: GradientMatching, ipc: int, compute: Compute
    ) -> None:
        self._task, self._first, self._settings, self._compute = curator.task, first, settings, compute
        self._loops = settings.loops(ipc)
        self.images = compute.put(first.images.clone()).requires_grad_()
        self._labels = compute.put(first.soft_labels)
        self._optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            self._optimizer = torch.optim.Adam([self.images], lr=settings.rate, betas=(0.5, 0.999))
        else:
            self._optimizer = torch.optim.SGD([self.images], lr=settings.rate, momentum=settings.momentum)

    def iterate(self, network: nn.Module, number: int, generator: Generator) -> float:
        """All matching steps on fresh network ``number``, trained between them; the mean distance per class."""
        outer, inner = self._loops
        trainer = torch.optim.SGD(network.parameters(), lr=self._settings.network_rate)
        total = 0.0
        for step in range(outer):
            total += self._match(network, generator)
            self._descend(number)
            if step + 1 < outer:
                self._train(network, trainer, inner, generator)
        return total / outer / self._task.n_classes

    @abstractmethod
    def _match(self, network: nn.Module, generator: Generator) -> float:
        """The gradient of the images towards real gradients; the distance."""

    def _descend(self, number: int) -> None:
        assert self.images.grad is not None
        check_finite((self.images.grad,), distiller="gradient_matching", step=number, remedy=_REMEDY)
        self._optimizer.step()
        with torch.no_grad():
            self.images.clamp_(0.0, 1.0)

    def _train(
        self, network: nn.Module, trainer: torch.optim.Optimizer, epochs: int, generator: Generator
    ) -> None:
        """Epochs of the network on the synthetic images as they are now."""
        images, kind = self.images.detach(), self._task.kind
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for index in torch.split(order, _TRAINING_BATCH):
                inputs = augment(images[index], generator) if self._settings.siamese else images[index]
                with self._compute.autocast():
                    loss = objective(kind, network(inputs), self._labels[index])
                trainer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                trainer.step()

    def state(self, step: int) -> dict[str, Tensor]:
        return {"step": torch.tensor(step), "images": self.images, **pack_optimizer(self._optimizer, "images")}

    def restore(self, state: dict[str, Tensor] | None) -> int:
        if state is None:
            return 0
        self.images.data.copy_(state["images"])
        unpack_optimizer(self._optimizer, state, "images")
        return int(state["step"])

    def result(self) -> Synthetic:
        return Synthetic(
            images=self.images.detach().cpu().clone(),
            soft_labels=self._first.soft_labels,
            hard_labels=self._first.hard_labels,
        )


class _Open(_Matched):
    """Matches gradients of real batches."""

    def __init__(self, curator: Curator, *others: Any) -> None:
        super().__init__(curator, *others)
        self._real = curator.images()

    def _match(self, network: nn.Module, generator: Generator) -> float:
        """Class by class."""
        self.images.grad, total = torch.zeros_like(self.images), 0.0
        for label in range(self._real.task.n_classes):
            rows = (self._first.hard_labels == label).nonzero().flatten().to(self.images.device)
            index = class_batch(self._real, label, self._settings.batch_per_class, generator)
            real = self._compute.put(self._real.images[index]), self._compute.put(self._real.targets[index])
            synthetic = self.images.detach()[rows].requires_grad_()
            distance = gradient_distance(
                network,
                (synthetic, self._labels[rows]),
                real,
                kind=self._real.task.kind,
                change=alike(generator) if self._settings.siamese else unchanged,
                compute=self._compute,
            )
            (self.images.grad[rows],) = torch.autograd.grad(distance, synthetic)
            total += distance.item()
        return total


class _Private(_Matched):
    """Matches noisy gradients of sampled patients."""

    def __init__(self, curator: Curator, *others: Any) -> None:
        super().__init__(curator, *others)
        self._curator, self._counts = curator, torch.empty(0)
        self._losses = vmap(partial(objective, self._task.kind))

    def _match(self, network: nn.Module, generator: Generator) -> float:
        """All classes at once."""
        wanted = self._wanted(network)
        images = self.images.detach().requires_grad_()
        with self._compute.autocast():
            losses = self._losses(network.forward(images), self._labels)
            loss = (self._shares.to(losses) * losses).sum()
        found = torch.autograd.grad(loss, weights_of(network), create_graph=True)
        distance = matching_distance(found, wanted)
        (self.images.grad,) = torch.autograd.grad(distance, images)
        return distance.item()

    def _wanted(self, network: nn.Module) -> list[Tensor]:
        """The curator's answer over the expected number of patients; nothing is spent on what is not matched."""

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return self._losses(logits, targets) * (targets > 0).any(1)

        others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
        for parameter in others:
            parameter.requires_grad_(False)
        settings = self._settings
        answer = self._curator.gradient(
            network, loss, clip_norm=settings.clip_norm, sampling_rate=settings.sampling_rate
        )
        for parameter in others:
            parameter.requires_grad_(True)
        expected = settings.sampling_rate * settings.clip_norm * float(self._counts[-1])
        return [part / expected for part in answer.values()]

    @property
    def _shares(self) -> Tensor:
        """What every synthetic image weighs: its class's share of patients, shared among the class's images."""
        counts = self._counts[:-1] / self._counts[:-1].sum()
        labels = self._first.hard_labels
        return counts[labels] / labels.bincount(minlength=len(counts))[labels]

    def state(self, step: int) -> dict[str, Tensor]:
        return {**super().state(step), "counts": self._counts}

    def restore(self, state: dict[str, Tensor] | None) -> int:
        done = super().restore(state)
        if state is None:
            self._counts = patients_of_each(self._curator)
        else:
            self._counts = state["counts"]
            self._curator.resume(1 + done * self._loops[0])
        return done


def patients_of_each(curator: Curator) -> Tensor:
    """Patients of every class, then of all, from one sum, the first query; no count is below its noise.

    Args:
        curator: Who answers.
    """
    task = curator.task
    clip_norm = math.sqrt(1 + (MOST_LABELS if task.kind is TaskKind.MULTILABEL else 1))

    def embed(images: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([targets, torch.ones_like(targets[:, :1])], dim=1)

    least = max(1.0, curator.noise(0) * clip_norm)
    return curator.sum(embed, clip_norm=clip_norm).cpu().float().clamp_min(least)


#: Changes a batch of images without changing their number.
Change = Callable[[Tensor], Tensor]


def alike(generator: Generator) -> Change:
    """One augmentation, drawn now: every image of every batch that is given to it is changed in the same way."""
    seed = int(torch.randint(_SEEDS, (), generator=generator))
    return lambda images: augment(images, torch.Generator().manual_seed(seed), shared=True)


def unchanged(images: Tensor) -> Tensor:
    """The images themselves."""
    return images


def gradient_distance(
    network: nn.Module,
    synthetic: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    *,
    kind: TaskKind,
    change: Change,
    compute: Compute,
) -> Tensor:
    """Distance between the gradients on two batches, differentiable with respect to the synthetic images.

    Args:
        network: Whose weights the gradients are taken at.
        synthetic: Images and labels.
        real: Images and targets.
        kind: Chooses the loss.
        change: Augmentation of both.
        compute: Precision.
    """
    weights = weights_of(network)
    with compute.autocast():
        wanted = objective(kind, network(change(real[0])), real[1])
        # Not through a compiled call, which cannot be differentiated twice.
        found = objective(kind, network.forward(change(synthetic[0])), synthetic[1])
    target = torch.autograd.grad(wanted, weights)
    return matching_distance(torch.autograd.grad(found, weights, create_graph=True), target)


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    """The weights whose gradients are matched: neither biases nor scales of normalisation."""
    return [parameter for parameter in network.parameters() if parameter.ndim > 1]


def matching_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of the angle, summed over the output units of all layers.

    Args:
        found: Gradients of the weights, layer by layer; the first axis counts output units.
        wanted: The same of the other batch.
    """
    total = torch.zeros((), device=found[0].device, dtype=found[0].dtype)
    for layer, other in zip(found, wanted, strict=True):
        a, b = layer.flatten(1), other.flatten(1)
        norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
        total = total + (1 - (a * b).sum(1) / (norms + 1e-6)).sum()
    return total
