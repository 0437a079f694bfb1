"""Tracing: does a patient pull the released class means towards themselves?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from medistill.audit.attack import Exposed, Floats, Guilty
from medistill.audit.statistics import per_patient
from medistill.audit.students import Features, RandomNetworks
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, averaged, joined
from medistill.distill.public_features import PublicFeatures
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized

_SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Tracing:
    r"""Project a patient on what the released class means have, and other people's class means have not.

    .. math:: s(p) = \langle z_p - r_y,\; m_y - r_y \rangle_{\Sigma^{-1}}

    with :math:`z_p` the mean feature of a patient's images of class :math:`y`, :math:`m_y` the class mean of the
    release (its images weighted by their soft labels), :math:`r_y` that of the reference over patients and
    :math:`\Sigma` the covariance of the reference within classes (Ledoit & Wolf 2004). A mean over few patients
    contains each of them to a part that whitening makes as large as it gets, however little any released image is
    like any of theirs; nearest neighbours do not see it.

    Taken over several feature maps: pixels averaged to a small side, features of random ConvNets (what
    distribution matching matches) and the public features of private releases. Of every map and class the scores
    are standardised by those of the reference, then averaged. A patient's score does not depend on who else is
    attacked. Images of a class that the reference lacks, or that no soft label of the release names, score zero.

    Args:
        side: Side length of the averaged pixels.
        volume_side: The same for volumes.
        networks: Random ConvNets, see :class:`medistill.audit.students.RandomNetworks`.
        public: Public features asked for; 0 for none.
        averaged_patients: Patients per class whose mean images are the positive control.

    References:
        Homer et al., PLoS Genetics 2008. Dwork et al., FOCS 2015 (robust traceability). Ledoit & Wolf 2004.

    Privacy:
        Reads non-released data of the candidates and the reference.
    """

    side: int = 32
    volume_side: int = 10
    networks: RandomNetworks = field(default_factory=lambda: RandomNetworks(networks=3))
    public: int = 256
    averaged_patients: int = 3

    threat: ClassVar[str] = "T2"
    question: ClassVar[str] = "Do the class means of the release carry the features of this patient's images?"
    wanted: ClassVar[float] = 0.9

    def __post_init__(self) -> None:
        if min(self.side, self.volume_side, self.averaged_patients) < 1 or self.public < 0:
            raise ConfigError("Expected side, volume_side and averaged_patients >= 1 and public >= 0.")

    @property
    def guilty_of(self) -> str:
        """The positive control."""
        return f"mean images of at most {self.averaged_patients} patients per class, without noise"

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> PreparedTracing:
        """Whiten every feature map by the reference.

        Args:
            candidates: Images of everybody attacked.
            reference: Images of patients known to be no members.
            ipc: Not used.
            seed: Public seed of the random networks.
            compute: Device of the networks.
            progress: Shows the maps.

        Raises:
            DataError: If the reference has fewer than two images.
        """
        if len(reference) < 2:
            raise DataError(f"Expected at least 2 reference images, got {len(reference)}.")
        shape = tuple(reference.images.shape[1:])
        maps = self._maps(shape, derive_seed(seed, "tracing"), compute)
        return PreparedTracing(maps, candidates, reference, progress)

    def _maps(self, shape: tuple[int, ...], seed: int, compute: Compute) -> FeatureMaps:
        def pixels(images: Tensor) -> Tensor:
            return averaged(images, plane=self.side, solid=self.volume_side).flatten(1)

        public = PublicFeatures(shape, self.public, compute) if self.public else None

        def described(images: Tensor) -> Tensor:
            assert public is not None
            return public(compute.put(images)).cpu()

        plain: list[Callable[[Tensor], Tensor]] = [pixels, described] if self.public else [pixels]
        return FeatureMaps(plain, self.networks.draw(shape, seed=seed, compute=compute))

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """Release the mean image, over patients, of each class; of few members.

        Raises:
            DataError: If no member has an image of some class.
        """
        share = _patient_weights(members)
        generator = torch.Generator().manual_seed(derive_seed(seed, "averaged"))
        chosen: set[str] = set()
        for c in range(members.task.n_classes):
            rows = torch.nonzero(share[:, c]).flatten()
            names = sorted({members.patients[i] for i in rows.tolist()} - chosen)
            order = torch.randperm(len(names), generator=generator)[: self.averaged_patients]
            chosen |= {names[i] for i in order.tolist()}
        averaged_over = members.of_patients(chosen)
        weights = _patient_weights(averaged_over)
        if not bool((weights.sum(0) > 0).all()):
            raise DataError("Expected members with images of every class.")
        flat = averaged_over.images.flatten(1).double()
        means = (weights.T @ flat / weights.sum(0)[:, None]).float().clamp(0.0, 1.0)
        k, task = members.task.n_classes, members.task
        release = Exposed(
            images=means.view(k, *members.images.shape[1:]), soft_labels=torch.eye(k), task=task, ipc=1
        )
        candidates = joined(averaged_over, others)
        return Guilty(release=release, members=frozenset(chosen), candidates=candidates)


class FeatureMaps:
    """Several functions from images to vectors, applied in batches.

    Args:
        plain: Functions from images to vectors, on the CPU.
        networks: Random networks.
    """

    def __init__(self, plain: list[Callable[[Tensor], Tensor]], networks: Features) -> None:
        self._plain, self._networks = plain, networks

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """One matrix ``(n, d)`` a map, float32 on the CPU."""
        plain = [torch.cat([one(batch) for batch in cache_sized(images)]) for one in self._plain]
        return [*plain, *self._networks(images)]


@dataclass(frozen=True, kw_only=True)
class Whitened:
    """The reference under one map: class means, the inverse of the covariance, and its own images' features.

    Args:
        means: :math:`r_y`, shape ``(k, d)``, float64.
        precision: Shape ``(d, d)``.
        features: Of the reference's images, shape ``(n, d)``.
    """

    means: Tensor
    precision: Tensor
    features: Tensor

    @classmethod
    def of(cls, features: Tensor, reference: ImageSet) -> Whitened:
        """Class means over patients, and the covariance about them."""
        rows, weights = features.double(), _patient_weights(reference)
        means = (weights.T @ rows) / weights.sum(0)[:, None].clamp_min(_SMALLEST)
        own = reference.targets.double()
        about = own @ means / own.sum(1, keepdim=True).clamp_min(_SMALLEST)
        covariance, _ = ledoit_wolf((rows - about).numpy(), assume_centered=True)
        spread = torch.from_numpy(covariance)
        spread.diagonal().add_(_SMALLEST + 1e-6 * float(spread.diagonal().mean()))
        return cls(means=means, precision=torch.linalg.inv(spread), features=features)

    def scores(self, features: Tensor, directions: Tensor) -> Tensor:
        r"""Inner products with the centred features, for every class, shape ``(n, k)``.

        Args:
            features: Shape ``(n, d)``.
            directions: :math:`\Sigma^{-1} (m_y - r_y)`, shape ``(k, d)``.
        """
        return features.double() @ directions.T - (self.means * directions).sum(1)


class PreparedTracing:
    """Tracing with the reference's moments known.

    Args:
        maps: Feature maps.
        candidates: Whose features are kept, to score several releases on them.
        reference: Gives means and covariances.
        progress: Shows the maps.
    """

    def __init__(self, maps: FeatureMaps, candidates: ImageSet, reference: ImageSet, progress: Progress) -> None:
        self._maps, self._reference, self._candidates = maps, reference, candidates
        seen = progress.track(maps(reference.images), "tracing: covariances")
        self._whitened = [Whitened.of(features, reference) for features in seen]
        self._features = maps(candidates.images)

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """Mean over maps, images and classes of the standardised scores of each patient."""
        known = candidates is self._candidates
        theirs = self._features if known else self._maps(candidates.images)
        targets, total = candidates.targets.double(), torch.zeros(len(candidates), dtype=torch.float64)
        for whitened, released, features in zip(self._whitened, self._maps(release.images), theirs, strict=True):
            total += self._one_map(whitened, released, release.soft_labels, features, targets)
        return per_patient((total / len(theirs)).numpy(), candidates.patients)

    def _one_map(
        self, whitened: Whitened, released: Tensor, labels: Tensor, features: Tensor, targets: Tensor
    ) -> Tensor:
        """Standardised score of every image, averaged over the classes it has, shape ``(n,)``."""
        labels, own = labels.double(), _patient_weights(self._reference)
        weight = labels.sum(0)
        means = labels.T @ released.double() / weight[:, None].clamp_min(_SMALLEST)
        directions = (means - whitened.means) @ whitened.precision
        usual = whitened.scores(whitened.features, directions)
        spread = ((own * usual**2).sum(0) / own.sum(0).clamp_min(_SMALLEST)).sqrt()
        seen = (weight > 0) & (own.sum(0) > 0) & (spread > 0)
        scores = whitened.scores(features, directions) / torch.where(seen, spread, torch.inf)
        return (targets * scores).sum(1) / targets.sum(1).clamp_min(_SMALLEST)


def _patient_weights(images: ImageSet) -> Tensor:
    """Each image's targets over the number of its patient's images, shape ``(n, k)``."""
    _, of_image, counts = np.unique(np.asarray(images.patients), return_inverse=True, return_counts=True)
    return images.targets.double() / torch.from_numpy(counts[of_image])[:, None]
