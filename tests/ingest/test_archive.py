from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medistill.errors import RejectedFile, SourceError
from medistill.ingest.intensity import Policy
from medistill.ingest.quarantine import REASON_CODES
from medistill.ingest.reading import Item
from medistill.ingest.sources.archive import (
    ArchiveLimits,
    ArchiveSource,
    Member,
    escapes,
    holds_dicom,
    is_archive,
)
from tests.ingest.conftest import make_dicom

SMALL = ArchiveLimits(member_bytes=1 << 20, members=20, ratio=50, ratio_from=1 << 16)
TAR_KINDS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def make_zip(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_bytes(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if isinstance(content, bytes) else info.size
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def make_tar(path: Path, members: dict[str, Any], kind: str = "tar") -> Path:
    path.write_bytes(TAR_KINDS[kind](tar_bytes(members)))
    return path


def outcome(source: ArchiveSource) -> dict[str, bytes | tuple[str, str]]:
    """What every item is, after the checks that hold for any archive."""
    items = list(source.items())
    assert len(items) == len(source)
    assert [item.ordinal for item in items] == list(range(len(items)))
    assert [item.name for item in source.references()] == [item.name for item in items]
    assert all((item.payload is None) == bool(item.refused) for item in items)
    assert {item.refused for item in items} <= {"", *REASON_CODES}
    return {item.name: item.payload if not item.refused else (item.refused, item.refused_detail) for item in items}


def codes(source: ArchiveSource) -> dict[str, str]:
    return {name: value[0] if isinstance(value, tuple) else "" for name, value in outcome(source).items()}


def test_members_of_a_zip_come_sorted_with_their_bytes(tmp_path: Path) -> None:
    members = {"b/2": b"two", "a/1": noise(300_000), "c": b""}
    path = make_zip(tmp_path / "x.zip", members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("folder")
    found = outcome(ArchiveSource(path))
    assert found == members
    assert list(found) == sorted(members)


@pytest.mark.parametrize("kind", TAR_KINDS)
def test_members_of_a_tar_come_in_its_order(tmp_path: Path, kind: str) -> None:
    members = {"b/2": b"two", "a/1": noise(300_000), "c": b"", "aligned": noise(1024, 1), "d": noise(70_000, 2)}
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = make_tar(tmp_path / "x", {"folder": folder, **members}, kind)
    found = outcome(ArchiveSource(path))
    assert found == members
    assert list(found) == list(members)
    assert is_archive(path)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_references_read_the_same_in_any_order_and_process(tmp_path: Path, kind: str) -> None:
    members = {str(number): noise(5000 + 512 * number, number) for number in range(9)}
    path = tmp_path / "x"
    if kind == "zip":
        make_zip(path, members)
    else:
        make_tar(path, members, kind)
    references = pickle.loads(pickle.dumps(list(ArchiveSource(path).references())))
    for item in [*references[::-1], *references, references[4]]:
        assert isinstance(item.payload, Member)
        assert item.payload.read() == members[item.name]


def test_a_member_of_an_archive_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(RejectedFile) as caught:
        Member(archive=tmp_path / "gone", position=0, size=3).read()
    assert caught.value.code == "READ_ERROR"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_decoded_as_from_a_folder(tmp_path: Path, kind: str) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    make_dicom(tmp_path / "1.dcm", pixels)
    members = {"1.dcm": (tmp_path / "1.dcm").read_bytes(), "note": b"no image"}
    path = tmp_path / "x"
    make_zip(path, members) if kind == "zip" else make_tar(path, members, kind)
    source = ArchiveSource(path)
    first, second = (item.payload for item in source.items())
    decoded = list(source.decode(first, Policy.NONE))
    assert len(decoded) == 1
    np.testing.assert_array_equal(decoded[0].stored, pixels)
    with pytest.raises(RejectedFile) as caught:
        list(source.decode(second, Policy.NONE))
    assert caught.value.code == "NOT_DICOM"


ESCAPING = ["../up", "a/../../up", "/etc/x", "C:/x", "c:\\x", "..\\up", "\\\\server\\x"]


@pytest.mark.parametrize("name", ESCAPING)
def test_names_that_leave_the_archive(tmp_path: Path, name: str) -> None:
    assert escapes(name)
    members = {name: b"x", "good/..name": b"y"}
    assert list(codes(ArchiveSource(make_zip(tmp_path / "x.zip", members))).values()).count("PATH_ESCAPE") == 1
    found = codes(ArchiveSource(make_tar(tmp_path / "x.tar", members)))
    assert found == {name: "PATH_ESCAPE", "good/..name": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.zip"]


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "...", "1.2.840/x.dcm", "ab:c"])
def test_names_that_stay(name: str) -> None:
    assert not escapes(name)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/hostname"
    found = codes(ArchiveSource(make_tar(tmp_path / "x", {"link": info, "file": b"x"})))
    assert found == {"link": "PATH_ESCAPE", "file": ""}


def test_links_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/hostname")
    assert codes(ArchiveSource(path)) == {"link": "PATH_ESCAPE"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_inside_are_not_opened(tmp_path: Path, kind: str) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"a": b"x"}).read_bytes()
    disguised = inner.ljust(128, b"\0")[:128] + b"DICM" + inner[132:]
    members = {
        "a.zip": inner,
        "b.dcm": tar_bytes({"x": b"y"}),
        "c": gzip.compress(b"x"),
        "d": bz2.compress(b"x"),
        "e": lzma.compress(b"x"),
        "f": b"7z\xbc\xaf\x27\x1c\0",
        "polyglot.dcm": disguised,
    }
    path = tmp_path / "x"
    make_zip(path, members) if kind == "zip" else make_tar(path, members, kind)
    found = outcome(ArchiveSource(path))
    assert found.pop("polyglot.dcm") == disguised
    assert set(found.values()) == {("ZIP_LIMIT", "archives inside archives are not opened")}


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"bomb": bytes(1 << 18), "large": noise((1 << 20) + 1), "good": b"x"})
    found = outcome(ArchiveSource(path, SMALL))
    assert found == {
        "bomb": ("ZIP_LIMIT", "the archive is compressed too much"),
        "large": ("ZIP_LIMIT", "the member is too large"),
        "good": b"x",
    }


def patch_directory(path: Path, offset: int, form: str, value: int) -> None:
    """Change a field of the first record of the central directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, content.index(b"PK\x01\x02") + offset, value)
    path.write_bytes(content)


def test_a_bomb_that_declares_little_inflates_little(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"bomb": bytes(64 << 20)})
    patch_directory(path, 24, "<L", 1000)
    patch_directory(path, 16, "<L", zlib.crc32(bytes(1000)))
    reference = next(ArchiveSource(path, SMALL).references()).payload
    tracemalloc.start()
    try:
        assert reference.read() == bytes(1000)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_cannot_be_bounded(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a", b"x" * 100)
    assert codes(ArchiveSource(tmp_path / "x.zip")) == {"a": "READ_ERROR"}


def test_a_member_shorter_or_longer_than_declared(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a": noise(3000)})
    patch_directory(path, 24, "<L", 4000)
    assert outcome(ArchiveSource(path)) == {"a": ("TRUNCATED", "the member is shorter than declared")}
    patch_directory(path, 24, "<L", 2000)
    assert codes(ArchiveSource(path)) == {"a": "READ_ERROR"}


def test_the_ratio_of_the_whole_archive_counts(tmp_path: Path) -> None:
    members = {f"{number:02d}": bytes(1 << 16) for number in range(20)}
    found = codes(ArchiveSource(make_zip(tmp_path / "x.zip", members), SMALL))
    allowed = max(1 << 16, SMALL.ratio * (tmp_path / "x.zip").stat().st_size) // (1 << 16)
    assert list(found.values()) == [""] * int(allowed) + ["ZIP_LIMIT"] * (20 - int(allowed))


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.bz2"])
def test_a_compressed_tar_that_inflates_without_end(tmp_path: Path, kind: str) -> None:
    path = make_tar(tmp_path / "x", {"a": b"x", "bomb": bytes(1 << 20), "b": b"y"}, kind)
    found = codes(ArchiveSource(path, SMALL))
    assert found == {"a": "", "bomb": "ZIP_LIMIT", "rest of the archive": "ZIP_LIMIT"}


def test_an_oversized_header_of_a_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 16 << 20
    head = tar_bytes({"a": b"x"})[:1024]
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(head + info.tobuf() + bytes(16 << 20)))
    tracemalloc.start()
    try:
        found = codes(ArchiveSource(path))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found == {"a": "", "rest of the archive": "ZIP_LIMIT"}
    assert peak < 8 << 20


def test_a_sparse_member(tmp_path: Path) -> None:
    info = tarfile.TarInfo("holes")
    info.type = tarfile.GNUTYPE_SPARSE
    assert codes(ArchiveSource(make_tar(tmp_path / "x", {"h": info, "a": b"x"}))) == {
        "holes": "ZIP_LIMIT",
        "a": "",
    }


def test_a_member_of_negative_size_ends_the_archive(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.pax_headers = {"size": "-2048"}
    path = tmp_path / "x"
    path.write_bytes(tar_bytes({"a": b"x"})[:1024] + info.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    found = codes(ArchiveSource(path))
    assert found["a"] == ""
    assert found["rest of the archive"] == "READ_ERROR"


def test_too_many_members(tmp_path: Path) -> None:
    members = {str(number): b"x" for number in range(21)}
    with pytest.raises(SourceError, match="at most 20 members"):
        len(ArchiveSource(make_zip(tmp_path / "x.zip", members), SMALL))
    found = codes(ArchiveSource(make_tar(tmp_path / "x.tar", members), SMALL))
    assert Counter(found.values()) == {"": 20, "ZIP_LIMIT": 1}
    del members["20"]
    assert len(ArchiveSource(make_zip(tmp_path / "y.zip", members), SMALL)) == 20


def test_a_large_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    record = b"PK\x01\x02" + bytes(42)
    count = 200_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, count * len(record), 0, 0)
    (tmp_path / "x.zip").write_bytes(record * count + end)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="members"):
            len(ArchiveSource(tmp_path / "x.zip", SMALL))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_encrypted_members(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a": b"x", "b": b"y"})
    patch_directory(path, 8, "<H", 1)
    assert outcome(ArchiveSource(path)) == {"a": ("READ_ERROR", "the member is encrypted"), "b": b"y"}


def test_a_damaged_member_of_a_zip_costs_one(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a": noise(5000), "b": b"y"})
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    assert outcome(ArchiveSource(path)) == {"a": ("READ_ERROR", "the member is damaged"), "b": b"y"}


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a": noise(500), "b": noise(600, 1)})
    content = path.read_bytes()
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 4)
    shared = bytearray(content)
    shared[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(shared)
    assert codes(ArchiveSource(path))["b"] == "READ_ERROR"


@pytest.mark.parametrize("kind", TAR_KINDS)
def test_a_cut_tar(tmp_path: Path, kind: str) -> None:
    members = {"a": noise(3000), "b": noise(200_000, 1), "c": b"z"}
    whole = make_tar(tmp_path / "x", members, kind).read_bytes()
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2])
    if kind == "tar.bz2":  # nothing of its only block can be read
        with pytest.raises(SourceError):
            len(ArchiveSource(tmp_path / "x"))
        return
    found = codes(ArchiveSource(tmp_path / "x"))
    assert found == {"a": "", "b": "TRUNCATED", "rest of the archive": "TRUNCATED"}


def test_a_tar_cut_between_members(tmp_path: Path) -> None:
    whole = tar_bytes({"a": b"x", "b": b"y"})
    (tmp_path / "x").write_bytes(whole[:1024])
    assert codes(ArchiveSource(tmp_path / "x")) == {"a": "", "rest of the archive": "TRUNCATED"}


def test_a_damaged_header_within_a_tar(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes({"a": b"x", "b": b"y"}))
    whole[1024 + 150] ^= 255
    (tmp_path / "x").write_bytes(whole)
    assert codes(ArchiveSource(tmp_path / "x")) == {"a": "", "rest of the archive": "READ_ERROR"}


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04 cut", gzip.compress(b"no tar", mtime=0), bytes(10240), b"\x1f\x8b"]
)
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SourceError):
        len(ArchiveSource(tmp_path / "x"))
    with pytest.raises(SourceError):
        list(ArchiveSource(tmp_path / "x").items())
    assert not holds_dicom(tmp_path / "x")


def test_an_archive_that_is_empty_or_absent(tmp_path: Path) -> None:
    for path in (make_zip(tmp_path / "x.zip", {}), tmp_path / "absent"):
        with pytest.raises(SourceError):
            len(ArchiveSource(path))
    assert not is_archive(tmp_path / "absent")
    assert not holds_dicom(tmp_path / "absent")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_are_two_items(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    assert [item.payload for item in ArchiveSource(tmp_path / "x.zip").items()] == [b"1", b"2"]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.dcm")
    assert outcome(ArchiveSource(make_tar(tmp_path / "x.tar", {odd: b"x"}))) == {odd: b"x"}
    path = make_zip(tmp_path / "x.zip", {"aaaa": b"x"})
    path.write_bytes(path.read_bytes().replace(b"aaaa", b"a\xff\xfea"))
    assert list(outcome(ArchiveSource(path)).values()) == [b"x"]


def test_names_do_not_show(tmp_path: Path) -> None:
    item = next(ArchiveSource(make_zip(tmp_path / "secret.zip", {"Doe^Jane": b"x"})).references())
    assert "Doe" not in repr(item)
    assert "secret" not in repr(item.payload)


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"a": b"x"}).read_bytes()
    (tmp_path / "x").write_bytes(tar_bytes({"b": inner}))
    assert list(outcome(ArchiveSource(tmp_path / "x"))) == ["b"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.xz"])
def test_dicom_is_recognised(tmp_path: Path, kind: str) -> None:
    make = make_zip if kind == "zip" else lambda path, members: make_tar(path, members, kind)
    plain = {f"{number}.png": noise(200, number) for number in range(3)}
    assert not holds_dicom(make(tmp_path / "x", plain))
    assert holds_dicom(make(tmp_path / "y", {**plain, "scan": bytes(128) + b"DICM" + noise(10)}))
    assert not holds_dicom(make(tmp_path / "z", {"short": bytes(128) + b"DI"}))


def test_one_member_is_held_at_a_time(tmp_path: Path) -> None:
    size = 1 << 20
    stored = {str(number): noise(size, number) for number in range(8)}
    for path in (make_zip(tmp_path / "x.zip", stored), make_tar(tmp_path / "x.tgz", stored, "tar.gz")):
        tracemalloc.start()
        try:
            total = sum(len(item.payload) for item in ArchiveSource(path).items())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert total == 8 * size
        assert peak < 4 * size  # pieces, the joined member, and the one before it


def test_a_tar_forgets_the_members_it_passed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x", {str(number): b"x" for number in range(1500)})
    tracemalloc.start()
    try:
        count = sum(1 for _ in ArchiveSource(path).items())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1500
    assert peak < 3 << 19


def read_all(path: Path) -> list[Item] | None:
    """Items, or nothing for a source error; anything else raised fails the test."""
    try:
        items = list(ArchiveSource(path, SMALL).items())
    except RejectedFile:
        raise AssertionError("a rejection must become an item") from None
    except SourceError:
        return None
    assert len(ArchiveSource(path, SMALL)) == len(items)
    return items


MEMBERS = {"a": b"x" * 700, "b/c": noise(900), "d": b""}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("wholes")
    tars = {kind: compress(tar_bytes(dict(MEMBERS))) for kind, compress in TAR_KINDS.items()}
    return {"zip": make_zip(folder / "x.zip", MEMBERS).read_bytes(), **tars}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["zip", *TAR_KINDS]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    keep=st.floats(0, 1),
)
def test_damage_never_breaks_the_reader(
    tmp_path: Path, wholes: dict[str, bytes], kind: str, edits: list[tuple[float, int]], keep: float
) -> None:
    content = bytearray(wholes[kind])
    for where, value in edits:
        content[int(where * len(content))] = value
    content = content[: max(1, round(len(content) * min(1, keep * 1.5)))]
    path = tmp_path / "damaged"
    path.write_bytes(content)
    items = read_all(path)
    if content == wholes[kind]:
        assert items is not None
        assert {item.name: item.payload for item in items} == MEMBERS
