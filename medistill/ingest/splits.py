"""Patients divided into train, validation, holdout and test.

Patients who share an image (identical pixels) or a study are taken for one person and stay together. Within each
class the order comes from a keyed hash, so a division is reproducible with the key and the seed, and cannot be
guessed without. Where patients are divided independently, each one's own hash decides and nobody else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medistill.core.cohort import Split
from medistill.errors import ConfigError, SourceError
from medistill.ingest.identity import Pseudonymiser

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SplitFractions:
    """Share of patients per split.

    Args:
        train: Distilled from.
        validation: Schedules, operating points and the audit's reference.
        holdout: The audit's non-members.
        test: Diagnosis; not used where the source gives a test split.
        independent: Whether each patient is drawn on their own. Shares then hold on average only, and no patient
            more or less moves another one: what differential privacy needs in order to hold for all patients of
            the hospital, and not only for those distilled from.

    Raises:
        ConfigError: If a share is negative, nothing is left to train on, or they do not add up to 1.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    train: float = 0.55
    validation: float = 0.15
    holdout: float = 0.15
    test: float = 0.15
    independent: bool = False

    def __post_init__(self) -> None:
        shares = {split.value: float(getattr(self, split.value)) for split in Split}
        problems = [f"expected {name} >= 0, got {share}" for name, share in shares.items() if not share >= 0]
        if not self.train > 0:
            problems.append(f"expected train > 0, got {self.train}")
        if abs(sum(shares.values()) - 1) > 1e-9:
            problems.append(f"expected fractions to add up to 1, got {sum(shares.values()):.6g}")
        if problems:
            raise ConfigError("Split fractions: " + "; ".join(problems) + ".")

    def shares(self, *, given_test: bool) -> dict[Split, float]:
        """Share of each split that is drawn, scaled to add up to 1; leaves test out where it is given."""
        drawn = {split: float(getattr(self, split.value)) for split in Split}
        if given_test:
            drawn.pop(Split.TEST)
        drawn = {split: share for split, share in drawn.items() if share > 0}
        return {split: share / sum(drawn.values()) for split, share in drawn.items()}


@dataclass(frozen=True, kw_only=True)
class Member:
    """What decides where images of a patient go.

    Args:
        patient: Pseudonym.
        label: Class; empty for images that show none of the classes of a multilabel task.
        given_test: Whether the source puts the image into the test split.
    """

    patient: str
    label: str
    given_test: bool = False


def assign_splits(
    members: Sequence[Member],
    *,
    links: Iterable[tuple[str, str]] = (),
    fractions: SplitFractions,
    pseudonymiser: Pseudonymiser,
    seed: int,
) -> list[Split | None]:
    """Divide images by patient.

    Images given for testing stay there. All other patients are drawn for the remaining splits, whatever the source
    calls them. A patient with several classes is drawn with the rarest of them.

    Args:
        members: Images, or one member for all images of a patient with the same class and ``given_test``; an image
            with several classes is one member for each.
        links: Pairs of patients who are one person.
        fractions: Share of patients per split.
        pseudonymiser: Orders patients under its key.
        seed: Another seed gives another division.

    Returns:
        One split per image; ``None`` for an image whose patient also has images given for testing.

    Raises:
        SourceError: If a class has too few patients; says how many were found and needed.
    """
    person = _persons(members, links)
    tested = {person[member.patient] for member in members if member.given_test}
    shares = fractions.shares(given_test=bool(tested))
    home: dict[str, Split] = {}
    if fractions.independent:
        for patient in set(person.values()) - tested:
            home[patient] = _by_own_hash(pseudonymiser.digest("split", f"{seed}|{patient}"), shares)
    for patients in () if fractions.independent else _strata(members, person, tested).values():
        order = sorted(patients, key=lambda patient: pseudonymiser.digest("split", f"{seed}|{patient}"))
        home.update(zip(order, _sequence(len(order), shares), strict=True))
    places = [_place(member, person[member.patient], tested, home) for member in members]
    _check_complete(members, places, shares, person)
    return places


def _by_own_hash(digest: bytes, shares: Mapping[Split, float]) -> Split:
    """Split of a patient whose hash is a number from 0 to 1."""
    at, total = int.from_bytes(digest, "big") / 256 ** len(digest), 0.0
    for split, share in shares.items():
        total += share
        if at < total:
            return split
    return split


def _place(member: Member, patient: str, tested: set[str], home: dict[str, Split]) -> Split | None:
    if patient in tested:
        return Split.TEST if member.given_test else None
    return home[patient]


def _persons(members: Sequence[Member], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Representative of each patient, by union-find."""
    parent = {member.patient: member.patient for member in members}

    def find(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    for one, other in links:
        first, second = find(one), find(other)
        parent[max(first, second)] = min(first, second)
    return {patient: find(patient) for patient in parent}


def _strata(members: Sequence[Member], person: dict[str, str], tested: set[str]) -> dict[str, list[str]]:
    """Persons to draw, by the rarest of their classes."""
    classes: dict[str, set[str]] = defaultdict(set)
    for member in members:
        if person[member.patient] not in tested:
            classes[person[member.patient]].add(member.label)
    frequency = Counter(label for labels in classes.values() for label in labels)
    strata: dict[str, list[str]] = defaultdict(list)
    for patient, labels in classes.items():
        strata[min(labels, key=lambda label: (frequency[label], label))].append(patient)
    return dict(sorted(strata.items()))


def _check_complete(
    members: Sequence[Member],
    places: Sequence[Split | None],
    shares: dict[Split, float],
    person: Mapping[str, str],
) -> None:
    """Every class needs a patient in every split; to show none of the classes is not a class."""
    named = [(member, place) for member, place in zip(members, places, strict=True) if member.label]
    patients: dict[str, set[str]] = defaultdict(set)
    present: dict[str, set[Split]] = defaultdict(set)
    for member, place in named:
        present[member.label] |= {place} if place else set()
        if not member.given_test:
            patients[member.label].add(person[member.patient])
    needed = {*shares, *(split for splits in present.values() for split in splits)}
    least = len(shares)
    problems = [
        f"class {number} of {len(present)}: found {len(patients[label])} to draw from, needed at least {least}; "
        f"none in {', '.join(sorted(needed - splits))}"
        for number, (label, splits) in enumerate(sorted(present.items()), start=1)
        if needed - splits
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        more = f"\n  - and {len(problems) - _SHOWN} more classes" if len(problems) > _SHOWN else ""
        joined = len(set(person)) - len(set(person.values()))
        as_one = f" {joined} patients share an image or a study with another and count as one." if joined else ""
        raise SourceError(
            f"Too few patients to divide. Every split needs a patient of every class.{as_one}\n{listed}{more}"
        )


def _sequence(count: int, shares: dict[Split, float]) -> list[Split]:
    """Splits for ``count`` persons: one each as far as they go, the rest by largest remainder."""
    least = 1 if count >= len(shares) else 0
    numbers = {split: max(least, int(count * share)) for split, share in shares.items()}
    while sum(numbers.values()) != count:
        step = 1 if sum(numbers.values()) < count else -1
        movable = [split for split in shares if step > 0 or numbers[split] > least]
        chosen = max(movable, key=lambda split: step * (count * shares[split] - numbers[split]))
        numbers[chosen] += step
    return [split for split, number in numbers.items() for _ in range(number)]
