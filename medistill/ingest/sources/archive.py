"""ZIP and TAR archives of DICOM files, read member by member; nothing is unpacked to disk.

What an archive declares is not trusted: sizes and ratios are checked against the directory and again while bytes
are inflated, reads of the archive's own headers are bounded, and a member is a place in the file, never a path to
write to.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import os
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from medistill.errors import RejectedFile, SourceError
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item

_LOOK_AT = 50
_PIECE = 1 << 16
_HEADER_AT_MOST = 1 << 22
_HEAD = 512
_MAGIC = slice(128, 132)
_TAR_MAGIC = slice(257, 262)
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_NESTED = (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf\x27\x1c", b"Rar!", *_COMPRESSED)
_DRIVE = re.compile(r"^[A-Za-z]:")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
_SPECIAL = ("PATH_ESCAPE", "the member is a link or a device")
_BOMB = ("ZIP_LIMIT", "the archive is compressed too much")


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may ask for.

    Args:
        member_bytes: Largest member after inflation.
        members: Largest number of members.
        ratio: Largest inflated size over stored size, of one member and of the whole archive.
        ratio_from: Inflated bytes below which the ratio does not count; black images compress well.
    """

    member_bytes: int = 1 << 30
    members: int = 1 << 20
    ratio: float = 200.0
    ratio_from: int = 1 << 26

    def allow(self, inflated: int, stored: int) -> bool:
        """Whether so many bytes may come out of so many."""
        return inflated <= max(self.ratio_from, self.ratio * stored)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Reference to one file of an archive, picklable and small.

    Args:
        archive: The archive.
        position: Place in the directory of a ZIP, or offset of the data in a TAR.
        size: Declared size.
        limits: What the archive may ask for.
    """

    archive: Path = field(repr=False)
    position: int
    size: int
    limits: ArchiveLimits = field(default_factory=ArchiveLimits, repr=False)

    def read(self) -> bytes:
        """Content of the member.

        Members of one compressed TAR are best read in the order of their positions: going back means inflating it
        again from its start.

        Raises:
            RejectedFile: READ_ERROR, TRUNCATED or ZIP_LIMIT.
        """
        return self.head(self.size)

    def head(self, size: int) -> bytes:
        """First bytes of the member, at most ``size``.

        Raises:
            RejectedFile: As :meth:`read`.
        """
        try:
            reader = _shared_reader(self.archive, self.limits, os.getpid())
            return reader.read(self.position, min(size, self.size))
        except SourceError as error:
            if isinstance(error, RejectedFile):
                raise
            raise RejectedFile("READ_ERROR", "the archive can no longer be opened") from None


@dataclass(frozen=True)
class ArchiveSource:
    """All regular members of a ``.zip``, ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file of DICOM files.

    The members of a ZIP come sorted by name, those of a TAR in the order of the file. Members that point outside
    the archive, links, devices, archives inside the archive, encrypted and damaged members are items too, refused
    with a code. Where a TAR breaks off, one more refused item stands for the rest.

    Args:
        path: The archive.
        limits: What it may ask for.

    Raises:
        SourceError: When read, if the archive as a whole cannot be opened, is empty, or is a ZIP of more members
            than allowed.
    """

    path: Path
    limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    keys: ClassVar[tuple[str, ...]] = ("sop", "file", "patient")

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._listed())

    def __len__(self) -> int:
        """Number of members without directories; for a compressed TAR this reads it once."""
        return self._count

    def references(self) -> Iterator[Item]:
        """One item per member, whose payload is a :class:`Member`; no content is read."""
        path = Path(self.path)
        for ordinal, (entry, _) in enumerate(self._listed()):
            member = Member(archive=path, position=entry.position, size=entry.size, limits=self.limits)
            yield entry.item(ordinal, None if entry.code else member)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per member, with its bytes; one member is held at a time."""
        for ordinal, (entry, reader) in enumerate(self._listed()):
            try:
                yield entry.item(ordinal, None if entry.code else reader.read(entry.position, entry.size))
            except RejectedFile as rejection:
                yield replace(entry, code=rejection.code, detail=rejection.detail).item(ordinal, None)

    def _listed(self) -> Iterator[tuple[_Entry, _ZipReader | _TarReader]]:
        empty = True
        with closing(_open(Path(self.path), self.limits)) as reader:
            for entry in reader.entries():
                empty = False
                yield entry, reader
        if empty:
            raise SourceError("The archive holds no file. Check the path.")

    @property
    def decode(self) -> Callable[[bytes, Policy], Iterator[Decoded]]:
        """Reads one DICOM file."""
        return decode_dicom


def is_archive(path: Path) -> bool:
    """Whether a file begins like a TAR or compressed file, or is a ZIP."""
    try:
        head = _head(path)
    except OSError:
        return False
    return _is_tar(head) or zipfile.is_zipfile(path)


def holds_dicom(path: Path) -> bool:
    """Whether one of the first members of an archive has the DICOM mark (PS3.10 7.1).

    Args:
        path: Any file; one that is no readable archive holds no DICOM.
    """
    try:
        with closing(_open(path, ArchiveLimits())) as reader:
            return any(_is_dicom(reader, entry) for entry in islice(reader.entries(), _LOOK_AT))
    except SourceError:
        return False


def escapes(name: str) -> bool:
    """Whether a name points outside the folder it belongs to: absolute, with a drive, or with ``..``."""
    slashed = name.replace("\\", "/")
    return slashed.startswith("/") or bool(_DRIVE.match(slashed)) or ".." in PurePosixPath(slashed).parts


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One member as listed."""

    name: str
    position: int = 0
    size: int = 0
    code: str = ""
    detail: str = ""

    def item(self, ordinal: int, payload: Member | bytes | None) -> Item:
        return Item(
            ordinal=ordinal, name=self.name, payload=payload, refused=self.code, refused_detail=self.detail
        )


class _ZipReader:
    """Members of a ZIP archive in any order."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        _check_directory(path, limits)
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception:
            raise SourceError("The archive cannot be opened: it is damaged or incomplete.") from None
        self._infos = self._archive.infolist()
        self._limits = limits
        self._stored = path.stat().st_size

    def close(self) -> None:
        if hasattr(self, "_archive"):
            self._archive.close()

    __del__ = close

    def entries(self) -> Iterator[_Entry]:
        order = sorted(range(len(self._infos)), key=lambda index: (self._infos[index].filename, index))
        total = 0
        for index in order:
            info = self._infos[index]
            if not info.is_dir():
                code, detail = self._verdict(info, total)
                total += 0 if code else info.file_size
                yield _Entry(name=info.filename, position=index, size=info.file_size, code=code, detail=detail)

    def _verdict(self, info: zipfile.ZipInfo, before: int) -> tuple[str, str]:
        limits = self._limits
        checks = (
            (stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG), *_SPECIAL),
            (escapes(info.filename), "PATH_ESCAPE", ""),
            (info.flag_bits & _ENCRYPTED, "READ_ERROR", "the member is encrypted"),
            # zipfile inflates other methods without a limit
            (info.compress_type not in _METHODS, "READ_ERROR", "expected a member that is stored or deflated"),
            (info.file_size > limits.member_bytes, "ZIP_LIMIT", "the member is too large"),
            (not limits.allow(info.file_size, info.compress_size), *_BOMB),
            (not limits.allow(before + info.file_size, self._stored), *_BOMB),
        )
        return next(((code, detail) for wrong, code, detail in checks if wrong), ("", ""))

    def read(self, position: int, size: int) -> bytes:
        info = self._infos[position]
        try:
            with self._archive.open(info) as file:
                content = _drain(file, size)
        except EOFError:
            raise RejectedFile("TRUNCATED", "the archive ends within the member") from None
        except MemoryError:
            raise RejectedFile("OOM_LIMIT") from None
        except Exception:  # damaged streams, overlapping members, checksums
            raise RejectedFile("READ_ERROR", "the member is damaged") from None
        if len(content) < size:
            raise RejectedFile("TRUNCATED", "the member is shorter than declared")
        return _no_archive(content)


class _TooMuchError(Exception):
    """More came out of the archive, or was asked for at once, than is allowed."""


class _Forward:
    """What :class:`tarfile.TarFile` needs of a file, with bounded reads; compressed files only go forwards."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        head = _head(path)
        opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
        self._file: Any = opener(path) if opener else path.open("rb")
        self._plain = opener is None
        self._limits = limits
        self._stored = path.stat().st_size
        self._position = 0
        self._failure: Exception | None = None
        self.last = b""

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._position

    def rewind(self) -> None:
        self._file.seek(0)
        self._position, self._failure = 0, None

    def seek(self, position: int) -> None:
        if position < self._position:  # a member of negative size would lead tarfile round in circles
            raise tarfile.StreamError
        if self._plain:
            self._position = self._file.seek(position)
        while self._position < position and self.read(min(_PIECE, position - self._position)):
            pass

    def read(self, size: int) -> bytes:
        if self._failure:
            raise self._failure
        try:
            if not 0 <= size <= _HEADER_AT_MOST:
                raise _TooMuchError
            self.last = self._file.read(size)
            self._position += len(self.last)
            if not self._plain and not self._limits.allow(self._position, self._stored):
                raise _TooMuchError
        except Exception as error:
            self._failure = error  # a decompressor is in no state to go on
            raise
        return self.last


class _TarReader:
    """Members of a TAR archive, one after the other."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._stream = _Forward(path, limits)
        try:
            self._archive = tarfile.TarFile(fileobj=self._stream, mode="r")  # type: ignore[arg-type]
        except Exception:
            self._stream.close()
            raise SourceError("The source is no readable ZIP or TAR archive. Check the path.") from None

    def close(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()

    __del__ = close

    def entries(self) -> Iterator[_Entry]:
        for _ in range(self._limits.members):
            try:
                info = self._archive.next()
            except Exception as error:
                yield _rest(*_failure(error))
                return
            if info is None:
                yield from self._end()
                return
            self._archive.members = []  # type: ignore[attr-defined] # it would keep them all
            if not info.isdir():
                code, detail = self._verdict(info)
                yield _Entry(name=info.name, position=info.offset_data, size=info.size, code=code, detail=detail)
        yield _rest("ZIP_LIMIT", "the archive has too many members")

    def _end(self) -> Iterator[_Entry]:
        """An end without end mark is a cut; a header that is none hides what follows."""
        if len(self._stream.last) < tarfile.BLOCKSIZE:
            yield _rest("TRUNCATED", "the archive ends without its end mark")
        elif self._stream.last.strip(b"\0"):
            yield _rest("READ_ERROR", "the rest of the archive is damaged")

    def _verdict(self, info: tarfile.TarInfo) -> tuple[str, str]:
        if not info.isreg():
            return _SPECIAL
        if escapes(info.name):
            return "PATH_ESCAPE", ""
        if info.issparse():
            return "ZIP_LIMIT", "sparse members are not opened"
        if info.size > self._limits.member_bytes:
            return "ZIP_LIMIT", "the member is too large"
        return "", ""

    def read(self, position: int, size: int) -> bytes:
        try:
            if position < self._stream.tell():
                self._stream.rewind()
            self._stream.seek(position)
            content = _drain(self._stream, size)
        except MemoryError:
            raise RejectedFile("OOM_LIMIT") from None
        except Exception as error:
            raise RejectedFile(*_failure(error)) from None
        if len(content) < size:
            raise RejectedFile("TRUNCATED", "the archive ends within the member")
        return _no_archive(content)


def _failure(error: Exception) -> tuple[str, str]:
    if isinstance(error, _TooMuchError):
        return "ZIP_LIMIT", "the archive is compressed too much, or has an oversized header"
    if isinstance(error, EOFError) or "unexpected end" in str(error):
        return "TRUNCATED", "the archive breaks off"
    return "READ_ERROR", "the rest of the archive is damaged"


def _rest(code: str, detail: str) -> _Entry:
    return _Entry(name="rest of the archive", code=code, detail=detail)


def _open(path: Path, limits: ArchiveLimits) -> _ZipReader | _TarReader:
    try:
        if not _is_tar(_head(path)) and zipfile.is_zipfile(path):
            return _ZipReader(path, limits)
        return _TarReader(path, limits)
    except OSError:
        raise SourceError("The archive cannot be read. Check the path and its permissions.") from None


@lru_cache(maxsize=1)
def _shared_reader(path: Path, limits: ArchiveLimits, process: int) -> _ZipReader | _TarReader:
    """The archive this process reads from; a forked child must not share the file position of its parent."""
    del process
    return _open(path, limits)


def _check_directory(path: Path, limits: ArchiveLimits) -> None:
    """Count the records of a ZIP's central directory before an object is made for each (APPNOTE 4.3)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"PK\x05\x06")
        if end < 0 or end + 22 > len(content):
            raise SourceError("The archive cannot be opened: it is damaged or incomplete.")
        size = struct.unpack_from("<L", content, end + 12)[0]
        if end >= 76 and content[end - 20 : end - 16] == b"PK\x06\x07":
            end -= 76
            size = struct.unpack_from("<Q", content, end + 40)[0]
        at, count = max(0, end - size), 0
        while count <= limits.members and (at := content.find(b"PK\x01\x02", at, end)) >= 0:
            at, count = at + 4, count + 1
    if count > limits.members:
        raise SourceError(f"Expected an archive of at most {limits.members} members; found more. Divide it.")


def _drain(file: Any, size: int) -> bytes:
    """Read a member piece by piece, so that what it declares cannot make a large allocation."""
    parts, left = [], size
    while left and (part := file.read(min(_PIECE, left))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _no_archive(content: bytes) -> bytes:
    """Content that is no archive itself, unless it is DICOM with a preamble that looks like one."""
    if content[_MAGIC] != b"DICM" and (content.startswith(_NESTED) or content[_TAR_MAGIC] == b"ustar"):
        raise RejectedFile("ZIP_LIMIT", "archives inside archives are not opened")
    return content


def _is_dicom(reader: _ZipReader | _TarReader, entry: _Entry) -> bool:
    try:
        return not entry.code and reader.read(entry.position, min(entry.size, _HEAD))[_MAGIC] == b"DICM"
    except RejectedFile:
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_tar(head: bytes) -> bool:
    return head[_TAR_MAGIC] == b"ustar" or head.startswith(tuple(_COMPRESSED))
