from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medistill.errors import ConfigError, LabelError, SourceError
from medistill.ingest import IngestConfig, ingest, wrap_images
from tests.ingest.conftest import KEY, write_csv


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    folder = tmp_path / "png"
    folder.mkdir()
    images, rows = [], [["file", "patient_id", "label", "split"]]
    for number in range(24):
        images.append(rng.integers(0, 256, (19, 19), dtype=np.uint8))
        Image.fromarray(images[-1]).save(folder / f"{number:02d}.png")
        rows.append([f"{number:02d}.png", f"p^{number // 2}", str(number // 2 % 2), "train"])
    return folder, write_csv(tmp_path / "table.csv", rows), images


def wrap(pictures: tuple[Path, Path, list[np.ndarray]], out: Path, **values: object) -> Path:
    names = {"0": "normal", "1": "pneumonia"}
    wrap_images(pictures[0], out, table=pictures[1], label_names=names, jobs=1, **values)  # type: ignore[arg-type]
    return out


def test_pixels_survive_the_round_trip(pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path) -> None:
    out = wrap(pictures, tmp_path / "dicom")
    config = IngestConfig(size=19, burned_in="allow", fit="stretch", classes=("normal", "pneumonia"))
    cohort = ingest(out / "images", tmp_path / "cohort", key=KEY, labels=out / "labels.csv", config=config)
    assert len(cohort.patients) == 12
    stored = cohort.store.read(range(24))[:, 0]
    np.testing.assert_array_equal(stored, np.stack(pictures[2]).astype(np.uint16) * 257)
    assert {instance.modality for instance in cohort.instances} == {"CR"}


def test_files_are_complete_and_reproducible(
    pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    one, two = wrap(pictures, tmp_path / "one"), wrap(pictures, tmp_path / "two")
    assert (one / "labels.csv").read_bytes() == (two / "labels.csv").read_bytes()
    first, second = (pydicom.dcmread(one / "images" / f"00000{number}.dcm") for number in (0, 1))
    assert first.PatientName == "WRAPPED^p_0"
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ViewPosition"):
        assert keyword in first
    with (one / "labels.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["PatientID"], row["file"], row["label"]) == ("p^0", "00.png", "normal")
    assert row["SOPInstanceUID"] == first.SOPInstanceUID


def test_other_modalities_are_secondary_capture(
    pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(wrap(pictures, tmp_path / "out", modality="OP") / "images" / "000000.dcm")
    assert dataset.SOPClassUID.name == "Secondary Capture Image Storage"
    assert dataset.ConversionType == "WSD"
    with pytest.raises(ConfigError):
        wrap(pictures, tmp_path / "no", modality="XRAY")


def test_images_without_patient_are_left_out(
    pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "short.csv", [["file", "patient_id"], ["00.png", "a"], ["01.png", ""]])
    summary = wrap_images(pictures[0], tmp_path / "out", table=table, jobs=1)
    assert (summary.images, summary.patients, summary.skipped) == (1, 1, {"ID_MISSING": 23})


def test_without_a_table(pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path) -> None:
    summary = wrap_images(pictures[0], tmp_path / "out", jobs=1)
    assert (summary.images, summary.patients) == (24, 24)


def test_lossy_source_is_declared(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (32, 32), 9).save(tmp_path / "images" / "a.jpg")
    wrap_images(tmp_path / "images", tmp_path / "out", jobs=1)
    assert pydicom.dcmread(tmp_path / "out" / "images" / "000000.dcm").LossyImageCompression == "01"


def test_bad_tables(pictures: tuple[Path, Path, list[np.ndarray]], tmp_path: Path) -> None:
    cases = {
        "no such columns": [["file", "label"], ["00.png", "x"]],
        "more than once: line 3": [["file", "patient_id"], ["00.png", "x"], ["00.png", "y"]],
        "64 characters": [["file", "patient_id"], ["00.png", "x" * 65]],
    }
    for match, rows in cases.items():
        with pytest.raises(LabelError, match=match):
            wrap_images(pictures[0], tmp_path / "out", table=write_csv(tmp_path / "bad.csv", rows), jobs=1)
    table = write_csv(tmp_path / "bad.csv", [["file", "patient_id"], ["zz.png", "x"]])
    with pytest.raises(SourceError, match="No image"):
        wrap_images(pictures[0], tmp_path / "out", table=table, jobs=1)
    assert not (tmp_path / "out").exists()
