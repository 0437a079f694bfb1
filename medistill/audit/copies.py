"""Does a release hold copies or mixtures of patients' images, or come nearer to its patients than to others?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medistill.audit.attack import Exposed
from medistill.audit.copy_alarm import CopyAlarm, CopySearch, source_lift, source_lift_p
from medistill.audit.mixtures import Mixtures, MixtureSearch
from medistill.audit.pool import Pool
from medistill.core.images import ImageSet, joined
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.distill.start import random_images
from medistill.report.audit_page import ClosePair
from medistill.seeds import derive_seed

NAME = "copy_alarm"
_REAL_PER_CLASS = 10
_MIXED = 20
_NOISE = 0.3
_CAUGHT = 0.8
_LIFTED = 0.01


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What was found, before all attacks' p-values are looked at together.

    Args:
        found: Copies among all patients.
        mixtures: Mixtures among all patients.
        copies: Released images that are copies of a training patient's image.
        mixed: Those that are mixtures of two images, of which one at least is of a training patient.
        share: Share of members among the patients nearest to the release.
        chance: Share of members among all patients that are searched.
        p_value: Of so many members among them, or among the nearest pairs.
        smallest: The p-value if all of them were members.
        controls: Positive and negative.
    """

    found: CopySearch
    mixtures: Mixtures
    copies: int
    mixed: int
    share: float
    chance: float
    p_value: float
    smallest: float
    controls: tuple[ControlOutcome, ...]


class _Searched:
    """Everybody a released image is compared with, learned once for the release and its controls."""

    def __init__(self, pool: Pool) -> None:
        self.train, self.members, reference = pool.train, pool.members, pool.reference.images
        everybody = joined(pool.train, pool.holdout)
        self.inside = set(pool.train.patients)
        self.outside = set(everybody.patients) - self.inside
        self.balanced = pool.candidates
        self.copies = CopyAlarm().within(everybody, reference)
        self.mixtures = MixtureSearch().within(everybody, reference)
        self.copies_of_balanced = CopyAlarm().within(pool.candidates, reference)
        self.mixtures_of_balanced = MixtureSearch().within(pool.candidates, reference)

    def lift(self, released: Tensor) -> tuple[float, float]:
        """Share of members among the nearest of as many members as others, and its p-value."""
        nearest = self.copies_of_balanced.search(released)
        others = set(self.balanced.patients) - self.members
        return source_lift(set(nearest.patients), set(self.members), others)


def measure_copies(release: Exposed, control: Exposed, *, control_name: str, pool: Pool, seed: int) -> Copies:
    """Search a release and its controls.

    Args:
        release: What is audited.
        control: A release of patients of whom none is a candidate.
        control_name: What that is, in words.
        pool: Who is attacked, and who stands beside them.
        seed: Public seed.
    """
    searched = _Searched(pool)
    found, mixtures = searched.copies.search(release.images), searched.mixtures.search(release.images)
    inside = np.isin(mixtures.patients, pool.train.unique_patients)
    share, near = source_lift(set(found.patients), searched.inside, searched.outside)
    _, pair = source_lift(set(mixtures.patients.flatten().tolist()), searched.inside, searched.outside)
    return Copies(
        found=found,
        mixtures=mixtures,
        copies=_copies_of(found, searched.inside),
        mixed=int((mixtures.mixed & inside.any(1)).sum()),
        share=share,
        chance=len(searched.inside) / (len(searched.inside) + len(searched.outside)),
        p_value=min(1.0, 2 * min(near, pair)),
        smallest=_smallest(len(set(found.patients)), len(searched.inside), len(searched.outside)),
        controls=(*_positive(searched, seed), _negative(searched, control, control_name)),
    )


def _positive(searched: _Searched, seed: int) -> tuple[ControlOutcome, ...]:
    smallest = int(searched.train.targets.sum(0).min())
    real = random_images(
        searched.train, ipc=max(1, min(_REAL_PER_CLASS, smallest)), seed=derive_seed(seed, "real release")
    )
    guilty = searched.copies.search(real.images)
    rows = zip(guilty.copies, guilty.patients, real.patients, strict=True)
    caught = np.mean([flag and who == true for flag, who, true in rows])
    return (
        ControlOutcome(
            name="positive: a release of real images",
            expected=f"at least {_CAUGHT:.0%} of the copied patients found",
            observed=f"{caught:.0%} of {len(real)} found",
            passed=bool(caught >= _CAUGHT),
        ),
        _mixed_control(searched, seed),
        _noisy_control(searched, seed),
    )


def _mixed_control(searched: _Searched, seed: int) -> ControlOutcome:
    """Halves of two patients' images each; random pairs, whatever their class."""
    count = min(_MIXED, len(searched.train.unique_patients) // 2)
    order = one_image_each(searched.train, seed)
    first, second = order[:count], order[count : 2 * count]
    images = (searched.train.images[first] + searched.train.images[second]) / 2
    found = searched.mixtures.search(images)
    names = [{searched.train.patients[i], searched.train.patients[j]} for i, j in zip(first, second, strict=True)]
    rows = zip(found.mixed, found.patients, names, strict=True)
    caught = np.mean([flag and set(pair.tolist()) == true for flag, pair, true in rows])
    return ControlOutcome(
        name="positive: mixtures of two real images",
        expected=f"at least {_CAUGHT:.0%} of the mixed pairs found",
        observed=f"{caught:.0%} of {count} found",
        passed=bool(caught >= _CAUGHT),
    )


def _noisy_control(searched: _Searched, seed: int) -> ControlOutcome:
    """Real images of attacked members under heavy noise."""
    inside = searched.balanced.of_patients(searched.members)
    chosen = inside.select(one_image_each(inside, seed)[:_MIXED])
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise on real images"))
    noise = _NOISE * torch.randn(chosen.images.shape, generator=generator)
    share, p_value = searched.lift((chosen.images + noise).clamp(0, 1))
    return ControlOutcome(
        name=f"positive: real images under noise of {_NOISE:g}",
        expected=f"members among the nearest patients, p below {_LIFTED:g}",
        observed=f"{share:.0%} of the nearest are members, p = {p_value:.2g}",
        passed=p_value < _LIFTED,
    )


def _negative(searched: _Searched, control: Exposed, name: str) -> ControlOutcome:
    search = searched.copies_of_balanced.search(control.images)
    mixed = searched.mixtures_of_balanced.search(control.images)
    copies, mixtures = int(search.copies.sum()), int(mixed.mixed.sum())
    return ControlOutcome(
        name=f"negative: {name}",
        expected="no copy and no mixture found",
        observed=f"{copies} copies and {mixtures} mixtures found",
        passed=copies == 0 and mixtures == 0,
    )


def conclude_copies(measured: Copies, *, corrected: float, alpha: float) -> AttackOutcome:
    """What follows from the search.

    Args:
        measured: What was found.
        corrected: Its p-value after Holm's correction over all attacks.
        alpha: Level below which a p-value counts.
    """
    released = len(measured.found.copies)
    lifted = corrected < alpha
    guilty = bool(measured.copies or measured.mixed or lifted)
    valid = all(control.passed for control in measured.controls)
    verdict = Verdict.INVALID if not valid else Verdict.FAIL if guilty else Verdict.PASS
    return AttackOutcome(
        attack=NAME,
        question="Does a released image depict one training patient, or two mixed, far better than anybody else?",
        auroc=None,
        tpr_at_fpr={},
        p_value=corrected,
        minimum_detectable_auroc=None,
        findings={
            "copies": float(measured.copies),
            "mixtures_of_two": float(measured.mixed),
            "pictures_searched": float(released),
            "largest_correlation_with_a_patient": round(float(measured.found.correlation.max()), 2),
            "largest_gap": round(float(measured.found.gap.max()), 2),
            "gap_limit": measured.found.gap_limit,
            "members_among_nearest_patients": round(measured.share, 2),
            "by_chance": round(measured.chance, 2),
            "smallest_p_value_that_so_many_could_give": measured.smallest,
        },
        controls=measured.controls,
        verdict=verdict,
        summary=_summary(measured, verdict, released, corrected),
    )


def _summary(measured: Copies, verdict: Verdict, released: int, corrected: float) -> str:
    if verdict is Verdict.INVALID:
        return "A control failed, so this result says nothing about the release."
    if verdict is Verdict.PASS:
        return (
            f"None of the {released} released pictures stands out as a copy of one patient or a mixture of two. "
            "This is the absence of an alarm, not a proof."
        )
    if measured.copies:
        return f"{measured.copies} of {released} released pictures are copies of a training patient's image."
    if measured.mixed:
        return f"{measured.mixed} of {released} released pictures are mixtures of two patients' images."
    return (
        f"{measured.share:.0%} of the patients nearest to the released pictures are members, "
        f"{measured.chance:.0%} would be chance (p = {corrected:.2g})."
    )


def closest_pairs(
    release: Exposed, *, train: ImageSet, holdout: ImageSet, reference: ImageSet, count: int = 6
) -> tuple[ClosePair, ...]:
    """The released pictures that stand out most for one training patient, beside what they are nearest to.

    Args:
        release: What is audited.
        train: Images it was distilled from.
        holdout: Images of patients that distillation never saw.
        reference: Images of further patients.
        count: How many pictures.

    Privacy:
        Returns patients' images, for the data owner's eyes only.
    """
    alarm = CopyAlarm()
    gap = alarm.within(train, reference.images).search(release.images).gap
    chosen = np.argsort(-gap)[:count].tolist()
    inside, outside = (alarm.nearest(release.images[chosen], part.images) for part in (train, holdout))
    return tuple(
        ClosePair(
            released=release.images[number],
            member=train.images[inside[0][row]],
            other=holdout.images[outside[0][row]],
            with_member=float(inside[1][row]),
            with_other=float(outside[1][row]),
        )
        for row, number in enumerate(chosen)
    )


def one_image_each(images: ImageSet, seed: int) -> list[int]:
    """Positions of one image of each patient, patients in random order.

    Args:
        images: What to choose from.
        seed: Public seed.
    """
    first = {patient: number for number, patient in reversed(list(enumerate(images.patients)))}
    generator = torch.Generator().manual_seed(derive_seed(seed, "order of patients"))
    positions = [first[patient] for patient in images.unique_patients]
    return [positions[i] for i in torch.randperm(len(positions), generator=generator).tolist()]


def _smallest(nearest: int, members: int, others: int) -> float:
    return float(f"{source_lift_p(min(nearest, members), nearest, members, others):.2g}")


def _copies_of(search: CopySearch, members: set[str]) -> int:
    rows = zip(search.copies, search.patients, strict=True)
    return sum(bool(flag) and patient in members for flag, patient in rows)
