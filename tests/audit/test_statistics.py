"""Audit statistics against scikit-learn, closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from medistill.audit import statistics
from medistill.errors import DataError


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        members, others = generator.normal(0.4, 1, 37), generator.normal(0, 1, 51)
        if ties:
            members, others = members.round(0), others.round(0)
        truth = np.r_[np.ones(37), np.zeros(51)]
        expected = roc_auc_score(truth, np.r_[members, others])
        assert statistics.auroc(members, others).value == pytest.approx(expected, abs=1e-12)


def test_auroc_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    truth = stats.norm.cdf(0.5 / np.sqrt(2))
    covered = 0
    for _ in range(1000):
        estimate = statistics.auroc(generator.normal(0.5, 1, 80), generator.normal(0, 1, 80))
        covered += estimate.low <= truth <= estimate.high
    assert 0.925 <= covered / 1000 <= 0.975


def test_p_value_alarms_on_noise_no_more_often_than_its_level() -> None:
    generator = np.random.default_rng(2)
    p_values = [
        statistics.randomisation_p_value(generator.normal(size=40), generator.normal(size=40), draws=200, seed=i)
        for i in range(400)
    ]
    alarms = sum(p <= 0.05 for p in p_values)
    assert alarms <= stats.binom.ppf(0.999, 400, 0.05)
    assert statistics.randomisation_p_value(np.arange(20.0) + 100, np.arange(20.0)) < 1e-3


def test_tpr_at_fpr_is_the_roc_curve() -> None:
    generator = np.random.default_rng(3)
    members, others = generator.normal(1, 1, 300), generator.normal(0, 1, 1000)
    false, true, _ = roc_curve(np.r_[np.ones(300), np.zeros(1000)], np.r_[members, others])
    for fpr in (0.01, 0.1):
        estimate = statistics.tpr_at_fpr(members, others, fpr=fpr)
        assert estimate is not None
        assert estimate.value == pytest.approx(true[false <= fpr].max())
        assert estimate.low <= estimate.value <= estimate.high


def test_tpr_below_the_resolution_is_none_and_never_zero() -> None:
    assert statistics.tpr_at_fpr(np.ones(50), np.zeros(999), fpr=0.01) is None
    assert statistics.tpr_at_fpr(np.ones(50), np.zeros(1000), fpr=0.01) is not None


def test_clopper_pearson_is_that_of_scipy() -> None:
    for hits, trials in ((0, 10), (3, 10), (10, 10), (57, 400)):
        expected = stats.binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
        estimate = statistics.clopper_pearson(hits, trials)
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_per_patient_weighs_patients_and_not_images() -> None:
    means = statistics.per_patient(np.array([1.0, 3.0, 10.0]), ("a", "a", "b"))
    assert means.tolist() == [2.0, 10.0]


def test_minimum_detectable_auroc_is_detected_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    target = statistics.minimum_detectable_auroc(100, 100)
    shift = np.sqrt(2) * stats.norm.ppf(target)
    found = sum(
        stats.mannwhitneyu(generator.normal(shift, 1, 100), generator.normal(0, 1, 100)).pvalue < 0.05
        for _ in range(400)
    )
    assert 0.72 <= found / 400 <= 0.88


@pytest.mark.parametrize("scores", [np.array([]), np.ones((2, 2)), np.array([np.nan])])
def test_bad_scores_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(DataError):
        statistics.auroc(scores, np.ones(3))


def test_a_reversed_score_is_as_significant_as_a_right_one() -> None:
    low, high = np.arange(30.0), np.arange(30.0) + 100
    assert statistics.randomisation_p_value(low, high) == statistics.randomisation_p_value(high, low) < 1e-3


def test_a_few_exposed_patients_show_among_the_highest_scores() -> None:
    generator = np.random.default_rng(6)
    members, others = generator.normal(size=1000), generator.normal(size=1000)
    members[:40] += 20
    assert statistics.top_p_value(members, others, share=0.01) < 1e-4
    shares = [
        statistics.top_p_value(generator.normal(size=200), generator.normal(size=200), share=0.1)
        for _ in range(400)
    ]
    assert sum(p <= 0.05 for p in shares) <= stats.binom.ppf(0.999, 400, 0.05)


# -- several tests, curves, and what happens where there is nothing to find -------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    corrected = statistics.holm(p_values)
    for alpha in (0.001, 0.01, 0.05, 0.2):
        ordered = sorted(p_values)
        rejected = 0
        while rejected < len(ordered) and ordered[rejected] * (len(ordered) - rejected) <= alpha:
            rejected += 1
        assert sum(value <= alpha for value in corrected) == rejected
    assert all(after >= before for after, before in zip(corrected, p_values, strict=True))


def test_the_curve_lies_on_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.7, 1, 300), generator.normal(0, 1, 500)
    false, true, _ = roc_curve(np.r_[np.ones(300), np.zeros(500)], np.r_[members, others], drop_intermediate=False)
    curve = statistics.roc(members, others)
    assert curve[0][0] == pytest.approx(10 / 500)
    assert curve[-1] == (1.0, 1.0)
    for fpr, tpr in curve:
        allowed = np.floor(fpr * 500 + 1e-6) / 500
        assert tpr == pytest.approx(true[false <= allowed + 1e-9].max(), abs=1e-4)


def test_nothing_is_found_more_often_than_promised_where_there_is_nothing() -> None:
    """2,000 cohorts without a leak: at most 5.5 % false alarms of every test at the level of 5 %."""
    generator = np.random.default_rng(1)
    cohorts, alarms = 2000, {"coins": 0, "top": 0, "both, corrected": 0, "interval": 0}
    for number in range(cohorts):
        members, others = generator.standard_t(3, (2, 100))
        coins = statistics.randomisation_p_value(members, others, draws=199, seed=number)
        top = statistics.top_p_value(members, others, share=0.1)
        interval = statistics.auroc(members, others)
        alarms["coins"] += coins <= 0.05
        alarms["top"] += top <= 0.05
        alarms["both, corrected"] += min(statistics.holm([coins, top])) <= 0.05
        alarms["interval"] += not interval.low <= 0.5 <= interval.high
    assert {name: count / cohorts for name, count in alarms.items() if count > 0.055 * cohorts} == {}


def test_p_values_are_uniform_when_coins_are_redrawn() -> None:
    """Control N3: who counts as a member is drawn anew, the scores stay."""
    generator = np.random.default_rng(2)
    scores = generator.gamma(1.0, 1.0, 160)
    found = []
    for number in range(300):
        inside = generator.permutation(160) < 80
        found.append(statistics.randomisation_p_value(scores[inside], scores[~inside], draws=199, seed=number))
    assert stats.kstest(found, "uniform").pvalue > 0.01
