"""Linkage by another image of a patient: learned on other people, calibrated on them, and blind to membership."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medistill.audit import statistics
from medistill.audit.attack import Exposed, Guilty, MembershipAttack, Prepared
from medistill.audit.reidentification import (
    PreparedReidentification,
    Reidentification,
    Verification,
    patients_by_images,
    pixel_correlation,
)
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.core.task import Task
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from tests.conftest import blobs, pseudonym

QUICK = Reidentification(steps=60, batch=24, width=8, dimension=16, fewest=10)


def people(count: int, seed: int) -> ImageSet:
    """Patients with an anatomy of their own, three images each, in another pose and exposure each time."""
    plain = blobs(count, per_patient=3, seed=seed, first=1000 * seed)
    generator = np.random.default_rng(seed)
    images = []
    for number, image in enumerate(plain.images):
        if number % 3 == 0:
            coarse = torch.tensor(generator.normal(0, 0.15, (1, 1, 5, 5)), dtype=torch.float32)
            anatomy = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")[0]
        moved = torch.roll(image + anatomy, tuple(generator.integers(-1, 2, 2).tolist()), dims=(1, 2))
        images.append((moved * generator.uniform(0.7, 1.0) + generator.uniform(0, 0.2)).clamp(0, 1))
    return replace(plain, images=torch.stack(images))


def _prepared(attack: Reidentification, candidates: ImageSet, reference: ImageSet) -> PreparedReidentification:
    return attack.prepare(candidates, reference, ipc=2, seed=0, compute=Compute(), progress=Progress())


def _area(
    attack: MembershipAttack, members: ImageSet, others: ImageSet, reference: ImageSet
) -> statistics.Estimate:
    prepared = attack.prepare(
        joined(members, others), reference, ipc=2, seed=0, compute=Compute(), progress=Progress()
    )
    return _control(prepared, attack.guilty(members, others, reference, seed=0))


def _control(prepared: Prepared, guilty: Guilty) -> statistics.Estimate:
    scores = prepared.score(guilty.release, guilty.candidates)
    is_member = np.array([name in guilty.members for name in guilty.candidates.unique_patients])
    return statistics.auroc(scores[is_member], scores[~is_member])


def test_the_positive_control_is_caught_by_unseen_images_alone() -> None:
    members, others, reference = people(40, 0), people(40, 1), people(150, 2)
    learned = _area(replace(QUICK, steps=150), members, others, reference)
    floor = _area(replace(QUICK, by="pixels"), members, others, reference)
    print(f"\nnetwork {learned}, pixels {floor}")
    assert learned.low > 0.6
    assert learned.value >= QUICK.wanted
    guilty = QUICK.guilty(members, others, reference, seed=0)
    assert guilty.members == frozenset(members.patients)
    assert len(guilty.release.images) == 40
    assert len(guilty.candidates) == 160  # one image of everybody is left out, members or not
    released = {tuple(image.flatten().tolist()) for image in guilty.release.images}
    assert not released & {tuple(image.flatten().tolist()) for image in guilty.candidates.images}


def test_a_release_of_strangers_links_to_nobody() -> None:
    candidates, reference = blobs(100), blobs(60, seed=2, first=300)
    prepared = _prepared(replace(QUICK, steps=20), candidates, reference)
    covered = []
    for seed in range(8):
        scores = prepared.score(Exposed.of_images(blobs(10, seed=50 + seed, first=900)), candidates)
        coins = np.random.default_rng(seed).permutation(100) < 50
        area = statistics.auroc(scores[coins], scores[~coins])
        covered.append(area.low <= 0.5 <= area.high)
    assert sum(covered) >= 6


def test_the_score_is_the_plain_formula_and_needs_no_other_candidate() -> None:
    candidates, reference = blobs(12, per_patient=3), blobs(20, seed=1, first=100)
    candidates = candidates.select([i for i in range(36) if i % 3 == 0 or i % 2])
    prepared = _prepared(replace(QUICK, by="pixels"), candidates, reference)
    release = Exposed.of_images(blobs(3, seed=5, first=500))
    scores = prepared.score(release, candidates)

    def z(image: torch.Tensor, released: torch.Tensor) -> float:
        return float(np.arctanh(np.corrcoef(image.flatten().numpy(), released.flatten().numpy())[0, 1]))

    usual = np.array([[z(x, r) for r in release.images] for x in reference.images])
    mean, deviation = usual.mean(0), usual.std(0, ddof=1)
    beta = ((usual - mean) / deviation).max(1).std(ddof=1) * np.sqrt(6) / np.pi
    for number, name in enumerate(candidates.unique_patients):
        mine = candidates.of_patients({name}).images
        found = max(
            float(max((z(x, r) - m) / d for r, m, d in zip(release.images, mean, deviation, strict=True)))
            for x in mine
        )
        assert scores[number] == pytest.approx(found - beta * np.log(len(mine)), abs=1e-3)
    some = candidates.of_patients(set(candidates.unique_patients[3:7]))
    np.testing.assert_allclose(prepared.score(release, some), scores[3:7], rtol=1e-5)


def test_log_odds_are_weighted_distances_of_coordinates() -> None:
    network = Verification(blobs(2).task, (1, 16, 16), width=4, dimension=5)
    network.weights.data.copy_(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    first, second = torch.randn(3, 5), torch.randn(4, 5)
    weights = torch.log1p(network.weights.exp()) / 5**0.5
    naive = -(first[:, None] - second[None]).abs() @ weights
    torch.testing.assert_close(network(first, second), naive)


@pytest.mark.parametrize("kind", ["colour", "volume", "multilabel"])
def test_colour_volumes_and_several_labels(kind: str) -> None:
    images = [blobs(12), blobs(12, seed=1, first=100), blobs(20, seed=2, first=200)]
    if kind == "colour":
        images = [replace(part, images=part.images.repeat(1, 3, 1, 1)) for part in images]
    elif kind == "volume":
        images = [replace(part, images=part.images[:, :, None].repeat(1, 1, 16, 1, 1)) for part in images]
    else:
        none = torch.zeros_like(images[0].targets[:4])
        images = [
            replace(part, task=Task.multilabel(("a", "b")), targets=torch.cat([none, part.targets[4:]]))
            for part in images
        ]
    attack = replace(QUICK, steps=3, batch=8, single=2)
    first, second = (_area(attack, *images) for _ in range(2))
    assert first == second  # and the same seed gives the same bits


def test_too_few_patients_with_several_images_are_counted() -> None:
    once, twice = blobs(30, per_patient=1), blobs(30, seed=1, first=100)
    assert [len(part) for part in patients_by_images(joined(once, twice))] == [30, 30]
    with pytest.raises(DataError, match="found 0 among the reference, expected at least 10"):
        _prepared(QUICK, twice, once)
    with pytest.raises(DataError, match="found 0 among the attacked members, expected at least 10"):
        QUICK.guilty(once, twice, twice, seed=0)
    with pytest.raises(DataError, match="found 0 among the other attacked patients"):
        QUICK.guilty(twice, once, twice, seed=0)
    with pytest.raises(ConfigError, match="network, pixels"):
        Reidentification(by="eyes")
    with pytest.raises(ConfigError, match="batch"):
        Reidentification(batch=1)


def _pediatric(shared_data: Path) -> ImageSet:
    stored = np.load(shared_data / "pediatric_cxr" / "cxr_64.npz")
    rows = stored["split"] == "train"
    names = {name: pseudonym(number) for number, name in enumerate(np.unique(stored["patient_id"]))}
    return ImageSet(
        images=torch.tensor(stored["images"][rows], dtype=torch.float32)[:, None] / 255,
        targets=torch.nn.functional.one_hot(torch.tensor(stored["label"][rows].astype(int)), 2).float(),
        patients=tuple(names[name] for name in stored["patient_id"][rows]),
        task=Task.single_label(("normal", "pneumonia")),
    )


def _verification_auc(odds: torch.Tensor, images: ImageSet) -> float:
    """Of pairs of images with the same diagnosis: those of one patient, one a patient, against all others."""
    numbers = np.unique(images.patients, return_inverse=True)[1]
    first, second = np.triu_indices(len(images), 1)
    alike = (images.classes[first] == images.classes[second]).numpy()
    same = numbers[first] == numbers[second]
    one_each = np.flatnonzero(same)[np.unique(numbers[first][same], return_index=True)[1]]
    kept = np.r_[one_each, np.flatnonzero(~same & alike)]
    values = odds[first, second].numpy()
    return float(roc_auc_score(same[kept], values[kept]))


@pytest.mark.benchmark
def test_children_are_linked_better_by_the_network_than_by_pixels(shared_data: Path) -> None:
    """Minutes: ``uv run pytest -m benchmark tests/audit/test_reidentification.py -s``."""
    import time

    everybody = _pediatric(shared_data)
    names = np.array(everybody.unique_patients)
    np.random.default_rng(0).shuffle(names)
    held_out, reference = (everybody.of_patients(set(part)) for part in np.split(names, [len(names) * 3 // 10]))
    members, others = (
        everybody.of_patients(set(part)) for part in np.array_split(sorted(held_out.unique_patients), 2)
    )
    verified = {}
    for by in ("network", "pixels"):
        attack, began = Reidentification(by=by), time.process_time()
        prepared = _prepared(attack, held_out, reference)
        seconds = time.process_time() - began
        reduced = attack.reduce(held_out.images)
        verified[by] = _verification_auc(prepared.verify(reduced, reduced), held_out)
        control = _control(prepared, attack.guilty(members, others, reference, seed=0))
        print(f"\n{by}: verification AUC {verified[by]:.3f}, control {control}, preparation {seconds:.0f} CPU s")
        assert seconds <= 120
    assert verified["network"] > verified["pixels"] + 0.1  # pairs; the control among all released images is missed


def test_pixel_correlation_is_that_of_numpy() -> None:
    first, second = torch.rand(3, 1, 4, 4), torch.rand(2, 1, 4, 4)
    naive = np.corrcoef(first.flatten(1).numpy(), second.flatten(1).numpy())[:3, 3:]
    np.testing.assert_allclose(pixel_correlation(first, second).tanh().numpy(), naive, atol=1e-5)
