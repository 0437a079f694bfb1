"""Diagnosis of patients from patches of their radiographs, with every training set side by side.

A patch goes to its most probable class; patches outside the organ are discarded; a patient's score is the share
of positive patches among the rest, and from a threshold on the patient is positive (Kanai et al. 2020; Li et al.
2020). The threshold is chosen on validation patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medistill.core.distilled import DistilledSet, Schedule, ViewLabels
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic
from medistill.core.reports import ArmResult, DiagnosticReport
from medistill.distill.schedule import choose_schedule
from medistill.distill.start import random_images
from medistill.errors import DataError
from medistill.evaluate.arms import REAL_SCHEDULE
from medistill.evaluate.bootstrap import over_networks, patient_weights
from medistill.evaluate.metrics import diagnostic_metrics, operating_point
from medistill.ingest.patches import PatchGrid, cut_patches, patients_positive
from medistill.networks.convnet import ConvNet
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.students import Student, train_students
from medistill.training.views import hard_views, hardened

Floats = NDArray[np.float64]
_POSITIVE, _OUTSIDE = 1, 2
_OF_PROBABILITIES = "ece"  #: a share of patches is no probability


@dataclass(frozen=True, kw_only=True)
class PatchSplit:
    """Every patch of some patients, and what these patients have.

    Args:
        patches: Classes ``(negative, positive, outside)``; the targets are not read.
        positive: Patient to finding; patients who are not in it are not judged.

    Raises:
        DataError: If there are not three classes, or no patient can be judged.
    """

    patches: ImageSet
    positive: Mapping[str, bool]

    def __post_init__(self) -> None:
        if self.patches.task.n_classes != _OUTSIDE + 1:
            raise DataError(
                f"Expected the classes negative, positive and outside; got {self.patches.task.n_classes} classes."
            )
        if len({self.positive[p] for p in self.patches.unique_patients if p in self.positive}) < 2:
            raise DataError("Expected patients with and without the finding in every split; found one kind only.")

    @classmethod
    def of(cls, films: ImageSet, *, grid: PatchGrid, classes: tuple[str, str, str]) -> PatchSplit:
        """Every patch of radiographs; a patient has the finding if one radiograph is of the positive class."""
        positive = patients_positive(films, negative=classes[0], positive=classes[1])
        return cls(patches=cut_patches(films, grid=grid, classes=classes), positive=positive)

    @property
    def judged(self) -> tuple[str, ...]:
        """Patients with a known finding, sorted."""
        return tuple(patient for patient in self.patches.unique_patients if patient in self.positive)

    @property
    def classes(self) -> NDArray[np.int64]:
        """Finding of each judged patient, 0 or 1."""
        return np.array([self.positive[patient] for patient in self.judged], dtype=np.int64)

    def scores(self, probabilities: NDArray[np.floating]) -> Floats:
        """Share of positive patches of each judged patient, as ``(1 - share, share)``."""
        shares = positive_shares(probabilities, self.patches.patients)
        positive = np.array([shares[patient] for patient in self.judged])
        return np.stack([1 - positive, positive], axis=1)


def positive_shares(probabilities: NDArray[np.floating], patients: Sequence[str]) -> Mapping[str, float]:
    """Share of positive patches among those inside the organ.

    Args:
        probabilities: Shape ``(n, 3)``: negative, positive, outside.
        patients: Patient of each patch, length ``n``.

    Returns:
        Patient to share; 0 for a patient none of whose patches is taken for inside: nothing positive was found.
    """
    decided = probabilities.argmax(axis=1)
    distinct, of_patch = np.unique(np.asarray(patients), return_inverse=True)
    positive = np.bincount(of_patch, weights=decided == _POSITIVE, minlength=len(distinct))
    inside = np.bincount(of_patch, weights=decided != _OUTSIDE, minlength=len(distinct))
    shares = positive / np.maximum(inside, 1)
    return dict(zip(distinct.tolist(), shares.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class _Arm:
    name: str
    images: Tensor
    soft_labels: Tensor
    schedule: Schedule
    number: int
    views: ViewLabels | None = None


def evaluate_patients(
    distilled: Mapping[str, DistilledSet],
    *,
    train: ImageSet,
    choose_on: ImageSet,
    validation: PatchSplit,
    test: PatchSplit,
    seeds: int = 2,
    random_draws: int = 5,
    real_epochs: int = 5,
    draws: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> DiagnosticReport:
    """Diagnose patients by networks trained on distilled patches, on as many random real ones, and on all of them.

    Every distilled set is an arm with its soft labels and, as ``<name>_hard``, with the classes its images were
    made for. A draw of random patches is trained by the schedule that is best for it on ``choose_on``.

    Args:
        distilled: Name of the arm to set.
        train: Labelled patches of training patients.
        choose_on: Labelled patches of validation patients, for the schedule of the random patches.
        validation: Every patch of validation patients; the threshold on the share is chosen on them.
        test: Every patch of test patients, on whom nothing is chosen.
        seeds: Networks per arm; one for each random draw.
        random_draws: Draws of random real patches.
        real_epochs: Epochs on all real patches.
        draws: Bootstrap draws over test patients.
        seed: Public seed.
        progress: Shows the trainings.

    Returns:
        One arm each, the mean over networks of every metric with 95 % intervals by bootstrap over patients.

    Raises:
        DataError: If a patient is in two splits.
    """
    progress = progress or Progress()
    _check_apart(train.patients, (*choose_on.patients, *validation.patches.patients), test.patches.patients)
    arms = list(_arms(distilled, train, choose_on, seeds, random_draws, real_epochs, seed, progress))
    apply_to = {"validation": validation.patches.images.numpy(), "test": test.patches.images.numpy()}
    students = [
        Student(
            network=ConvNet,
            task=train.task,
            images=arm.images.numpy(),
            soft_labels=arm.soft_labels.numpy(),
            schedule=arm.schedule,
            weights_seed=derive_seed(seed, "student", arm.name, arm.number),
            order_seed=derive_seed(seed, "order", arm.name, arm.number),
            apply_to=apply_to,
            views=arm.views,
        )
        for arm in arms
    ]
    found: dict[str, list[_Judged]] = {}
    trained = progress.track(train_students(students), "evaluating", total=len(students))
    for arm, result in zip(arms, trained, strict=True):
        scores = validation.scores(result.probabilities["validation"])
        judged = _Judged(
            scores=test.scores(result.probabilities["test"]),
            threshold=operating_point(scores, validation.classes),
            images=len(arm.images),
            seconds=result.cpu_seconds,
        )
        found.setdefault(arm.name, []).append(judged)
    weights = patient_weights(test.judged, draws=draws, seed=derive_seed(seed, "bootstrap"))
    results = tuple(_arm_result(name, judged, test, weights) for name, judged in found.items())
    fingerprint = "+".join(made.fingerprint() for made in distilled.values())
    return DiagnosticReport(arms=results, class_names=train.task.class_names, release=fingerprint)


def _check_apart(*splits: Sequence[str]) -> None:
    patients = [set(split) for split in splits]
    if sum(map(len, patients)) != len(set().union(*patients)):
        raise DataError("Expected every patient in one of train, validation and test; found one in two.")


def _arms(
    distilled: Mapping[str, DistilledSet],
    train: ImageSet,
    choose_on: ImageSet,
    seeds: int,
    random_draws: int,
    real_epochs: int,
    seed: int,
    progress: Progress,
) -> Iterator[_Arm]:
    schedule = replace(REAL_SCHEDULE, epochs=real_epochs)
    for number in range(seeds):
        yield _Arm(name="real", images=train.images, soft_labels=train.targets, schedule=schedule, number=number)
    for name, made in distilled.items():
        hard = hardened(made.soft_labels, made.hard_labels, made.task)
        taught = ((name, made.soft_labels, made.views), (f"{name}_hard", hard, hard_views(made.views, hard)))
        for arm, labels, views in taught:
            for number in range(seeds):
                yield _Arm(
                    name=arm,
                    images=made.images,
                    soft_labels=labels,
                    schedule=made.schedule,
                    number=number,
                    views=views,
                )
    ipc = max(made.ipc for made in distilled.values())
    for number in range(random_draws):
        chosen = random_images(train, ipc=ipc, seed=derive_seed(seed, "random", number))
        synthetic = Synthetic(images=chosen.images, soft_labels=chosen.targets, hard_labels=chosen.classes)
        ranked = choose_schedule(synthetic, choose_on, network=ConvNet, seed=seed, students=1, progress=progress)
        yield _Arm(
            name="random",
            images=chosen.images,
            soft_labels=chosen.targets,
            schedule=ranked[0].schedule,
            number=number,
        )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    scores: Floats
    threshold: float
    images: int
    seconds: float


def _arm_result(name: str, judged: Sequence[_Judged], test: PatchSplit, weights: Floats) -> ArmResult:
    plain, classes = np.ones((1, weights.shape[1])), test.classes
    values = [diagnostic_metrics(one.scores, classes, plain, threshold=one.threshold) for one in judged]
    drawn = [diagnostic_metrics(one.scores, classes, weights, threshold=one.threshold) for one in judged]
    metrics, deviations = over_networks(values, drawn, n=len(test.judged))
    return ArmResult(
        arm=name,
        network="convnet",
        split="test",
        images=judged[0].images,
        seeds=len(judged),
        metrics={name: found for name, found in metrics.items() if name != _OF_PROBABILITIES},
        seed_deviation={name: found for name, found in deviations.items() if name != _OF_PROBABILITIES},
        cpu_seconds=round(sum(one.seconds for one in judged) / len(judged), 2),
    )
