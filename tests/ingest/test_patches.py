"""Patches against naive loops; regions found again after pseudonymisation; the phantom's bytes."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.errors import ConfigError, DataError, SourceError
from medistill.ingest import IngestConfig, PatchGrid, central_regions, cut_patches, ingest, load_regions
from medistill.ingest.patches import patients_positive
from medistill.ingest.phantom import PhantomConfig, draw_anatomy, draw_pose, render, stomach_region, write_phantom

KEY = bytes(range(32))
CLASSES = ("no", "yes", "outside")


@given(patch=st.integers(1, 12), stride=st.integers(1, 12), extra=st.integers(0, 30))
def test_patches_cover_every_pixel_and_stay_inside(patch: int, stride: int, extra: int) -> None:
    if stride > patch:
        with pytest.raises(ConfigError, match="stride"):
            PatchGrid(patch=patch, stride=stride)
        return
    side = patch + extra
    starts = PatchGrid(patch=patch, stride=stride).starts(side)
    assert sorted({pixel for start in starts for pixel in range(start, start + patch)}) == list(range(side))
    assert list(starts) == sorted(set(starts))
    assert all(after - before <= stride for before, after in itertools.pairwise(starts))


def test_patches_reassemble_to_the_image() -> None:
    images = np.random.default_rng(0).random((2, 3, 21, 26), dtype=np.float32)
    grid = PatchGrid(patch=8, stride=5)
    patches = grid.cut(images)
    total, counts = np.zeros(images.shape), np.zeros(images.shape)
    places = [(top, left) for top in grid.starts(21) for left in grid.starts(26)]
    assert patches.shape == (2, len(places), 3, 8, 8)
    for number, (top, left) in enumerate(places):
        total[:, :, top : top + 8, left : left + 8] += patches[:, number]
        counts[:, :, top : top + 8, left : left + 8] += 1
    np.testing.assert_allclose(total / counts, images, rtol=1e-6)


def _films() -> tuple[ImageSet, np.ndarray]:
    rng = np.random.default_rng(1)
    regions = np.zeros((4, 20, 20), dtype=np.float32)
    regions[0, 3:15, 2:17] = 1
    regions[1, :, 10:] = 1
    regions[3] = 1
    films = ImageSet(
        images=torch.from_numpy(rng.random((4, 1, 20, 20), dtype=np.float32)),
        targets=torch.eye(3)[[1, 0, 2, 2]],  # classes of the radiographs stand in another order than CLASSES
        patients=("A", "A", "B", "C"),
        task=Task.single_label(("yes", "no", "outside")),
    )
    return films, regions


def test_labels_of_patches_are_those_of_a_naive_loop() -> None:
    films, regions = _films()
    grid = PatchGrid(patch=6, stride=4)
    made = cut_patches(films, regions, grid=grid, classes=CLASSES, covered=(0.25, 0.75))
    expected = []
    for film in range(4):
        for top in grid.starts(20):
            for left in grid.starts(20):
                share = (
                    sum(regions[film, top + row, left + column] for row in range(6) for column in range(6)) / 36
                )
                if 0.25 < share < 0.75:
                    continue
                label = ["no", "yes", "outside", "outside"][film] if share >= 0.75 else "outside"
                pixels = films.images[film, :, top : top + 6, left : left + 6]
                expected.append((CLASSES.index(label), films.patients[film], pixels))
    assert made.classes.tolist() == [label for label, _, _ in expected]
    assert made.patients == tuple(patient for _, patient, _ in expected)
    assert torch.equal(made.images, torch.stack([pixels for _, _, pixels in expected]))
    assert made.task.class_names == CLASSES
    assert set(made.classes.tolist()) == {0, 1, 2}


def test_without_regions_every_patch_is_kept() -> None:
    films, _ = _films()
    grid = PatchGrid(patch=6, stride=4)
    assert len(cut_patches(films, grid=grid, classes=CLASSES)) == 4 * len(grid.starts(20)) ** 2


def test_a_patient_is_positive_by_one_radiograph_and_unjudged_by_none() -> None:
    films, _ = _films()
    assert patients_positive(films, negative="yes", positive="no") == {"A": True}
    assert patients_positive(films.select([0]), negative="no", positive="yes") == {"A": False}


def test_mistakes_are_named() -> None:
    films, regions = _films()
    grid = PatchGrid(patch=6, stride=4)
    with pytest.raises(DataError, match="shape"):
        cut_patches(films, regions[:2], grid=grid, classes=CLASSES)
    with pytest.raises(DataError, match="other ones"):
        cut_patches(films, grid=grid, classes=("a", "b", "c"))
    with pytest.raises(ConfigError, match="at most 20 px"):
        cut_patches(films, grid=PatchGrid(patch=21, stride=4), classes=CLASSES)


def test_the_central_region_is_symmetric_and_leaves_the_corners_out() -> None:
    region = central_regions(2, 64)[1]
    assert np.array_equal(region, region[::-1])
    assert np.array_equal(region, region[:, ::-1])
    assert region[0, 0] == 0
    assert region[32, 32] == 1
    assert 0.48 < region.mean() < 0.52  # an ellipse of 0.84 x 0.76 x pi / 4


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent.name != "regions":
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_regions_change_nothing_else_of_a_phantom_and_are_found_after_ingestion(tmp_path: Path) -> None:
    config = PhantomConfig(patients=14, size=48, burned_in=0.0)
    write_phantom(tmp_path / "plain", config)
    write_phantom(tmp_path / "masked", config, regions=True)
    assert _digest(tmp_path / "plain") == _digest(tmp_path / "masked")
    assert not (tmp_path / "plain" / "regions").exists()

    source = tmp_path / "masked"
    settings = IngestConfig(size=48, ocr="never", classes=("no_gastritis", "gastritis", "outside"))
    cohort = ingest(
        source / "dicom", tmp_path / "cohort", key=KEY, labels=source / "labels.csv", config=settings, jobs=1
    )
    regions = load_regions(source / "regions", cohort, key=KEY, size=48)
    covered = regions.mean(axis=(1, 2))
    for instance, share in zip(cohort.instances, covered, strict=True):
        assert (share < 0.15) if instance.label == "outside" else (0.15 < share < 0.75)
    assert load_regions(source / "regions", cohort, key=KEY, size=24).shape == (len(cohort), 24, 24)
    with pytest.raises(SourceError, match="have no region"):
        load_regions(source / "regions", cohort, key=bytes(32), size=48)
    for path in (source / "regions").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(SourceError, match="cannot be read"):
        load_regions(source / "regions", cohort, key=KEY, size=48)


def test_the_stomach_is_where_the_film_changes_without_it() -> None:
    rng = np.random.default_rng(3)
    with_folds = draw_anatomy(rng, gastritis=True, difficulty=0.0)
    pose = draw_pose(rng, outside=False)
    region = stomach_region(with_folds, pose, 64)
    from dataclasses import replace

    other = replace(with_folds, severity=0.02)
    change = np.abs(render(with_folds, pose, 64) - render(other, pose, 64))
    assert change[region].mean() > 3 * change[~region].mean()
