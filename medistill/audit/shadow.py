"""Membership by shadow distillations: LiRA (Carlini et al. 2022) and RMIA (Zarifzadeh et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from medistill.audit.attack import Exposed, Floats, Guilty
from medistill.audit.shadow_distillation import (
    ShadowDistillation,
    draw_membership,
    patient_numbers,
    random_network,
)
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, averaged, joined
from medistill.distill.batches import has_label
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized

TESTS = ("lira", "rmia")
#: Columns of what is observed of a patient in a release.
TRACING, WHITENED, MARGIN, NEARNESS = range(4)
_FEW = 5  #: members of each class in the positive control
_RIDGE, _SHARPNESS, _FLOOR, _AT_ONCE = 1e-2, 8.0, 1e-6, 512


@dataclass(frozen=True, kw_only=True)
class Shadow:
    r"""Does the release look more like those distilled with the patient, or like those without?

    The attacker makes ``shadows`` releases of the patients they hold images of, each from a random half, and looks
    at four numbers :math:`o_j` for every patient in every one of them: the inner product of the patient's features
    with the released class mean (tracing), the same after whitening, the margin of ridge regression fitted to the
    released images, and the distance to the nearest of them; in features of random networks that no shadow was
    distilled with. For ``"lira"``

    .. math:: s(p) = \sum_j \log \mathcal N(o_j; \mu^{in}_{pj}, \sigma_j^2)
              - \log \mathcal N(o_j; \mu^{out}_{pj}, \sigma_j^2)

    with one variance for all patients. For ``"rmia"`` it is the share of the reference patients :math:`z` with
    :math:`\frac{P(p \mid \text{release})}{P(p)} \ge \frac{P(z \mid \text{release})}{P(z)}`, with :math:`P` the
    confidence of the ridge student in the patient's diagnosis and :math:`P(p)` its mean over all shadows.

    A shadow is a surrogate, whatever made the release: distribution matching with few steps at ``side`` pixels, a
    bounded number of images and hard class labels (of a multilabel task: the mean labels of a class). A release of
    a stronger method, such as ridge regression with learned labels, can leak in ways that no shadow shows.

    Where it deviates from LiRA: an observation is a property of a set of images instead of the loss of a model.
    What is common to all patients, or a straight line in what was usual for them, is taken off before a release is
    compared with shadows that were made differently (:func:`aligned`); no membership enters there. The difference
    of :math:`\mu^{in}` and :math:`\mu^{out}` is shrunk to the mean difference of all patients as far as it is
    noise (:func:`shrunk`): with few shadows the attack would otherwise lose most of its power.

    Args:
        shadows: Shadow releases, an even number; 64 to 256 where there is time.
        test: ``"lira"`` or ``"rmia"``.
        observers: Random networks in which releases are observed.
        side: Side length to which larger images are averaged.
        volume_side: The same for volumes.
        distillation: How shadows are distilled.

    References:
        Carlini et al. 2022, arXiv:2112.03570, section VI. Zarifzadeh et al. 2024, arXiv:2312.03262.

    Privacy:
        Reads non-released data of the candidates and the reference.
    """

    threat: ClassVar[str] = "T2"
    question: ClassVar[str] = (
        "Does the release look more like imitations made with this patient than like those made without?"
    )
    guilty_of: ClassVar[str] = "a release distilled from a handful of members of each class"

    shadows: int = 32
    test: str = "lira"
    observers: int = 4
    side: int = 32
    volume_side: int = 16
    distillation: ShadowDistillation = field(default_factory=ShadowDistillation)

    def __post_init__(self) -> None:
        if self.shadows < 4 or self.shadows % 2:
            raise ConfigError(f"Expected an even number of shadows, 4 or more, got {self.shadows}.")
        if self.test not in TESTS:
            raise ConfigError(f"Expected test to be one of {', '.join(TESTS)}, got {self.test!r}.")
        if min(self.observers, self.side, self.volume_side) < 1:
            raise ConfigError("Expected observers, side and volume_side >= 1.")

    @property
    def wanted(self) -> float:
        """AUROC that the positive control must reach; RMIA looks at one observation only and sees less."""
        return 0.75 if self.test == "lira" else 0.65

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> PreparedShadow:
        """Distil all shadows and observe every patient in each.

        Raises:
            DataError: If a patient is in both, or a class has so few that some shadow has none.
        """
        if shared := set(candidates.patients) & set(reference.patients):
            raise DataError(
                f"Found {len(shared)} patients both among the candidates and in the reference; expected none."
            )
        pool = self._reduced(joined(candidates, reference))
        names, shape = pool.unique_patients, tuple(pool.images.shape[1:])
        networks = [
            random_network(
                pool.task, shape, self.distillation.width, derive_seed(seed, "shadow observer", i), compute
            )
            for i in range(self.observers)
        ]
        observer = Observer(pool, networks, compute)
        membership = draw_membership(len(names), self.shadows, derive_seed(seed, "shadow coins"))
        observed = torch.empty(len(names), self.shadows, 4, dtype=torch.float64)
        parts = self.distillation.run(
            pool, membership, ipc=ipc, seed=derive_seed(seed, "shadows"), compute=compute, progress=progress
        )
        for part in parts:
            for number, images, labels in zip(part.numbers.tolist(), part.images, part.labels, strict=True):
                observed[:, number] = observer(images, labels)
        known = set(reference.patients)
        outsiders = torch.tensor([name in known for name in names])
        return PreparedShadow(self, names, outsiders, observer, observed, membership)

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """Distil a few members, by the method of the shadows and from another seed, without reserve.

        Raises:
            DataError: If a class has no member.
        """
        few = self._reduced(members.of_patients(_few_of_each_class(members, _FEW, seed)))
        everybody = torch.ones(1, len(few.unique_patients), dtype=torch.bool)
        ipc = max(1, self.distillation.most // few.task.n_classes)
        (made,) = self.distillation.run(
            few, everybody, ipc=ipc, seed=derive_seed(seed, "guilty"), compute=Compute(), progress=Progress()
        )
        return Guilty(
            release=Exposed(images=made.images[0], soft_labels=made.labels[0], task=few.task, ipc=ipc),
            members=frozenset(few.patients),
            candidates=joined(members.of_patients(set(few.patients)), others),
        )

    def _reduced(self, images: ImageSet) -> ImageSet:
        return replace(images, images=averaged(images.images, plane=self.side, solid=self.volume_side))


class PreparedShadow:
    """The shadows' observations of every patient, ready for a release.

    Args:
        attack: The settings.
        names: All patients, sorted.
        outsiders: Which of them are of the reference, shape ``(p,)``.
        observer: Observes them in a release.
        observed: Shape ``(p, s, 4)``.
        membership: Shape ``(s, p)``.
    """

    def __init__(
        self,
        attack: Shadow,
        names: tuple[str, ...],
        outsiders: Tensor,
        observer: Observer,
        observed: Tensor,
        membership: Tensor,
    ) -> None:
        self._attack, self._observer, self._outsiders = attack, observer, outsiders
        self._number = {name: number for number, name in enumerate(names)}
        self._moments = moments(observed, membership)
        self._usual = shrunk(self._moments, membership)
        self._confidence = _confidence(observed[..., MARGIN]).mean(1)

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """One number for each of the candidates' patients; higher: more likely a member.

        Args:
            release: What is attacked.
            candidates: Of the patients who were prepared, any; all images that were prepared are used.

        Raises:
            DataError: If a patient was not prepared, or released images have another shape.
        """
        unknown = [name for name in candidates.unique_patients if name not in self._number]
        if unknown:
            raise DataError(f"Found {len(unknown)} patients of whom the shadows know nothing: prepare with them.")
        images = averaged(release.images, plane=self._attack.side, solid=self._attack.volume_side)
        observed = self._observer(images, release.soft_labels)
        scores = self._rmia(observed) if self._attack.test == "rmia" else self._lira(observed)
        wanted = torch.tensor([self._number[name] for name in candidates.unique_patients])
        chosen: Floats = scores[wanted].numpy()
        return chosen

    def _lira(self, observed: Tensor) -> Tensor:
        middle = (self._usual.inside + self._usual.outside) / 2
        return likelihood_ratio(aligned(observed, middle, self._observer.targets), self._usual)

    def _rmia(self, observed: Tensor) -> Tensor:
        ratio = _confidence(observed[:, MARGIN]) / self._confidence
        share = torch.searchsorted(ratio[self._outsiders].sort().values, ratio, right=True)
        return share.double() / int(self._outsiders.sum())


class Observer:
    """What can be observed of a pool of patients in some images with labels.

    Args:
        pool: Images of all patients.
        networks: Random networks.
        compute: Their device.
    """

    def __init__(self, pool: ImageSet, networks: list[ConvNet], compute: Compute) -> None:
        self._compute, self._shape = compute, tuple(pool.images.shape[1:])
        self._of_image, self._counts = patient_numbers(pool)
        self._truth = pool.targets
        self.targets = self._per_patient(pool.targets.double())
        self._views = [_View(network, pool, compute) for network in networks]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Observations of every patient, ``(p, 4)`` in double precision, means over images and networks.

        Args:
            images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
            labels: Shape ``(m, k)``.
        """
        if tuple(images.shape[1:]) != self._shape:
            raise DataError(f"Expected released images of shape {self._shape}, got {tuple(images.shape[1:])}.")
        each = torch.stack([view.observe(images, labels, self._truth, self._compute) for view in self._views])
        return self._per_patient(each.double().mean(0))

    def _per_patient(self, of_images: Tensor) -> Tensor:
        total = torch.zeros(len(self._counts), of_images.shape[1], dtype=torch.float64)
        return total.index_add_(0, self._of_image, of_images) / self._counts.double()[:, None]


class _View:
    """The pool as one random network sees it."""

    def __init__(self, network: ConvNet, pool: ImageSet, compute: Compute) -> None:
        self._network = network
        features = _features(network, pool.images, compute)
        self._centre = features.mean(0)
        self._scale = (features - self._centre).square().sum(1).mean().sqrt().clamp_min(_FLOOR)
        self._pool = (features - self._centre) / self._scale
        rows, targets = self._pool.double(), pool.targets.double()
        within = rows - targets @ torch.linalg.pinv(targets) @ rows
        covariance = within.T @ within / len(rows)
        own = covariance.diagonal().mean().clamp_min(_FLOOR) * torch.eye(len(covariance), dtype=torch.float64)
        self._whitener = (torch.linalg.inv(covariance + own) * covariance.diagonal().mean()).float()

    def observe(self, images: Tensor, labels: Tensor, truth: Tensor, compute: Compute) -> Tensor:
        released = (_features(self._network, images, compute) - self._centre) / self._scale
        means = labels.T @ released / labels.sum(0).clamp_min(_FLOOR)[:, None]
        predicted = self._pool @ _ridge(released, labels - labels.mean(0))
        nearest = torch.stack(
            [torch.cdist(self._pool, part).min(1).values for part in torch.split(released, _AT_ONCE)]
        )
        columns = {
            TRACING: (self._pool @ means.T * truth).sum(1),
            WHITENED: (self._pool @ self._whitener @ means.T * truth).sum(1),
            MARGIN: ((2 * truth - 1) * predicted).mean(1),
            NEARNESS: -(nearest.min(0).values + _FLOOR).log(),
        }
        return torch.stack([columns[number] for number in sorted(columns)], dim=1)


@torch.no_grad()
def _features(network: ConvNet, images: Tensor, compute: Compute) -> Tensor:
    parts = cache_sized(images) if compute.device_type == "cpu" else torch.split(images, _AT_ONCE)
    return torch.cat([network.features(compute.put(part)).float().cpu() for part in parts])


def _ridge(features: Tensor, labels: Tensor) -> Tensor:
    """Weights ``(d, k)`` of ridge regression."""
    rows, wanted = features.double(), labels.double()
    penalty = _RIDGE * rows.square().sum(1).mean().clamp_min(_FLOOR)
    gram = rows.T @ rows + penalty * torch.eye(rows.shape[1], dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(gram, rows.T @ wanted)
    return weights.float()


def _confidence(margin: Tensor) -> Tensor:
    confidence: Tensor = torch.sigmoid(margin * _SHARPNESS)
    return confidence


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What is observed of a patient in the shadows.

    Args:
        inside: Means over the shadows that have the patient, shape ``(p, q)``.
        outside: Means over the others, shape ``(p, q)``.
        variance: Variance about these means, the same for all patients, shape ``(q,)``.
    """

    inside: Tensor
    outside: Tensor
    variance: Tensor


def moments(observed: Tensor, membership: Tensor) -> Moments:
    """Moments of observations.

    Args:
        observed: Shape ``(p, s, q)``.
        membership: Boolean, shape ``(s, p)``, for every patient with both values.
    """
    is_in = membership.T[:, :, None].to(observed)
    inside = (observed * is_in).sum(1) / is_in.sum(1)
    outside = (observed * (1 - is_in)).sum(1) / (1 - is_in).sum(1)
    rest = observed - is_in * inside[:, None] - (1 - is_in) * outside[:, None]
    freedom = observed.shape[0] * (observed.shape[1] - 2)
    return Moments(inside=inside, outside=outside, variance=rest.square().sum((0, 1)) / freedom)


def likelihood_ratio(observed: Tensor, usual: Moments) -> Tensor:
    """Log-likelihood ratio of "in" to "out", summed over observations ``(p, q)``; shape ``(p,)``."""
    distances = (observed - usual.outside).square() - (observed - usual.inside).square()
    return (distances / (2 * usual.variance.clamp_min(torch.finfo(torch.float64).tiny))).sum(1)


def shrunk(usual: Moments, membership: Tensor) -> Moments:
    """The same with the difference of the means drawn towards its mean over patients, as far as it is noise.

    The share that is kept is that of the variance between patients which the noise of the means does not explain
    (James & Stein); the middle of the two means stays.
    """
    count = membership.sum(0).double()
    noise = usual.variance * (1 / count + 1 / (len(membership) - count)).mean()
    difference, middle = usual.inside - usual.outside, (usual.inside + usual.outside) / 2
    real = (difference.var(0) - noise).clamp_min(0)
    keep = real / (real + noise).clamp_min(torch.finfo(torch.float64).tiny)
    difference = difference.mean(0) + keep * (difference - difference.mean(0))
    return Moments(inside=middle + difference / 2, outside=middle - difference / 2, variance=usual.variance)


def aligned(observed: Tensor, middle: Tensor, targets: Tensor) -> Tensor:
    """Observations without what is common to patients of a class, or a straight line in what is usual for them.

    A release made by another method than the shadows is on another scale; least squares over all patients, whose
    membership is not known, take that off.

    Args:
        observed: Shape ``(p, q)``.
        middle: What is usual for a patient, shape ``(p, q)``.
        targets: Mean targets of a patient's images, shape ``(p, k)``.
    """
    columns = []
    for now, usual in zip(observed.T, middle.T, strict=True):
        known = torch.cat([usual[:, None], targets, torch.ones_like(usual)[:, None]], dim=1)
        columns.append(usual + now - known @ (torch.linalg.pinv(known) @ now))
    return torch.stack(columns, dim=1)


def _few_of_each_class(images: ImageSet, count: int, seed: int) -> set[str]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "few members"))
    chosen: set[str] = set()
    for label in range(images.task.n_classes):
        of_class = images.select(has_label(images, label).nonzero().flatten()).unique_patients
        order = torch.randperm(len(of_class), generator=generator)[:count]
        chosen |= {of_class[number] for number in order.tolist()}
    return chosen
