"""From images to patients, against a loop over patients; and groups of patients."""

from __future__ import annotations

import numpy as np
import pytest

from medistill.core.task import TaskKind
from medistill.evaluate.patient_level import Patients, rules
from medistill.evaluate.subgroups import number_sites, subgroups

OF = ["b", "a", "b", "c", "a", "b", "d"]
DRAW = np.random.default_rng(4)


def targets(kind: TaskKind) -> np.ndarray:
    if kind is TaskKind.BINARY:
        return np.eye(2)[[0, 1, 1, 0, 1, 0, 0]]
    if kind is TaskKind.MULTICLASS:
        return np.eye(3)[[2, 1, 2, 0, 1, 2, 0]]
    return np.array([[0, 0], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0], [1, 0]], dtype=float)


@pytest.mark.parametrize("kind", TaskKind)
def test_scores_are_joined_as_a_loop_does(kind: TaskKind) -> None:
    truth = targets(kind)
    p = DRAW.dirichlet(np.ones(truth.shape[1]), len(OF))
    cuts = {TaskKind.BINARY: (0.4,), TaskKind.MULTICLASS: (), TaskKind.MULTILABEL: (0.3, 0.6)}[kind]
    people = Patients.of(kind, OF, truth)
    assert people.names == ("a", "b", "c", "d")
    assert people.several
    for rule in rules(kind):
        found = people.joined(rule, p, cuts)
        for place, name in enumerate(people.names):
            mine = p[[i for i, patient in enumerate(OF) if patient == name]]
            if rule == "vote" and kind is TaskKind.MULTICLASS:
                mine = np.eye(3)[mine.argmax(1)]
            elif rule == "vote":
                mine = (mine >= (cuts if len(cuts) > 1 else (1 - cuts[0], cuts[0]))).astype(float)
            expected = mine.max(0) if rule == "max" else mine.mean(0)
            if kind is TaskKind.BINARY:
                expected = np.array([1 - expected[1], expected[1]])
            assert np.allclose(found[place], expected)


def test_a_patient_has_what_one_image_shows() -> None:
    assert Patients.of(TaskKind.BINARY, OF, targets(TaskKind.BINARY)).targets.tolist() == [
        [0, 1],
        [0, 1],
        [1, 0],
        [1, 0],
    ]
    several = Patients.of(TaskKind.MULTILABEL, OF, targets(TaskKind.MULTILABEL))
    assert several.targets.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]


def test_patients_whose_images_are_of_different_classes_are_left_out() -> None:
    truth = np.eye(3)[[2, 1, 0, 0, 1, 2, 0]]
    people = Patients.of(TaskKind.MULTICLASS, OF, truth)
    assert people.names == ("a", "c", "d")
    assert people.of_image.tolist() == [-1, 0, -1, 1, 0, -1, 2]
    assert people.joined("mean", np.eye(3)[[0, 1, 0, 0, 1, 0, 0]], ()).tolist() == [
        [0, 1, 0],
        [1, 0, 0],
        [1, 0, 0],
    ]


def test_nobody_with_several_images_is_said() -> None:
    assert not Patients.of(TaskKind.BINARY, list("abc"), np.eye(2)[[0, 1, 1]]).several


def test_sites_are_numbered_by_their_patients_and_never_named() -> None:
    patients = [f"p{i}" for i in range(30)]
    site = ["SECRETSECRETSECR"] * 12 + ["OTHEROTHEROTHERO"] * 16 + [""] * 2
    sites = number_sites([({"site": site}, patients), ({}, patients)])
    assert sites == ("OTHEROTHEROTHERO", "SECRETSECRETSECR")
    truth = np.eye(2)[[0, 1] * 15]
    found = list(subgroups({"site": site}, patients, truth, sites=sites))
    assert [(g.group, g.patients, g.shown) for g in found] == [
        ("site 1", 16, True),
        ("site 2", 12, True),
        ("not stated", 2, False),
    ]
    assert not any("SECRET" in repr(g) for g in found)


def test_warnings_of_groups() -> None:
    patients = [f"p{i}" for i in range(140)]
    sex = ["F"] * 70 + ["M"] * 60 + ["O"] * 10
    positive = np.r_[np.arange(70) % 2, np.zeros(60, int), np.arange(10) % 2]
    found = {g.group: g.warning for g in subgroups({"sex": sex}, patients, np.eye(2)[positive], sites=())}
    assert found["F"] == ""
    assert "absent" in found["M"]
    assert "few patients" in found["O"]
