"""From files to a cohort: accounting, privacy, interruption."""

from __future__ import annotations

import csv
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medistill.core.cohort import Cohort
from medistill.errors import ConfigError, LabelError, MedistillError, OutputError, SourceError
from medistill.ingest import IngestConfig, ingest, load_cohort
from medistill.ingest.sources import FolderSource
from tests.ingest.conftest import KEY, Recorder, make_dicom, write_csv

Clinic = Callable[..., tuple[Path, Path]]
SMALL = IngestConfig(size=16, burned_in="allow")


def quarantine(cohort: Cohort) -> dict[str, int]:
    return dict(cohort.profile["counts"]["quarantine"])


def all_bytes(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_clinic(clinic: Clinic, tmp_path: Path, recorder: Recorder) -> None:
    scans, labels = clinic()
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, progress=recorder)
    assert (len(cohort), len(cohort.patients)) == (32, 16)
    assert cohort.task.class_names == ("sick", "well")
    assert all(count["patients"] >= 2 for count in cohort.counts().values())
    assert recorder.messages[0] == "32 images of 16 patients; 0 images and files of 32 files in quarantine."
    assert recorder.messages[1].startswith("Positive class: 'well'")
    assert load_cohort(tmp_path / "cohort").instances == cohort.instances
    assert cohort.profile["config"]["size"] == 16


def test_same_key_gives_the_same_cohort(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    one, two = (ingest(scans, tmp_path / name, key=KEY, labels=labels, config=SMALL) for name in ("one", "two"))
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    other = ingest(scans, tmp_path / "three", key=bytes(32), labels=labels, config=SMALL)
    assert one.instances == two.instances
    assert not set(one.patients) & set(other.patients)


def test_processes_give_the_same_cohort(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    ingest(scans, tmp_path / "one", key=KEY, labels=labels, config=SMALL, jobs=1)
    ingest(scans, tmp_path / "two", key=KEY, labels=labels, config=SMALL, jobs=2)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


PLANTED = ("Zanzibar", "Quokkasson", "KH Hinterwald", "19470311", "20190923", "Dr Xylophon", "WQ77123", "ACC5551")


def test_no_identifier_survives(clinic: Clinic, tmp_path: Path, recorder: Recorder) -> None:
    scans, labels = clinic(
        PatientName="Quokkasson^Zanzibar",
        PatientBirthDate="19470311",
        StudyDate="20190923",
        InstitutionName="KH Hinterwald",
        ReferringPhysicianName="Dr Xylophon",
        AccessionNumber="ACC5551",
        ViewPosition="ZANZIBAR",
        BodyPartExamined="QUOKKASSON",
        ImageComments="Zanzibar Quokkasson",
        IssuerOfPatientID="WQ77123",
    )
    rng = np.random.default_rng(5)
    make_dicom(
        scans / "Quokkasson" / "Zanzibar.dcm",
        rng.integers(0, 256, (16, 16), dtype=np.uint8),
        PatientID="WQ77123",
        Modality="WQ77123",
        BurnedInAnnotation="YES",
    )
    (scans / "Zanzibar.txt").write_text("Quokkasson")
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, progress=recorder)
    output = all_bytes(tmp_path / "cohort") + "\n".join(recorder.messages).encode() + repr(cohort).encode()
    uids = [f"1.2.3.1{number:03d}" for number in range(32)] + ["1.2.4.1", "1.2.3.99"]
    for value in (*PLANTED, *uids, str(tmp_path), "scans"):
        for text in (value, value.upper(), value.lower()):
            for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
                assert text.encode(encoding) not in output, "a planted value survived"
    assert {instance.age_band for instance in cohort.instances} == {"70-79"}
    assert quarantine(cohort) == {"NO_LABEL": 1, "NOT_DICOM": 1}


def test_errors_carry_no_identifier(clinic: Clinic, tmp_path: Path) -> None:
    scans, _ = clinic(PatientName="Quokkasson")
    wrong = write_csv(
        tmp_path / "wrong.csv", [["PatientID", "label"], ["Quokkasson", "Zanzibar"], ["P3", "Zanzibar"]]
    )
    with pytest.raises(LabelError) as caught:
        ingest(scans, tmp_path / "cohort", key=KEY, labels=wrong, config=SMALL)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert not any(word in str(chain) for word in ("Quokkasson", "Zanzibar", "P3", "scans"))
        chain = chain.__cause__ or chain.__context__
    assert not (tmp_path / "cohort").exists()


def test_full_output_folder(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    with pytest.raises(OutputError):
        ingest(scans, tmp_path, key=KEY, labels=labels, config=SMALL)


def test_duplicates(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    first = (scans / "000.dcm").read_bytes()
    (scans / "copy.dcm").write_bytes(first)
    make_dicom(scans / "zz.dcm", np.zeros((9, 9), dtype=np.uint8), SOPInstanceUID="1.2.3.1000")
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL)
    assert quarantine(cohort) == {"DUP_SOP_SAME": 1, "DUP_SOP_DIFF": 1}
    assert len(cohort) == 32


def test_patient_with_two_birth_dates(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    pixels = np.full((9, 9), 7, dtype=np.uint8)
    make_dicom(scans / "000.dcm", pixels, PatientBirthDate="19700101", SOPInstanceUID="1.2.3.1000")
    make_dicom(scans / "001.dcm", pixels + 1, PatientBirthDate="19710101", SOPInstanceUID="1.2.3.1001")
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL)
    assert quarantine(cohort) == {"ID_CONFLICT": 2}
    assert len(cohort.patients) == 15


def test_missing_patients(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    for number in range(32):
        pixels = np.full((9, 9), number, dtype=np.uint8)
        make_dicom(scans / f"{number:03d}.dcm", pixels, PatientID="", StudyInstanceUID=f"1.5.{number // 2}")
    with pytest.raises(SourceError, match=r"32 ID_MISSING.*missing_patient"):
        ingest(scans, tmp_path / "no", key=KEY, labels=labels, config=SMALL)
    own = IngestConfig(size=16, burned_in="allow", missing_patient="own")
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=own)
    assert len(cohort.patients) == 16
    assert (tmp_path / "cohort" / "manifest.csv").read_text().count("patient_is_study") == 32


def test_unlabelled_images_and_rows_are_counted(clinic: Clinic, tmp_path: Path, recorder: Recorder) -> None:
    scans, labels = clinic()
    rows = [line.split(",") for line in labels.read_text().split()]
    rows[1][1] = ""
    write_csv(labels, [*rows[:-1], ["9.9", "well"]])
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, progress=recorder)
    assert quarantine(cohort) == {"NO_LABEL": 2}
    assert (
        recorder.messages[0]
        == "Warning: 1 of 32 label rows belong to no image that was kept (quarantined or missing): line 33."
    )


def test_private_notes(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    (scans / "deep").mkdir()
    (scans / "deep" / "Müller.txt").write_text("no image")
    notes = tmp_path / "notes.csv"
    ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, private_notes=notes)
    assert stat.S_IMODE(notes.stat().st_mode) == 0o600
    with notes.open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["ordinal", "frame", "code", "file"],
            ["32", "0", "NOT_DICOM", "deep/Müller.txt"],
        ]
    with pytest.raises(ConfigError, match="outside"):
        ingest(scans, tmp_path / "two", key=KEY, labels=labels, private_notes=tmp_path / "two" / "notes.csv")


def test_config_lists_every_problem() -> None:
    with pytest.raises(ConfigError, match=r"fit.*missing_patient.*size"):
        IngestConfig(size=3, fit="squeeze", missing_patient="maybe")


def test_labels_are_needed(clinic: Clinic, tmp_path: Path) -> None:
    scans, _ = clinic()
    with pytest.raises(SourceError, match="label table"):
        ingest(scans, tmp_path / "cohort", key=KEY)


def test_given_test_split(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    lines = labels.read_text().split()
    rows = [[*lines[0].split(","), "split"]]
    rows += [[*line.split(","), "test" if number < 7 else "val"] for number, line in enumerate(lines[1:])]
    cohort = ingest(scans, tmp_path / "cohort", key=KEY, labels=write_csv(labels, rows), config=SMALL)
    assert quarantine(cohort) == {"ID_CONFLICT": 1}
    assert cohort.counts()["test"]["images"] == 7


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [["file", "patient_id"]]
    for number in range(24):
        name = f"{'ill' if number % 2 else 'fit'}/{number}.png"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / "images" / name)
        rows.append([name, f"p{number % 12}"])
    table = write_csv(tmp_path / "patients.csv", rows)
    cohort = ingest(tmp_path / "images", tmp_path / "cohort", key=KEY, labels=table, config=SMALL)
    assert (len(cohort.patients), cohort.task.class_names) == (12, ("fit", "ill"))


def test_table_without_labels_leaves_the_rest_without_patient(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, label=np.arange(24) % 2)
    rows = [["index", "patient_id"], *([index, f"p{index}"] for index in range(20))]
    table = write_csv(tmp_path / "t.csv", rows)
    cohort = ingest(tmp_path / "a.npz", tmp_path / "one", key=KEY, labels=table, config=SMALL)
    assert quarantine(cohort) == {"ID_MISSING": 4}
    own = IngestConfig(size=16, burned_in="allow", missing_patient="own")
    assert len(ingest(tmp_path / "a.npz", tmp_path / "two", key=KEY, labels=table, config=own)) == 24


def test_npz_counts_within_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    rows: list[list[object]] = [["split", "index", "patient_id"]]
    for split, count in (("train", 30), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
        prefix = "t" if split == "test" else "p"
        rows += [[split, index, f"{prefix}{index}"] for index in range(count)]
    np.savez(tmp_path / "a.npz", **arrays)
    table = write_csv(tmp_path / "t.csv", rows)
    cohort = ingest(tmp_path / "a.npz", tmp_path / "cohort", key=KEY, labels=table, config=SMALL)
    assert len(cohort.patients) == 36
    assert cohort.counts()["test"]["patients"] == 6
    train = arrays["train_images"].astype(np.uint16) * 257
    stored = cohort.store.read(range(30))[:, 0]
    np.testing.assert_array_equal(stored, train)


def test_real_files_are_all_accounted_for(data: Path, tmp_path: Path) -> None:
    source = FolderSource(data / "dicom")
    names = [item.name for item in source.items()]
    rows = [["file", "label"], *([name, str(index % 2)] for index, name in enumerate(names))]
    table = write_csv(tmp_path / "t.csv", rows)
    fractions = IngestConfig(size=32, burned_in="allow", missing_patient="own")
    notes = tmp_path / "notes.csv"
    cohort = ingest(
        source, tmp_path / "cohort", key=KEY, labels=table, config=fractions, private_notes=notes, jobs=1
    )
    with (tmp_path / "cohort" / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ordinals = [int(row["ordinal"]) for row in rows]
    assert ordinals == sorted(ordinals)
    assert set(ordinals) == set(range(len(names)))
    assert sum(row["frame"] in ("", "1") for row in rows) == len(names)
    assert len(cohort) + sum(quarantine(cohort).values()) == len(rows)
    output = all_bytes(tmp_path / "cohort")
    for word in (b"CompressedSamples", b"Lestrade", b"Doe^", b"KAUFMAN", b"SIMPSON", b"16d7f894", b".dcm"):
        assert word not in output


def test_every_error_is_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"no")
    (tmp_path / "bad.zip").write_bytes(b"no")
    for name in ("empty", "bad.npz", "bad.zip", "absent", "absent.npz"):
        with pytest.raises(MedistillError):
            ingest(tmp_path / name, tmp_path / "cohort", key=KEY)
    assert not (tmp_path / "cohort").exists()
