"""Diagnostic metrics against scikit-learn, with and without weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score, roc_auc_score

from medistill.core.task import TaskKind
from medistill.evaluate.bootstrap import patient_weights, percentile_estimate
from medistill.evaluate.calibration import calibration_error, confidences, reliability
from medistill.evaluate.metrics import (
    class_aurocs,
    diagnostic_metrics,
    operating_point,
    operating_points,
    task_metrics,
    weighted_auroc,
    weighted_average_precision,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=40).filter(
        lambda rows: any(p and w for p, _, w in rows) and any(not p and w for p, _, w in rows)
    )
)
def test_weighted_auroc_is_that_of_scikit_learn(rows: list[tuple[bool, int, int]]) -> None:
    positive, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    found = weighted_auroc(scores.astype(float), positive.astype(bool), weights[None].astype(float))
    assert found[0] == pytest.approx(expected, abs=1e-9)
    expected = average_precision_score(positive, scores, sample_weight=weights)
    found = weighted_average_precision(scores.astype(float), positive.astype(bool), weights[None].astype(float))
    assert found[0] == pytest.approx(expected, abs=1e-9)


def test_the_calibration_error_is_that_of_the_reliability_curve() -> None:
    draw = np.random.default_rng(2)
    p = draw.uniform(0, 1, 3000)
    y = draw.uniform(0, 1, 3000) < p**2
    rates, means = calibration_curve(y, p, n_bins=15, strategy="uniform")
    shares = np.histogram(p, bins=15, range=(0, 1))[0] / len(p)
    assert calibration_error(p, y, np.ones((1, 3000)))[0] == pytest.approx((np.abs(rates - means) * shares).sum())
    assert np.allclose(reliability(p, y), np.stack([means, rates, shares], axis=1))
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False]), np.ones((1, 2)))[0] == 0


def test_a_weight_of_the_calibration_error_is_a_repetition() -> None:
    draw = np.random.default_rng(3)
    p, weights = draw.uniform(0, 1, 200), draw.integers(0, 4, 200)
    y = draw.uniform(0, 1, 200) < p
    repeated = calibration_error(np.repeat(p, weights), np.repeat(y, weights), np.ones((1, weights.sum())))
    assert calibration_error(p, y, weights[None].astype(float))[0] == pytest.approx(repeated[0])


def test_what_is_predicted_with_confidence_depends_on_the_task() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    y = np.array([[0.0, 1, 0], [0, 0, 1]])
    found, shown = confidences(TaskKind.MULTICLASS, p, y)
    assert (found[:, 0].tolist(), shown[:, 0].tolist()) == ([0.5, 0.6], [True, False])
    found, shown = confidences(TaskKind.MULTILABEL, p, y)
    assert np.array_equal(found, p)
    assert np.array_equal(shown, y == 1)
    found, shown = confidences(TaskKind.BINARY, p[:, :2], y[:, :2])
    assert (found[:, 0].tolist(), shown[:, 0].tolist()) == ([0.5, 0.3], [True, False])


def test_absent_class_is_not_a_number() -> None:
    assert np.isnan(weighted_auroc(np.arange(3.0), np.ones(3, bool), np.ones((1, 3)))[0])


@pytest.mark.parametrize("k", [2, 4])
def test_metrics_are_those_of_scikit_learn(k: int) -> None:
    generator = np.random.default_rng(k)
    classes = generator.integers(0, k, 200)
    scores = generator.normal(size=(200, k)) + 1.2 * np.eye(k)[classes]
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    found = diagnostic_metrics(probabilities, classes, np.ones((1, 200)), threshold=0.5 if k == 2 else None)
    decided = probabilities.argmax(1)
    assert found["balanced_accuracy"][0] == pytest.approx(balanced_accuracy_score(classes, decided))
    if k == 2:
        sensitivity = recall_score(classes, decided)
        specificity = recall_score(classes, decided, pos_label=0)
        assert found["auroc"][0] == pytest.approx(roc_auc_score(classes, probabilities[:, 1]))
        expected = 2 * sensitivity * specificity / (sensitivity + specificity)
        assert found["harmonic_mean"][0] == pytest.approx(expected)
    else:
        expected = roc_auc_score(classes, probabilities, multi_class="ovr")
        assert found["auroc"][0] == pytest.approx(expected)


def test_operating_point_has_the_best_balanced_accuracy() -> None:
    generator = np.random.default_rng(5)
    classes = generator.integers(0, 2, 120)
    positive = np.round(generator.beta(2 + classes, 3 - classes), 2)
    probabilities = np.stack([1 - positive, positive], axis=1)
    cut = operating_point(probabilities, classes)
    best = max(
        balanced_accuracy_score(classes, positive >= threshold) for threshold in np.r_[np.unique(positive), 2]
    )
    assert balanced_accuracy_score(classes, positive >= cut) == pytest.approx(best)


def test_patients_are_drawn_whole() -> None:
    patients = ["a", "a", "b", "c", "c", "c"]
    weights = patient_weights(patients, draws=50, seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_patient_interval_is_wider_than_an_image_interval_when_images_repeat() -> None:
    generator = np.random.default_rng(0)
    per_patient = generator.normal(size=60)
    classes = np.repeat(generator.integers(0, 2, 60), 10)
    scores = np.repeat(per_patient, 10) + 0.5 * classes

    def width(patients: list[str]) -> float:
        draws = weighted_auroc(scores, classes == 1, patient_weights(patients, draws=400, seed=1))
        estimate = percentile_estimate(0.5, draws, n=60)
        return estimate.high - estimate.low

    grouped = width([str(i // 10) for i in range(600)])
    separate = width([str(i) for i in range(600)])
    assert grouped > 2 * separate


def test_metrics_of_several_labels_are_averages_over_classes() -> None:
    generator = np.random.default_rng(3)
    targets = (generator.random((150, 4)) < (0.5, 0.2, 0.7, 0.0)).astype(float)
    probabilities = np.clip(0.3 * targets + 0.7 * generator.random((150, 4)), 0, 1)
    cuts = operating_points(TaskKind.MULTILABEL, probabilities, targets)
    assert len(cuts) == 4
    found = task_metrics(TaskKind.MULTILABEL, probabilities, targets, np.ones((1, 150)), thresholds=cuts)
    shown, decided = targets[:, :3] > 0, probabilities[:, :3] >= cuts[:3]  # nobody shows the last class
    assert found["auroc"][0] == pytest.approx(roc_auc_score(shown, probabilities[:, :3], average="macro"))
    balanced = [balanced_accuracy_score(shown[:, c], decided[:, c]) for c in range(3)]
    assert found["balanced_accuracy"][0] == pytest.approx(np.mean(balanced))
    recall = [recall_score(shown[:, c], decided[:, c]) for c in range(3)]
    assert found["diagnostic_sensitivity"][0] == pytest.approx(np.mean(recall))
    areas = class_aurocs(probabilities, targets, np.ones((1, 150)))[:, 0]
    assert areas[:3].mean() == pytest.approx(found["auroc"][0])
    assert np.isnan(areas[3])
    none = task_metrics(TaskKind.MULTILABEL, probabilities, np.zeros((150, 4)), np.ones((2, 150)), thresholds=cuts)
    assert np.isnan(none["auroc"]).tolist() == [True, True]


def test_operating_points_by_kind() -> None:
    targets = np.eye(3)[np.arange(30) % 3]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 30)
    assert operating_points(TaskKind.MULTICLASS, probabilities, targets) == ()
    two = np.stack([1 - targets[:, 0], targets[:, 0]], axis=1)
    pair = np.stack([1 - probabilities[:, 0], probabilities[:, 0]], axis=1)
    (cut,) = operating_points(TaskKind.BINARY, pair, two)
    assert cut == operating_point(pair, two.argmax(1))
    assert cut == operating_points(TaskKind.MULTILABEL, probabilities, targets)[0]
