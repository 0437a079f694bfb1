"""Who is who: issuers, missing patients, shared studies and images, and what is turned away for it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medistill.core.cohort import Cohort, Split
from medistill.errors import DataError, SourceError
from medistill.ingest import IngestConfig, ingest
from tests.ingest.conftest import KEY, make_dicom, write_csv

SMALL = IngestConfig(size=16, ocr="never")
OWN = IngestConfig(size=16, ocr="never", missing_patient="own")
Rows = list[tuple[str, ...]]


def scan(folder: Path, patients: int, values: Callable[[int, int], dict[str, Any]]) -> Path:
    """Two images for each patient; returns their folder."""
    generator = np.random.default_rng(0)
    for patient in range(patients):
        for image in range(2):
            given = {
                "PatientID": f"P{patient}",
                "StudyInstanceUID": f"1.2.4.{patient + 1}",
                "SOPInstanceUID": f"1.2.3.{patient + 1}.{image}",
                **values(patient, image),
            }
            where = str(given.pop("folder", "."))
            pixels = given.pop("pixels", generator.integers(0, 256, (16, 12), dtype=np.uint8))
            make_dicom(folder / "scans" / where / f"{patient:02d}{image}.dcm", pixels, **given)
    return folder / "scans"


def by_file(folder: Path, patients: int) -> Path:
    rows: Rows = [("file", "label")]
    rows += [(f"{n:02d}{image}.dcm", "sick" if n % 2 else "well") for n in range(patients) for image in range(2)]
    return write_csv(folder / "labels.csv", rows)


def quarantine(cohort: Cohort) -> dict[str, int]:
    return dict(cohort.profile["counts"]["quarantine"])


def test_two_sites_that_use_the_same_numbers(tmp_path: Path) -> None:
    scans = scan(
        tmp_path, 40, lambda n, _: {"PatientID": f"{n // 2}", "IssuerOfPatientID": "NORTH" if n % 2 else "SOUTH"}
    )
    rows: Rows = [("PatientID", "IssuerOfPatientID", "label")]
    rows += [(f"{n // 2}", "north " if n % 2 else "South", "sick" if n % 2 else "well") for n in range(40)]
    labels = write_csv(tmp_path / "labels.csv", rows)
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, jobs=1)
    assert (len(cohort), len(cohort.patients)) == (80, 40)
    assert {label: sum(i.label == label for i in cohort.instances) for label in ("sick", "well")} == {
        "sick": 40,
        "well": 40,
    }


def test_a_bare_number_that_two_issuers_use_says_nothing(tmp_path: Path) -> None:
    def values(patient: int, _: int) -> dict[str, Any]:
        shared = {"PatientID": "7", "IssuerOfPatientID": "NORTH" if patient else "SOUTH"}
        return shared if patient < 2 else {"IssuerOfPatientID": "NORTH"}

    scans = scan(tmp_path, 40, values)
    rows: Rows = [("PatientID", "label"), ("7", "well")]
    rows += [(f"P{n}", "sick" if n % 2 else "well") for n in range(2, 40)]
    labels = write_csv(tmp_path / "labels.csv", rows)
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, jobs=1)
    assert (len(cohort), quarantine(cohort)) == (76, {"ID_CONFLICT": 4})
    assert "two issuers" in (tmp_path / "cohort" / "manifest.csv").read_text()


def test_an_issuer_that_only_the_table_knows_makes_nobody_two_people(tmp_path: Path) -> None:
    scans = scan(
        tmp_path, 40, lambda n, image: {"PatientID": "", "StudyInstanceUID": f"1.2.4.{n}.{image}"} if image else {}
    )
    rows: Rows = [("file", "patient_id", "IssuerOfPatientID", "label")]
    rows += [
        (f"{n:02d}{i}.dcm", f"P{n}", "NORTH", "sick" if n % 2 else "well") for n in range(40) for i in range(2)
    ]
    labels = write_csv(tmp_path / "labels.csv", rows)
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=labels, config=SMALL, jobs=1)
    assert (len(cohort), len(cohort.patients)) == (80, 40)


def test_of_two_copies_the_one_with_a_label_stays(tmp_path: Path) -> None:
    scans = scan(tmp_path, 20, lambda n, _: {})
    (scans / "0.dcm").write_bytes((scans / "000.dcm").read_bytes())  # comes first and has no row
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 20), config=SMALL, jobs=1)
    assert (len(cohort), quarantine(cohort)) == (40, {"NO_LABEL": 1})


@pytest.mark.parametrize("written", ["p 7", "P  7", " P 7 "])
def test_spaces_and_case_of_a_number_do_not_matter(tmp_path: Path, written: str) -> None:
    scans = scan(tmp_path, 20, lambda n, i: {"PatientID": written if i else "P 7"} if n == 7 else {})
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 20), config=SMALL, jobs=1)
    assert len(cohort.patients) == 20


@pytest.mark.parametrize(
    ("missing", "flag", "patients"),
    [
        ({"PatientID": ""}, "patient_is_study", 20),
        ({"PatientID": "", "StudyInstanceUID": ""}, "patient_is_folder", 20),
    ],
)
def test_missing_patients_fall_back_to_study_then_folder(
    tmp_path: Path, missing: dict[str, Any], flag: str, patients: int
) -> None:
    scans = scan(tmp_path, 20, lambda n, _: {**missing, "folder": f"visit {n}"})
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 20), config=OWN, jobs=1)
    assert (len(cohort), len(cohort.patients)) == (40, patients)
    with (tmp_path / "c" / "manifest.csv").open() as file:
        assert {row["flags"] for row in csv.DictReader(file)} == {flag}


def test_patients_who_share_a_study_or_an_image_stay_together(tmp_path: Path) -> None:
    same = np.full((16, 12), 5, dtype=np.uint8)

    def values(patient: int, image: int) -> dict[str, Any]:
        if patient in (0, 2) and image == 0:
            return {"pixels": same}
        return {"StudyInstanceUID": "1.2.4.99"} if patient in (2, 4, 6) else {}

    scans = scan(tmp_path, 40, values)
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 40), config=SMALL, jobs=1)
    assert len(cohort.patients) == 40
    by_key: dict[str, set[Split]] = {}
    for instance in cohort.instances:
        for key in (instance.study, instance.pixel_key, instance.patient):
            by_key.setdefault(key, set()).add(instance.split)
    assert all(len(splits) == 1 for splits in by_key.values())
    shared = [i for i in cohort.instances if sum(j.study == i.study for j in cohort.instances) > 2]
    assert len({i.patient for i in shared}) == 3
    assert len({i.split for i in shared}) == 1


def test_a_study_in_two_splits_is_refused_on_load(tmp_path: Path) -> None:
    scans = scan(tmp_path, 20, lambda n, _: {})
    ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 20), config=SMALL, jobs=1)
    manifest = tmp_path / "c" / "manifest.csv"
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    train = next(row for row in rows if row["split"] == "train")
    test = next(row for row in rows if row["split"] == "test")
    test["study"] = train["study"]
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    from medistill.ingest import load_cohort

    with pytest.raises(DataError, match="study"):
        load_cohort(tmp_path / "c")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
        ({"Modality": "US"}, "BURNED_IN"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "BURNED_IN"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALISER"),
        ({"Modality": "CT", "BodyPartExamined": "HEAD"}, "HEAD_VOLUME"),
        ({"Modality": "MR", "StudyDescription": "MRI Brain w/o"}, "HEAD_VOLUME"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "NON_IMAGE_SOP"),
    ],
)
def test_images_that_do_not_belong_are_turned_away(tmp_path: Path, values: dict[str, Any], code: str) -> None:
    scans = scan(tmp_path, 20, lambda n, _: values if n == 3 else {})
    cohort = ingest(scans, tmp_path / "c", key=KEY, labels=by_file(tmp_path, 20), config=SMALL, jobs=1)
    assert quarantine(cohort) == {code: 2}


def test_defaced_heads_and_allowed_text_enter(tmp_path: Path) -> None:
    values = {"Modality": "CT", "BodyPartExamined": "HEAD", "BurnedInAnnotation": "YES"}
    scans = scan(tmp_path, 20, lambda n, _: values)
    labels = by_file(tmp_path, 20)
    with pytest.raises(SourceError, match=r"40 HEAD_VOLUME.*defaced"):
        ingest(scans, tmp_path / "c", key=KEY, labels=labels, config=SMALL, jobs=1)
    config = IngestConfig(size=16, heads="defaced", burned_in="allow")
    assert len(ingest(scans, tmp_path / "c", key=KEY, labels=labels, config=config, jobs=1)) == 40
