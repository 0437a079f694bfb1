"""Inference of sex, age band and site: leaks that are caught, what the population tells, and chance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from medistill.audit import AuditPolicy, Exposed, audit_images
from medistill.audit.attribute_inference import AttributeInference, PreparedAttributes
from medistill.audit.guesses import Guesses, Known, attributes_of_patients, crossed
from medistill.audit.nearness import nearest, weighted
from medistill.audit.policy import PROFILES, THREATS
from medistill.audit.statistics import auroc, randomisation_p_value
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.core.reports import AttackOutcome, AuditReport, Verdict
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from tests.audit.kinds import KINDS, of_kind, told_apart
from tests.conftest import blobs

MEMBERS, OTHERS, REFERENCE = blobs(80, seed=1), blobs(80, seed=2, first=1000), blobs(60, seed=3, first=2000)
CANDIDATES, INSIDE = joined(MEMBERS, OTHERS), frozenset(MEMBERS.patients)
POLICY = AuditPolicy(profile="quick", fewest_patients=100)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def drawn(*parts: ImageSet, seed: int = 0) -> Known:
    """Attributes by coins, which no image shows."""
    generator = np.random.default_rng(seed)
    names = sorted({patient for part in parts for patient in part.patients})
    ages = ["30-39", "40-49", "50-59"]
    return {
        name: {"sex": str(generator.choice(["F", "M"])), "age_band": str(generator.choice(ages))} for name in names
    }


KNOWN = drawn(MEMBERS, OTHERS, REFERENCE)


def prepared(known: Known = KNOWN, candidates: ImageSet = CANDIDATES, **changes: object) -> PreparedAttributes:
    attack = AttributeInference(known=known, fewest=20, **changes)  # type: ignore[arg-type]
    return attack.prepare(candidates, REFERENCE, ipc=1, seed=0, compute=Compute(), progress=Progress())


def told_by(images: ImageSet, known: Known, attribute: str, value: str) -> Exposed:
    """A release whose labels are surer for patients of one value."""
    sure = torch.tensor([known[patient][attribute] == value for patient in images.patients])
    labels = torch.where(sure[:, None], images.targets, 0.6 * images.targets + 0.2)
    return replace(Exposed.of_images(images), soft_labels=labels)


# -- leaks and their absence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey", *KINDS])
def test_the_positive_control_is_caught_on_every_kind_of_image_and_task(kind: str) -> None:
    def people(patients: int, seed: int, first: int) -> ImageSet:
        return (
            blobs(patients, seed=seed, first=first)
            if kind == "grey"
            else of_kind(kind, patients, seed=seed, first=first)
        )

    members, others, reference = people(60, 1, 0), people(60, 2, 1000), people(40, 3, 2000)
    attack = AttributeInference(known=drawn(members, others, reference), fewest=20)
    ready = attack.prepare(
        joined(members, others), reference, ipc=1, seed=0, compute=Compute(), progress=Progress()
    )
    guilty = attack.guilty(members, others, reference, seed=0)
    found = told_apart(ready.score(guilty.release, guilty.candidates), guilty.candidates, guilty.members)
    assert found.value >= attack.wanted
    assert found.low > 0.6


def test_labels_that_lean_with_an_attribute_are_found_and_the_attribute_is_named() -> None:
    ready = prepared()
    release = told_by(MEMBERS, KNOWN, "age_band", "40-49")
    assert told_apart(ready.score(release, CANDIDATES), CANDIDATES, INSIDE).low > 0.6
    details = ready.details(release, CANDIDATES, INSIDE)
    of = "gained_by_members_more_than_by_others,_lower_limit"
    assert details.findings[f"age_band_{of}"] > 0.05
    assert details.findings[f"sex_{of}"] < 0.05
    assert details.excess == pytest.approx(details.findings[f"age_band_{of}"], abs=1e-3)


def test_pictures_that_show_what_the_attackers_images_hide_are_found() -> None:
    """The release has other images of the members, marked by sex as those of the reference are."""

    def marked(images: ImageSet, strength: float) -> ImageSet:
        sign = torch.tensor([1.0 if KNOWN[patient]["sex"] == "F" else 0.0 for patient in images.patients])
        changed = images.images.clone()
        changed[:, :, :5, :5] = strength * sign[:, None, None, None] + (1 - strength) * changed[:, :, :5, :5]
        return replace(images, images=changed)

    attack = AttributeInference(known=KNOWN, fewest=20, attributes=("sex",))
    ready = attack.prepare(
        CANDIDATES, marked(REFERENCE, 0.5), ipc=1, seed=0, compute=Compute(), progress=Progress()
    )
    release = Exposed.of_images(marked(MEMBERS, 0.5))
    assert told_apart(ready.score(release, CANDIDATES), CANDIDATES, INSIDE).low > 0.6
    assert ready.details(release, CANDIDATES, INSIDE).excess > 0.05


def test_what_a_release_tells_of_the_population_is_no_leak() -> None:
    """Strangers' labels lean with sex, which every image shows a little: guesses improve for everybody alike."""

    def shown(images: ImageSet, known: Known) -> ImageSet:
        sign = torch.tensor([1.0 if known[patient]["sex"] == "F" else -1.0 for patient in images.patients])
        bright = (images.images + 0.12 * sign[:, None, None, None]).clamp(0, 1)
        return replace(images, images=bright)

    strangers = blobs(200, seed=4, first=5000)
    known = {**KNOWN, **drawn(strangers, seed=1)}
    members, others = shown(MEMBERS, known), shown(OTHERS, known)
    candidates = joined(members, others)
    ready = prepared(known, candidates, attributes=("sex",), components=2)  # too coarse to see it all
    release = told_by(shown(strangers, known), known, "sex", "F")
    scores = ready.score(release, candidates)
    details = ready.details(release, candidates, INSIDE)
    assert details.findings["sex_guessed_rightly_with_it"] > 0.75
    found = told_apart(scores, candidates, INSIDE)
    assert found.low <= 0.5 <= found.high
    assert details.excess <= 0.05


def test_a_release_of_strangers_or_of_plain_members_tells_nothing() -> None:
    ready = prepared()
    for images in (MEMBERS, blobs(60, seed=5, first=7000)):
        release = Exposed.of_images(images)
        found = told_apart(ready.score(release, CANDIDATES), CANDIDATES, INSIDE)
        assert found.low <= 0.5 <= found.high
        assert ready.details(release, CANDIDATES, INSIDE).excess <= 0.05


def null_p_values(draws: int) -> tuple[list[float], int]:
    """P-values where there is nothing, and how often the interval of an AUROC misses 0.5."""
    p_values, missed = [], 0
    for draw in range(draws):
        everybody = blobs(80, per_patient=1, size=8, seed=draw)
        names = everybody.unique_patients
        generator = np.random.default_rng(draw)
        inside = frozenset(generator.permutation(names)[:40].tolist())
        known = drawn(everybody, REFERENCE, seed=draw)
        attack = AttributeInference(known=known, attributes=("sex",), fewest=10, components=8, folds=3)
        reference = blobs(30, per_patient=1, size=8, seed=draw + 10_000, first=2000)
        ready = attack.prepare(everybody, reference, ipc=1, seed=draw, compute=Compute(), progress=Progress())
        strangers = blobs(20, per_patient=1, size=8, seed=draw + 20_000, first=4000)
        release = told_by(strangers, drawn(strangers, seed=draw), "sex", "F")
        scores = ready.score(release, everybody)
        members = np.array([name in inside for name in names])
        p_values.append(randomisation_p_value(scores[members], scores[~members], draws=200, seed=draw))
        area = auroc(scores[members], scores[~members])
        missed += not area.low <= 0.5 <= area.high
    return p_values, missed


def test_chance_is_taken_for_a_leak_no_more_often_than_said() -> None:
    p_values, missed = null_p_values(40)
    assert sum(p <= 0.05 for p in p_values) <= 6  # more have a probability of 0.003
    assert missed <= 7


@pytest.mark.long
def test_chance_over_many_draws_is_within_five_and_a_half_percent() -> None:
    p_values, _ = null_p_values(2000)
    assert np.mean([p <= 0.05 for p in p_values]) <= 0.055


# -- the audit ----------------------------------------------------------------------------------------------------


def examined(release: Exposed, known: Known | None = KNOWN, **policy: object) -> AuditReport:
    parts = {"train": joined(MEMBERS, blobs(80, seed=8, first=3000)), "holdout": OTHERS, "reference": REFERENCE}
    known = None if known is None else {**known, **drawn(parts["train"], seed=9), **known}
    attributes = known and {
        name: {which: [known[patient][which] for patient in images.patients] for which in ("sex", "age_band")}
        for name, images in parts.items()
    }
    return audit_images(
        release,
        **parts,
        attributes=attributes or None,
        policy=replace(POLICY, **policy),
        seed=3,  # type: ignore[arg-type]
    )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "quick", {"attribute_inference": {"fewest": 20}})


def outcome(report: AuditReport) -> AttackOutcome:
    (found,) = (entry for entry in report.outcomes if entry.attack == "attribute_inference")
    return found


@pytest.mark.usefixtures("alone")
def test_an_audit_fails_a_release_whose_labels_tell_the_sex_of_its_patients() -> None:
    train = joined(MEMBERS, blobs(80, seed=8, first=3000))
    known = {**drawn(train, seed=9), **KNOWN}
    found = outcome(examined(told_by(train, known, "sex", "M"), known))
    assert found.verdict is Verdict.FAIL
    assert found.p_value < 0.01
    assert {control.name.split(":")[0] for control in found.controls} == {"positive", "negative"}
    assert all(control.passed for control in found.controls)
    assert found.findings["sex_gained_by_members_more_than_by_others"] > 0.05
    assert (
        found.findings["sex_guessed_rightly_with_it"] > found.findings["sex_guessed_rightly_without_the_release"]
    )


@pytest.mark.usefixtures("alone")
def test_an_audit_passes_a_release_of_strangers_and_says_who_was_the_attacker() -> None:
    report = examined(Exposed.of_images(blobs(20, seed=23, first=9000)))
    assert outcome(report).verdict in (Verdict.PASS, Verdict.NOT_ESTIMABLE)
    assert THREATS["T4"] in report.threat_model
    assert THREATS["T4"] not in report.not_tested
    text = str(report.to_json())
    assert not [name for name in CANDIDATES.unique_patients if name in text]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("known", [None, {patient: {"sex": "F", "age_band": ""} for patient in KNOWN}])
def test_without_attributes_it_is_not_tested_and_the_reason_is_said(known: Known | None) -> None:
    same = known and {**{p: {"sex": "F", "age_band": ""} for p in blobs(80, seed=8, first=3000).patients}, **known}
    parts = {"train": joined(MEMBERS, blobs(80, seed=8, first=3000)), "holdout": OTHERS, "reference": REFERENCE}
    attributes = same and {
        name: {which: [same[p][which] for p in images.patients] for which in ("sex", "age_band")}
        for name, images in parts.items()
    }
    release = Exposed.of_images(blobs(20, seed=23, first=9000))
    report = audit_images(release, **parts, attributes=attributes or None, policy=POLICY)
    assert "attribute_inference" not in {entry.attack for entry in report.outcomes}
    (why,) = (text for text in report.not_tested if text.startswith("attribute inference: none of sex, age_band"))
    assert "20 patients each" in why
    assert THREATS["T4"] in report.not_tested


@pytest.mark.usefixtures("alone")
def test_an_excess_beyond_the_policys_is_not_within_its_limits() -> None:
    train = joined(MEMBERS, blobs(80, seed=8, first=3000))
    known = {**drawn(train, seed=9), **KNOWN}
    release = told_by(train, known, "sex", "M")
    lax = {"auroc_high": 0.999, "tpr_high": 0.999}
    failed = outcome(examined(release, known, **lax))
    assert failed.verdict is Verdict.FAIL
    assert re.match(r"The release tells attributes of its own patients: at least \d+% more", failed.summary)
    assert outcome(examined(release, known, attribute_excess=0.9, **lax)).verdict is Verdict.PASS


def test_attributes_of_unknown_parts_or_of_other_lengths_are_refused() -> None:
    release = Exposed.of_images(blobs(20, seed=23, first=9000))
    parts = {"train": MEMBERS, "holdout": OTHERS, "reference": REFERENCE}
    with pytest.raises(DataError, match="got test"):
        audit_images(release, **parts, attributes={"test": {}}, policy=POLICY)
    with pytest.raises(DataError, match="160 images, got 1"):
        audit_images(release, **parts, attributes={"train": {"sex": ["F"]}}, policy=POLICY)


# -- parts --------------------------------------------------------------------------------------------------------


def test_an_attribute_that_differs_between_images_of_a_patient_is_not_known() -> None:
    images = blobs(3, per_patient=3)
    names = images.unique_patients
    values = {"sex": ["F"] * 9, "site": ["a", "a", "b", "a", "a", "a", "", "", ""]}
    found = attributes_of_patients([(images, values)])
    first, second, third = (images.patients[i] for i in (0, 3, 6))
    assert set(found) == set(names)
    assert [found[one]["site"] for one in (first, second, third)] == ["", "a", ""]
    assert {found[one]["sex"] for one in names} == {"F"}


def test_nobodys_own_attribute_is_used_to_guess_it() -> None:
    generator = np.random.default_rng(0)
    rows, wanted = generator.normal(size=(60, 4)), generator.choice(["F", "M", ""], 60, p=[0.4, 0.4, 0.2])
    folds = [np.arange(start, 60, 3) for start in range(3)]
    before = crossed(rows, wanted, folds, penalty=1.0)
    turned = wanted.copy()
    turned[folds[0]] = np.where(wanted[folds[0]] == "F", "M", "F")
    after = crossed(rows, turned, folds, penalty=1.0)
    assert after[folds[0]] == pytest.approx(before[folds[0]])
    assert not np.allclose(after[folds[1]], before[folds[1]])
    assert np.exp(before).sum(1) == pytest.approx(np.ones(60))


def test_gain_and_excess_are_those_of_a_loop_over_patients() -> None:
    generator = np.random.default_rng(1)
    wanted = generator.choice(["", "F", "M"], 50)
    plain, helped = (np.log(generator.dirichlet([1, 1], 50)) for _ in range(2))
    guesses = Guesses(wanted=wanted, values=("F", "M"), plain=plain, helped=helped)
    inside = generator.random(50) < 0.5
    added: dict[bool, list[int]] = {True: [], False: []}
    for number, value in enumerate(wanted):
        column = {"F": 0, "M": 1}.get(value)
        expected = 0.0 if column is None else helped[number, column] - plain[number, column]
        assert guesses.gain[number] == pytest.approx(expected)
        if column is not None:
            rights = [int(logs[number].argmax() == column) for logs in (helped, plain)]
            added[bool(inside[number])].append(rights[0] - rights[1])
    value, low, high = guesses.excess(inside)
    first, second = (np.array(added[key]) for key in (True, False))
    error = np.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    assert value == pytest.approx(first.mean() - second.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error))


def test_distances_and_weighted_means_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medistill.audit.nearness._AT_ONCE", 7)
    generator = np.random.default_rng(0)
    points, others, values = (generator.normal(size=shape) for shape in ((30, 5), (17, 5), (17, 2)))
    distances = cdist(points, others)
    found, places = nearest(points, others)
    assert found == pytest.approx(distances.min(1))
    assert places.tolist() == distances.argmin(1).tolist()
    apart, _ = nearest(points, points, skip=1)
    assert apart == pytest.approx(np.sort(cdist(points, points), axis=1)[:, 1])
    weights = np.exp(-(distances**2) / (2 * 1.3**2))
    assert weighted(points, others, 1.3, values) == pytest.approx(weights @ values / weights.sum(1)[:, None])


def test_scores_follow_patients_whatever_their_order_and_repeat() -> None:
    release = told_by(MEMBERS, KNOWN, "sex", "F")
    ready = prepared()
    scores = ready.score(release, CANDIDATES)
    turned = CANDIDATES.select(list(range(len(CANDIDATES)))[::-1])
    assert ready.score(release, turned) == pytest.approx(scores, abs=1e-6)
    assert prepared().score(release, CANDIDATES).tolist() == scores.tolist()


@pytest.mark.parametrize(
    "wrong", [{"fewest": 5}, {"folds": 1}, {"components": 0}, {"penalty": 0.0}, {"attributes": ()}]
)
def test_settings_without_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AttributeInference(**wrong)  # type: ignore[arg-type]
