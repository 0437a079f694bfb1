"""Which images are unlike those a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from medistill.core.compute import fresh
from medistill.core.task import Task
from medistill.errors import DataError
from medistill.networks.convnet import ConvNet
from medistill.networks.layers import Classifier
from medistill.training.augment import augment
from medistill.training.fit import cache_sized

#: Augmented released pictures that the limit is found on, at least.
REFERENCES = 2000
#: Share of them within the limit.
PERCENTILE = 99.0
#: Weight of the round part of the covariance; released images are few and vary less than real ones.
SHRINKAGE = 0.9
#: Directions in which the covariance is kept; it is round in all others.
MOST_DIRECTIONS = 64
_STATISTICS = ("mean", "directions", "variances")
_NETWORK = "network."


@dataclass(frozen=True, kw_only=True)
class Outliers:
    r"""Mahalanobis distance of a picture's features from those of augmented released pictures.

    .. math:: D(x)^2 = (f(x) - \mu)^\top \big( (1-s) C + s\, \tfrac{\mathrm{tr} C}{d} I \big)^{-1} (f(x) - \mu)

    :math:`f` are the features of a ConvNet with random weights that is never trained, so that the distance does
    not depend on the diagnosing network; :math:`\mu` and :math:`C` are their mean and covariance over at least
    2,000 augmented released pictures, :math:`s` is 0.9 and :math:`d` the number of features. Distances are
    multiples of :attr:`limit`, the 99th percentile of those pictures; above 1 an image is said to be out of
    distribution.

    Chosen by measurement on validation X-rays against other kinds of images, among energy, largest probability,
    nearest neighbours, distances of thumbnails and of trained features. Trained features of the ConvNet are as
    good, those of networks that pool over the whole image are not.

    Limits: no real patient is behind it. Released images vary less than real ones do, so some real images of the
    right kind are flagged. What is flagged is an image of another kind or polarity; a rare disease, another device
    or a wrong body part that looks alike can stay unseen. It says nothing about whether a diagnosis is right.

    Args:
        network: Gives the features.
        mean: Mean features, shape ``(d,)``.
        directions: Unit vectors of the largest variance, shape ``(r, d)``.
        variances: Variance along each, shape ``(r,)``.
        spread: Mean variance over all features.
        limit: Distance that 99 % of augmented released pictures keep.

    References:
        Lee et al. 2018, arXiv:1807.03888 (with one mean in place of one per class, and an untrained network).
    """

    network: Classifier = field(repr=False)
    mean: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    variances: Tensor = field(repr=False)
    spread: float
    limit: float

    def __post_init__(self) -> None:
        shapes = self.directions.ndim == 2 and self.directions.shape == (len(self.variances), len(self.mean))
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in self._statistics.values())
        if not shapes or not finite or not (0 < self.spread < math.inf and 0 < self.limit < math.inf):
            raise DataError("The outlier statistics of the model are damaged. Train again.")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What belongs into the weights file."""
        state = {f"{_NETWORK}{name}": value for name, value in self.network.state_dict().items()}
        return {**self._statistics, **state}

    @property
    def _statistics(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "directions": self.directions, "variances": self.variances}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor], *, task: Task, image_shape: tuple[int, ...]
    ) -> Outliers:
        """Inverse of :meth:`to_json` and :attr:`tensors`."""
        if not tensors.keys() >= set(_STATISTICS):
            raise DataError("The outlier statistics of the model are missing. Train again.")
        network = fresh(ConvNet, task, image_shape, 0)
        assert isinstance(network, ConvNet)
        state = {name.removeprefix(_NETWORK): t for name, t in tensors.items() if name.startswith(_NETWORK)}
        network.load_state_dict(state)
        known = {name: tensors[name] for name in _STATISTICS}
        return cls(network=network.eval(), **known, spread=float(values["spread"]), limit=float(values["limit"]))

    def to_json(self) -> dict[str, float | str]:
        """Plain values beside the tensors."""
        return {
            "statistic": "mahalanobis",
            "shrinkage": SHRINKAGE,
            "percentile": PERCENTILE,
            "spread": self.spread,
            "limit": self.limit,
        }

    def distances(self, images: Tensor) -> Tensor:
        """Multiples of the limit, shape ``(n,)``."""
        return self._distances(self.network.to(images.device).features(images).float()) / self.limit

    def _distances(self, features: Tensor) -> Tensor:
        away = features - self.mean.to(features)
        along = away @ self.directions.to(features).T
        rest = (away.square().sum(1) - along.square().sum(1)).clamp_min(0)
        floor = SHRINKAGE * self.spread
        inside = along.square() / ((1 - SHRINKAGE) * self.variances.to(features) + floor)
        return (inside.sum(1) + rest / floor).sqrt()


@torch.no_grad()
def fit_outliers(pictures: Tensor, task: Task, *, seed: int) -> Outliers:
    """Statistics of released pictures, augmented as they are in training.

    Args:
        pictures: Images of the release, or the tiles of its mosaics.
        task: What is diagnosed.
        seed: Public seed of the random network and of the augmentation.
    """
    network = fresh(ConvNet, task, tuple(pictures.shape[1:]), seed).eval()
    assert isinstance(network, ConvNet)
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(REFERENCES / len(pictures))
    features = torch.cat(
        [
            network.features(batch)
            for _ in range(rounds)
            for batch in cache_sized(augment(pictures, generator).clamp(0, 1))
        ]
    ).double()
    mean = features.mean(0)
    centred = features - mean
    spread = max(float(centred.square().mean()), 1e-12)
    directions, variances = _principal(centred)
    found = Outliers(
        network=network,
        mean=mean.float(),
        directions=directions.float(),
        variances=variances.float(),
        spread=spread,
        limit=1.0,
    )
    limit = float(torch.quantile(found._distances(features.float()), PERCENTILE / 100))
    return replace(found, limit=max(limit, 1e-6))


def _principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of the largest variance with their variances, from whichever matrix of products is smaller."""
    n, d = centred.shape
    if d <= n:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
        directions = vectors.T
    else:
        values, vectors = torch.linalg.eigh(centred @ centred.T / n)
        directions = (vectors / (values.clamp_min(1e-12) * n).sqrt()).T @ centred
    kept = values.argsort(descending=True)[: min(MOST_DIRECTIONS, n, d)]
    kept = kept[values[kept] > 1e-9 * float(values.max().clamp_min(1e-12))]
    return directions[kept].contiguous(), values[kept].contiguous()
