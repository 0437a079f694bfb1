from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medistill.errors import RejectedFile, SourceError
from medistill.ingest import IngestConfig, ingest
from medistill.ingest.geometry import Fit
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Source
from medistill.ingest.sources import FolderSource, ImageFolderSource, NpzSource, source_for
from medistill.ingest.sources.image_folder import decode_image
from medistill.registry import SOURCES
from tests.ingest.conftest import KEY


def grey(payload: Path | bytes) -> np.ndarray:
    return next(decode_image(payload, Policy.NONE)).grey()


def names(source: Source) -> list[str]:
    return [item.name for item in source.items()]


def test_registry_names_them() -> None:
    assert SOURCES.load("folder") is FolderSource
    assert SOURCES.load("image_folder") is ImageFolderSource
    assert SOURCES.load("npz") is NpzSource


def test_links_are_not_followed_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "a").touch()
    (inside / "loop").symlink_to(inside)
    (inside / "away").symlink_to(outside)
    (inside / "file").symlink_to(outside / "secret")
    (inside / "self").symlink_to(inside / "self")
    (inside / "good").symlink_to(inside / "deep" / "a")
    items = {item.name: item for item in FolderSource(inside).items()}
    assert [name for name, item in items.items() if item.payload] == ["deep/a", "good"]
    assert {item.refused for item in items.values()} == {"", "PATH_ESCAPE"}
    assert set(items) == {"deep/a", "good", "loop", "away", "file", "self"}
    assert len(FolderSource(inside)) == len(items)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.dcm", "wb"):
            pass
    except OSError:
        pytest.skip("this file system allows text names only")
    assert len(names(FolderSource(tmp_path))) == 1


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 51, 0.2),
        ("RGB", (51, 51, 51), 0.2),
        ("RGB", (255, 0, 0), 0.299),
        ("RGBA", (255, 255, 255, 0), 0.0),
        ("LA", (255, 128), 128 / 255),
        ("I;16", 13107, 0.2),
        ("1", 1, 1.0),
        ("P", 0, 0.0),
    ],
)
def test_modes(tmp_path: Path, mode: str, value: object, expected: float) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (5, 4), value).save(path)  # type: ignore[arg-type]
    assert grey(path).shape == (4, 5)
    np.testing.assert_allclose(grey(path), expected, atol=0.003)


def test_damaged_images_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    for content in (b"", b"text", path.read_bytes()[:900]):
        path.write_bytes(content)
        with pytest.raises(RejectedFile) as caught:
            next(decode_image(path, Policy.NONE))
        assert caught.value.code == "IMAGE_FORMAT"


def test_archive_equals_folder(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "__MACOSX/b/2.png", ".hidden.png", "notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), len(name)).save(path, format="PNG")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "images"))
    folder, packed = source_for(tmp_path / "images"), source_for(tmp_path / "images.zip")
    assert names(folder) == names(packed) == ["a/1.png", "b/2.png"]
    assert folder.labelled
    for one, two in zip(folder.items(), packed.items(), strict=True):
        assert one.label == two.label
        np.testing.assert_array_equal(
            next(folder.decode(one.payload, Policy.NONE)).grey(),
            next(packed.decode(two.payload, Policy.NONE)).grey(),
        )


def test_npz_layouts(tmp_path: Path) -> None:
    images = np.zeros((3, 5, 5), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", images=images, label=[0, 1, 0], patient_id=["x", "y", "z"], split=["train", "test", ""]
    )
    items = list(NpzSource(tmp_path / "a.npz").items())
    assert [(i.label, i.patient, i.split, i.index) for i in items][1] == ("1", "y", "test", "1")
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 5, 5, 5), dtype=np.uint8))
    with pytest.raises(SourceError, match="volumes"):
        len(NpzSource(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", images=np.array([{}], dtype=object))
    with pytest.raises(SourceError, match="pickled"):
        len(NpzSource(tmp_path / "c.npz"))
    np.savez(tmp_path / "d.npz", other=images)
    with pytest.raises(SourceError, match="found neither"):
        len(NpzSource(tmp_path / "d.npz"))


def test_floats_out_of_range_are_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((1, 4, 4), 255.0, dtype=np.float32))
    source = NpzSource(tmp_path / "a.npz")
    image = np.asarray(next(source.items()).payload)
    with pytest.raises(RejectedFile):
        next(source.decode(image, Policy.NONE))


def test_npz_of_volumes(tmp_path: Path) -> None:
    volumes = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=volumes, train_labels=[[0], [1]])
    source = source_for(tmp_path / "a.npz", volumes="cubes")
    assert (len(source), source.labelled) == (2, True)
    (decoded,) = source.decode(next(iter(source.items())).payload, Policy.NONE)
    np.testing.assert_array_equal(decoded.pixels(9, Fit.PAD), volumes[0].astype(np.uint16) * 257)
    assert decoded.pixels(5, Fit.PAD).shape == (5, 5, 5)
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 9, 9, 3), dtype=np.uint8), label=[0, 1])
    with pytest.raises(SourceError, match="volumes: slices"):
        len(source_for(tmp_path / "b.npz", volumes="cubes"))


def test_npz_of_several_labels(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 5, 5), dtype=np.uint8), np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, class_names=["x", "y", "z"])
    source = NpzSource(tmp_path / "a.npz")
    assert source.joint_labels
    assert [item.label for item in source.items()] == ["x;z", ";", "y"]
    np.savez(tmp_path / "b.npz", train_images=images, train_labels=labels)
    assert [item.label for item in NpzSource(tmp_path / "b.npz").items()] == ["0;2", ";", "1"]
    np.savez(tmp_path / "c.npz", train_images=images, train_labels=labels * 2)
    with pytest.raises(SourceError, match="0 and 1"):
        len(NpzSource(tmp_path / "c.npz"))
    with pytest.raises(SourceError, match="Set labels to multilabel"):
        ingest(tmp_path / "a.npz", tmp_path / "out", key=KEY, config=IngestConfig(missing_patient="own"))


@pytest.mark.parametrize(("colour", "channels"), [("auto", 3), ("grey", 1), ("rgb", 3)])
def test_colour_is_kept_or_not_as_the_cohort_says(tmp_path: Path, colour: str, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, label=np.arange(32) % 2)
    config = IngestConfig(size=16, colour=colour, missing_patient="own", burned_in="allow")
    cohort = ingest(tmp_path / "a.npz", tmp_path / "out", key=KEY, config=config, jobs=1)
    found = cohort.store.read(range(32))
    assert found.shape == (32, channels, 16, 16)
    assert cohort.profile["config"]["colour"] == ("grey" if channels == 1 else "rgb")
    grey = images @ np.array([0.299, 0.587, 0.114])
    expected = np.moveaxis(images, -1, 1) if channels == 3 else grey[:, None]
    np.testing.assert_allclose(found / 257, expected, atol=0.01)


def test_colour_of_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (51, 102, 204)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 51).save(tmp_path / "b.png")
    colour, grey = (next(decode_image(tmp_path / name, Policy.NONE)) for name in ("a.png", "b.png"))
    assert colour.flags == ("colour",)
    hidden = colour.masked([(0, 0, 4, 8)]).colours(8, Fit.PAD)
    assert hidden[:, 6, 3].tolist() == [51 * 257, 102 * 257, 204 * 257]
    assert not hidden[:, :4].any()
    assert grey.colours(8, Fit.PAD)[:, 0, 0].tolist() == [51 * 257] * 3


def test_images_of_an_npz_with_splits_can_be_patients_of_their_own(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    labels = np.arange(40) % 2
    parts = {"train": slice(0, 30), "test": slice(30, 40)}
    arrays = {
        f"{name}_{what}": values[part]
        for name, part in parts.items()
        for what, values in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "a.npz", **arrays)
    config = IngestConfig(size=16, missing_patient="own", burned_in="allow")
    cohort = ingest(tmp_path / "a.npz", tmp_path / "out", key=KEY, config=config, jobs=1)
    assert len(cohort.patients) == 40
    assert cohort.counts()["test"]["images"] == 10
