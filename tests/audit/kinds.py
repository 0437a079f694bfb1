"""Small cohorts of every kind of image and task, and how well scores tell members among them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from medistill.audit.attack import Floats
from medistill.audit.statistics import auroc
from medistill.core.images import ImageSet
from medistill.core.reports import Estimate
from medistill.core.task import Task
from tests.conftest import blobs

KINDS = ("colour", "volumes", "multilabel", "multiclass")


def of_kind(kind: str, patients: int, *, seed: int, first: int) -> ImageSet:
    """Blobs in colour, as volumes, with several findings or none by a coin each, or of three classes."""
    if kind == "volumes":
        flat = blobs(patients, size=8, seed=seed, first=first)
        deep = flat.images[:, :, None].expand(-1, -1, 8, -1, -1)
        noisy = deep + 0.1 * torch.randn(deep.shape, generator=torch.Generator().manual_seed(seed))
        return replace(flat, images=noisy.clamp(0, 1))
    if kind in ("multilabel", "multiclass"):
        plain = blobs(patients, classes=3, seed=seed, first=first)
        if kind == "multiclass":
            return plain
        coins = torch.rand(len(plain), 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        return replace(plain, targets=coins.float(), task=Task.multilabel(("a", "b", "c")))
    grey = blobs(patients, seed=seed, first=first)
    return replace(grey, images=grey.images.repeat(1, 3, 1, 1))


def told_apart(scores: Floats, candidates: ImageSet, members: frozenset[str]) -> Estimate:
    """AUROC of members against the other candidates, by one score a patient."""
    inside = np.array([patient in members for patient in candidates.unique_patients])
    return auroc(scores[inside], scores[~inside])
