from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medistill.core.cohort import Split
from medistill.errors import ConfigError, SourceError
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.splits import Member, SplitFractions, assign_splits
from tests.ingest.conftest import KEY

SECRET = Pseudonymiser(KEY)


def assign(
    members: list[Member], seed: int = 0, key: bytes = KEY, links: Sequence[tuple[str, str]] = ()
) -> list[Split | None]:
    return assign_splits(
        members, links=links, fractions=SplitFractions(), pseudonymiser=Pseudonymiser(key), seed=seed
    )


def crowd(patients: int, classes: int = 2, images: int = 2) -> list[Member]:
    return [
        Member(patient=f"p{number:04d}", label=f"c{number % classes}")
        for number in range(patients)
        for _ in range(images)
    ]


@settings(deadline=None, max_examples=60)
@given(
    patients=st.integers(24, 120),
    classes=st.integers(2, 3),
    images=st.integers(1, 3),
    seed=st.integers(0, 5),
    twins=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), max_size=4),
)
def test_persons_stay_together_and_classes_are_balanced(
    patients: int, classes: int, images: int, seed: int, twins: list[tuple[int, int]]
) -> None:
    members = crowd(patients, classes, images)
    links = [(f"p{one:04d}", f"p{other:04d}") for one, other in twins]
    try:
        places = assign(members, seed, links=links)
    except SourceError:
        assert twins  # merging can leave a class with too few persons
        return
    assert places == assign(members, seed, links=links)
    home: dict[str, set[Split | None]] = defaultdict(set)
    for member, place in zip(members, places, strict=True):
        home[member.patient].add(place)
    assert all(len(found) == 1 for found in home.values())
    assert all(home[one] == home[other] for one, other in links)
    if not twins:
        for label in {member.label for member in members}:
            mine = {m.patient: p for m, p in zip(members, places, strict=True) if m.label == label}
            for split, count in Counter(mine.values()).items():
                assert split is not None
                share = getattr(SplitFractions(), split.value)
                assert abs(count - share * len(mine)) <= 1.5


@settings(deadline=None, max_examples=20)
@given(removed=st.integers(0, 199), seed=st.integers(0, 50))
def test_divided_independently_no_patient_moves_another(removed: int, seed: int) -> None:
    alone = SplitFractions(independent=True)

    def home(members: list[Member], fractions: SplitFractions) -> dict[str, Split | None]:
        places = assign_splits(members, links=[], fractions=fractions, pseudonymiser=SECRET, seed=seed)
        return dict(zip([member.patient for member in members], places, strict=True))

    members = crowd(200, images=1)
    rest = members[:removed] + members[removed + 1 :]
    gone = members[removed].patient
    before, after = home(members, alone), home(rest, alone)
    assert {**after, gone: before[gone]} == before


def test_an_even_division_moves_others_and_an_independent_one_has_the_shares_on_average() -> None:
    members, moved, counts = crowd(200, images=1), 0, Counter[Split | None]()
    for seed in range(20):
        even, less = assign(members, seed), assign(members[1:], seed)
        moved += sum(one is not other for one, other in zip(even[1:], less, strict=True))
        alone = SplitFractions(train=0.4, validation=0.1, holdout=0.2, test=0.3, independent=True)
        counts.update(assign_splits(members, links=[], fractions=alone, pseudonymiser=SECRET, seed=seed))
    assert moved > 0
    for split in Split:
        expected = 4000 * getattr(alone, split.value)
        assert abs(counts[split] - expected) < 5 * expected**0.5


def test_order_of_images_does_not_matter() -> None:
    members = crowd(40)
    forward = dict(zip((m.patient for m in members), assign(members), strict=True))
    backward = dict(zip((m.patient for m in members[::-1]), assign(members[::-1]), strict=True))
    assert forward == backward


def test_key_and_seed_change_the_division() -> None:
    members = crowd(40)
    assert assign(members) != assign(members, seed=1)
    assert assign(members) != assign(members, key=bytes(32))


def test_given_test_stays_and_its_patients_leave_the_rest() -> None:
    members = crowd(40, images=1)
    members += [Member(patient=f"t{n}", label=f"c{n % 2}", given_test=True) for n in range(4)]
    members += [Member(patient="t0", label="c0")]
    places = assign(members)
    assert places[-1] is None
    assert set(places[-5:-1]) == {Split.TEST}
    assert set(places[:-5]) == {Split.TRAIN, Split.VALIDATION, Split.HOLDOUT}
    assert Counter(places[:-5])[Split.TRAIN] == 26  # 0.55 / 0.85 of 20 per class


def test_too_few_patients_are_explained() -> None:
    with pytest.raises(SourceError) as caught:
        assign(crowd(5))
    assert "class 2 of 2: found 2 to draw from, needed at least 4" in str(caught.value)


def test_patient_with_two_classes_counts_for_both() -> None:
    members = crowd(40, images=1)
    members += [Member(patient=f"p{n:04d}", label="rare") for n in range(8)]
    places = assign(members)
    assert {place for member, place in zip(members, places, strict=True) if member.label == "rare"} == set(Split)


@pytest.mark.parametrize(
    "shares",
    [
        {"train": 0.6},
        {"train": 0.0, "test": 0.7},
        {"train": 1.3, "validation": -0.6},
        {"train": float("nan")},
    ],
)
def test_fractions_are_checked(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SplitFractions(**shares)


def test_every_finding_is_in_every_split_and_images_without_any_need_not_be() -> None:
    every = {"a": 2, "b": 3, "rare": 20}
    findings = {f"p{n:04d}": [name for name, step in every.items() if n % step == 0] for n in range(120)}
    members = [Member(patient=patient, label=label) for patient, own in findings.items() for label in own or [""]]
    members = [member for member in members if member.label or member.patient == "p0001"]
    places = assign(members)
    for label in ("a", "b", "rare"):
        assert {p for m, p in zip(members, places, strict=True) if m.label == label} == set(Split)
    home = {member.patient: place for member, place in zip(members, places, strict=True)}
    assert all(home[member.patient] is place for member, place in zip(members, places, strict=True))
