"""Folders: names, manifest, rejections and what becomes of a file that crashes."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import stat
from pathlib import Path

import pydicom
import pytest

from medistill.errors import OutputError, SourceError
from medistill.ingest.deidentify import deidentify_folder
from medistill.ingest.quarantine import REASON_CODES
from medistill.ingest.reading import Item
from tests.ingest.conftest import KEY
from tests.ingest.deidentify.planting import Names, base, plant, surviving


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def _payload(ds) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """One patient with two studies, a second patient, a double, a text file and an ultrasound image."""
    names = Names(9)
    folder = tmp_path / "Smith_Jane"
    first = base("CT", names)
    later = base("CT", names)
    later.PatientID, later.StudyDate = first.PatientID, "20170722"
    _write(folder / "a" / "1.dcm", _payload(first))
    _write(folder / "a" / "2.dcm", _payload(later))
    _write(folder / "b" / "3.dcm", plant("MR").payload)
    _write(folder / "b" / "4.dcm", _payload(first))
    _write(folder / "b" / "5.txt", b"Jane Smith was here")
    _write(folder / "b" / "6.dcm", _payload(base("US", names)))
    return folder


def test_a_folder(clinic: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes.csv"
    summary = deidentify_folder(clinic, out, key=KEY, notes=notes, jobs=1)
    rows = _rows(out)
    assert [row["outcome"] for row in rows] == [
        "WRITTEN",
        "WRITTEN",
        "WRITTEN",
        "DUP_SOP_SAME",
        "NOT_DICOM",
        "BURNED_IN",
    ]
    assert [row["day"] for row in rows[:3]] == ["0", "37", "0"]
    assert (summary.written, summary.patients, len(summary.rejected)) == (3, 2, 3)
    assert {rejection.code for rejection in summary.rejected} <= set(REASON_CODES)
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.dcm"))
    assert written == sorted(row["file"] for row in rows if row["file"])
    assert {path.name for path in out.iterdir()} == {"manifest.csv", *(name.split("/")[0] for name in written)}
    planted = plant("MR")
    for row in rows[:3]:
        content = (out / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        dataset = pydicom.dcmread(io.BytesIO(content))
        assert row["file"].startswith(f"{dataset.PatientID}/")
        assert row["file"].endswith(f"/{dataset.SOPInstanceUID}.dcm")
        assert int(row["kept"]) > 10
        assert int(row["removed"]) > 0
        assert surviving(planted.texts, content) == []
    everything = (out / "manifest.csv").read_text() + "".join(written)
    assert "Smith" not in everything
    assert surviving(planted.texts, everything.encode()) == []
    assert stat.S_IMODE(notes.stat().st_mode) == 0o600
    with notes.open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)][-1] == "b/6.dcm"


def test_items_may_hold_bytes_and_be_refused_by_their_source(tmp_path: Path) -> None:
    items = [
        Item(ordinal=0, name="one", payload=plant("CR").payload),
        Item(ordinal=1, name="two", payload=None, refused="ZIP_LIMIT"),
        Item(ordinal=2, name="three", payload=b"nothing"),
    ]
    summary = deidentify_folder(items, tmp_path / "out", key=KEY, jobs=1)
    assert summary.written == 1
    assert [(item.ordinal, item.code) for item in summary.rejected] == [(1, "ZIP_LIMIT"), (2, "NOT_DICOM")]


def test_text_may_be_allowed(tmp_path: Path) -> None:
    items = [Item(ordinal=0, name="one", payload=_payload(base("US", Names(1))))]
    assert deidentify_folder(items, tmp_path / "out", key=KEY, burned_in="allow", jobs=1).written == 1
    assert _rows(tmp_path / "out")[0]["flags"] == "burned_in_allowed"


class Crashing:
    """A reference whose reading ends the process."""

    def read(self) -> bytes:
        os.abort()


def test_a_crash_costs_one_file(tmp_path: Path) -> None:
    items = [
        Item(ordinal=0, name="one", payload=Crashing()),
        Item(ordinal=1, name="two", payload=_payload(base("CT", Names(1)))),
    ]
    summary = deidentify_folder(items, tmp_path / "out", key=KEY, burned_in="allow", jobs=1)
    assert summary.written == 1
    assert [item.code for item in summary.rejected] == ["CODEC_CRASH"]


def test_bad_places(tmp_path: Path, clinic: Path) -> None:
    with pytest.raises(SourceError):
        deidentify_folder([], tmp_path / "out", key=KEY)
    with pytest.raises(SourceError):
        deidentify_folder(tmp_path / "none", tmp_path / "out", key=KEY)
    with pytest.raises(OutputError, match="outside"):
        deidentify_folder(clinic, tmp_path / "out", key=KEY, notes=tmp_path / "out" / "notes.csv")
    with pytest.raises(OutputError, match="not empty"):
        deidentify_folder(clinic, clinic, key=KEY, jobs=1)
