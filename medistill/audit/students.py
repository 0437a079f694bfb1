"""Small students that an attacker trains on a release, many at once: ridge regression on random features.

The features are those of random ConvNets, the regression has a closed form, and its solution for one set of images
serves any number of sets of labels. So a student costs what one forward pass costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.compute import Compute, fresh
from medistill.core.images import averaged
from medistill.core.task import Task, TaskKind
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized

#: The head of a feature network is never used; it only has to have a size.
_ANY_TASK = Task.single_label(("absent", "present"))
_SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class RandomNetworks:
    """How the feature networks of students are drawn.

    Args:
        networks: Random ConvNets; each gives a student of its own, unless their features are joined.
        width: Width of the networks.
        side: Side length to which larger images are averaged first.
        volume_side: The same for volumes.

    Raises:
        ConfigError: If a number is below 1, or a side below 4.
    """

    networks: int = 4
    width: int = 32
    side: int = 32
    volume_side: int = 16

    def __post_init__(self) -> None:
        if min(self.networks, self.width) < 1 or min(self.side, self.volume_side) < 4:
            raise ConfigError("Expected networks and width >= 1, side and volume_side >= 4.")

    def draw(self, image_shape: tuple[int, ...], *, seed: int, compute: Compute) -> Features:
        """The networks for images of a shape.

        Args:
            image_shape: ``(c, h, w)`` or ``(c, d, h, w)``.
            seed: Public seed.
            compute: Device.
        """
        return Features(self, image_shape, seed=seed, compute=compute)


class Features:
    """What several random networks see in images; made by :meth:`RandomNetworks.draw`."""

    def __init__(
        self, settings: RandomNetworks, image_shape: tuple[int, ...], *, seed: int, compute: Compute
    ) -> None:
        self._settings, self._compute = settings, compute
        shape = tuple(self._small(torch.zeros(1, *image_shape)).shape[1:])

        def factory(task: Task, shape: tuple[int, ...]) -> nn.Module:
            return ConvNet(task, shape, width=settings.width)

        self._networks = [
            compute.ready(
                fresh(factory, _ANY_TASK, shape, derive_seed(seed, "features", number)).requires_grad_(False)
            ).eval()
            for number in range(settings.networks)
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of every network, shape ``(networks, n, d)``, on the CPU; computed in batches.

        Args:
            images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        """
        seen: list[Tensor] = []
        for batch in cache_sized(images):
            small = self._compute.put(self._small(batch))
            seen.append(torch.stack([self._of(network, small) for network in self._networks]).float().cpu())
        return torch.cat(seen, dim=1)

    def _small(self, images: Tensor) -> Tensor:
        return averaged(images, plane=self._settings.side, solid=self._settings.volume_side)

    @staticmethod
    def _of(network: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(network, ConvNet)
        return network.features(images)


def side_by_side(features: Tensor) -> Tensor:
    """Features of all networks side by side, for one student that sees more: shape ``(1, n, networks * d)``."""
    return features.transpose(0, 1).flatten(1)[None]


@dataclass(frozen=True, kw_only=True)
class RidgeStudents:
    r"""Ridge regressions on the features of several networks, for several sets of labels.

    .. math:: \min_{W, b} \lVert \Phi W + b - G \rVert^2 + \lambda \tfrac{\mathrm{tr}}{n} \lVert W \rVert^2

    with :math:`\mathrm{tr}` the trace of the centred Gram matrix and :math:`G` the log-odds of the labels
    (:func:`log_odds`).

    Args:
        weights: :math:`W`, shape ``(networks, d, sets * k)``, float64.
        biases: :math:`b`, shape ``(networks, 1, sets * k)``.
        sets: Sets of labels.
    """

    weights: Tensor
    biases: Tensor
    sets: int

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor, *, ridge: float) -> RidgeStudents:
        r"""Solve for all networks and sets of labels.

        Args:
            features: Of :class:`Features`, shape ``(networks, n, d)``.
            targets: What to predict, shape ``(sets, n, k)``, or ``(n, k)`` for one set.
            ridge: :math:`\lambda`; it is relative, and the same value means the same for any network.

        Raises:
            DataError: If there is nothing to learn from, or the numbers of images differ.
            ConfigError: If ``ridge`` is not positive.
        """
        targets = targets if targets.ndim == 3 else targets[None]
        sets, n, k = targets.shape
        if not n or features.shape[1] != n:
            raise DataError(f"Expected as many targets as images, at least one; got {n} and {features.shape[1]}.")
        if ridge <= 0:
            raise ConfigError(f"Expected ridge > 0, got {ridge}.")
        flat = targets.double().transpose(0, 1).reshape(n, sets * k)
        solved = [cls._solve(one.double(), flat, ridge) for one in features]
        weights, biases = (torch.stack(part) for part in zip(*solved, strict=True))
        return cls(weights=weights, biases=biases, sets=sets)

    @staticmethod
    def _solve(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """One network: by the Gram matrix of the images or of the features, whichever is smaller."""
        centre, level = features.mean(0), targets.mean(0)
        centred, wanted = features - centre, targets - level
        n, d = centred.shape
        gram = centred @ centred.T if n <= d else centred.T @ centred
        penalty = ridge * float(gram.trace().clamp_min(_SMALLEST)) / n
        gram.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(gram)
        right = wanted if n <= d else centred.T @ wanted
        solved = torch.cholesky_solve(right, factor)
        weights = centred.T @ solved if n <= d else solved
        return weights, (level - centre @ weights)[None]

    def predict(self, features: Tensor) -> Tensor:
        """Predictions, shape ``(networks, sets, n, k)``, float64.

        Args:
            features: Shape ``(networks, n, d)``.
        """
        n = features.shape[1]
        rows = torch.stack(
            [
                one.double() @ weights + biases
                for one, weights, biases in zip(features, self.weights, self.biases, strict=True)
            ]
        )
        return rows.view(len(rows), n, self.sets, -1).transpose(1, 2)


def log_odds(labels: Tensor, kind: TaskKind, *, floor: float) -> Tensor:
    """What students regress on: scores whose softmax, or sigmoid for several labels an image, is the label.

    Args:
        labels: Probabilities, shape ``(..., k)``.
        kind: Kind of the task.
        floor: Smallest probability that is told from zero; hard labels become finite scores by it.
    """
    clipped = labels.double().clamp(floor, 1 - floor)
    if kind is TaskKind.MULTILABEL:
        return clipped.log() - (1 - clipped).log()
    scores = clipped.log()
    return scores - scores.mean(-1, keepdim=True)


def log_likelihoods(logits: Tensor, targets: Tensor, kind: TaskKind) -> Tensor:
    r"""Log-probability of the true label, :math:`\log p(y | x)`.

    Args:
        logits: Shape ``(..., n, k)``.
        targets: Shape ``(n, k)``.
        kind: Kind of the task.

    Returns:
        Shape ``(..., n, 1)``; for a multilabel task one entry a label, ``(..., n, k)``.
    """
    targets = targets.to(logits)
    if kind is TaskKind.MULTILABEL:
        return targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)
    return (targets * logits.log_softmax(-1)).sum(-1, keepdim=True)


def halves(patients: tuple[str, ...], *, splits: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a random half of the patients and of the other half, as masks of shape ``(n,)``, several times."""
    distinct = sorted(set(patients))
    place = {patient: number for number, patient in enumerate(distinct)}
    of_image = torch.tensor([place[patient] for patient in patients])
    for number in range(splits):
        generator = torch.Generator().manual_seed(derive_seed(seed, "halves", number))
        first = torch.zeros(len(distinct), dtype=torch.bool)
        first[torch.randperm(len(distinct), generator=generator)[: len(distinct) // 2]] = True
        yield first[of_image], ~first[of_image]
