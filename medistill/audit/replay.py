"""Record and replay: does a private release depend on patients through the noisy answers only?

What a distiller makes of the answers is covered by their guarantee, however long it computes, if it touches
nothing else of the patients. So the answers about one cohort are recorded and given again, as they were, while a
neighbouring cohort lies there: with one patient removed, and another one replaced. The release must be the same to
the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from medistill.audit.worst_case import Unwritten
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Recipe
from medistill.core.guarantee import Budget
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.distill.private import plan_of
from medistill.distill.runner import run_recipe
from medistill.errors import DataError, PrivacyError
from medistill.privacy.curator import PrivateCurator
from medistill.progress import Progress

#: Everything that is done for a release, from its curator and from the cohort that lies beside it.
Release = Callable[[PrivateCurator, ImageSet], DistilledSet]
_Made = Callable[[PrivateCurator, ImageSet], str]
_FEWEST = 3
_PUBLIC = frozenset({"task"})
_CHANGED = "the release changed"


class _Recording(PrivateCurator):
    """Keeps what it answered."""

    def __init__(self, images: ImageSet, **values: Any) -> None:
        super().__init__(images, **values)
        self.given: list[Tensor] = []

    def _answer(self, *values: Any, **more: Any) -> Tensor:
        answer = super()._answer(*values, **more)
        self.given.append(answer.clone())
        return answer


class _Replaying(PrivateCurator):
    """Gives the answers that another curator gave, and notes what is touched of its own cohort beside them."""

    def __init__(self, images: ImageSet, *, given: list[Tensor], **values: Any) -> None:
        super().__init__(images, **values)
        self._given, self._shape = given, tuple(images.images.shape[1:])
        self.watched = Watched(images)
        self._images = cast("ImageSet", self.watched)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._shape

    def _answer(self, rows: object, length: int, *values: Any, **more: Any) -> Tensor:
        answer = self._given[self._next].clone() if self._next < len(self._given) else torch.empty(0)
        if answer.shape != (length,):
            raise PrivacyError("Another question was asked than before, though all answers were the same.")
        self._next += 1
        return answer


class Watched:
    """Images that note what of them is looked at.

    Args:
        images: The images.
    """

    def __init__(self, images: ImageSet) -> None:
        self._of = images
        self.touched: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.touched.add(name)
        return getattr(self._of, name)

    def __len__(self) -> int:
        self.touched.add("len")
        return len(self._of)


def audit_replay(
    recipe: Recipe,
    cohort: ImageSet,
    *,
    epsilon: float,
    delta: float,
    release: Release | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> AttackOutcome:
    """Distil a cohort with answers recorded, and a neighbouring one with the same answers replayed.

    Nothing is spent: what is distilled is compared and thrown away.

    Args:
        recipe: What is run; few steps show as much as many.
        cohort: Images of at least three patients, real or made up.
        epsilon: How much noise the recorded answers get.
        delta: With it.
        release: Everything that is done for a release; running the recipe where not given.
        compute: Device and precision.
        progress: Shows how far it is.

    Returns:
        ``FAIL`` where the release changed or the cohort was touched, ``INVALID`` where it changes by itself.

    Raises:
        DataError: If there are fewer than three patients.

    Privacy:
        Reads non-released data. Shows that something is touched, and does not prove that nothing is.
    """
    if len(cohort.unique_patients) < _FEWEST:
        raise DataError(f"Expected at least {_FEWEST} patients, got {len(cohort.unique_patients)}.")

    def run(curator: PrivateCurator, images: ImageSet) -> DistilledSet:
        return run_recipe(recipe, curator, compute=compute, looks=0, progress=progress).distilled

    def made(curator: PrivateCurator, images: ImageSet) -> str:
        return _bits((release or run)(curator, images))

    plan = plan_of(recipe, cohort.task, tuple(cohort.images.shape[1:]))
    budget = Budget(epsilon=epsilon, delta=delta)
    recording = _Recording(cohort, budget=budget, plan=plan, ledger=Unwritten())
    try:
        bits = made(recording, cohort)
    except PrivacyError as error:
        return _outcome([f"refused: {error}"], controls=())

    def changes(made: _Made, bits: str, images: ImageSet) -> list[str]:
        curator = _Replaying(images, given=recording.given, budget=budget, plan=plan, ledger=Unwritten())
        return _changes(made, bits, curator, images)

    other = neighbour(cohort)
    peeked = changes(_peeking, _peeking(recording, cohort), other)
    again = changes(made, bits, cohort)
    controls = (
        ControlOutcome(
            name="positive: a release that is a patient's image",
            expected="a changed release, and the cohort touched",
            observed=_listed(peeked),
            passed=_CHANGED in peeked and len(peeked) > 1,
        ),
        ControlOutcome(
            name="negative: the same answers beside the same cohort",
            expected="the same release to the last bit",
            observed=_CHANGED if _CHANGED in again else "the same",
            passed=_CHANGED not in again,
        ),
    )
    return _outcome(changes(made, bits, other), controls=controls)


def neighbour(cohort: ImageSet) -> ImageSet:
    """The cohort with its first patient removed, and every image of the last one inverted."""
    patients = list(dict.fromkeys(cohort.patients))
    left = cohort.of_patients(set(patients[1:]))
    replaced = torch.tensor([patient == patients[-1] for patient in left.patients])
    replaced = replaced.view(-1, *[1] * (left.images.ndim - 1))
    return replace(left, images=torch.where(replaced, 1 - left.images, left.images))


def _bits(distilled: DistilledSet) -> str:
    """Everything that is released, as a digest."""
    return f"{distilled.fingerprint()} {distilled.schedule}"


def _peeking(curator: PrivateCurator, images: ImageSet) -> str:
    """Known fault: what is released is an image of the cohort."""
    return hashlib.sha256(images.images[-1].contiguous().numpy().tobytes()).hexdigest()


def _changes(made: _Made, bits: str, curator: _Replaying, images: ImageSet) -> list[str]:
    """What is different, or touched, if the answers are the same and this is the cohort."""
    beside = Watched(images)
    try:
        after = made(curator, cast("ImageSet", beside))
    except PrivacyError as error:
        return [f"refused: {error}"]
    touched = sorted((curator.watched.touched | beside.touched) - _PUBLIC)
    return ([] if after == bits else [_CHANGED]) + ([f"touched: {', '.join(touched)}"] if touched else [])


def _listed(changes: list[str]) -> str:
    return "; ".join(changes) or "nothing"


def _outcome(changes: list[str], *, controls: tuple[ControlOutcome, ...]) -> AttackOutcome:
    verdict = Verdict.FAIL if changes else Verdict.PASS
    summary = "The release follows from the noisy answers: beside another cohort it is the same to the last bit."
    if changes:
        summary = f"Something other than the noisy answers reaches the release ({_listed(changes)})."
    if not all(control.passed for control in controls):
        verdict = Verdict.INVALID
        summary = "A control failed, so this result says nothing about the release."
    return AttackOutcome(
        attack="replay",
        question="Does anything of the patients reach the release beside the noisy answers?",
        auroc=None,
        tpr_at_fpr={},
        p_value=0.0 if changes else 1.0,
        minimum_detectable_auroc=None,
        findings={"changes": float(len(changes))},
        controls=controls,
        verdict=verdict,
        summary=summary,
    )
