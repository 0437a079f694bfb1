"""An audit on known leaks, with broken attacks and with leaking controls; its parts against naive code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from medistill.audit import AuditPolicy, Exposed, audit, audit_images, control, membership, runner
from medistill.audit.calibrated_neighbour import Calibrated, CalibratedNeighbour, nearest_distance
from medistill.audit.copy_alarm import CopiesWithin, CopyAlarm, limit_of_gaps, source_lift, unit_rows
from medistill.audit.mixtures import MixtureSearch, best_pair
from medistill.audit.pool import draw_pool
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, AuditReport, Verdict
from medistill.distill import distill
from medistill.distill.runner import Distillation
from medistill.errors import DataError
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from tests.conftest import blobs

TRAIN = blobs(120, seed=1, first=0)
HOLDOUT = blobs(60, seed=2, first=1000)
REFERENCE = blobs(50, seed=3, first=2000)
POLICY = AuditPolicy(profile="quick", fewest_patients=100)
QUICK = {
    "distribution_matching": {"networks": 2, "iterations": 25, "width": 8},
    "kernel_ridge": {"iterations": 12, "pool": 2, "width": 8, "real_batch": 40, "advance": 2},
}


def copied(ipc: int, data: ImageSet = TRAIN) -> DistilledSet:
    """A release that consists of real images."""
    return distill(OpenCurator(data), method="coreset", ipc=ipc, seed=4).distilled


def examined(distilled: DistilledSet, **changes: ImageSet) -> AuditReport:
    parts = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE, **changes}
    return audit(distilled, seed=5, policy=POLICY, **parts)


def outcome(report: AuditReport, attack: str) -> AttackOutcome:
    (found,) = (entry for entry in report.outcomes if entry.attack == attack)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrix products wait for one another on several threads, most of all on a busy machine."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def many_real() -> AuditReport:
    """Audit of a release of real images of most training patients."""
    return examined(copied(50))


@pytest.fixture(scope="module")
def from_noise() -> DistilledSet:
    return distill(OpenCurator(TRAIN), ipc=2, seed=6, settings=QUICK).distilled


@pytest.fixture(scope="module")
def of_noise(from_noise: DistilledSet) -> AuditReport:
    return examined(from_noise)


# -- verdicts on known cases ------------------------------------------------------------------------------------


def test_a_release_of_most_members_images_fails_every_attack(many_real: AuditReport) -> None:
    assert many_real.verdict is Verdict.FAIL
    membership, copies = (outcome(many_real, name) for name in ("calibrated_neighbour", "copy_alarm"))
    assert membership.verdict is copies.verdict is Verdict.FAIL
    assert membership.auroc is not None
    assert membership.auroc.low > 0.8
    assert membership.p_value < 0.01
    assert copies.findings["copies"] >= 0.9 * 100


def test_every_attack_has_a_positive_and_a_negative_control_that_pass(
    many_real: AuditReport, of_noise: AuditReport
) -> None:
    for report in (many_real, of_noise):
        attacks = {entry.attack for entry in report.outcomes}
        assert attacks == {"calibrated_neighbour", "copy_alarm", "edited_copies"}
        for entry in report.outcomes:
            kinds = [control.name.split(":")[0] for control in entry.controls]
            assert set(kinds) == {"positive", "negative"}
            assert all(control.passed for control in entry.controls), entry.controls


def test_a_coreset_of_few_images_sets_off_the_copy_alarm() -> None:
    report = examined(copied(3))
    copies = outcome(report, "copy_alarm")
    assert report.verdict is copies.verdict is Verdict.FAIL
    assert copies.findings["copies"] == 6
    assert copies.summary.startswith("6 of 6 released pictures are copies")


def test_a_release_from_noise_does_not_fail(of_noise: AuditReport) -> None:
    assert of_noise.verdict in (Verdict.PASS, Verdict.NOT_ESTIMABLE)
    assert outcome(of_noise, "copy_alarm").findings["copies"] == 0
    assert of_noise.members == of_noise.non_members == 60


def test_a_rate_below_the_resolution_is_none(of_noise: AuditReport) -> None:
    rates = outcome(of_noise, "calibrated_neighbour").tpr_at_fpr
    assert rates["0.01"] is None
    assert set(rates) == {"0.01", "0.1"}


def test_the_same_seed_gives_the_same_audit(from_noise: DistilledSet, of_noise: AuditReport) -> None:
    assert examined(from_noise) == of_noise


def test_the_report_names_the_recipe_it_is_about(from_noise: DistilledSet, of_noise: AuditReport) -> None:
    assert of_noise.release == from_noise.fingerprint()


def test_no_pseudonym_is_in_a_report(many_real: AuditReport) -> None:
    text = json.dumps(many_real.to_json())
    assert not [name for part in (TRAIN, HOLDOUT, REFERENCE) for name in part.unique_patients if name in text]


def test_a_report_survives_json(many_real: AuditReport, of_noise: AuditReport) -> None:
    for report in (many_real, of_noise):
        assert AuditReport.from_json(json.loads(json.dumps(report.to_json()))) == report


# -- controls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["random", "constant"])
def test_a_broken_attack_is_invalid_because_its_positive_control_fails(
    broken: str, from_noise: DistilledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)

    def score(self: Calibrated, release: Exposed, candidates: ImageSet) -> object:
        count = len(candidates.unique_patients)
        return generator.normal(size=count) if broken == "random" else np.zeros(count)

    monkeypatch.setattr(Calibrated, "score", score)
    report = examined(from_noise)
    membership = outcome(report, "calibrated_neighbour")
    assert report.verdict is membership.verdict is Verdict.INVALID
    assert not membership.controls[0].passed
    assert membership.summary.startswith("A control failed")


def test_a_blind_copy_alarm_is_invalid(from_noise: DistilledSet, monkeypatch: pytest.MonkeyPatch) -> None:
    search = CopiesWithin.search

    def blind(self: CopiesWithin, released: torch.Tensor) -> object:
        found = search(self, released)
        return replace(found, copies=np.zeros(len(released), dtype=bool))

    monkeypatch.setattr(CopiesWithin, "search", blind)
    report = examined(from_noise)
    assert report.verdict is outcome(report, "copy_alarm").verdict is Verdict.INVALID
    assert not outcome(report, "copy_alarm").controls[0].passed


def test_a_leaking_negative_control_is_invalid(from_noise: DistilledSet, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = draw_pool(TRAIN, HOLDOUT, REFERENCE, runner.derive_seed(5, "candidates"))
    attacked = pool.candidates.of_patients(pool.members)

    def leak(*_: object, **__: object) -> Distillation:
        return Distillation(distilled=copied(50, attacked), snapshots={})

    monkeypatch.setattr(control, "run_recipe", leak)
    report = examined(from_noise)
    assert report.verdict is Verdict.INVALID
    for entry in report.outcomes:
        assert entry.verdict is Verdict.INVALID
        assert [control.name for control in entry.controls if not control.passed] == [entry.controls[-1].name]
        assert entry.controls[-1].name.startswith("negative")


def test_the_negative_control_never_sees_an_attacked_patient(
    from_noise: DistilledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ImageSet] = []
    original = control.run_recipe

    def watch(recipe: object, curator: OpenCurator, **options: object) -> Distillation:
        seen.append(curator.images())
        return original(recipe, curator, **options)

    monkeypatch.setattr(control, "run_recipe", watch)
    examined(from_noise)
    pool = draw_pool(TRAIN, HOLDOUT, REFERENCE, runner.derive_seed(5, "candidates"))
    assert set(seen[0].patients) == set(TRAIN.patients) - pool.members
    assert not set(seen[0].patients) & set(HOLDOUT.patients)


# -- few patients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "holdout", "reference"])
def test_too_few_patients_are_counted_by_split_and_not_named(name: str, from_noise: DistilledSet) -> None:
    few = blobs(9, seed=9, first=5000)
    split = "validation" if name == "reference" else name
    with pytest.raises(DataError, match=f"at least 10 patients in each part; {split} has 9\\.") as caught:
        examined(from_noise, **{name: few})
    assert not [patient for patient in few.patients if patient in str(caught.value)]


def test_few_patients_cannot_show_the_absence_of_a_leak() -> None:
    train = blobs(40, seed=11)
    release = distill(
        OpenCurator(train), method="kernel_ridge", ipc=1, settings={"kernel_ridge": QUICK["kernel_ridge"]}
    )
    report = audit(
        release.distilled,
        train=train,
        holdout=blobs(14, seed=12, first=1000),
        reference=blobs(14, seed=13, first=2000),
        policy=AuditPolicy(profile="quick"),
    )
    assert outcome(report, "calibrated_neighbour").verdict is Verdict.NOT_ESTIMABLE
    assert report.verdict is not Verdict.PASS
    assert "with so few patients" in outcome(report, "calibrated_neighbour").summary


# -- parts ------------------------------------------------------------------------------------------------------


def test_nearest_distance_is_that_of_scipy() -> None:
    generator = np.random.default_rng(0)
    points, others = generator.normal(size=(30, 12)), generator.normal(size=(17, 12))
    expected = cdist(points, others).min(1)
    assert nearest_distance(points, others) == pytest.approx(expected, abs=1e-9)
    assert nearest_distance(points, points) == pytest.approx(np.zeros(30), abs=1e-6)


def test_membership_scores_do_not_depend_on_the_other_candidates(from_noise: DistilledSet) -> None:
    first = HOLDOUT.of_patients(set(HOLDOUT.unique_patients[:5]))
    scored = []
    for candidates in (first, HOLDOUT):
        attack = CalibratedNeighbour(components=10).prepare(
            candidates, REFERENCE, ipc=2, seed=0, compute=Compute(), progress=Progress()
        )
        scored.append(attack.score(Exposed.of(from_noise), candidates))
    assert scored[0] == pytest.approx(scored[1][:5], abs=1e-9)


def test_source_lift_is_the_share_of_all_ways_to_choose_members() -> None:
    patients = [f"p{i}" for i in range(9)]
    members, others = set(patients[:5]), set(patients[5:])
    for size in (1, 3, 4):
        for nearest in itertools.combinations(patients, size):
            share, p_value = source_lift(set(nearest), members, others)
            hits = len(set(nearest) & members)
            draws = [len(set(nearest) & set(draw)) for draw in itertools.combinations(patients, 5)]
            assert share == hits / size
            assert p_value == pytest.approx(sum(drawn >= hits for drawn in draws) / len(draws))


def test_copy_alarm_sees_through_noise_and_names_the_patient() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = TRAIN.select(range(0, 40, 4))
    disguised = (chosen.images + 0.04 * torch.randn(chosen.images.shape, generator=generator)).clamp(0, 1)
    found = CopyAlarm().within(TRAIN, REFERENCE.images).search(disguised)
    assert found.copies.all()
    assert found.patients == chosen.patients


def test_copy_alarm_sees_through_brightness_and_contrast() -> None:
    chosen = TRAIN.select(range(0, 40, 4))
    found = CopyAlarm().within(TRAIN, REFERENCE.images).search(0.2 + 0.5 * chosen.images)
    assert found.copies.all()
    assert found.correlation == pytest.approx(np.ones(10), abs=1e-6)


def test_copy_alarm_ignores_images_of_nobody() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand((20, 1, 16, 16), generator=generator)
    strangers = blobs(20, seed=21, first=9000).images
    for unrelated in (noise, strangers):
        assert CopyAlarm().within(TRAIN, REFERENCE.images).search(unrelated).copies.mean() <= 0.05


def test_the_limit_of_gaps_is_passed_by_strangers_once_in_a_hundred_searches() -> None:
    generator = np.random.default_rng(0)
    false_alarms = 0
    for _ in range(2000):
        best = np.sort(generator.normal(size=(58 + 20, 400)), axis=1)
        gaps = best[:, -1] - best[:, -2]
        false_alarms += gaps[58:].max() > limit_of_gaps(gaps[:58], 20)
    assert false_alarms <= 0.02 * 2000


def test_copy_alarm_works_on_images_reduced_in_size() -> None:
    wide = blobs(30, size=48, seed=31)
    reference = blobs(20, size=48, seed=32, first=500).images
    found = CopyAlarm(side=24).within(wide, reference).search(wide.images[:6])
    assert found.copies.all()
    assert found.patients == wide.patients[:6]


# -- what the verdict on membership rests on --------------------------------------------------------------------


def _membership_of(
    monkeypatch: pytest.MonkeyPatch, release: DistilledSet, members: np.ndarray, others: np.ndarray
) -> AttackOutcome:
    """The membership outcome when the attack on the release gives these scores."""
    real = membership.split_scores
    answers = iter(
        [
            membership.Scores(
                members=members,
                others=others,
                member_classes=np.zeros(len(members)),
                other_classes=np.zeros(len(others)),
            )
        ]
    )
    monkeypatch.setattr(membership, "split_scores", lambda *given: next(answers, None) or real(*given))
    return outcome(examined(release), "calibrated_neighbour")


@pytest.mark.parametrize(
    ("shift", "exposed", "verdict", "words"),
    [
        (0.0, 0, Verdict.PASS, "No relevant leak"),
        (0.25, 0, Verdict.PASS, "A small leak was measured"),
        (-1.1, 0, Verdict.FAIL, "told from other patients"),
        (1.1, 0, Verdict.FAIL, "told from other patients"),
        (0.0, 60, Verdict.FAIL, "told from other patients"),
    ],
)
def test_a_leak_is_never_called_none(
    monkeypatch: pytest.MonkeyPatch,
    from_noise: DistilledSet,
    shift: float,
    exposed: int,
    verdict: Verdict,
    words: str,
) -> None:
    generator = np.random.default_rng(1)
    members, others = generator.normal(shift, 1, 1500), generator.normal(0, 1, 1500)
    members[:exposed] += 20
    found = _membership_of(monkeypatch, from_noise, members, others)
    assert found.verdict is verdict
    assert words in found.summary


# -- mixtures, noise, other people's images, several releases, limits of the policy -----------------------------


def test_mixtures_of_two_members_are_found() -> None:
    mixed = (TRAIN.images[:40:4] + TRAIN.images[2:42:4]) / 2
    found = MixtureSearch().within(TRAIN, REFERENCE.images).search(mixed)
    wanted = [{TRAIN.patients[i], TRAIN.patients[i + 2]} for i in range(0, 40, 4)]
    assert found.mixed.all()
    assert [set(pair) for pair in found.patients.tolist()] == wanted
    assert found.correlation == pytest.approx(np.ones(10), abs=1e-6)


def test_images_of_strangers_are_no_mixtures() -> None:
    strangers = blobs(20, seed=21, first=9000).images
    assert MixtureSearch().within(TRAIN, REFERENCE.images).search(strangers).mixed.mean() <= 0.05


def test_the_correlation_with_a_pair_is_that_of_least_squares() -> None:
    generator = np.random.default_rng(0)
    image, first, second = generator.normal(size=(3, 40))
    pair = np.stack([first, second])
    _, reached, _ = best_pair(unit_rows(image[None])[0], unit_rows(pair), np.arange(2), firsts=20)
    centred = np.column_stack([row - row.mean() for row in pair])
    fitted = centred @ np.linalg.lstsq(centred, image - image.mean(), rcond=None)[0]
    assert reached == pytest.approx(np.corrcoef(fitted, image)[0, 1])


@pytest.mark.parametrize("kind", ["mixtures", "noisy", "one in ten"])
def test_images_of_known_guilt_made_by_somebody_else_are_caught(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    real = TRAIN.images[:40]
    noise = torch.randn(real.shape, generator=generator)
    images = {
        "mixtures": (real[:20] + real[20:]) / 2,
        "noisy": (real + 0.3 * noise).clamp(0, 1),
        "one in ten": torch.cat([real[:2], blobs(18, seed=22, first=9000).images]),
    }[kind]
    labels = torch.eye(2)[torch.arange(len(images)) % 2]
    exposed = Exposed(images=images, soft_labels=labels, task=TRAIN.task, ipc=len(images) // 2)
    report = audit_images(exposed, train=TRAIN, holdout=HOLDOUT, reference=REFERENCE, policy=POLICY, seed=1)
    assert report.verdict is Verdict.FAIL, report.outcomes


def test_images_of_strangers_made_by_somebody_else_pass() -> None:
    strangers = blobs(20, seed=23, first=9000)
    exposed = Exposed(images=strangers.images, soft_labels=strangers.targets, task=TRAIN.task, ipc=10)
    report = audit_images(exposed, train=TRAIN, holdout=HOLDOUT, reference=REFERENCE, policy=POLICY)
    assert report.verdict in (Verdict.PASS, Verdict.NOT_ESTIMABLE), report.outcomes
    assert outcome(report, "copy_alarm").verdict is Verdict.PASS


def test_a_guilty_second_release_is_seen_beside_an_innocent_first(from_noise: DistilledSet) -> None:
    report = audit(
        from_noise, others=(copied(3),), train=TRAIN, holdout=HOLDOUT, reference=REFERENCE, policy=POLICY, seed=5
    )
    assert report.verdict is Verdict.FAIL
    assert outcome(report, "copy_alarm").findings["copies"] == 6
    assert not [text for text in report.not_tested if "several releases" in text]


def test_a_policy_that_asks_for_a_proof_fails_a_release_without_one(from_noise: DistilledSet) -> None:
    parts = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE}
    report = audit(from_noise, policy=replace(POLICY, epsilon_max=3.0), seed=5, **parts)
    assert report.verdict is Verdict.FAIL
    assert "none is proved" in report.refusals[0]


@pytest.mark.parametrize(("epsilon", "expected"), [(1.0, 0.575), (3.0, 0.694), (10.0, 0.921)])
def test_the_auroc_that_an_epsilon_allows(epsilon: float, expected: float) -> None:
    assert membership.auroc_ceiling(epsilon, 1e-5) == pytest.approx(expected, abs=2e-3)
