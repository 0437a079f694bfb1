"""Leakage through soft labels: students trained on the release, and RMIA (Zarifzadeh et al. 2024) on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from medistill.audit.attack import Exposed, Floats, Guilty
from medistill.audit.statistics import per_patient
from medistill.audit.students import (
    Features,
    RandomNetworks,
    RidgeStudents,
    halves,
    log_likelihoods,
    log_odds,
    side_by_side,
)
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import probabilities

_PUBLIC_SEED = 2312
#: The teacher's labels are kept away from 0 and 1, so that little of its scores is cut off.
_TEACHER_FLOOR = 0.05
_TEACHER_RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LabelLeakage:
    r"""Is a student of the release surer of this patient's diagnosis than students of other people?

    A student :math:`\theta` is trained on the images and soft labels of the release, reference models on halves of
    the reference's patients with their true labels. The score of an image with label :math:`y` is the share of the
    reference's images :math:`z` with

    .. math:: \frac{p(x | \theta) / p(x)}{p(z | \theta) / p(z)} > \gamma, \qquad
              p(x) = \tfrac{1 + a}{2} \, \overline{p_{\mathrm{out}}(x)} + \tfrac{1 - a}{2}

    averaged over labels in a multilabel task and over the patient's images. Of an image of the
    reference, :math:`p_{\mathrm{out}}` is the mean over the models that were not trained on its patient; of a
    candidate it is the mean over all. A patient's score does not depend on who else is attacked.

    Where it deviates: students are ridge regressions on the joined features of random ConvNets (see
    :class:`medistill.audit.students.RidgeStudents`), not networks trained by descent. The weights of these
    networks are public and always the same. Of a teacher that is itself a network such a student recovers less
    than a network would; a quiet result says little about those.

    The positive control's teacher is a regression on the same public features, as where many hospitals train a
    head on one public backbone. It interpolates its patients' labels, some of them drawn anew, and labels moved
    copies of the reference's images: no pixel of a member is in that release, and a label that was drawn can be
    known from nowhere but the teacher.

    Args:
        networks: Random ConvNets.
        references: Reference models; an even number, two for each way to halve the patients.
        ridge: Relative ridge of students and reference models.
        floor: Smallest label probability told from zero.
        gamma: :math:`\gamma`.
        slope: :math:`a`, how sure models become of what they are trained on; 1 for no surer than before.
        memorised: Members that the teacher of the positive control memorises.
        labelled: Public images that it labels.
        noise: Share of images whose label is drawn anew in the positive control, of members or not.

    References:
        Zarifzadeh et al., ICML 2024, arXiv:2312.03262.

    Privacy:
        Reads non-released data of the candidates and the reference.
    """

    networks: RandomNetworks = field(default_factory=RandomNetworks)
    references: int = 4
    ridge: float = 1e-3
    floor: float = 0.01
    gamma: float = 1.0
    slope: float = 0.3
    memorised: int = 60
    labelled: int = 1000
    noise: float = 0.5

    threat: ClassVar[str] = "T6"
    question: ClassVar[str] = "Do the soft labels teach a student this patient's diagnosis?"
    wanted: ClassVar[float] = 0.65

    def __post_init__(self) -> None:
        if self.references < 2 or self.references % 2:
            raise ConfigError(f"Expected an even number of references, at least 2, got {self.references}.")
        if min(self.ridge, self.gamma) <= 0 or not 0 < self.floor < 0.5:
            raise ConfigError("Expected ridge and gamma > 0 and floor in (0, 0.5).")
        if not (0 <= self.slope <= 1 and 0 <= self.noise <= 1):
            raise ConfigError("Expected slope and noise in [0, 1].")
        if min(self.memorised, self.labelled) < 1:
            raise ConfigError("Expected memorised and labelled >= 1.")

    @property
    def guilty_of(self) -> str:
        """The positive control."""
        return f"{self.labelled} public images with the soft labels of a teacher that memorised its patients"

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> PreparedLabelLeakage:
        """Train the reference models.

        Args:
            candidates: Images of everybody attacked.
            reference: Images of patients known to be no members.
            ipc: Not used.
            seed: Public seed of the halves.
            compute: Device of the networks.
            progress: Shows the reference models.

        Raises:
            DataError: If the reference has fewer than two patients.
        """
        if len(reference.unique_patients) < 2:
            raise DataError(f"Expected at least 2 reference patients, got {len(reference.unique_patients)}.")
        shape = tuple(reference.images.shape[1:])
        features = self.networks.draw(shape, seed=_PUBLIC_SEED, compute=compute)
        return PreparedLabelLeakage(self, features, candidates, reference, seed=seed, progress=progress)

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """Label moved reference images by a teacher that interpolates members' partly redrawn labels."""
        names = members.unique_patients
        generator = torch.Generator().manual_seed(derive_seed(seed, "memorised"))
        order = torch.randperm(len(names), generator=generator)[: self.memorised].tolist()
        learned = members.of_patients({names[i] for i in order})
        candidates = _redrawn(joined(learned, others), self.noise, generator)
        learned = candidates.of_patients(frozenset(learned.patients))
        times = -(-self.labelled // len(reference))
        public = reference.images.repeat(times, *[1] * (reference.images.ndim - 1))[: self.labelled]
        public = augment(public, generator).clamp(0.0, 1.0)
        labels = self._memorising_teacher(learned, public)
        ipc = max(1, len(public) // members.task.n_classes)
        release = Exposed(images=public, soft_labels=labels, task=members.task, ipc=ipc)
        return Guilty(release=release, members=frozenset(learned.patients), candidates=candidates)

    def _memorising_teacher(self, learned: ImageSet, public: Tensor) -> Tensor:
        """Soft labels of public images."""
        features = self.networks.draw(tuple(public.shape[1:]), seed=_PUBLIC_SEED, compute=Compute())
        scores = log_odds(learned.targets, learned.task.kind, floor=_TEACHER_FLOOR)
        teacher = RidgeStudents.fit(side_by_side(features(learned.images)), scores, ridge=_TEACHER_RIDGE)
        said = teacher.predict(side_by_side(features(public)))[0, 0]
        return probabilities(learned.task.kind, said).float()


class PreparedLabelLeakage:
    """The attack with its reference models trained.

    Args:
        settings: Of the attack.
        features: Feature networks.
        candidates: Whose features are kept, to score several releases on them.
        reference: Trains the reference models, and is the population.
        seed: Public seed.
        progress: Shows the reference models.
    """

    def __init__(
        self,
        settings: LabelLeakage,
        features: Features,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        seed: int,
        progress: Progress,
    ) -> None:
        self._settings, self._features, self._candidates = settings, features, candidates
        self._kind, self._population = reference.task.kind, reference
        self._of_reference, self._of_candidates = self._seen(reference.images), self._seen(candidates.images)
        scores = log_odds(reference.targets, self._kind, floor=settings.floor)
        splits = halves(reference.patients, splits=settings.references // 2, seed=derive_seed(seed, "halves"))
        masks = [mask for pair in splits for mask in pair]
        self._models = [
            RidgeStudents.fit(self._of_reference[:, mask], scores[mask], ridge=settings.ridge)
            for mask in progress.track(masks, "reference models")
        ]
        self._usual = self._usual_of_population(masks)

    def _seen(self, images: Tensor) -> Tensor:
        return side_by_side(self._features(images))

    def _usual_of_population(self, masks: list[Tensor]) -> Tensor:
        """Log of p(z), over the models that did not see z's patient."""
        unseen = ~torch.stack(masks)[:, :, None]
        sure = torch.stack(
            [
                self._likelihoods(model, self._of_reference, self._population.targets).exp()
                for model in self._models
            ]
        )
        return self._calibrated((sure * unseen).sum(0) / unseen.sum(0))

    def _usual_of(self, features: Tensor, targets: Tensor) -> Tensor:
        """Log of p(x) of images that no model was trained on."""
        sure = torch.stack([self._likelihoods(model, features, targets).exp() for model in self._models])
        return self._calibrated(sure.mean(0))

    def _calibrated(self, out: Tensor) -> Tensor:
        slope = self._settings.slope
        return ((1 + slope) / 2 * out + (1 - slope) / 2).log()

    def _likelihoods(self, student: RidgeStudents, features: Tensor, targets: Tensor) -> Tensor:
        """Shape ``(n, 1)``, or ``(n, k)`` for a multilabel task."""
        return log_likelihoods(student.predict(features)[0, 0], targets, self._kind)

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """Mean over labels and images of each patient's score."""
        settings = self._settings
        known = candidates is self._candidates
        theirs = self._of_candidates if known else self._seen(candidates.images)
        labels = log_odds(release.soft_labels, self._kind, floor=settings.floor)
        student = RidgeStudents.fit(self._seen(release.images), labels, ridge=settings.ridge)
        targets, population = candidates.targets, self._population.targets
        of_x = self._likelihoods(student, theirs, targets) - self._usual_of(theirs, targets)
        of_z = self._likelihoods(student, self._of_reference, population) - self._usual
        return per_patient(dominated(of_x, of_z, gamma=settings.gamma).mean(1).numpy(), candidates.patients)


def dominated(ratios: Tensor, population: Tensor, *, gamma: float) -> Tensor:
    r"""Share of the population whose likelihood ratio is smaller by more than a factor :math:`\gamma`.

    Args:
        ratios: Logarithms, shape ``(n, k)``.
        population: Logarithms, shape ``(z, k)``.
        gamma: :math:`\gamma`.

    Returns:
        Shape ``(n, k)``.
    """
    ordered = population.T.contiguous().sort(-1).values
    limits = (ratios - math.log(gamma)).T.contiguous()
    return torch.searchsorted(ordered, limits, side="left").T.double() / len(population)


def _redrawn(images: ImageSet, share: float, generator: torch.Generator) -> ImageSet:
    """Some images with the targets of an image drawn at random."""
    drawn = torch.randint(len(images), (len(images),), generator=generator)
    redraw = torch.rand(len(images), generator=generator) < share
    return replace(images, targets=torch.where(redraw[:, None], images.targets[drawn], images.targets))
