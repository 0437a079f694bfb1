r"""What is asked about patients under differential privacy, and what follows from the answers.

Two sums over patients, of unit vectors :math:`u` of public features and targets :math:`y`:

.. math:: T_1 = \sum_p \big[\, u_p,\; \tfrac12 y_p \,\big], \qquad
    T_2 = \sum_p \big[\, \operatorname{svec}(v_p v_p^\top),\; y_p \otimes (\tfrac12, v_p) \,\big], \qquad
    v = \frac{u - \mu}{\lVert u - \mu \rVert}

where :math:`\mu` is the mean in the answer :math:`T_1`, and svec the upper triangle with its off-diagonal times
:math:`\sqrt 2`. Every row of an image has the same length, known beforehand; a patient's is the mean over their
images. The first answer costs a tenth of the budget: without the part that all images share, what tells the
classes apart is a larger part of a row, and the noise is the same.

Everything below the two sums is made from the answers alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.guarantee import PrivacyPlan, Query, QueryKind
from medistill.core.protocols import Curator, Embed
from medistill.core.task import Task, TaskKind
from medistill.distill.labels import MOST_LABELS
from medistill.distill.public_features import PublicFeatures
from medistill.errors import DataError
from medistill.training.objectives import probabilities

#: Noise to signal above which features cost more than they say.
MOST_NOISE = 0.8
_FEWEST = 16
_COUNT = 0.5
_BATCH = 64

ASSUMPTIONS = ("Features are those of a fixed filter bank, scaled by random fields; no patient decides them.",)


def moments_plan() -> PrivacyPlan:
    """The two sums; the first is answered with three times the noise of the second."""
    return PrivacyPlan(
        queries=(
            Query(kind=QueryKind.SUM, purpose="mean of features", relative_noise=3.0),
            Query(kind=QueryKind.SUM, purpose="class moments of centred features"),
        ),
        assumptions=ASSUMPTIONS,
    )


def noise_to_signal(noise: float, dimension: int, patients: float) -> float:
    """Length of the noise on a class sum over the largest length of that sum.

    Args:
        noise: Standard deviation of the noise on one coordinate.
        dimension: Features.
        patients: Patients of the class.
    """
    return noise * math.sqrt(dimension) / max(patients, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The two answers, in parts.

    Args:
        features: The public features.
        centre: Noisy mean of the features, shape ``(D,)``; its length says how many components are used.
        total: Noisy number of patients.
        counts: Noisy patients per class, shape ``(k,)``.
        sums: Noisy class sums of centred features, shape ``(k, D)``.
        everyone: Noisy sum over all patients, shape ``(D,)``.
        second: Noisy second moments of all patients, shape ``(D, D)``.
        noise: Standard deviation of the noise on each of these coordinates; 0 where answers are exact.
        signal: Noise to signal of the smallest class, known before the second sum was asked for.
    """

    features: PublicFeatures
    centre: Tensor
    total: float
    counts: Tensor
    sums: Tensor
    everyone: Tensor
    second: Tensor
    noise: float
    signal: float

    def centred(self, images: Tensor) -> Tensor:
        """Centred features of unit length, shape ``(n, D)``; differentiable in the images."""
        return F.normalize(self.uncentred_features(images) - self.centre, dim=1)

    def uncentred_features(self, images: Tensor) -> Tensor:
        """As many features as are used, of unit length, before centring."""
        return _shortened(self.features(images), len(self.centre))

    def uncentred(self, centred: Tensor) -> Tensor:
        """Unit vectors whose direction from the centre is the given one, shape ``(n, D)``."""
        along = centred @ self.centre
        inside = (1 - self.centre.square().sum()).clamp_min(0.05)
        reach = (along.square() + inside).sqrt() - along
        return F.normalize(self.centre + reach[:, None] * centred, dim=1)


def ask_moments(curator: Curator, *, dimension: int, compute: Compute) -> Moments:
    """Ask for the two sums.

    The second is of as many components as keep the noise to signal of the smallest class below
    :data:`MOST_NOISE`, by the counts in the first answer.

    Args:
        curator: Who answers.
        dimension: Most features.
        compute: Device.

    Raises:
        DataError: If a class has no patient, as far as the noise lets that be seen.
    """
    features, task = PublicFeatures(curator.image_shape, dimension, compute), curator.task
    targets = _Targets.of(task)
    first = curator.sum(_mean_row(features, targets, compute), clip_norm=math.hypot(1.0, targets.length * _COUNT))
    first = first.cpu().double()
    counts = first[features.dimension :] / _COUNT
    patients = float(targets.total(counts))
    clip_norm = math.hypot(1.0, targets.length * math.hypot(1.0, _COUNT))
    noise = curator.noise(1) * clip_norm
    smallest = float(counts[: task.n_classes].min())
    used = _affordable(features.dimension, noise, smallest)
    centre = compute.put((first[:used] / max(patients, 1.0)).float())
    answer = curator.sum(_moment_row(features, centre, targets, compute), clip_norm=clip_norm).cpu().double()
    triangle = used * (used + 1) // 2
    by_class = answer[triangle:].view(targets.rows, used + 1)
    counts, sums = by_class[:, 0] / _COUNT, by_class[:, 1:]
    least = max(1e-6, 2 * noise / _COUNT)
    for name, count in zip(task.class_names, counts.tolist(), strict=False):
        if count < least:
            raise DataError(
                f"Class {name!r} has no patient among those to distil, or too few to be seen through the noise: "
                "expected some of every class. Leave the class out, or allow a larger epsilon."
            )
    return Moments(
        features=features,
        centre=centre,
        total=float(targets.total(counts)),
        counts=counts[: task.n_classes],
        sums=sums[: task.n_classes],
        everyone=targets.total(sums),
        second=symmetric(answer[:triangle], used),
        noise=noise,
        signal=noise_to_signal(noise, used, smallest),
    )


@dataclass(frozen=True)
class _Targets:
    """Targets as they stand in a row; in a multilabel task, where they need not add up to one, with a 1 beside."""

    classes: int
    multilabel: bool

    @classmethod
    def of(cls, task: Task) -> _Targets:
        return cls(task.n_classes, task.kind is TaskKind.MULTILABEL)

    @property
    def rows(self) -> int:
        return self.classes + self.multilabel

    @property
    def length(self) -> float:
        return math.sqrt(1 + MOST_LABELS) if self.multilabel else 1.0

    def extended(self, targets: Tensor) -> Tensor:
        return torch.cat([targets, torch.ones_like(targets[:, :1])], dim=1) if self.multilabel else targets

    def total(self, by_class: Tensor) -> Tensor:
        return by_class[-1] if self.multilabel else by_class.sum(0)


def _affordable(dimension: int, noise: float, patients: float) -> int:
    """Most components whose noise to signal is below the limit."""
    if noise == 0:
        return dimension
    most = int((MOST_NOISE * max(patients, 0.0) / noise) ** 2)
    return min(dimension, max(_FEWEST, most))


def _shortened(features: Tensor, used: int) -> Tensor:
    """The first components, again of unit length; those of an image that has nothing in them stay zero."""
    return F.normalize(features[:, :used], dim=1) if used < features.shape[1] else features


def _mean_row(features: PublicFeatures, targets: _Targets, compute: Compute) -> Embed:
    def embed(images: Tensor, labels: Tensor) -> Tensor:
        found = torch.cat([features(compute.put(part)) for part in torch.split(images, _BATCH)])
        return torch.cat([found, _COUNT * compute.put(targets.extended(labels))], dim=1)

    return embed


def _moment_row(features: PublicFeatures, centre: Tensor, targets: _Targets, compute: Compute) -> Embed:
    above, beside = torch.triu_indices(len(centre), len(centre))
    scale = compute.put(torch.where(above == beside, 1.0, math.sqrt(2.0)))

    def embed(images: Tensor, labels: Tensor) -> Tensor:
        found = torch.cat([features(compute.put(part)) for part in torch.split(images, _BATCH)])
        centred = F.normalize(_shortened(found, len(centre)) - centre, dim=1)
        long = torch.cat([torch.full_like(centred[:, :1], _COUNT), centred], dim=1)
        by_class = compute.put(targets.extended(labels))[:, :, None] * long[:, None, :]
        return torch.cat([centred[:, above] * centred[:, beside] * scale, by_class.flatten(1)], dim=1)

    return embed


def symmetric(triangle: Tensor, side: int) -> Tensor:
    """The matrix of which an upper triangle was given with its off-diagonal times the root of two."""
    above, beside = torch.triu_indices(side, side)
    values = triangle / torch.where(above == beside, 1.0, math.sqrt(2.0))
    matrix = values.new_zeros(side, side)
    matrix[above, beside] = values
    matrix[beside, above] = values
    return matrix


class Teacher:
    r"""A classifier and a generator that follow from noisy moments.

    Linear discriminants :math:`w_c = (\hat\Sigma_+ + \lambda I)^{-1} (\hat\mu_c - \hat\mu)`, where
    :math:`\hat\Sigma_+` is the noisy covariance without negative eigenvalues and :math:`\lambda` is ``ridge``
    times the *edge*, the largest eigenvalue that noise alone has (twice its spread times the root of the
    dimension). Their scores are shortened by the share of the distance between class means that is noise.

    Args:
        moments: The answers.
        kind: Kind of the task.
        ridge: Penalty over the edge.
        least_variance: The edge where noise has a smaller one.
        sharpness: Factor of the scores; above 1 for labels nearer to certainty than the discriminants are.
    """

    def __init__(
        self,
        moments: Moments,
        *,
        kind: TaskKind,
        ridge: float = 0.6,
        sharpness: float = 1.0,
        least_variance: float = 0.0,
    ) -> None:
        self._moments, self._kind = moments, kind
        counts, total = moments.counts, max(moments.total, 1.0)
        self._means = moments.sums / counts[:, None]
        mean = moments.everyone / total
        covariance = moments.second / total - mean[:, None] * mean
        multilabel = kind is TaskKind.MULTILABEL
        if not multilabel:
            apart = self._means - mean
            covariance = covariance - (apart.T * (counts / counts.sum())) @ apart
        dimension = len(mean)
        self.edge = max(least_variance, math.sqrt(2 * dimension) * moments.noise / total)
        values, self._vectors = torch.linalg.eigh(covariance)
        self._values = values.clamp_min(0.0)
        shrunk = self._values + max(ridge * self.edge, 0.01 / dimension)
        if multilabel:
            others = (total - counts).clamp_min(1.0)
            rest = (moments.everyone - moments.sums) / others[:, None]
            apart, middle = self._means - rest, (self._means + rest) / 2
            spread = 1 / counts.square() + 1 / others.square()
        else:
            centre = self._means.mean(0)
            apart, middle = self._means - centre, (self._means + centre) / 2
            spread = (1 - 1 / len(counts)) / counts.square()
        weights = (apart @ self._vectors / shrunk) @ self._vectors.T
        distance = (weights * apart).sum(1)
        by_noise = moments.noise**2 * spread * (1 / shrunk).sum()
        #: Part of the distances between class means that is not noise.
        self.share = float((1 - by_noise.sum() / distance.sum()).clamp(0.05, 1.0))
        put = moments.centre
        self._weights = (sharpness * self.share * weights).to(put)
        self._offsets = (sharpness * self.share * (weights * middle).sum(1)).to(put)

    @torch.no_grad()
    def soft_labels(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, shape ``(n, k)``, on the CPU."""
        parts = torch.split(images, _BATCH)
        features = torch.cat([self._moments.centred(part.to(self._weights)) for part in parts])
        return probabilities(self._kind, features @ self._weights.T - self._offsets).cpu()

    def draw(self, per_class: int, generator: Generator) -> Tensor:
        """Features of made-up images, class after class: Gaussian in those directions that noise did not make.

        Returns:
            Unit vectors, shape ``(k * per_class, D)``.
        """
        spread = torch.where(self._values > self.edge, self._values, 0.0).sqrt()
        shape = (len(self._means) * per_class, len(spread))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        means = self._means.repeat_interleave(per_class, dim=0)
        return F.normalize(means + drawn @ self._vectors.T, dim=1).to(self._weights)
