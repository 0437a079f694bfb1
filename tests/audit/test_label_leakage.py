"""The label audit: the ratios against a naive triple loop, memorising teachers caught, honest ones not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medistill.audit.attack import Exposed, MembershipAttack
from medistill.audit.label_leakage import LabelLeakage, PreparedLabelLeakage, dominated
from medistill.audit.students import RandomNetworks, RidgeStudents, halves, log_odds
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.objectives import probabilities
from tests.audit.kinds import KINDS, of_kind, told_apart
from tests.conftest import blobs

MEMBERS = blobs(60, seed=1, first=0)
OTHERS = blobs(60, seed=2, first=1000)
REFERENCE = blobs(50, seed=3, first=2000)
QUICK = LabelLeakage(networks=RandomNetworks(networks=2, width=16), memorised=40, labelled=500)
ATTACK: MembershipAttack = QUICK


def prepared(
    candidates: ImageSet, reference: ImageSet = REFERENCE, attack: LabelLeakage = QUICK
) -> PreparedLabelLeakage:
    return attack.prepare(candidates, reference, ipc=1, seed=7, compute=Compute(), progress=Progress())


# -- controls ---------------------------------------------------------------------------------------------------


def test_a_memorising_teachers_labels_give_its_patients_away() -> None:
    guilty = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5)
    caught = told_apart(
        prepared(joined(MEMBERS, OTHERS)).score(guilty.release, guilty.candidates),
        guilty.candidates,
        guilty.members,
    )
    assert caught.value >= QUICK.wanted
    assert caught.low > 0.6


def test_it_is_the_labels_that_give_them_away() -> None:
    """The same images with other people's labels show nothing, and no image is one of a member."""
    guilty = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5)
    order = torch.randperm(len(guilty.release.images), generator=torch.Generator().manual_seed(0))
    harmless = replace(guilty.release, soft_labels=guilty.release.soft_labels[order])
    ours = prepared(guilty.candidates)
    nothing = told_apart(ours.score(harmless, guilty.candidates), guilty.candidates, guilty.members)
    assert nothing.low < 0.5 < nothing.high
    members = MEMBERS.images.flatten(1)
    to_members = torch.cdist(guilty.release.images.flatten(1), members).min()
    between = torch.cdist(REFERENCE.images.flatten(1), members).min()
    assert float(to_members) > 0.5 * float(between)


def test_a_release_of_other_patients_gives_nobody_away() -> None:
    release = Exposed.of_images(blobs(40, seed=4, first=3000))
    candidates = joined(MEMBERS, OTHERS)
    nobody = told_apart(prepared(candidates).score(release, candidates), candidates, frozenset(MEMBERS.patients))
    assert nobody.low < 0.5 < nobody.high


def test_labels_are_redrawn_alike_for_members_and_others() -> None:
    guilty = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5)
    truth = dict(zip(MEMBERS.patients + OTHERS.patients, joined(MEMBERS, OTHERS).classes.tolist(), strict=True))
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    for patient, target in zip(guilty.candidates.patients, guilty.candidates.classes.tolist(), strict=True):
        wrong[patient in guilty.members].append(target != truth[patient])
    assert len(guilty.members) == 40
    for side in (True, False):
        assert 0.1 < float(np.mean(wrong[side])) < 0.4


# -- the ratios themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_share_of_dominated_images_is_that_of_a_naive_loop(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios, population = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator)
    ratios[0] = population[2]  # a ratio of exactly one does not exceed one
    expected = torch.zeros(7, 3)
    for image in range(7):
        for label in range(3):
            hits = 0
            for other in range(5):
                hits += bool(ratios[image, label] - math.log(gamma) > population[other, label])
            expected[image, label] = hits / 5
    torch.testing.assert_close(dominated(ratios, population, gamma=gamma), expected.double())


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_the_score_is_that_of_naive_loops(kind: str) -> None:
    make = partial(of_kind, kind) if kind == "multilabel" else blobs
    reference, candidates = make(8, seed=3, first=2000), make(5, seed=1, first=0)
    public = make(6, seed=4, first=3000)
    soft = 0.1 + 0.8 * public.targets
    soft = soft if kind == "multilabel" else soft / soft.sum(1, keepdim=True)
    release = Exposed(images=public.images, soft_labels=soft, task=public.task, ipc=3)
    ours = prepared(candidates, reference)
    seen, task = ours._seen, reference.task.kind

    def trained(images: Tensor, labels: Tensor) -> RidgeStudents:
        return RidgeStudents.fit(seen(images), log_odds(labels, task, floor=QUICK.floor), ridge=QUICK.ridge)

    def sure(model: RidgeStudents, image: Tensor, target: Tensor, label: int) -> float:
        p = probabilities(task, model.predict(seen(image[None]))[0, 0])[0]
        if kind == "multilabel":
            return float(p[label] if target[label] else 1 - p[label])
        return float(p[int(target.argmax())])

    masks = [m for pair in halves(reference.patients, splits=2, seed=derive_seed(7, "halves")) for m in pair]
    models = [trained(reference.images[mask], reference.targets[mask]) for mask in masks]
    student = trained(release.images, release.soft_labels)

    def ratio(image: Tensor, target: Tensor, label: int, unseen: list[RidgeStudents]) -> float:
        out = float(np.mean([sure(model, image, target, label) for model in unseen]))
        return sure(student, image, target, label) / (0.65 * out + 0.35)

    labels = range(3) if kind == "multilabel" else range(1)
    scores = np.zeros(len(candidates))
    for i in range(len(candidates)):
        for label in labels:
            mine = ratio(candidates.images[i], candidates.targets[i], label, models)
            hits = 0
            for j in range(len(reference)):
                unseen = [model for model, mask in zip(models, masks, strict=True) if not mask[j]]
                assert len(unseen) == 2
                hits += mine / ratio(reference.images[j], reference.targets[j], label, unseen) > 1.0
            scores[i] += hits / len(reference) / len(labels)
    names = np.array(candidates.patients)
    expected = [scores[names == patient].mean() for patient in candidates.unique_patients]
    np.testing.assert_allclose(ours.score(release, candidates), expected, atol=1e-12)


def test_a_patients_score_does_not_depend_on_who_else_is_attacked() -> None:
    release = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5).release
    everybody = joined(MEMBERS, OTHERS)
    few = MEMBERS.of_patients(set(MEMBERS.unique_patients[3:9]))
    ours = prepared(everybody)
    of_all = dict(zip(everybody.unique_patients, ours.score(release, everybody), strict=True))
    expected = [of_all[name] for name in few.unique_patients]
    np.testing.assert_allclose(prepared(few).score(release, few), expected, atol=0.011)  # one image of a hundred
    np.testing.assert_allclose(ours.score(release, few), expected, atol=0.011)


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two = (QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5) for _ in range(2))
    assert torch.equal(one.release.images, two.release.images)
    assert torch.equal(one.release.soft_labels, two.release.soft_labels)
    first, second = (prepared(OTHERS).score(one.release, OTHERS) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_and_task_is_attacked(kind: str) -> None:
    attack = replace(QUICK, memorised=20, labelled=300)
    members, others, reference = (
        of_kind(kind, 30, seed=1, first=0),
        of_kind(kind, 60, seed=2, first=1000),
        of_kind(kind, 50, seed=3, first=2000),
    )
    guilty = attack.guilty(members, others, reference, seed=5)
    labels = guilty.release.soft_labels
    assert 0 <= float(labels.min()) <= float(labels.max()) <= 1
    scores = prepared(guilty.candidates, reference, attack).score(guilty.release, guilty.candidates)
    assert scores.shape == (len(guilty.candidates.unique_patients),)
    assert told_apart(scores, guilty.candidates, guilty.members).value > 0.65


@pytest.mark.parametrize(
    ("setting", "value"),
    [("references", 3), ("references", 0), ("ridge", 0.0), ("gamma", 0.0), ("floor", 0.5), ("slope", 1.5),
     ("noise", -0.1), ("memorised", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        LabelLeakage(**{setting: value})


def test_a_reference_of_one_patient_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 reference patients"):
        prepared(OTHERS, REFERENCE.select([0, 1]))
