"""The phantom is reproducible, valid DICOM, honest in its answer key, and neither trivial nor hopeless."""

import csv
import json
import warnings
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import JPEGLossless, JPEGLSLossless
from sklearn.metrics import roc_auc_score

from medistill.errors import ConfigError, OutputError
from medistill.ingest.phantom import PhantomConfig, cohort, draw_anatomy, draw_pose, render, write_phantom
from medistill.ingest.phantom.pixels import (
    MAXIMUM,
    TRANSFER_SYNTAXES,
    burn_in,
    draw_storage,
    quantise,
    set_pixels,
)

SMALL = PhantomConfig(patients=5, size=64, burned_in=0.5, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def decode(dataset: pydicom.Dataset) -> np.ndarray:
    decoders = {JPEGLossless: imagecodecs.jpegsof3_decode, JPEGLSLossless: imagecodecs.jpegls_decode}
    decoder = decoders.get(dataset.file_meta.TransferSyntaxUID)
    if decoder is None:
        return dataset.pixel_array
    return decoder(next(generate_frames(dataset.PixelData, number_of_frames=1)))


def follow(dataset: pydicom.Dataset, where: str) -> str:
    """Value at a path of the answer key, for example ``RequestAttributesSequence[0].AccessionNumber``."""
    if where == "preamble":
        return dataset.preamble.decode()
    node = dataset
    for part in where.split("."):
        name, _, item = part.partition("[")
        tag = name.strip("()").replace(",", "") if name.startswith("(") else name
        node = node.file_meta if name == "file_meta" else node[int(tag, 16) if tag != name else tag].value
        if item:
            node = node[int(item.rstrip("]"))]
    return str(node)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """A cohort of forty patients with its summary, answer key and data sets by file."""
    out = tmp_path_factory.mktemp("phantom") / "nested" / "out"
    summary = write_phantom(out, PhantomConfig(patients=40, size=64, burned_in=0.3, seed=1))
    key = json.loads((out / "ground_truth.json").read_text(encoding="utf-8"))
    datasets = {row["file"]: pydicom.dcmread(out / "dicom" / row["file"]) for row in key["files"]}
    return out, summary, key, datasets


@pytest.fixture(scope="module")
def films():
    """Two films of the stomach of each of 70 patients at 64 pixels: images, whether gastritis, patient."""
    rows = []
    for patient in range(70):
        rng = np.random.default_rng([17, patient])
        anatomy = draw_anatomy(rng, gastritis=patient % 2 == 1, difficulty=0.5)
        for _ in range(2):
            image = render(anatomy, draw_pose(rng, outside=False), 128)
            rows.append((image.reshape(64, 2, 64, 2).mean((1, 3)), patient % 2, patient))
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def test_same_config_same_bytes_whatever_the_jobs(tmp_path):
    for name, jobs in (("a", 1), ("b", 1), ("c", 2)):
        write_phantom(tmp_path / name, SMALL, jobs=jobs)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")
    write_phantom(tmp_path / "other", replace(SMALL, seed=4))
    assert not set(digests(tmp_path / "a").values()) & set(digests(tmp_path / "other").values()) - {
        sha256((tmp_path / "a" / "README.txt").read_bytes()).hexdigest()
    }


def test_render_is_a_function_of_what_was_drawn():
    first, second = (draw_anatomy(np.random.default_rng(2), gastritis=True, difficulty=0.5) for _ in range(2))
    pose = draw_pose(np.random.default_rng(3), outside=False)
    np.testing.assert_array_equal(render(first, pose, 64), render(second, pose, 64))


@pytest.mark.parametrize("size", [48, 64, 101, 256])
@pytest.mark.parametrize("outside", [False, True])
def test_render_gives_grey_values_of_any_size(size, outside):
    rng = np.random.default_rng(0)
    image = render(draw_anatomy(rng, gastritis=True, difficulty=0.5), draw_pose(rng, outside=outside), size)
    assert image.shape == (size, size)
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    assert image.std() > 0.1


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("inverted", [False, True])
def test_pixels_come_back_exactly(syntax, inverted, tmp_path):
    rng = np.random.default_rng(5)
    image = render(draw_anatomy(rng, gastritis=False, difficulty=0.5), draw_pose(rng, outside=False), 101)
    storage = draw_storage(rng, fluoroscopy=False)
    storage = replace(storage, transfer_syntax=syntax, inverted=inverted)
    stored = quantise(image, storage)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.ComputedRadiographyImageStorage, "2.25.1"
    set_pixels(dataset, stored, storage)
    dataset.save_as(tmp_path / "film", enforce_file_format=True)
    read = pydicom.dcmread(tmp_path / "film")
    assert read.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(decode(read), MAXIMUM - stored if inverted else stored)


@pytest.mark.parametrize(
    ("display", "rescale"),
    [
        ("window", None),
        ("window", (0.5, -30.0)),
        ("two windows", None),
        ("two windows", (2.0, 7.0)),
        ("lut", None),
        ("none", (0.5, 0.0)),
    ],
)
def test_both_polarities_depict_the_same(display, rescale):
    rng = np.random.default_rng(6)
    image = render(draw_anatomy(rng, gastritis=False, difficulty=0.5), draw_pose(rng, outside=False), 64)
    shown = []
    for inverted in (False, True):
        storage = replace(
            draw_storage(np.random.default_rng(0), fluoroscopy=False),
            inverted=inverted,
            display=display,
            rescale=rescale,
            transfer_syntax=pydicom.uid.ExplicitVRLittleEndian,
        )
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = storage.transfer_syntax
        set_pixels(dataset, quantise(image, storage), storage)
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(float)
        values = -values if dataset.PhotometricInterpretation == "MONOCHROME1" else values
        shown.append(values - values.min())
    np.testing.assert_allclose(shown[0], shown[1], atol=1e-6 * shown[0].max())


def test_files_are_what_the_answer_key_says(phantom):
    out, summary, key, datasets = phantom
    for row in key["files"]:
        dataset = datasets[row["file"]]
        assert dataset.SOPInstanceUID == row["sop_uid"] == dataset.file_meta.MediaStorageSOPInstanceUID
        assert dataset.StudyInstanceUID == row["study_uid"]
        assert dataset.file_meta.TransferSyntaxUID == row["transfer_syntax"]
        assert dataset.PhotometricInterpretation == row["photometric"]
        assert dataset.get("BurnedInAnnotation") == row["burned_in_annotation"]
        assert dataset.ImageComments == "SYNTHETIC PHANTOM"
        assert (dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit) == (16, 12, 11)
        pixels = decode(dataset)
        assert pixels.shape == (64, 64)
        assert pixels.max() <= MAXIMUM
    assert len({row["sop_uid"] for row in key["files"]}) == summary.images == len(datasets)
    assert {row["transfer_syntax"] for row in key["files"]} == set(TRANSFER_SYNTAXES)
    assert "SYNTHETIC" in (out / "README.txt").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"dicom", "labels.csv", "ground_truth.json", "README.txt"}
    assert not [path for path in out.parent.iterdir() if path != out]


def test_variety(phantom):
    _, summary, key, datasets = phantom
    inverted = np.mean([row["photometric"] == "MONOCHROME1" for row in key["files"]])
    assert 0.3 < inverted < 0.7
    assert summary.studies > summary.patients == 40
    assert {dataset.Modality for dataset in datasets.values()} == {"CR", "RF"}
    assert {row["display"] for row in key["files"]} == {"window", "two windows", "lut", "none"}
    assert {Path(row["file"]).suffix for row in key["files"]} == {"", ".dcm", ".DCM"}
    with_text = [row for row in key["files"] if row["text_boxes"]]
    assert {row["burned_in_annotation"] for row in with_text} == {"YES", "NO"}
    assert 0.1 < len(with_text) / len(datasets) < 0.5


def test_series_hold_one_modality_and_patients_one_class(phantom):
    _, _, key, datasets = phantom
    modality, label = {}, {}
    for row in key["files"]:
        dataset = datasets[row["file"]]
        assert modality.setdefault(dataset.SeriesInstanceUID, dataset.Modality) == dataset.Modality
        if row["label"] != "outside":
            assert label.setdefault(row["patient"], row["label"]) == row["label"]
    assert Counter(label.values()) == {"gastritis": 20, "no_gastritis": 20}


def test_planted_identifiers_are_where_the_answer_key_says(phantom):
    out, _, key, datasets = phantom
    kinds = set()
    for row in key["files"]:
        content = (out / "dicom" / row["file"]).read_bytes()
        implicit = row["transfer_syntax"] == pydicom.uid.ImplicitVRLittleEndian
        for planted in row["identifiers"]:
            where, value = planted["where"], planted["value"]
            assert value.encode() in content
            if not (implicit and where.startswith("(")):
                assert follow(datasets[row["file"]], where).rstrip("\0").endswith(value)
            kinds.add("nested" if "[" in where else "private" if where.startswith("(") else where)
    assert {"nested", "private", "PatientName", "PatientID", "PatientBirthDate", "preamble"} <= kinds
    assert "file_meta.SourceApplicationEntityTitle" in kinds


def test_text_boxes_cover_the_text():
    rng = np.random.default_rng(0)
    plain = np.full((128, 128), 900, np.uint16)
    burned, boxes = burn_in(plain, ["Zanzan Belcor", "SYN-1"], rng)
    outside = np.ones_like(plain, bool)
    for box in boxes:
        left, top, right, bottom = box.box
        assert burned[top:bottom, left:right].max() > 2000
        outside[top:bottom, left:right] = False
    assert [box.text for box in boxes] == ["Zanzan Belcor", "SYN-1"]
    np.testing.assert_array_equal(burned[outside], plain[outside])
    assert burned.max() <= MAXIMUM


def test_labels_agree_with_the_files(phantom):
    out, summary, key, datasets = phantom
    with (out / "labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["SOPInstanceUID", "PatientID", "file", "label"]
    for row, truth in zip(rows, key["files"], strict=True):
        dataset = datasets[row["file"]]
        assert row["SOPInstanceUID"] == dataset.SOPInstanceUID
        assert row["PatientID"] == dataset.PatientID
        assert row["label"] == truth["label"]
    assert Counter(row["label"] for row in rows) == summary.per_class
    found = {path.relative_to(out / "dicom").as_posix() for path in (out / "dicom").rglob("*") if path.is_file()}
    assert found == {row["file"] for row in rows}


def test_headers_do_not_depend_on_the_class(phantom):
    _, _, _, datasets = phantom
    assert not any("gastritis" in str(dataset).lower() for dataset in datasets.values())


def test_brightness_does_not_give_the_class_away(films):
    images, gastritis, _ = films
    for measure in (images.mean((1, 2)), images.std((1, 2)), np.median(images, (1, 2))):
        assert 0.35 < roc_auc_score(gastritis, measure) < 0.65


def test_gastritis_changes_the_mucosa_and_nothing_else():
    rng = np.random.default_rng(8)
    anatomy = draw_anatomy(rng, gastritis=True, difficulty=0.5)
    mild, severe = replace(anatomy, severity=0.05), replace(anatomy, severity=0.95)
    stomach = draw_pose(rng, outside=False)
    chest = replace(stomach, centre=(0.0, -2.4))
    np.testing.assert_array_equal(render(mild, chest, 64), render(severe, chest, 64))
    change = np.abs(render(mild, stomach, 64) - render(severe, stomach, 64))
    assert change.mean() > 0.02


@pytest.mark.parametrize(("difficulty", "low", "high"), [(0.0, 0.97, 1.0), (0.5, 0.85, 0.99), (1.0, 0.4, 0.75)])
def test_difficulty_bounds_what_can_be_learned(difficulty, low, high):
    patients = [
        draw_anatomy(np.random.default_rng(seed), gastritis=seed % 2 == 1, difficulty=difficulty)
        for seed in range(300)
    ]
    best = roc_auc_score([seed % 2 for seed in range(300)], [patient.severity for patient in patients])
    assert low <= best <= high


def test_patients_are_recognised_by_plain_correlation(films):
    images, _, patients = films
    rows = images.reshape(len(images), -1)
    similarity = np.corrcoef(rows)
    np.fill_diagonal(similarity, -1.0)
    rank_one = np.mean(patients[similarity.argmax(1)] == patients)
    assert rank_one > 0.25  # chance is 1 in 139


def test_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(OutputError, match="empty"):
        write_phantom(tmp_path, SMALL)
    with pytest.raises(OutputError, match="empty"):
        write_phantom(tmp_path / "kept", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_empty_folder_will_do_and_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cohort, "_write_tables", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(out, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.iterdir())
    assert write_phantom(out, SMALL).patients == 5


def test_no_warning_on_write_and_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_phantom(tmp_path / "out", SMALL)
        for path in (tmp_path / "out" / "dicom").rglob("IM*"):
            str(pydicom.dcmread(path))


@pytest.mark.parametrize(
    "change",
    [
        {"patients": 0},
        {"seed": -1},
        {"size": 8},
        {"images_per_patient": (3, 2)},
        {"images_per_patient": (0, 2)},
        {"difficulty": 1.5},
        {"burned_in": -0.1},
        {"difficulty": float("nan")},
    ],
)
def test_bad_config(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}="):
        PhantomConfig(**change)


def test_bad_config_names_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"patients=0.*size=1 "):
        PhantomConfig(patients=0, size=1)
