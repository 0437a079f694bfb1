"""What tests of curators share: cohorts of known rows, plans, and randomness that can be switched off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.privacy.curator import PrivateCurator
from medistill.privacy.ledger import Ledger
from tests.conftest import pseudonym

BUDGET = Budget(epsilon=2.0, delta=1e-5)
TASK = Task.single_label(("normal", "ill"))


def silent(count: int) -> bytes:
    """Bits of which the Gaussian is exactly zero; with them nobody is sampled."""
    return b"\xff" * count


def only_sampling() -> Callable[[int], bytes]:
    """Secret sampling, and no noise: answers show who took part. For queries with a sampling rate below 1."""
    calls = 0

    def entropy(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return os.urandom(count) if calls % 2 else silent(count)

    return entropy


def sums(count: int = 1, rate: float = 1.0) -> PrivacyPlan:
    return PrivacyPlan(
        queries=(Query(kind=QueryKind.SUM, purpose="moments", count=count, sampling_rate=rate),),
        assumptions=("The features are public.",),
    )


def gradients(count: int = 1, rate: float = 1.0) -> PrivacyPlan:
    query = Query(kind=QueryKind.GRADIENT, purpose="steps", count=count, sampling_rate=rate)
    return PrivacyPlan(queries=(query,))


def cohort(pixels: Tensor, per_patient: int = 1) -> ImageSet:
    """One image for each row of pixels, square, several in a row of the same patient."""
    side = int(pixels.shape[1] ** 0.5)
    labels = torch.arange(len(pixels)) // per_patient % 2
    return ImageSet(
        images=pixels.view(-1, 1, side, side),
        targets=F.one_hot(labels, 2).float(),
        patients=tuple(pseudonym(number // per_patient) for number in range(len(pixels))),
        task=TASK,
    )


def marks(patients: int) -> ImageSet:
    """Patients of whom each has one bright pixel of their own, so that a sum shows who is in it."""
    side = int(patients**0.5)
    assert side * side == patients
    return cohort(torch.eye(patients))


def pixels(images: Tensor, targets: Tensor) -> Tensor:
    """The simplest embedding."""
    return images.flatten(1)


def curator(
    data: ImageSet,
    folder: Path,
    *,
    plan: PrivacyPlan | None = None,
    kind: type[PrivateCurator] = PrivateCurator,
    **more,
) -> PrivateCurator:
    return kind(data, budget=BUDGET, plan=plan or sums(), ledger=Ledger(folder / "ledger.jsonl"), **more)
