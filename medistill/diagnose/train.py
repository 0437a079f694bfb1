"""Training a diagnostic model on somebody's release."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from medistill import __version__
from medistill.core.compute import Compute, fresh
from medistill.core.distilled import DistilledSet, Schedule, ViewLabels
from medistill.core.task import Task, TaskKind
from medistill.diagnose.calibration import (
    Calibration,
    best_temperature,
    number_of_thresholds,
    stated_calibration,
)
from medistill.diagnose.ensemble import Ensemble
from medistill.diagnose.model import MAX_STUDENTS, DiagnosticModel, model_files, require_new, write_folder
from medistill.diagnose.outliers import fit_outliers
from medistill.diagnose.preprocessing import Preprocessing
from medistill.errors import ConfigError
from medistill.networks.layers import Classifier
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.release.verify import Release, load_release
from medistill.seeds import derive_seed
from medistill.training.fit import fit
from medistill.training.views import picture_labels, pictures

#: Parts that the released images are divided into to find a temperature.
FOLDS = 2
CALIBRATIONS = ("auto", "none")
_BATCH = 64


def train_on_release(
    release: Path,
    out: Path,
    *,
    network: str = "convnet",
    students: int = 1,
    calibration: str = "auto",
    seed: int = 0,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train networks from scratch on a release, by the schedule and soft labels it carries.

    The model's temperature is the one the data owner found on real patients, where the release carries one.
    Otherwise it is found by cross-fitting: the released images are divided into two halves, a network is trained
    on each, and the temperature is fitted to what they say of the half they have not seen, against the released
    soft labels. A network trained on half of the images is worse than the model, so what comes out is an upper
    bound: a temperature above 1 is not taken. No real patient is behind that figure: it shows how certain students
    of this release are about released images, and says nothing about a shift between those and the receiver's
    patients. Where each class has a single image there is nothing to hold out, and the temperature stays 1.

    Args:
        release: Release folder; its seal is verified first.
        out: New folder for ``model.safetensors`` and ``model.json``.
        network: Registered network name.
        students: Networks whose probabilities are averaged; each costs another training.
        calibration: ``auto`` as above, or ``none`` for temperature 1.
        seed: Public seed of the initial weights and augmentation.
        compute: Device and precision; the CPU by default.
        progress: Shows the trainings.

    Returns:
        The model folder.

    Raises:
        ReleaseError: If the release is damaged or was changed.
        OutputError: If the output folder is not empty.
        ConfigError: If the network is unknown or a setting is out of range.
        DataError: If what the release says about its cohort cannot be.
    """
    NETWORKS.load(network)
    if not 1 <= students <= MAX_STUDENTS or calibration not in CALIBRATIONS:
        raise ConfigError(
            f"Expected 1 to {MAX_STUDENTS} students and calibration {' or '.join(CALIBRATIONS)}, got {students} "
            f"and {calibration!r}."
        )
    require_new(out)
    model = train_model(
        load_release(release),
        network=network,
        students=students,
        calibration=calibration,
        seed=seed,
        compute=compute or Compute(),
        progress=progress or Progress(),
    )
    write_folder(out, model_files(model))
    return out


def train_model(
    release: Release,
    *,
    network: str,
    students: int,
    calibration: str,
    seed: int,
    compute: Compute,
    progress: Progress,
) -> DiagnosticModel:
    """What :func:`train_on_release` writes, in memory."""
    distilled = release.distilled
    preprocessing = Preprocessing.of_release(release.card, tuple(distilled.images.shape[1:]))
    stated = stated_calibration(release.card, network, distilled.task)
    whole = _Images.of(distilled)
    folds = _folds(distilled) if stated is None and calibration == "auto" else ()
    work: list[tuple[str, int, Tensor | None]] = [("member", number, None) for number in range(students)]
    work += [("fold", number, held) for number, held in enumerate(folds)]
    members: list[Classifier] = []
    unseen: list[tuple[Tensor, Tensor]] = []
    for name, number, held in progress.track(work, "training"):
        part = whole if held is None else whole.select(~held)
        trained = _student(network, part, f"{name} {number}" if name == "fold" or number else "", seed, compute)
        if held is None:
            members.append(trained)
        else:
            unseen.append(_answers(trained, whole.select(held), compute))
    found = stated if stated is not None and calibration == "auto" else _calibration(unseen, distilled.task)
    ensemble = Ensemble(members, kind=distilled.task.kind, temperature=found.temperature).eval()
    return DiagnosticModel(
        ensemble=ensemble,
        network=network,
        task=distilled.task,
        preprocessing=preprocessing,
        calibration=found,
        outliers=fit_outliers(whole.pictures, distilled.task, seed=derive_seed(seed, "outliers")),
        origin={
            "release": distilled.fingerprint(),
            "recipe": distilled.recipe.fingerprint(),
            "schedule": asdict(distilled.schedule),
            "seed": seed,
            "agreement_with_release": _agreement(ensemble, distilled),
            "privacy": distilled.privacy.to_json(),
            "medistill": __version__,
            "torch": str(torch.__version__),
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Images:
    """Released images, or some of them; without the count per class that a whole set must have."""

    images: Tensor
    soft_labels: Tensor
    task: Task
    schedule: Schedule
    views: ViewLabels | None

    @classmethod
    def of(cls, distilled: DistilledSet) -> _Images:
        return cls(
            images=distilled.images,
            soft_labels=distilled.soft_labels,
            task=distilled.task,
            schedule=distilled.schedule,
            views=distilled.views,
        )

    def select(self, rows: Tensor) -> _Images:
        views = self.views
        if views is not None:
            views = replace(views, boxes=views.boxes[:, rows], soft_labels=views.soft_labels[:, rows])
        return replace(self, images=self.images[rows], soft_labels=self.soft_labels[rows], views=views)

    @property
    def pictures(self) -> Tensor:
        """What a network sees: images, or the tiles of mosaics."""
        return pictures(self.images, self.views)


def _student(network: str, images: _Images, name: str, seed: int, compute: Compute) -> Classifier:
    """One network trained on some of the released images; the first has the seeds of a single model."""
    task, shape = images.task, tuple(images.images.shape[1:])
    model = fresh(NETWORKS.load(network), task, shape, derive_seed(seed, *filter(None, ("model", name))))
    fit(
        model,
        images.images,
        images.soft_labels,
        kind=task.kind,
        schedule=images.schedule,
        seed=derive_seed(seed, *filter(None, ("order", name))),
        views=images.views,
        compute=compute,
    )
    trained = model.cpu()
    assert isinstance(trained, Classifier)
    return trained


def _folds(distilled: DistilledSet) -> tuple[Tensor, ...]:
    """Masks of the images that one fold holds out, a share of each class; none where a class has one image."""
    count = min(FOLDS, distilled.ipc)
    if count < 2:
        return ()
    place = torch.empty_like(distilled.hard_labels)
    for label in range(distilled.task.n_classes):
        own = distilled.hard_labels == label
        place[own] = torch.arange(int(own.sum()))
    return tuple(place % count == number for number in range(count))


@torch.no_grad()
def _answers(network: Classifier, held: _Images, compute: Compute) -> tuple[Tensor, Tensor]:
    """Logits and soft labels of released pictures that the network has not seen, at the labels' temperature."""
    network = network.to(compute.device)
    softened = held.views.temperature if held.views is not None and held.views.are_tiles else 1.0
    logits = torch.cat([network(compute.put(batch)).cpu() for batch in torch.split(held.pictures, _BATCH)])
    return logits / softened, picture_labels(held.soft_labels, held.views)


def _calibration(unseen: list[tuple[Tensor, Tensor]], task: Task) -> Calibration:
    thresholds = (0.5,) * number_of_thresholds(task)
    if not unseen:
        return Calibration(thresholds=thresholds)
    logits, targets = (torch.cat(parts) for parts in zip(*unseen, strict=True))
    temperature = min(1.0, best_temperature(task.kind, logits[None], targets))
    return Calibration(temperature=temperature, source="cross_fit", thresholds=thresholds)


def _agreement(ensemble: Ensemble, distilled: DistilledSet) -> float:
    """Share of released images that the model takes for what they were made for."""
    with torch.no_grad():
        answers = torch.cat([ensemble(batch) for batch in torch.split(distilled.images, _BATCH)])
    agreement = answers.argmax(1) == distilled.hard_labels
    if distilled.task.kind is TaskKind.MULTILABEL:  # an image may show several classes, or none
        agreement = (answers >= 0.5) == (distilled.soft_labels >= 0.5)
    return float(agreement.float().mean())
