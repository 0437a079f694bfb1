"""Synthetic DICOM files and folders for the ingestion tests."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from medistill.progress import Progress

KEY = bytes(range(32))
DATA = Path(os.environ.get("MEDISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


class Recorder(Progress):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def make_dicom(path: Path, pixels: np.ndarray, **values: Any) -> Dataset:
    """Write a Computed Radiography file; ``values`` override or add elements."""
    dataset = Dataset()
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = f"1.2.3.1{path.stem}" if path.stem.isdigit() else "1.2.3.99"
    dataset.StudyInstanceUID = "1.2.4.1"
    dataset.Modality = "CR"
    dataset.PatientID = "P0"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def write_csv(path: Path, rows: Sequence[Any], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def key() -> bytes:
    return KEY


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def data() -> Path:
    """Real files; point MEDISTILL_DATA at them."""
    if not (DATA / "dicom" / "valid").is_dir():
        pytest.skip("real files not found: set MEDISTILL_DATA")
    return DATA


def build_clinic(folder: Path, patients: int = 16, **values: Any) -> tuple[Path, Path]:
    """Make a folder of patients with two images each and a label table keyed by SOPInstanceUID."""
    rng = np.random.default_rng(0)
    rows: list[list[str]] = [["SOPInstanceUID", "label"]]
    for number in range(2 * patients):
        path = folder / "scans" / f"{number:03d}.dcm"
        pixels = rng.integers(0, 256, (16, 12), dtype=np.uint8)
        owner = {"PatientID": f"P{number // 2}", "StudyInstanceUID": f"1.2.4.{number // 2 + 1}"}
        made = make_dicom(path, pixels, **{**owner, **values})
        rows.append([made.SOPInstanceUID, "sick" if number // 2 % 2 else "well"])
    return folder / "scans", write_csv(folder / "labels.csv", rows)


@pytest.fixture
def clinic(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Make a clinic in this test's folder."""
    return partial(build_clinic, tmp_path)
