from __future__ import annotations

import gc
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from medistill.errors import SourceError
from medistill.ingest.decode import silence
from medistill.ingest.intensity import Policy
from medistill.ingest.sources import dicomdir
from medistill.ingest.sources.dicomdir import DicomdirSource, find_dicomdir
from tests.ingest.conftest import make_dicom

PYDICOM = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests"
VARIANTS = ["DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-implicit", "DICOMDIR-nooffset", "DICOMDIR-nopatient"]


def write_directory(folder: Path, names: list[object], syntax: str = ExplicitVRLittleEndian) -> Path:
    """A DICOMDIR with one record per name; no offsets are set."""
    with silence():
        records = []
        for name in names:
            record = Dataset()
            record.OffsetOfTheNextDirectoryRecord = 0
            record.RecordInUseFlag = 0xFFFF
            record.DirectoryRecordType = "IMAGE"
            record.ReferencedFileID = name
            records.append(record)
        dataset = Dataset()
        dataset.FileSetID = ""
        dataset.DirectoryRecordSequence = Sequence(records)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder


def pydicom_files(path: Path) -> set[Path]:
    with warnings.catch_warnings():  # a file set leaves temporary folders behind
        warnings.simplefilter("ignore", ResourceWarning)
        found = {Path(instance.path).resolve() for instance in FileSet(path)}
        gc.collect()
    return found


def names(source: DicomdirSource) -> list[str]:
    items = list(source.items())
    assert len(items) == len(source)
    assert [item.ordinal for item in items] == list(range(len(items)))
    return [item.name for item in items]


def refusals(source: DicomdirSource) -> dict[str, str]:
    assert all((item.payload is None) == bool(item.refused) for item in source.items())
    return {item.name: item.refused for item in source.items()}


@pytest.mark.parametrize("variant", ["DICOMDIR", "TINY_ALPHA/DICOMDIR"])
def test_files_are_those_pydicom_finds(variant: str) -> None:
    path = PYDICOM / variant
    expected = pydicom_files(path)
    source = DicomdirSource(path)
    found = [item.payload.resolve() for item in source.items()][: len(source) - source.unlisted]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert not source.damaged


def test_the_shared_tree(data: Path) -> None:
    folder = data / "dicom" / "multi_patient"
    source = DicomdirSource(folder)
    assert {item.payload.resolve() for item in source.items()} == pydicom_files(folder / "DICOMDIR")
    assert (len(source), source.unlisted, source.damaged) == (31, 0, False)
    decoded = [image for item in source.items() for image in source.decode(item.payload, Policy.NONE)]
    patients = Counter(image.header.patient_id for image in decoded)
    assert sum(patients.values()) == 31
    assert len(patients) == 2


@pytest.mark.parametrize("variant", ["DICOMDIR-nooffset", "DICOMDIR-nopatient"])
def test_missing_files_are_accounted_for(data: Path, tmp_path: Path, variant: str) -> None:
    shutil.copy(data / "dicom" / "odd" / variant, tmp_path / "DICOMDIR")
    source = DicomdirSource(tmp_path)
    items = list(source.items())
    assert len(items) == 31
    assert {(item.refused, item.refused_detail) for item in items} == {
        ("READ_ERROR", "named by the DICOMDIR but missing")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_encoding_and_damaged_tree_lists_the_same(tmp_path: Path, variant: str) -> None:
    shutil.copytree(PYDICOM / "98892003", tmp_path / "98892003")
    shutil.copy(PYDICOM / variant, tmp_path / "DICOMDIR")
    source = DicomdirSource(tmp_path)
    found = refusals(source)
    present = {name for name, code in found.items() if not code}
    assert present == {file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("98892003/*/*")}
    assert Counter(found.values()) == {"": len(present), "READ_ERROR": 31 - len(present)}
    assert source.unlisted == 0


def test_listed_first_then_the_others(tmp_path: Path) -> None:
    for name in ("z", "b", "sub/a", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = DicomdirSource(write_directory(tmp_path, ["z", ["sub", "a"], "z"]))
    assert names(source) == ["z", "sub/a", "b", "c"]
    assert source.unlisted == 2
    assert names(source) == names(DicomdirSource(tmp_path / "DICOMDIR"))


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        (["IMAGES", "IM1"], "images/im1"),
        (["images", "im1"], "IMAGES/IM1"),
        (["IMAGES", "IM1"], "IMAGES/IM1.;1"),
        (["IMAGES", "IM1;1"], "IMAGES/IM1"),
        ("IMAGES/IM1", "IMAGES/IM1"),
        (["", "IMAGES", "IM1"], "IMAGES/IM1"),
        (["IMAGES", ".", "IM1"], "IMAGES/IM1"),
    ],
)
def test_names_as_media_are_copied(tmp_path: Path, listed: object, stored: str) -> None:
    file = tmp_path / stored
    file.parent.mkdir()
    file.write_bytes(b"x")
    source = DicomdirSource(write_directory(tmp_path, [listed]))
    assert [item.payload for item in source.items()] == [file]
    assert source.unlisted == 0


def test_the_exact_name_comes_before_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    try:
        (tmp_path / "A").open("xb").close()
    except FileExistsError:
        pytest.skip("this file system ignores case")
    assert names(DicomdirSource(write_directory(tmp_path, ["a", "A"]))) == ["a", "A"]


@pytest.mark.parametrize("name", [["..", "up"], ["A", "..", "..", "up"], "/etc/hostname", "C:/up", ["C:", "up"]])
def test_references_that_leave_the_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "up").write_bytes(b"secret")
    (tmp_path / "medium").mkdir()
    source = DicomdirSource(write_directory(tmp_path / "medium", [name]))
    assert list(refusals(source).values()) == ["PATH_ESCAPE"]


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"secret")
    (tmp_path / "medium").mkdir()
    (tmp_path / "medium" / "LINK").symlink_to(tmp_path / "up")
    (tmp_path / "medium" / "AWAY").symlink_to(tmp_path)
    (tmp_path / "medium" / "LOOP").symlink_to(tmp_path / "medium" / "LOOP")
    source = DicomdirSource(write_directory(tmp_path / "medium", ["LINK", ["AWAY", "up"], "LOOP", "A\0B"]))
    assert list(refusals(source).values()) == ["PATH_ESCAPE", "PATH_ESCAPE", "READ_ERROR", "READ_ERROR"]


def nested(depth: int) -> bytes:
    """The directory sequence with empty sequences of undefined length, one in the other."""
    opening = b"\x04\x00\x20\x12SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return opening * depth


def test_a_damaged_directory_means_walking_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dicom(tmp_path / "A" / "1.dcm", np.zeros((4, 4), np.uint8))
    whole = (write_directory(tmp_path, [["A", "1.dcm"]]) / "DICOMDIR").read_bytes()
    meta = whole[: whole.index(b"\x04\x00\x30\x11")] if b"\x04\x00\x30\x11" in whole else whole[:300]
    for content in (b"", b"text", whole[:200], meta + nested(3000), whole[:132]):
        (tmp_path / "DICOMDIR").write_bytes(content)
        source = DicomdirSource(tmp_path)
        assert (names(source), source.damaged, source.unlisted) == (["A/1.dcm"], True, 1)
    write_directory(tmp_path, [["A", "1.dcm"]], DeflatedExplicitVRLittleEndian)
    assert DicomdirSource(tmp_path).damaged
    (tmp_path / "DICOMDIR").write_bytes(whole)
    assert not DicomdirSource(tmp_path).damaged
    monkeypatch.setattr(dicomdir, "MAX_BYTES", 100)
    assert DicomdirSource(tmp_path).damaged


def test_offsets_in_a_circle_do_not_catch_the_reader(tmp_path: Path) -> None:
    shutil.copytree(PYDICOM / "77654033", tmp_path / "77654033")
    dataset = pydicom.dcmread(PYDICOM / "DICOMDIR")
    first = dataset.DirectoryRecordSequence[0].seq_item_tell
    for record in dataset.DirectoryRecordSequence:
        record.OffsetOfTheNextDirectoryRecord = first
        record.OffsetOfReferencedLowerLevelDirectoryEntity = first
    dataset.save_as(tmp_path / "DICOMDIR")
    assert len(DicomdirSource(tmp_path)) == 31


def test_where_there_is_no_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError):
            len(DicomdirSource(path))
        assert find_dicomdir(path) is None
    with pytest.raises(SourceError, match="names no file"):
        len(DicomdirSource(write_directory(tmp_path, [])))


def test_the_directory_is_found_in_any_case(tmp_path: Path) -> None:
    write_directory(tmp_path, ["A"])
    (tmp_path / "DICOMDIR").rename(tmp_path / "dicomdir.;1")
    assert find_dicomdir(tmp_path) == tmp_path / "dicomdir.;1"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6))
def test_damage_never_breaks_the_reader(tmp_path: Path, edits: list[tuple[float, int]]) -> None:
    (tmp_path / "A").write_bytes(b"x")
    (tmp_path / "B").write_bytes(b"x")
    content = bytearray((write_directory(tmp_path, ["A", ["SUB", "IM1"], ["..", "X"]]) / "DICOMDIR").read_bytes())
    for where, value in edits:
        content[int(where * len(content))] = value
    (tmp_path / "DICOMDIR").write_bytes(content)
    found = refusals(DicomdirSource(tmp_path))
    assert {name for name, code in found.items() if not code} == {"A", "B"}
    assert set(found.values()) <= {"", "READ_ERROR", "PATH_ESCAPE"}
