"""A patient whose files name the issuer, or the patient, only sometimes stays one patient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medistill.errors import SourceError
from medistill.ingest import IngestConfig, ingest
from tests.ingest.conftest import KEY, make_dicom, write_csv

SIZE = IngestConfig(size=16, burned_in="allow", missing_patient="own")


def _scans(folder: Path, change: str) -> Path:
    generator = np.random.default_rng(0)
    rows = [("file", "label")]
    for patient in range(20):
        for image in range(2):
            name = f"{patient:02d}{image}"
            values = {"PatientID": f"P{patient}", "StudyInstanceUID": f"1.2.4.{patient + 1}"}
            if image and change == "issuer":
                values["IssuerOfPatientID"] = "HOSP"
            if image and change == "missing":
                values["PatientID"] = ""
            pixels = generator.integers(0, 4000, (16, 16)).astype(np.uint16)
            make_dicom(folder / "scans" / f"{name}.dcm", pixels, **values)
            rows.append((f"{name}.dcm", "sick" if patient % 2 else "well"))
    return write_csv(folder / "labels.csv", rows)


@pytest.mark.parametrize("change", ["issuer", "missing"])
def test_partly_named_patients_are_one_patient_in_one_split(tmp_path: Path, change: str) -> None:
    labels = _scans(tmp_path, change)
    cohort = ingest(tmp_path / "scans", tmp_path / "cohort", key=KEY, labels=labels, config=SIZE, jobs=1)
    assert (len(cohort), len(cohort.patients)) == (40, 20)


def _npz(path: Path, splits: list[str]) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    patients = np.array([f"p{number}" for number in range(60)])
    np.savez(path, images=images, label=np.arange(60) % 2, split=np.array(splits), patient_id=patients)
    return path


def test_a_given_test_split_is_honoured_however_it_is_spelled(tmp_path: Path) -> None:
    source = _npz(tmp_path / "a.npz", ["Test "] * 12 + ["TRAIN"] * 48)
    cohort = ingest(source, tmp_path / "cohort", key=KEY, config=IngestConfig(size=8, burned_in="allow"), jobs=1)
    assert cohort.counts()["test"]["images"] == 12


def test_a_split_nobody_knows_is_refused(tmp_path: Path) -> None:
    source = _npz(tmp_path / "a.npz", ["tset"] * 12 + ["train"] * 48)
    with pytest.raises(SourceError, match="12 values") as caught:
        ingest(source, tmp_path / "cohort", key=KEY, config=IngestConfig(size=8, burned_in="allow"), jobs=1)
    assert "tset" not in str(caught.value)
