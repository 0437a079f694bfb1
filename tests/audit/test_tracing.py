"""Tracing against a naive sum, on releases known to leak and on releases that cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from medistill.audit.attack import Exposed, MembershipAttack
from medistill.audit.students import RandomNetworks
from medistill.audit.tracing import PreparedTracing, Tracing
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from tests.audit.kinds import KINDS, of_kind, told_apart
from tests.conftest import blobs

MEMBERS = blobs(60, seed=1, first=0)
OTHERS = blobs(60, seed=2, first=1000)
REFERENCE = blobs(60, seed=3, first=2000)
QUICK = Tracing(networks=RandomNetworks(networks=1, width=8), public=64)
ATTACK: MembershipAttack = QUICK


def prepared(candidates: ImageSet, reference: ImageSet = REFERENCE, attack: Tracing = QUICK) -> PreparedTracing:
    return attack.prepare(candidates, reference, ipc=1, seed=7, compute=Compute(), progress=Progress())


# -- controls ---------------------------------------------------------------------------------------------------


def test_class_means_of_few_patients_are_traced_and_nearest_neighbours_miss_them() -> None:
    guilty = replace(QUICK, averaged_patients=10).guilty(MEMBERS, OTHERS, REFERENCE, seed=5)
    assert guilty.members <= set(MEMBERS.patients)
    assert len(guilty.members) == 20
    assert set(guilty.candidates.patients) == guilty.members | set(OTHERS.patients)
    assert len(guilty.release.images) == 2
    traced = told_apart(prepared(joined(MEMBERS, OTHERS)).score(guilty.release, guilty.candidates),
                   guilty.candidates, guilty.members)  # fmt: skip
    assert traced.value >= QUICK.wanted
    assert traced.low > 0.6

    flat = [one.flatten(1).double().numpy() for one in (guilty.release.images, guilty.candidates.images)]
    space = PCA(n_components=50).fit(REFERENCE.images.flatten(1).double().numpy())
    release, who = (space.transform(one) for one in flat)
    other = space.transform(REFERENCE.images.flatten(1).double().numpy())
    closeness = np.log(cdist(who, other).min(1)) - np.log(cdist(who, release).min(1))
    names = np.array(guilty.candidates.patients)
    each = np.array([closeness[names == patient].mean() for patient in guilty.candidates.unique_patients])
    neighbour = told_apart(each, guilty.candidates, guilty.members)
    assert neighbour.value < QUICK.wanted
    assert neighbour.value < traced.value - 0.1


def test_a_release_of_other_patients_gives_nobody_away() -> None:
    apart = blobs(60, seed=4, first=3000)
    release = QUICK.guilty(apart, OTHERS, REFERENCE, seed=5).release
    candidates = joined(MEMBERS, OTHERS)
    nobody = told_apart(prepared(candidates).score(release, candidates), candidates, frozenset(MEMBERS.patients))
    assert nobody.low < 0.5 < nobody.high


# -- the sum itself ---------------------------------------------------------------------------------------------


def test_the_score_is_the_naive_sum() -> None:
    attack = replace(QUICK, public=32)
    release = Exposed(
        images=blobs(5, per_patient=1, seed=9).images,
        soft_labels=torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]]),
        task=MEMBERS.task,
        ipc=2,
    )
    ragged = REFERENCE.select(list(range(0, 7)) + list(range(20, 60)) + [90])  # patients with one image and two
    candidates = MEMBERS.select(range(9))
    ours = prepared(candidates, ragged, attack)
    maps = ours._maps
    expected = np.zeros(len(candidates.unique_patients))
    for features, released, theirs in zip(
        maps(ragged.images), maps(release.images), maps(candidates.images), strict=True
    ):
        rows, released_rows, own = (part.double().numpy() for part in (features, released, theirs))
        labels = ragged.classes.numpy()
        names = np.array(ragged.patients)
        weight = np.array([1 / (names == name).sum() for name in names])
        r = [np.average(rows[labels == y], axis=0, weights=weight[labels == y]) for y in (0, 1)]
        residuals = np.array([row - r[y] for row, y in zip(rows, labels, strict=True)])
        sigma = LedoitWolf(assume_centered=True).fit(residuals).covariance_
        sigma = sigma + np.eye(len(sigma)) * (1e-12 + 1e-6 * np.trace(sigma) / len(sigma))
        for number, patient in enumerate(candidates.unique_patients):
            of_images = []
            for i in [i for i, name in enumerate(candidates.patients) if name == patient]:
                y = int(candidates.classes[i])
                m = np.average(released_rows, axis=0, weights=release.soft_labels[:, y].double().numpy())
                usual = [(row - r[y]) @ np.linalg.solve(sigma, m - r[y]) for row in rows[labels == y]]
                spread = np.sqrt(np.average(np.square(usual), weights=weight[labels == y]))
                of_images.append((own[i] - r[y]) @ np.linalg.solve(sigma, m - r[y]) / spread)
            expected[number] += np.mean(of_images) / len(maps(release.images))
    np.testing.assert_allclose(ours.score(release, candidates), expected, rtol=1e-6, atol=1e-8)


def test_a_patients_score_does_not_depend_on_who_else_is_attacked() -> None:
    release = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5).release
    everybody = joined(MEMBERS, OTHERS)
    few = MEMBERS.of_patients(set(MEMBERS.unique_patients[3:9]))
    of_all = dict(zip(everybody.unique_patients, prepared(everybody).score(release, everybody), strict=True))
    alone = prepared(few).score(release, few)
    np.testing.assert_allclose(alone, [of_all[name] for name in few.unique_patients], rtol=1e-4, atol=1e-5)
    unprepared = prepared(everybody).score(release, few)
    np.testing.assert_allclose(unprepared, alone, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two = (QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5) for _ in range(2))
    assert torch.equal(one.release.images, two.release.images)
    assert one.members == two.members
    first, second = (prepared(OTHERS).score(one.release, OTHERS) for _ in range(2))
    assert np.array_equal(first, second)
    assert QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=6).members != one.members


def test_the_control_averages_over_patients_and_not_over_images() -> None:
    uneven = MEMBERS.select([0, 1, 4, 2, 3])  # of class 0 a patient with two images and one with one
    release = QUICK.guilty(uneven, OTHERS, REFERENCE, seed=1).release
    images = uneven.images
    torch.testing.assert_close(release.images[0], (images[:2].mean(0) + images[2]) / 2)
    torch.testing.assert_close(release.images[1], images[3:].mean(0))


# -- all shapes and tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_and_task_is_traced(kind: str) -> None:
    attack = replace(QUICK, averaged_patients=5, public=0)
    members, others, reference = (
        of_kind(kind, 40, seed=1, first=0),
        of_kind(kind, 40, seed=2, first=1000),
        of_kind(kind, 60, seed=3, first=2000),
    )
    guilty = attack.guilty(members, others, reference, seed=5)
    ours = prepared(guilty.candidates, reference, attack)
    scores = ours.score(guilty.release, guilty.candidates)
    assert scores.shape == (len(guilty.candidates.unique_patients),)
    assert told_apart(scores, guilty.candidates, guilty.members).value > 0.75


def test_images_of_a_class_that_the_reference_lacks_score_zero() -> None:
    sick = torch.nonzero(REFERENCE.classes == 1).flatten()
    release = QUICK.guilty(MEMBERS, OTHERS, REFERENCE, seed=5).release
    scores = prepared(OTHERS, REFERENCE.select(sick)).score(release, OTHERS)
    healthy = {p for p, c in zip(OTHERS.patients, OTHERS.classes.tolist(), strict=True) if c == 0}
    inside = np.array([patient in healthy for patient in OTHERS.unique_patients])
    assert np.isfinite(scores).all()
    assert (scores[inside] == 0).all()
    assert (scores[~inside] != 0).all()


def test_settings_and_data_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="averaged_patients >= 1"):
        Tracing(averaged_patients=0)
    with pytest.raises(DataError, match="at least 2 reference images"):
        prepared(OTHERS, REFERENCE.select([0]))
    with pytest.raises(DataError, match="images of every class"):
        QUICK.guilty(MEMBERS.select([0, 1]), OTHERS, REFERENCE, seed=1)
