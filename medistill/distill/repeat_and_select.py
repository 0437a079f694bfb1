"""Repeat and select: a random number of private runs, of which the best is kept by a noisy score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import DistilledSet, Recipe
from medistill.core.images import ImageSet
from medistill.core.task import Task, TaskKind
from medistill.distill.runner import Distillation, run_recipe
from medistill.distill.watch import Look, Observer
from medistill.errors import DataError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import PrivateCurator, check_apart
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.fit import fit, predict

_COUNT = 0.25
_CLOSEST = 0.5
_CLIP_NORM = math.hypot(_CLOSEST, _COUNT)


@dataclass(frozen=True, kw_only=True)
class _Done:
    """One run that came to an end."""

    score: float
    made: Distillation
    looks: tuple[Look, ...]


def fingerprint_of(recipes: Sequence[Recipe]) -> str:
    """One fingerprint of all recipes that may be run, for the ledger."""
    return hashlib.sha256("".join(recipe.fingerprint() for recipe in recipes).encode()).hexdigest()


def repeat_and_select(
    images: ImageSet,
    validation: ImageSet,
    recipes: Sequence[Recipe],
    *,
    sealed: Path,
    observer: Observer | None = None,
    progress: Progress | None = None,
    compute: Compute | None = None,
    folder: Path | None = None,
    looks: int,
    **curator: Any,
) -> Distillation:
    r"""Run recipes drawn at random, score a student of each release, and keep the best.

    Every run has noise, a recipe and a seed of its own, asks the whole plan, and ends with a noisy sum over
    validation patients: how close a ConvNet trained on its release comes to the truth
    (:math:`1/2 - \sum_c (p_c - y_c)^2 / 2`, a proper score), averaged over classes so that a rare one weighs as
    much as a frequent one. A run whose noise hides a class has the lowest score.

    Args:
        images: The images distilled from.
        validation: Images of other patients.
        recipes: One is drawn for each run; all ask the same plan.
        sealed: Where noisy answers and the record of the runs are kept. It stays inside: the number of runs and
            the answers of the others are part of what is kept secret.
        observer: Told of the looks of the best run, when all are done.
        progress: Shows the runs.
        compute: Device and precision.
        folder: Where checkpoints are kept.
        looks: Times that the images of a run are looked at.
        curator: What a private curator is made of: ``budget``, ``plan``, ``ledger``.

    Raises:
        DataError: If the noise hides a class in every run.
        PrivacyError: If the ledger refuses, or the kept answers are those of something else.

    Privacy:
        As a whole (epsilon, delta)-differentially private for each patient of either set, see
        :mod:`medistill.privacy.selection`. The other runs must not be published, nor how many there were.

    References:
        Liu & Talwar 2019, arXiv:1811.07971; Papernot & Steinke 2022, arXiv:2110.03620.
    """
    progress, compute = progress or Progress(), compute or Compute()
    curator |= {"recipe": fingerprint_of(recipes)}
    check_apart(images, validation)
    first, done = PrivateCurator(images, store=sealed, **curator), list[_Done]()
    try:
        for number, (chosen, seed) in enumerate(runs := first.runs(len(recipes))):
            progress.say(f"run {number + 1}")  # how many there are is secret
            own, recipe, seen = first.run(number), replace(recipes[chosen], seed=seed), list[Look]()
            how: dict[str, Any] = {"compute": compute, "progress": progress, "observer": seen.append}
            try:
                place = folder and folder / f"run-{number:04d}"
                made = run_recipe(recipe, own, folder=place, looks=looks, **how)
                score = noisy_score(own, made.distilled, validation, compute)
                done.append(_Done(score=score, made=made, looks=tuple(seen)))
            except DataError:  # what the noise hid, no patient decides beyond the answer
                if number + 1 == len(runs) and not done:
                    raise
            finally:
                if own is not first:
                    own.close()
    finally:
        first.close()
    best = max(done, key=lambda one: one.score)
    for look in best.looks if observer else ():
        assert observer is not None
        observer(look)
    return best.made


def noisy_score(curator: PrivateCurator, distilled: DistilledSet, validation: ImageSet, compute: Compute) -> float:
    """How well a student of a release does on validation patients, up to noise; at most about 1/2.

    Args:
        curator: Of the run that ends with it.
        distilled: The release of the run.
        validation: Images of patients who were not distilled from.
        compute: Device and precision.
    """
    task, seed = distilled.task, distilled.recipe.seed
    network = fresh(ConvNet, task, tuple(distilled.images.shape[1:]), derive_seed(seed, "score"))
    fit(
        network,
        distilled.images,
        distilled.soft_labels,
        kind=task.kind,
        schedule=distilled.schedule,
        seed=derive_seed(seed, "score", 1),
        compute=compute,
        views=distilled.views,
    )

    def embed(images: Tensor, targets: Tensor) -> Tensor:
        return closeness(network, images, targets, task=task, compute=compute)

    answer = curator.score(validation, embed, clip_norm=_CLIP_NORM).double().view(-1, 2)
    sums, counts = answer[:, 0], answer[:, 1] / _COUNT
    return float((sums / counts.clamp_min(1.0)).mean())


def closeness(network: nn.Module, images: Tensor, targets: Tensor, *, task: Task, compute: Compute) -> Tensor:
    """Rows of a score: how close predictions come, and a constant, in the place of the image's class.

    Args:
        network: The student.
        images: Shape ``(n, c, h, w)``.
        targets: Shape ``(n, k)``.
        task: What is diagnosed; findings that may occur together share one place.
        compute: Device and precision.

    Returns:
        Shape ``(n, 2 k)``, or ``(n, 2)`` for a multilabel task; no row is longer than the root of 5/16.
    """
    found = predict(network, images, kind=task.kind, compute=compute).double()
    missed = (found - targets).square()
    multilabel = task.kind is TaskKind.MULTILABEL
    close = _CLOSEST - (missed.mean(1) if multilabel else missed.sum(1) / 2)
    close = close.nan_to_num(-_CLOSEST)  # of a student that diverged
    pair = torch.stack([close, torch.full_like(close, _COUNT)], dim=1)
    places = torch.ones_like(pair[:, :1]) if multilabel else targets.to(pair)
    return (places[:, :, None] * pair[:, None, :]).flatten(1)
