"""Portraits: a patient recognised in all pictures of a class together, and nobody where there is nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from medistill.audit import AuditPolicy, Exposed, audit_images, reconstruction
from medistill.audit.nearness import flat_rows
from medistill.audit.policy import PROFILES
from medistill.audit.pool import Pool, draw_pool
from medistill.audit.portraits import chance_of_largest
from medistill.audit.reconstruction import NAME, Reconstruction, search_portraits
from medistill.audit.shadow_distillation import ShadowDistillation
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.core.reports import AttackOutcome, Verdict
from medistill.distill import distill
from medistill.distill.public_features import pink_noise
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from tests.audit.kinds import of_kind
from tests.conftest import blobs


def smooth(patients: int, *, seed: int, first: int = 0) -> ImageSet:
    """Two images of each patient, alike as X-rays are: large structures are strong, and differ most."""
    plain = blobs(patients, seed=seed, first=first)
    own = pink_noise(patients, (1, 16, 16), seed=seed).repeat_interleave(2, dim=0)
    return replace(plain, images=(0.5 * plain.images + 0.5 * own).clamp(0, 1))


TRAIN, HOLDOUT, REFERENCE = smooth(160, seed=1), smooth(160, seed=2, first=1000), smooth(160, seed=3, first=2000)
STRANGERS = Exposed.of_images(smooth(20, seed=23, first=9000))
#: Fewer and shorter than by default, for images of few pixels.
SMALL = Reconstruction(portraits=4, distillation=ShadowDistillation(networks=8, iterations=80, most=10))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def attacked(release: Exposed, pool: Pool, control: Exposed = STRANGERS, seed: int = 1) -> AttackOutcome:
    given = {"control_name": "strangers", "pool": pool, "seed": seed, "compute": Compute(), "attack": SMALL}
    return search_portraits(release, control, **given)  # type: ignore[arg-type]


def with_a_class_of(images: ImageSet, count: int) -> ImageSet:
    """All patients of the first class, and the first few of the second."""
    second = images.select((images.classes == 1).nonzero().flatten()).unique_patients[:count]
    first = images.select((images.classes == 0).nonzero().flatten()).unique_patients
    return images.of_patients(set(first) | set(second))


@pytest.fixture(scope="module")
def of_one() -> tuple[ImageSet, Exposed]:
    """Distilled from noise; the second class is one patient."""
    train = with_a_class_of(TRAIN, 1)
    settings = {"distribution_matching": {"networks": 8, "iterations": 100, "width": 16}}
    made = distill(OpenCurator(train), method="distribution_matching", ipc=10, seed=4, settings=settings)
    return train, Exposed.of(made.distilled)


def test_the_patient_of_a_class_of_one_is_recognised(of_one: tuple[ImageSet, Exposed]) -> None:
    train, release = of_one
    found = attacked(release, draw_pool(train, HOLDOUT, REFERENCE, 1))
    assert all(control.passed for control in found.controls), found.controls
    assert found.verdict is Verdict.FAIL
    assert found.findings["patients_recognised"] == 1
    assert found.findings["classes_compared"] == 2
    assert found.p_value < 0.01
    assert "class class1" in found.summary
    portraits = SMALL.within(REFERENCE)
    everybody, strangers = portraits.people(TRAIN), portraits.people(HOLDOUT)
    (alone,) = train.select((train.classes == 1).nonzero().flatten()).unique_patients
    assert portraits.search(release, everybody, strangers)[1].patient == alone


def test_classes_of_many_show_nobody_and_a_stranger_is_not_taken_for_the_one(
    of_one: tuple[ImageSet, Exposed],
) -> None:
    settings = {"distribution_matching": {"networks": 4, "iterations": 30, "width": 8}}
    made = distill(OpenCurator(TRAIN), method="distribution_matching", ipc=10, seed=4, settings=settings)
    pool = draw_pool(TRAIN, HOLDOUT, REFERENCE, 1)
    found = attacked(Exposed.of(made.distilled), pool)
    assert found.verdict is Verdict.PASS
    assert found.findings["patients_recognised"] == 0
    without = with_a_class_of(TRAIN.of_patients(set(TRAIN.patients) - set(of_one[0].patients)), 40)
    others = joined(without, of_one[0].select((of_one[0].classes == 0).nonzero().flatten()))
    assert attacked(of_one[1], draw_pool(others, HOLDOUT, REFERENCE, 1)).findings["patients_recognised"] == 0


def test_a_control_that_shows_an_attacked_patient_is_invalid(of_one: tuple[ImageSet, Exposed]) -> None:
    pool = draw_pool(TRAIN, HOLDOUT, REFERENCE, 1)
    member = pool.candidates.of_patients({min(pool.members)})
    found = attacked(STRANGERS, pool, control=Exposed.of_images(member))
    assert found.verdict is Verdict.INVALID
    assert [control.passed for control in found.controls] == [True, False]
    assert found.summary.startswith("A control failed")


@pytest.mark.parametrize("kind", ["colour", "volumes", "multiclass", "multilabel"])
def test_images_of_a_member_are_recognised_for_every_kind_of_image_and_task(kind: str) -> None:
    train, holdout, reference = (
        of_kind(kind, n, seed=s, first=f) for n, s, f in ((90, 1, 0), (240, 2, 1000), (90, 3, 2000))
    )
    portraits = replace(SMALL, strangers=20).within(reference)
    members, strangers = portraits.people(train), portraits.people(holdout)
    name = members.names[0][3]
    release = Exposed.of_images(train.of_patients({name}))
    found = {one.number: one for one in portraits.search(release, members, strangers)}
    assert found[0].patient == name
    assert found[0].p_value < 0.01
    assert found[0].likeness > found[0].of_strangers


def test_classes_without_strangers_are_not_judged_and_said() -> None:
    pool = draw_pool(TRAIN, with_a_class_of(HOLDOUT, 3), REFERENCE, 1)
    found = attacked(STRANGERS, pool)
    assert found.findings["classes_compared"] == found.findings["classes_with_too_few_other_patients"] == 1
    with pytest.raises(DataError, match="no class has 30 patients"):
        attacked(STRANGERS, draw_pool(TRAIN, smooth(40, seed=5, first=1000), REFERENCE, 1))


def test_the_same_seed_gives_the_same_figures(of_one: tuple[ImageSet, Exposed]) -> None:
    pool = draw_pool(of_one[0], HOLDOUT, REFERENCE, 1)
    assert attacked(of_one[1], pool) == attacked(of_one[1], pool)


# -- the audit ----------------------------------------------------------------------------------------------------


def test_an_audit_says_what_it_recognised_and_why_it_did_not_try(
    of_one: tuple[ImageSet, Exposed], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, release = of_one
    parts = {"train": train, "holdout": HOLDOUT, "reference": REFERENCE}
    monkeypatch.setitem(PROFILES, "default", {"calibrated_neighbour": {}})
    monkeypatch.setattr(reconstruction, "Reconstruction", lambda: SMALL)
    report = audit_images(release, **parts, policy=AuditPolicy(fewest_patients=100), seed=2)
    (found,) = (entry for entry in report.outcomes if entry.attack == NAME)
    assert found.verdict is report.verdict is Verdict.FAIL
    text = str(report.to_json())
    assert not [name for part in parts.values() for name in part.unique_patients if name in text]
    report = audit_images(release, **parts, policy=AuditPolicy(profile="quick", fewest_patients=100), seed=2)
    assert "reconstruction: the profile quick does not try it" in report.not_tested
    parts["holdout"] = smooth(40, seed=5, first=1000)
    report = audit_images(release, **parts, policy=AuditPolicy(fewest_patients=100), seed=2)
    assert [why for why in report.not_tested if why.startswith("reconstruction: no class has 30")]


def test_where_no_known_patient_is_recognised_it_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medistill.audit.reconstruction._CAUGHT", 1.01)
    monkeypatch.setitem(PROFILES, "default", {"calibrated_neighbour": {}})
    monkeypatch.setattr(reconstruction, "Reconstruction", lambda: SMALL)
    parts = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE}
    report = audit_images(STRANGERS, **parts, policy=AuditPolicy(fewest_patients=100), seed=2)
    assert NAME not in {entry.attack for entry in report.outcomes}
    assert [why for why in report.not_tested if why.startswith("reconstruction: too few patients")]
    assert report.verdict is not Verdict.INVALID


# -- parts --------------------------------------------------------------------------------------------------------


def test_people_are_their_mean_images_less_their_class_in_whitened_components() -> None:
    portraits = SMALL.within(REFERENCE)
    people = portraits.people(HOLDOUT)
    rows, known = (flat_rows(one.images, plane=16, solid=10) for one in (HOLDOUT, REFERENCE))
    centred = known - known.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:50]
    spread = (centred @ axes.T).std(0, ddof=1)
    for number in (0, 1):
        centre, expected = known[REFERENCE.classes.numpy() == number].mean(0), []
        for place in (0, 17, 79):
            own = np.array([who == people.names[number][place] for who in HOLDOUT.patients])
            row = (rows[own].mean(0) - centre) @ axes.T / spread
            expected.append(row / np.linalg.norm(row))
        found = people.rows[number][[0, 17, 79]]
        cosines = np.array(expected) @ np.array(expected).T  # whatever the signs of the components
        assert found @ found.T == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize("draw", ["exponential", "normal"])
@pytest.mark.parametrize(("strangers", "members"), [(60, 120), (550, 1000)])
def test_strangers_are_the_largest_no_more_often_than_said(draw: str, strangers: int, members: int) -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(1500):
        usual, alike = (getattr(generator, draw)(size=size) for size in (strangers, members))
        found.append(chance_of_largest(alike.max(), usual, members))
    for limit in (0.05, 0.01):
        assert np.mean([p <= limit for p in found]) <= limit + 0.005


def test_the_chance_falls_with_the_value_and_grows_with_the_number() -> None:
    usual = np.random.default_rng(0).normal(size=300)
    chances = [chance_of_largest(value, usual, 100) for value in (-1.0, 2.0, 4.0, 8.0, 16.0)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == 1.0
    assert chance_of_largest(4.0, usual, 200) == pytest.approx(2 * chance_of_largest(4.0, usual, 100))


def null_p_values(draws: int) -> list[float]:
    """Portraits of strangers, alone or several, among the training patients."""
    portraits = SMALL.within(REFERENCE)
    members, strangers = portraits.people(TRAIN), portraits.people(HOLDOUT)
    found: list[float] = []
    for draw in range(draws):
        others = smooth(2 * (1, 2, 10)[draw % 3], seed=100 + draw, first=5000)
        found += [one.p_value for one in portraits.search(Exposed.of_images(others), members, strangers)]
    return found


def test_nobody_is_recognised_in_portraits_of_strangers() -> None:
    p_values = null_p_values(240)
    assert np.mean([p <= 0.05 for p in p_values]) <= 0.055
    assert np.mean([p <= 0.01 for p in p_values]) <= 0.0125


def test_a_class_that_no_label_names_is_passed_over() -> None:
    portraits = SMALL.within(REFERENCE)
    members, strangers = portraits.people(TRAIN), portraits.people(HOLDOUT)
    one_sided = replace(STRANGERS, soft_labels=torch.tensor([[1.0, 0.0]]).repeat(len(STRANGERS.images), 1))
    assert [one.number for one in portraits.search(one_sided, members, strangers)] == [0]


@pytest.mark.parametrize("wrong", [{"components": 0}, {"portraits": 1}, {"strangers": 1}, {"side": 0}])
def test_settings_without_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Reconstruction(**wrong)  # type: ignore[arg-type]
