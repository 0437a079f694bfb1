"""Burned-in text from file to cohort: found, read, masked or turned away."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from medistill.ingest import IngestConfig, ingest
from medistill.ingest.burned_in.ocr import available
from tests.ingest.conftest import KEY, Recorder, make_dicom, write_csv

SIDE = 192
TEXT = "QUOKKA MARIA 1961"
needs_ocr = pytest.mark.skipif(not available(), reason="the extra `ocr` is not installed")


def film(number: int, text: str = "") -> np.ndarray:
    """A smooth picture, each one another, with text in its upper left corner."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    smooth = 60 + 80 * np.exp(-((rows - 0.5) ** 2 + (columns - 0.4 - number / 400) ** 2) * 8)
    picture = Image.fromarray(smooth.astype(np.uint8))
    ImageDraw.Draw(picture).text((8, 10), text, fill=255, font=ImageFont.load_default(15))
    return np.asarray(picture)


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Path, Path]:
    """Twenty patients; text on the films of two, a marker on those of another."""
    rows = [("file", "label")]
    for number in range(20):
        text = {3: TEXT, 4: TEXT, 5: "L"}.get(number, "")
        values = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.2.4.{number + 1}"}
        make_dicom(tmp_path / "scans" / f"{number:02d}.dcm", film(number, text), **values)
        rows.append((f"{number:02d}.dcm", "sick" if number % 2 else "well"))
    return tmp_path / "scans", write_csv(tmp_path / "labels.csv", rows)


def flags(cohort: Path) -> dict[int, str]:
    with (cohort / "manifest.csv").open() as file:
        return {int(row["ordinal"]): row["outcome"] + " " + row["flags"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("ocr", ["never", pytest.param("require", marks=needs_ocr)])
def test_text_is_turned_away_and_markers_stay(scans: tuple[Path, Path], tmp_path: Path, ocr: str) -> None:
    config = IngestConfig(size=SIDE, ocr=ocr)
    cohort = ingest(scans[0], tmp_path / "c", key=KEY, labels=scans[1], config=config, jobs=1)
    assert cohort.profile["counts"]["quarantine"] == {"BURNED_IN": 2}
    found = flags(tmp_path / "c")
    assert {ordinal for ordinal, outcome in found.items() if outcome.startswith("BURNED_IN")} == {3, 4}


@needs_ocr
def test_text_is_masked_and_the_rest_untouched(
    scans: tuple[Path, Path], tmp_path: Path, recorder: Recorder
) -> None:
    config = IngestConfig(size=SIDE, burned_in="mask")
    cohort = ingest(scans[0], tmp_path / "c", key=KEY, labels=scans[1], config=config, jobs=1, progress=recorder)
    assert (len(cohort), cohort.profile["counts"]["quarantine"]) == (20, {})
    masked = {ordinal for ordinal, outcome in flags(tmp_path / "c").items() if "text_masked" in outcome}
    assert masked == {3, 4}
    pixels = cohort.store.read([3])[0, 0]
    clean = film(3).astype(int) * 257
    assert pixels[10:26, 8:100].max() < 60 * 257 + 1
    assert (np.abs(pixels.astype(int) - clean) <= 257)[60:].all()


def test_allowed_text_is_not_looked_for(scans: tuple[Path, Path], tmp_path: Path) -> None:
    config = IngestConfig(size=SIDE, burned_in="allow")
    cohort = ingest(scans[0], tmp_path / "c", key=KEY, labels=scans[1], config=config, jobs=1)
    assert len(cohort) == 20
    assert set(flags(tmp_path / "c").values()) == {"ACCEPTED burned_in_allowed"}


def test_an_image_that_masking_leaves_empty_is_turned_away(tmp_path: Path) -> None:
    rows = [("file", "label")]
    for number in range(20):
        values = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.2.4.{number + 1}"}
        made = make_dicom(tmp_path / "scans" / f"{number:02d}.dcm", film(number), **values)
        if number == 7:  # an ultrasound image whose only region is one black line
            made.Modality, made.SOPClassUID = "US", "1.2.840.10008.5.1.4.1.1.6.1"
            region = Dataset()
            region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
            region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 0, SIDE
            made.SequenceOfUltrasoundRegions = [region]
            stored = film(number).copy()
            stored[:, 0] = 0
            made.PixelData = stored.tobytes()
            made.save_as(tmp_path / "scans" / f"{number:02d}.dcm")
        rows.append((f"{number:02d}.dcm", "sick" if number % 2 else "well"))
    labels = write_csv(tmp_path / "labels.csv", rows)
    config = IngestConfig(size=SIDE, burned_in="mask", ocr="auto")
    cohort = ingest(tmp_path / "scans", tmp_path / "c", key=KEY, labels=labels, config=config, jobs=1)
    assert cohort.profile["counts"]["quarantine"] == {"BURNED_IN": 1}


@needs_ocr
def test_no_text_is_read_where_there_is_no_label(scans: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [("file", "label")]
    rows += [(f"{n:02d}.dcm", "sick" if n % 2 else "well") for n in range(20) if n not in (3, 4)]
    labels = write_csv(tmp_path / "fewer.csv", rows)
    read = 0

    class Steps(Recorder):
        def track(self, items: Any, description: str, *, total: int | None = None, **_: Any) -> Any:
            nonlocal read
            read += (total or 0) if description == "looking for text" else 0
            return items

    config = IngestConfig(size=SIDE, ocr="require")
    cohort = ingest(scans[0], tmp_path / "c", key=KEY, labels=labels, config=config, jobs=1, progress=Steps())
    assert cohort.profile["counts"]["quarantine"] == {"NO_LABEL": 2}
    assert read < 2  # at most one of the random sample
