"""The mechanism audit: correct mechanisms keep their claims, every known fault breaks them, and the statistics are
those of closed forms and naive code."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from medistill.audit.distinguisher import (
    Event,
    affordable,
    detectable_epsilon,
    gaussian_epsilon,
    lower_bound,
    p_value,
)
from medistill.audit.mechanism import audit_mechanism, same_code, stated_noise
from medistill.audit.replay import audit_replay, neighbour
from medistill.audit.worst_case import Mechanism, neighbours
from medistill.core.distilled import DistilledSet, Recipe
from medistill.core.guarantee import Budget, PrivacyPlan, PrivacyStatement, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, Verdict
from medistill.distill.moments import moments_plan
from medistill.distill.runner import make_recipe, run_recipe
from medistill.distill.start import initial
from medistill.errors import DataError, PrivacyError
from medistill.privacy import curator as curators
from medistill.privacy.accounting import analytic_noise
from medistill.privacy.calibration import calibrate, mechanisms_of
from medistill.privacy.clipping import clipped
from medistill.privacy.curator import PrivateCurator
from tests.audit.bug_zoo import (
    ONE_SUM,
    ZOO,
    AddsNothing,
    EverybodyTakesPart,
    NoiseFromPrivateCount,
    published,
)
from tests.conftest import blobs
from tests.privacy.test_accounting import integrated_delta

DELTA = 1e-5


def of_claim(epsilon: float, kind: type[Mechanism] = Mechanism, plan: PrivacyPlan = ONE_SUM) -> Mechanism:
    noise = calibrate(Budget(epsilon=epsilon, delta=DELTA), plan).noise_multipliers
    return kind(plan=plan, noise_multipliers=noise)


def claimed(epsilon: float, *event: str) -> PrivacyStatement:
    return PrivacyStatement(epsilon=epsilon, delta=DELTA, accountants=("analytic gaussian",), event=event)


# -- what must be seen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [1.0, 3.0])
@pytest.mark.parametrize("fault", ZOO)
def test_every_fault_of_the_zoo_is_caught(fault: str, claim: float) -> None:
    found = lower_bound(of_claim(claim, ZOO[fault]), delta=DELTA, runs=20_000)
    assert found.epsilon > claim


@pytest.mark.parametrize("claim", [1.0, 3.0])
def test_the_lower_bound_is_three_quarters_of_the_claim_or_more(claim: float) -> None:
    """At 99 % confidence both ends are four standard deviations or more away."""
    found = audit_mechanism(claimed(claim), ONE_SUM, seed=0, confidence=0.99)
    assert 0.75 * claim <= found.findings["epsilon_lower_bound"] <= claim
    assert claim < found.findings["detectable_epsilon"] < 1.2 * claim
    assert found.verdict is Verdict.PASS
    assert "not contradicted" in found.summary
    assert len(found.controls) == 4
    assert AttackOutcome.from_json(json.loads(json.dumps(asdict(found), allow_nan=False))) == found


def test_the_plan_of_private_releases_keeps_its_claim() -> None:
    found = audit_mechanism(claimed(3.0), moments_plan(), seed=0, confidence=0.99)
    assert 0.75 * 3 <= found.findings["epsilon_lower_bound"] <= 3
    assert found.verdict is Verdict.PASS


@pytest.mark.parametrize("claim", [1.0, 3.0])
def test_the_correct_mechanism_keeps_its_claim_in_95_percent_of_audits(claim: float) -> None:
    bounds = [lower_bound(of_claim(claim), delta=DELTA, runs=6000).epsilon for _ in range(80)]
    assert np.mean(np.array(bounds) <= claim) >= 0.95
    assert np.median(bounds) > 0


def test_nothing_is_found_where_there_is_nothing() -> None:
    """The largest bound over thresholds on the same runs would be above 0 in a quarter of audits or more."""
    bounds = [lower_bound(of_claim(1.0, AddsNothing), delta=DELTA, runs=2000).epsilon for _ in range(80)]
    assert np.mean(np.array(bounds) > 0) <= 0.05


def test_only_the_likelihood_ratio_sees_noise_that_depends_on_patients() -> None:
    plan = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="steps", count=30),))
    found = lower_bound(of_claim(1.0, NoiseFromPrivateCount, plan), delta=DELTA, runs=20_000)
    linear, ratio = (
        max(event.epsilon(DELTA, 0.975), event.gaussian_epsilon(DELTA, 0.975)) for event in found.events
    )
    assert ratio > 3 > 1.5 > linear
    assert found.epsilon == ratio


def test_sampling_keeps_its_claim_and_its_absence_does_not() -> None:
    query = Query(kind=QueryKind.SUM, purpose="steps", count=20, sampling_rate=0.05)
    plan, noise = PrivacyPlan(queries=(query,)), (1.2,)
    claim = 1.32  # privacy loss distributions: 1.309
    right, wrong = (
        lower_bound(kind(plan=plan, noise_multipliers=noise), delta=DELTA, runs=5000)
        for kind in (Mechanism, EverybodyTakesPart)
    )
    assert 0 <= right.epsilon <= claim < wrong.epsilon
    assert right.epsilon == right.direct  # the form for Gaussians holds for no mixture


# -- faults in the product itself ------------------------------------------------------------------------------


def test_too_little_noise_in_the_curator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = curators.gaussian
    monkeypatch.setattr(curators, "gaussian", lambda shape, sigma, **more: right(shape, 0.7 * sigma, **more))
    found = audit_mechanism(claimed(1.0), ONE_SUM, seed=0, runs=40_000)
    assert found.verdict is Verdict.FAIL
    assert all(control.passed for control in found.controls)
    assert found.p_value < 0.01
    assert "wrong" in found.summary


def test_clipping_to_twice_the_length_in_the_curator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curators, "clipped", lambda rows, norm: clipped(rows, 2 * norm))
    assert audit_mechanism(claimed(3.0), ONE_SUM, seed=0, runs=20_000).verdict is Verdict.FAIL


def test_a_noise_multiplier_stated_as_epsilon_fails() -> None:
    sigma = analytic_noise(3.0, DELTA)
    statement = claimed(sigma, f"moments: 1 x Gaussian, noise multiplier {sigma:.6g}")
    assert stated_noise(statement, ONE_SUM) == (pytest.approx(sigma, rel=1e-5),)
    found = audit_mechanism(statement, ONE_SUM, seed=0, runs=20_000)
    assert found.findings["epsilon_lower_bound"] > sigma
    assert found.verdict is Verdict.FAIL


def test_noise_that_is_stated_is_what_the_curator_states() -> None:
    plan = moments_plan()
    noise = calibrate(Budget(epsilon=2.0, delta=DELTA), plan).noise_multipliers
    mechanisms = zip(plan.queries, mechanisms_of(plan, noise), strict=True)
    event = [f"{query.purpose}: {mechanism.sentence}" for query, mechanism in mechanisms]
    assert stated_noise(claimed(2.0, *event), plan) == pytest.approx(noise, rel=1e-5)
    assert stated_noise(claimed(2.0), plan) == noise


MIXED = PrivacyPlan(
    queries=(
        Query(kind=QueryKind.SUM, purpose="moments"),
        Query(kind=QueryKind.GRADIENT, purpose="steps", count=3, sampling_rate=0.6, relative_noise=2.0),
    )
)


def test_what_is_audited_are_the_curators_own_answers() -> None:
    assert same_code(Mechanism(plan=MIXED, noise_multipliers=(2.0, 4.0))).passed


@pytest.mark.parametrize("broken", ["noise", "more", "seeded"])
def test_another_curator_than_the_audited_one_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "noise":
        monkeypatch.setattr(PrivateCurator, "noise", lambda self, position: 0.5)
    elif broken == "seeded":
        right = curators.gaussian
        monkeypatch.setattr(
            curators, "gaussian", lambda shape, noise, **_: right(shape, noise, entropy=published())
        )
    else:
        monkeypatch.setattr(PrivateCurator, "_check", lambda self, *_: setattr(self, "_next", 0))
    found = audit_mechanism(claimed(3.0), ONE_SUM, seed=0, runs=4000)
    assert [control.passed for control in found.controls] == [True, True, True, False]
    assert found.verdict is Verdict.INVALID


def test_known_random_bytes_give_known_answers() -> None:
    """The audited answers are sums of clipped rows and the noise of these bytes, by naive code."""
    without, with_ = neighbours()[1]
    noise = replace(of_claim(3.0), entropy=published()).answers(without, 5)[0]
    there = replace(of_claim(3.0), entropy=published()).answers(with_, 5)[0]
    moved = (there - noise).squeeze(1)
    assert moved[:, 0].tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    assert moved[:, 1].tolist() == [0.0] * 5
    assert noise[:, 0, 0].std() > 0


def test_no_claim_no_audit() -> None:
    with pytest.raises(PrivacyError, match="No epsilon is claimed"):
        audit_mechanism(PrivacyStatement.nothing_proved("open."), ONE_SUM, seed=0)


def test_plans_of_many_queries_get_fewer_runs() -> None:
    many = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="steps", count=1000),))
    assert affordable(ONE_SUM, 20_000) == 20_000
    assert 2000 <= affordable(many, 100_000) < 100_000


# -- statistics ------------------------------------------------------------------------------------------------


def test_bounds_of_counts_are_those_of_exact_intervals() -> None:
    event, tail = Event(true_positives=300, false_positives=40, trials=1000), 0.0125
    low = optimize.brentq(lambda p: stats.binom.sf(299, 1000, p) - tail, 1e-9, 1 - 1e-9)
    high = optimize.brentq(lambda p: stats.binom.cdf(40, 1000, p) - tail, 1e-9, 1 - 1e-9)
    assert event.epsilon(DELTA, 0.975) == pytest.approx(math.log((low - DELTA) / high))
    mu = stats.norm.isf(high) - stats.norm.ppf(1 - low)
    found = event.gaussian_epsilon(DELTA, 0.975)
    assert integrated_delta(1 / mu, found) == pytest.approx(DELTA, rel=1e-4)


def test_bounds_where_nothing_or_everything_was_seen() -> None:
    nothing = Event(true_positives=0, false_positives=0, trials=100)
    everything = Event(true_positives=100, false_positives=0, trials=100)
    assert nothing.epsilon(DELTA, 0.95) == nothing.gaussian_epsilon(DELTA, 0.95) == 0
    assert everything.epsilon(DELTA, 0.95) == pytest.approx(math.log((0.025**0.01 - DELTA) / (1 - 0.025**0.01)))
    assert gaussian_epsilon(-1.0, DELTA) == 0


def test_p_value_is_where_the_bound_reaches_the_claim() -> None:
    event = Event(true_positives=600, false_positives=400, trials=1000)
    found = p_value((event,), 0.2, DELTA, gaussian=False)
    assert event.epsilon(DELTA, 1 - found * 1.001) > 0.2 > event.epsilon(DELTA, 1 - found * 0.999)
    assert p_value((event, event), 0.2, DELTA, gaussian=False) == pytest.approx(2 * found)
    assert p_value((event,), 5.0, DELTA, gaussian=True) == 1


def test_what_is_said_to_be_detectable_is_detected_in_most_audits() -> None:
    epsilon = detectable_epsilon(1.0, delta=DELTA, trials=5000, confidence=0.975, gaussian=True)
    bounds = [lower_bound(of_claim(epsilon), delta=DELTA, runs=10_000).epsilon for _ in range(40)]
    assert np.mean(np.array(bounds) > 1.0) >= 0.55
    assert 1 < epsilon < 2


def test_more_runs_detect_less() -> None:
    for gaussian in (True, False):
        found = [
            detectable_epsilon(1.0, delta=DELTA, trials=trials, confidence=0.975, gaussian=gaussian)
            for trials in (1000, 10_000, 100_000)
        ]
        assert all(more > fewer for more, fewer in pairwise(found))


# -- record and replay -----------------------------------------------------------------------------------------


DATA = blobs(patients=120)
QUICK: dict[str, dict[str, Any]] = {
    "surrogate": {"iterations": 2, "made_up": 4, "drawing": 2, "dimension": 24, "width": 8},
    "distribution_matching": {"iterations": 3, "networks": 2, "width": 8},
    "gradient_matching": {"iterations": 1, "outer": 2, "inner": 1, "width": 8, "sampling_rate": 1.0},
}


def recipe(method: str = "distribution_matching") -> Recipe:
    settings = {method: QUICK[method]}
    return make_recipe(DATA.task, method=method, ipc=1, image_shape=(1, 16, 16), settings=settings, private=True)


def replayed(method: str = "distribution_matching", **more: Any) -> AttackOutcome:
    return audit_replay(recipe(method), DATA, epsilon=40.0, delta=DELTA, **more)


@pytest.mark.parametrize("method", QUICK)
def test_a_release_follows_from_the_answers(method: str) -> None:
    found = replayed(method)
    assert found.verdict is Verdict.PASS
    assert [control.passed for control in found.controls] == [True, True]


def brighter(curator: PrivateCurator, by: float) -> DistilledSet:
    honest = run_recipe(recipe(), curator, looks=0).distilled
    return replace(honest, images=(honest.images + by).clamp(0, 1))


def mixes_in_a_real_image(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
    return brighter(curator, 0.1 * float(curator._images.images[-1].mean()))


def looks_at_validation(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
    honest = brighter(curator, 0.0)
    epochs = 100 + int(1000 * float(cohort.images.std()))
    return replace(honest, schedule=replace(honest.schedule, epochs=epochs))


def uses_the_count(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
    return brighter(curator, 1 / len(curator._patients))


def touches_and_changes_nothing(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
    return brighter(curator, 0.0 * len(cohort))


def asks_for_images(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
    initial(curator, init="real", ipc=1, seed=0, start=None)
    return brighter(curator, 0.0)


@pytest.mark.parametrize(
    "cheat",
    [mixes_in_a_real_image, looks_at_validation, uses_the_count, touches_and_changes_nothing, asks_for_images],
)
def test_a_release_that_touches_anything_else_fails(cheat: Any) -> None:
    assert replayed(release=cheat).verdict is Verdict.FAIL


def test_a_release_that_changes_by_itself_is_invalid() -> None:
    def restless(curator: PrivateCurator, cohort: ImageSet) -> DistilledSet:
        return brighter(curator, float(torch.rand(1)) / 10)

    assert replayed(release=restless).verdict is Verdict.INVALID


def test_neighbours_differ_by_a_patient_less_and_one_replaced() -> None:
    other = neighbour(DATA)
    assert set(DATA.patients) - set(other.patients) == {DATA.patients[0]}
    kept = DATA.of_patients(set(other.patients))
    changed = (kept.images != other.images).flatten(1).any(1)
    assert {patient for patient, one in zip(kept.patients, changed, strict=True) if one} == {DATA.patients[-1]}


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(DataError, match="3 patients"):
        audit_replay(recipe(), blobs(patients=2), epsilon=3.0, delta=DELTA)
