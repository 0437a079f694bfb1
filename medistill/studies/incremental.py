"""Classes of several cohorts that arrive in steps, and what a network knows of them after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medistill.core.images import ImageSet
from medistill.core.task import Task, TaskKind
from medistill.errors import ConfigError, DataError
from medistill.evaluate.metrics import weighted_auroc
from medistill.ingest import load_cohort
from medistill.seeds import derive_seed

Floats = NDArray[np.float64]
_PLANE_AXES = 3


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Classes of several cohorts as one task, patients of all of them divided as they were."""

    train: ImageSet
    test: ImageSet

    @property
    def task(self) -> Task:
        """The joint task; classes are named ``site: class``."""
        return self.train.task


def join_cohorts(sites: Mapping[str, tuple[Path, int]]) -> Benchmark:
    """Read the train and test splits of several cohorts as one task, all in grey.

    Args:
        sites: Name to the folder of a cohort and the side length of its images, the same for all.

    Raises:
        ConfigError: If sizes differ, or a site has volumes or several classes per image.
        DataError: If a patient of one site's train split is in another site's test split.
    """
    if len({size for _, size in sites.values()}) != 1:
        raise ConfigError("Expected the same size for every site.")
    cohorts = {name: load_cohort(path) for name, (path, _) in sites.items()}
    for name, cohort in cohorts.items():
        if cohort.task.kind is TaskKind.MULTILABEL or len(cohort.profile["shape"]) > _PLANE_AXES:
            raise ConfigError(f"sites.{name}: expected plane images of one class each.")
    names = tuple(f"{site}: {label}" for site, cohort in cohorts.items() for label in cohort.task.class_names)
    task, size = Task.single_label(names), next(iter(sites.values()))[1]

    def joined(split: str) -> ImageSet:
        parts = [cohort.split(split).images(size) for cohort in cohorts.values()]
        return ImageSet(
            images=torch.cat([_grey(part.images) for part in parts]),
            targets=F.one_hot(_places(parts), task.n_classes).float(),
            patients=tuple(patient for part in parts for patient in part.patients),
            task=task,
        )

    train, test = joined("train"), joined("test")
    shared = len(set(train.patients) & set(test.patients))
    if shared:
        raise DataError(
            f"{shared} patients are in the train split of one site and in the test split of another. "
            "Leave one of the two sites out."
        )
    return Benchmark(train=train, test=test)


def _grey(images: Tensor) -> Tensor:
    """One channel, the mean of colours: colour alone would tell the sites apart."""
    return images.mean(1, keepdim=True) if images.shape[1] > 1 else images


def _places(parts: Sequence[ImageSet]) -> Tensor:
    """Class of every image in the joint task."""
    start, places = 0, []
    for part in parts:
        places.append(part.classes + start)
        start += part.task.n_classes
    return torch.cat(places)


def class_groups(classes: int, steps: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Classes of each step, in an order drawn from the seed.

    Raises:
        ConfigError: If the steps do not divide the classes evenly.
    """
    if classes % steps:
        raise ConfigError(f"{classes} classes cannot arrive in {steps} equal steps.")
    generator = torch.Generator().manual_seed(derive_seed(seed, "class order"))
    order = torch.randperm(classes, generator=generator).tolist()
    each = classes // steps
    return tuple(tuple(order[start : start + each]) for start in range(0, classes, each))


@dataclass(kw_only=True)
class Judge:
    """Tests after every step on the test images of all classes so far."""

    test: ImageSet
    weights: Floats
    recalls: list[Floats] = field(default_factory=list)  #: per step ``(1 + draws, classes)``, nan where not seen
    areas: list[Floats] = field(default_factory=list)  #: per step ``(1 + draws,)``

    def look(self, probabilities: Floats, groups: Sequence[Sequence[int]]) -> None:
        """Take the figures of one step; the answer is one of the classes seen."""
        seen = sorted(c for group in groups for c in group)
        classes = self.test.classes.numpy()
        here = np.isin(classes, seen)
        classes, found = classes[here], probabilities[here][:, seen]
        found = found / np.maximum(found.sum(1, keepdims=True), 1e-12)
        weights = np.vstack([np.ones((1, int(here.sum()))), self.weights[:, here]])
        right = np.asarray(seen)[found.argmax(1)] == classes
        recalls = np.full((len(weights), self.test.task.n_classes), np.nan)
        areas = []
        for place, c in enumerate(seen):
            of_class = classes == c
            total = weights @ of_class.astype(np.float64)
            hits = weights @ (right & of_class).astype(np.float64)
            recalls[:, c] = np.divide(hits, total, out=np.full_like(total, np.nan), where=total > 0)
            areas.append(weighted_auroc(found[:, place], of_class, weights))
        self.recalls.append(recalls)
        self.areas.append(mean_over_seen(np.stack(areas, axis=-1)))

    def accuracies(self) -> Floats:
        """Mean recall over the classes seen, shape ``(steps, 1 + draws)``."""
        return np.stack([mean_over_seen(recalls) for recalls in self.recalls])

    def figures(self) -> dict[str, Any]:
        """Point values."""
        return {
            "accuracy": self.accuracies()[:, 0].tolist(),
            "auroc": [None if np.isnan(area[0]) else float(area[0]) for area in self.areas],
            "forgetting": float(forgetting(np.stack(self.recalls))[0]),
            "recalls": [[None if np.isnan(r) else float(r) for r in step[0]] for step in self.recalls],
        }

    def draws(self) -> dict[str, Tensor]:
        """Bootstrap draws."""
        found = {
            "accuracy": self.accuracies()[:, 1:],
            "auroc": np.stack(self.areas)[:, 1:],
            "forgetting": forgetting(np.stack(self.recalls))[1:],
        }
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def mean_over_seen(recalls: Floats) -> Floats:
    """Mean of the last axis over what is a number; nan where nothing is."""
    there = np.isfinite(recalls)
    count = there.sum(-1)
    total = np.where(there, recalls, 0.0).sum(-1)
    mean: Floats = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return mean


def forgetting(recalls: Floats) -> Floats:
    r"""Mean fall of the classes' recalls from their best earlier step to the last one (Chaudhry et al. 2018).

    .. math:: F = \frac{1}{|C|} \sum_{c \in C} \left( \max_{t < T} r_{t,c} - r_{T,c} \right)

    over the classes :math:`C` that arrived before the last step.

    Args:
        recalls: Shape ``(steps, draws, classes)``, nan before a class arrived.

    Returns:
        Shape ``(draws,)``; 0 where there is one step only.
    """
    earlier = recalls[:-1]
    old = np.isfinite(earlier).any((0, 1)) if len(earlier) else np.zeros(recalls.shape[2], dtype=bool)
    if not old.any():
        return np.zeros(recalls.shape[1])
    best = np.where(np.isfinite(earlier), earlier, -np.inf).max(0)[:, old]
    fall = np.where(np.isfinite(best), best - recalls[-1][:, old], np.nan)
    return mean_over_seen(fall)
