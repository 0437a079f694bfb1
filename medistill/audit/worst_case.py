"""Worst cases for the private curator: cohorts that differ by one patient, and its answers, many times over."""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.privacy.accounting import PATIENCE
from medistill.privacy.answers import Answers
from medistill.privacy.contributions import images_of, patient_rows
from medistill.privacy.curator import PrivateCurator, contributions, noisy
from medistill.privacy.ledger import Ledger, Reservation
from medistill.privacy.noise import SYSTEM, Entropy, sampled

CLIP_NORM = 1.0
TASK = Task.single_label(("normal", "ill"))
#: The patient by whom cohorts differ, and how many images there are of them.
TARGET, IMAGES = "target", 5
#: Others in the larger pair of cohorts.
CROWD = 4
_LONG = 10.0  # of a row before clipping


def long_rows(images: Tensor, targets: Tensor) -> Tensor:
    """Rows far longer than the clip norm: 10 at pixels of 1, -10 at pixels of 0, nothing at mid grey."""
    return 2 * _LONG * (images.flatten(1).double() - 0.5)


def grey_cohort(pixels: Tensor, patients: tuple[str, ...]) -> ImageSet:
    """Made-up patients with these pixels, shape ``(n, d)``."""
    targets = torch.eye(TASK.n_classes)[torch.zeros(len(pixels), dtype=torch.long)]
    return ImageSet(images=pixels[:, None, None, :].float(), targets=targets, patients=patients, task=TASK)


def neighbours() -> tuple[tuple[ImageSet, ImageSet], ...]:
    """Pairs of cohorts, without and with one patient who has five images and rows far beyond the clip norm.

    In the first pair the only other patient adds nothing; in the second several add the opposite.
    """
    target = torch.tensor([[1.0, 0.5]]).repeat(IMAGES, 1)
    pairs = []
    for others in (torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 0.5]]).repeat(CROWD, 1)):
        names = tuple(f"other {number}" for number in range(len(others)))
        everybody = grey_cohort(torch.cat([others, target]), (*names, *[TARGET] * IMAGES))
        pairs.append((grey_cohort(others, names), everybody))
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The private curator's answers to a plan, many runs at a time and without a ledger.

    Args:
        plan: What is asked.
        noise_multipliers: One for each entry of the plan's queries.
        entropy: Source of random bytes.
    """

    plan: PrivacyPlan
    noise_multipliers: tuple[float, ...]
    entropy: Entropy = SYSTEM

    def answers(self, cohort: ImageSet, runs: int) -> tuple[Tensor, ...]:
        """For each entry of the plan, shape ``(runs, count, d)``."""
        asked = zip(self.plan.queries, self.noise_multipliers, strict=True)
        return tuple(self.answer(cohort, query, noise, runs) for query, noise in asked)

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        """One entry of the plan: sampled patients' contributions, summed exactly, and noise."""
        added = self.added(cohort)
        taken = sampled(runs * query.count * len(added), query.sampling_rate, entropy=self.entropy)
        totals = taken.view(-1, len(added)).double() @ added.double()  # whole numbers below 2**53
        return self.noised(totals.long(), noise).view(runs, query.count, -1)

    def added(self, cohort: ImageSet) -> Tensor:
        """What each patient adds, in steps of the grid, shape ``(n, d)``."""
        rows = patient_rows(cohort, images_of(cohort.patients), long_rows, chunk=len(cohort))
        return contributions(torch.cat(list(rows)), CLIP_NORM)

    def noised(self, totals: Tensor, noise: float) -> Tensor:
        """Sums with noise."""
        return noisy(totals, noise, CLIP_NORM, entropy=self.entropy)


class Unwritten(Ledger):
    """Writes nothing down: for answers that are thrown away.

    Args:
        reservation: What it is to hold, if anything.
    """

    def __init__(self, reservation: Reservation | None = None) -> None:
        self._only = reservation

    def find(self, identity: str) -> Reservation | None:
        """The reservation, if it is this one."""
        return self._only if self._only and self._only.identity == identity else None

    def reserve(self, reservation: Reservation, *, seconds: float = PATIENCE) -> None:
        """Nothing: nothing is spent."""

    def seal(self, identity: str, position: int, digest: str) -> None:
        """Nothing: nothing is kept."""


@contextmanager
def throw_away_curator(
    cohort: ImageSet, mechanism: Mechanism, *, entropy: Entropy | None = None
) -> Iterator[PrivateCurator]:
    """The private curator itself on a made-up cohort, with the noise of a mechanism; its answers are not kept.

    Args:
        cohort: Made-up patients.
        mechanism: Gives plan and noise.
        entropy: Source of random bytes; the curator's own where not given.
    """
    secret: dict[str, Any] = {} if entropy is None else {"_entropy": entropy}
    budget, identity = Budget(epsilon=1.0, delta=1e-5), secrets.token_hex(16)
    reservation = Reservation(
        identity=identity,
        plan=mechanism.plan,
        noise_multipliers=mechanism.noise_multipliers,
        budget=budget,
        recipe="",
        epsilon=budget.epsilon,
        accountants=("none: made-up patients",),
    )
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(Path(folder))
        answers.belong_to(identity)
        answers.close()
        curator = PrivateCurator(
            cohort,
            budget=budget,
            plan=mechanism.plan,
            ledger=Unwritten(reservation),
            store=Path(folder),
            **secret,
        )
        try:
            yield curator
        finally:
            curator.close()


class _Weights(nn.Module):
    """A network whose gradient of an image is the image's row."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length))

    def forward(self, images: Tensor) -> Tensor:
        return long_rows(images, images).to(self.weight) @ self.weight


def ask(curator: PrivateCurator, query: Query) -> Tensor:
    """One answer about :func:`long_rows`, as a sum or as a gradient, shape ``(d,)``."""
    if query.kind is QueryKind.SUM:
        return curator.sum(long_rows, clip_norm=CLIP_NORM, sampling_rate=query.sampling_rate)
    network = _Weights(math.prod(curator.image_shape))
    found = curator.gradient(
        network, lambda outputs, _: outputs, clip_norm=CLIP_NORM, sampling_rate=query.sampling_rate
    )
    return found["weight"]
