"""Patients from patches against a naive loop; the threshold never sees a test patient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medistill.core.distilled import DistilledSet, Recipe, Schedule, Step, ViewLabels
from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.reports import DiagnosticReport
from medistill.core.task import Task
from medistill.errors import DataError
from medistill.evaluate import PatchSplit, evaluate_patients, patients, render_patients
from medistill.evaluate.patients import positive_shares
from medistill.training.students import Student, Trained, train_students
from tests.conftest import blobs, pseudonym

TASK = Task.single_label(("healthy", "ill", "outside"))


def test_a_patient_is_a_vote_among_the_patches_inside() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], size=200)
    patients = [f"p{i}" for i in rng.integers(0, 12, size=200)]
    probabilities[[i for i, patient in enumerate(patients) if patient == "p3"]] = (0.1, 0.2, 0.7)
    shares = positive_shares(probabilities, patients)
    for patient in set(patients):
        ill = inside = 0
        for row, owner in zip(probabilities, patients, strict=True):
            decided = max(range(3), key=lambda c: row[c])
            if owner == patient and decided != 2:
                inside += 1
                ill += decided == 1
        assert shares[patient] == (ill / inside if inside else 0.0)
    assert shares["p3"] == 0.0


def _patches(*, seed: int, first: int, patients: int = 10) -> tuple[ImageSet, dict[str, bool]]:
    """Stripes in three places: healthy and ill inside, and outside; every patient has patches of two kinds."""
    made = blobs(patients=3 * patients, per_patient=2, classes=3, seed=seed)
    names = tuple(pseudonym(first + i // 6) for i in range(len(made)))
    finding = {pseudonym(first + number): number % 2 == 1 for number in range(patients)}
    classes = [2 if i % 3 == 2 else int(finding[name]) for i, name in enumerate(names)]
    order = [next(j for j in range(k, len(made), 1) if int(made.classes[j]) == c) for k, c in _places(classes)]
    images = made.images[order]
    return ImageSet(images=images, targets=torch.eye(3)[classes], patients=names, task=TASK), finding


def _places(classes: list[int]) -> list[tuple[int, int]]:
    return [(max(0, i - 8), c) for i, c in enumerate(classes)]


def _distilled(train: ImageSet) -> DistilledSet:
    """Class means: good enough to tell stripes apart."""
    means = torch.stack([train.images[train.classes == label].mean(0) for label in range(3)])
    return DistilledSet(
        images=means,
        soft_labels=torch.eye(3),
        hard_labels=torch.arange(3),
        ipc=1,
        task=TASK,
        recipe=Recipe(steps=(Step(distiller="coreset", settings={}),), ipc=1, seed=0, version="0"),
        schedule=Schedule(epochs=15, learning_rate=0.02),
        privacy=PrivacyStatement.nothing_proved("a test."),
    )


@pytest.fixture(scope="module")
def parts() -> tuple[ImageSet, ImageSet, PatchSplit, PatchSplit]:
    train, _ = _patches(seed=0, first=0)
    choose_on, found = _patches(seed=1, first=100)
    test, truth = _patches(seed=2, first=200)
    return (
        train,
        choose_on,
        PatchSplit(patches=choose_on, positive=found),
        PatchSplit(patches=test, positive=truth),
    )


def _evaluate(parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit], test: PatchSplit) -> DiagnosticReport:
    train, choose_on, validation, _ = parts
    return evaluate_patients(
        {"means": _distilled(train)}, train=train, choose_on=choose_on, validation=validation, test=test,
        seeds=1, random_draws=1, real_epochs=2, draws=100,
    )  # fmt: skip


@pytest.mark.usefixtures("short_schedules")
def test_the_threshold_never_sees_test_patients(
    parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit],
) -> None:
    test = parts[3]
    report = _evaluate(parts, test)
    contrary = replace(test, positive={patient: not found for patient, found in test.positive.items()})
    turned = _evaluate(parts, contrary)
    assert [arm.arm for arm in report.arms] == ["real", "means", "means_hard", "random"]
    for ours, theirs in zip(report.arms, turned.arms, strict=True):
        a, b = ours.metrics, theirs.metrics
        # The same decisions against the contrary truth: rates change places.
        assert b["diagnostic_sensitivity"].value == pytest.approx(1 - a["specificity"].value)
        assert b["specificity"].value == pytest.approx(1 - a["diagnostic_sensitivity"].value)
        assert b["auroc"].value == pytest.approx(1 - a["auroc"].value)
    means = report.arms[1].metrics
    assert means["auroc"].value > 0.9
    assert means["auroc"].n == 10
    page = render_patients(report, {"means": _distilled(parts[0])}, metrics=("auroc", "harmonic_mean"))
    assert page.count("data:image/png;base64,") == 3
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert f"{means['auroc'].value:.3f}" in page


def test_scores_are_shares_of_judged_patients(
    parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit],
) -> None:
    test = parts[3]
    known = dict(list(test.positive.items())[:6])
    split = replace(test, positive=known)
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], size=len(test.patches))
    scores = split.scores(probabilities)
    shares = positive_shares(probabilities, test.patches.patients)
    assert split.judged == tuple(sorted(known))
    assert scores[:, 1].tolist() == [shares[patient] for patient in sorted(known)]
    area = roc_auc_score([known[patient] for patient in sorted(known)], scores[:, 1])
    assert 0 <= area <= 1


def test_what_cannot_be_evaluated_is_refused(
    parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit],
) -> None:
    train, _, validation, test = parts
    with pytest.raises(DataError, match="one kind only"):
        replace(test, positive=dict.fromkeys(test.positive, True))
    with pytest.raises(DataError, match="outside"):
        PatchSplit(patches=blobs(patients=4), positive={})
    with pytest.raises(DataError, match="found one in two"):
        _evaluate((train, train, validation, test), validation)


def test_students_learn_from_the_views_of_a_release(
    parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, choose_on, validation, test = parts
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 4)
    views = ViewLabels(boxes=boxes, soft_labels=torch.eye(3)[None], temperature=2.0)
    seen: list[tuple[int, ViewLabels | None]] = []

    def watch(students: Sequence[Student]) -> Iterator[Trained]:
        seen.extend((len(student.images), student.views) for student in students)
        return train_students(students)

    monkeypatch.setattr(patients, "train_students", watch)
    evaluate_patients(
        {"means": replace(_distilled(train), views=views)}, train=train, choose_on=choose_on,
        validation=validation, test=test, seeds=1, random_draws=0, real_epochs=1, draws=100,
    )  # fmt: skip
    assert seen == [(len(train), None), (3, views), (3, None)]  # real, soft, hard


def test_patients_on_whom_the_schedule_is_chosen_are_not_tested(
    parts: tuple[ImageSet, ImageSet, PatchSplit, PatchSplit],
) -> None:
    train, _, validation, test = parts
    with pytest.raises(DataError, match="found one in two"):
        evaluate_patients(
            {"means": _distilled(train)}, train=train, choose_on=test.patches, validation=validation, test=test
        )
