"""Tests of differences against naive double loops, and their false alarms on data without a difference."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from scipy.stats import norm

from medistill.evaluate.paired import bootstrap_p_value, delong_p_value


def kernel(x: float, y: float) -> float:
    return 1.0 if x > y else 0.5 if x == y else 0.0


def naive(first: np.ndarray, second: np.ndarray, positive: np.ndarray, patients: list[str]) -> float:
    """Obuchowski 1997 for the difference of two AUROC, written with loops over pairs and patients."""
    plus, minus = np.flatnonzero(positive), np.flatnonzero(~positive)
    ten = {i: np.mean([kernel(first[i], first[j]) - kernel(second[i], second[j]) for j in minus]) for i in plus}
    one = {j: np.mean([kernel(first[i], first[j]) - kernel(second[i], second[j]) for i in plus]) for j in minus}
    theta, m, n = float(np.mean(list(ten.values()))), len(plus), len(minus)
    x, y = defaultdict(float), defaultdict(float)
    for i in plus:
        x[patients[i]] += ten[i] - theta
    for j in minus:
        y[patients[j]] += one[j] - theta
    everyone = set(patients)
    s10 = len(x) / ((len(x) - 1) * m) * sum(v**2 for v in x.values())
    s01 = len(y) / ((len(y) - 1) * n) * sum(v**2 for v in y.values())
    s11 = len(everyone) / (len(everyone) - 1) * sum(x.get(p, 0.0) * y.get(p, 0.0) for p in everyone)
    variance = s10 / m + s01 / n + 2 * s11 / (m * n)
    return float(2 * norm.sf(abs(theta) / math.sqrt(variance)))


def drawn(
    seed: int, *, patients: int = 40, lift: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Two networks on images of patients who have one to three images, which look alike."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 4, patients)
    names = [f"p{i}" for i, count in enumerate(counts) for _ in range(count)]
    own = np.repeat(draw.normal(size=patients), counts)
    positive = draw.random(len(names)) < np.repeat(draw.random(patients), counts)
    signal = positive + own
    first = np.round(signal * (1 + lift) + draw.normal(size=len(names)), 1)
    return first, np.round(signal + draw.normal(size=len(names)), 1), positive, names


@pytest.mark.parametrize("seed", range(5))
def test_delong_is_the_naive_one(seed: int) -> None:
    first, second, positive, patients = drawn(seed)
    expected = naive(first, second, positive, patients)
    assert delong_p_value([first], [second], positive, patients) == pytest.approx(expected)
    own = [str(i) for i in range(len(patients))]
    expected = naive(first, second, positive, own)
    assert delong_p_value([first], [second], positive, own) == pytest.approx(expected)


def test_delong_of_one_image_a_patient_is_the_published_one() -> None:
    """DeLong 1988: the variance is that of the components, over positives and over negatives."""
    first, second, positive, _ = drawn(9)
    components = []
    for scores in (first, second):
        table = np.array([[kernel(x, y) for y in scores[~positive]] for x in scores[positive]])
        components.append((table.mean(1), table.mean(0)))
    ten, one = (np.stack([c[side] for c in components]) for side in (0, 1))
    covariance = np.cov(ten) / ten.shape[1] + np.cov(one) / one.shape[1]
    contrast = np.array([1, -1])
    z = (ten[0].mean() - ten[1].mean()) / math.sqrt(contrast @ covariance @ contrast)
    own = [str(i) for i in range(len(first))]
    assert delong_p_value([first], [second], positive, own) == pytest.approx(2 * norm.sf(abs(z)))


def test_several_networks_are_averaged() -> None:
    first, second, positive, patients = drawn(2)
    both = delong_p_value([first, second], [second, first], positive, patients)
    assert both == 1.0
    twice = delong_p_value([first, first], [second, second], positive, patients)
    assert twice == pytest.approx(delong_p_value([first], [second], positive, patients))


def test_delong_raises_few_false_alarms_and_sees_a_difference() -> None:
    alarms = [delong_p_value([a], [b], y, p) < 0.05 for a, b, y, p in (drawn(100 + i) for i in range(400))]
    assert 0.02 < np.mean(alarms) < 0.08
    first, second, positive, patients = drawn(1, patients=200, lift=3)
    assert delong_p_value([first], [second], positive, patients) < 0.01


def test_what_has_no_variance_has_no_p_value() -> None:
    scores, patients = np.arange(4.0), list("abcd")
    assert math.isnan(delong_p_value([scores], [scores], np.array([True, False, False, False]), patients))
    assert delong_p_value([scores], [scores], np.array([True, True, False, False]), patients) == 1.0


def test_bootstrap_p_values() -> None:
    assert bootstrap_p_value(np.linspace(1, 2, 999)) == pytest.approx(2 / 1000)
    assert bootstrap_p_value(np.linspace(-1, 1, 999)) == 1.0
    assert bootstrap_p_value(np.r_[np.full(19, -1.0), np.full(180, 1.0), np.nan]) == pytest.approx(2 * 20 / 200)
    assert bootstrap_p_value(np.zeros(99)) == 1.0
