"""A medium with a DICOMDIR (PS3.10 8, PS3.3 F): the files it lists, then those it does not list."""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pydicom
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medistill.errors import SourceError
from medistill.ingest.decode import silence
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item
from medistill.ingest.sources.archive import escapes
from medistill.ingest.sources.folder import scan

MAX_BYTES = 1 << 26
_HEAD = 1024
_RECORDS = Tag("DirectoryRecordSequence")


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """Files of a medium: those listed, in the order of the records, then the others, sorted."""

    items: tuple[Item, ...] = field(repr=False)
    unlisted: int
    damaged: bool


@dataclass(frozen=True)
class DicomdirSource:
    """Files of a medium in the order of its DICOMDIR.

    The records are read one after the other, without following the offsets between them, so a circle or a damaged
    tree cannot catch the reader. Names are compared without regard to case, versions (``;1``) and final dots where
    no file has the exact name, as media are often copied so. Files that no record names follow, so that nothing is
    lost; where the DICOMDIR cannot be parsed, these are all files.

    Args:
        path: The DICOMDIR, or the folder that holds it.

    Raises:
        SourceError: When read, if there is no DICOMDIR or neither a file nor a record that names one.
    """

    path: Path
    keys: ClassVar[tuple[str, ...]] = ("sop", "file", "patient")

    @cached_property
    def _listing(self) -> _Listing:
        directory = find_dicomdir(Path(self.path))
        if directory is None:
            raise SourceError("Expected a DICOMDIR, or a folder that holds one. Check the path.")
        return _list(directory)

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    @property
    def unlisted(self) -> int:
        """Number of files that the DICOMDIR does not name."""
        return self._listing.unlisted

    @property
    def damaged(self) -> bool:
        """Whether the DICOMDIR could not be parsed, so that the folder was walked instead."""
        return self._listing.damaged

    def __len__(self) -> int:
        """Number of files, missing ones included."""
        return len(self._listing.items)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per file; a file that is missing or lies elsewhere is refused with a code."""
        yield from self._listing.items

    @property
    def decode(self) -> Callable[[Path, Policy], Iterator[Decoded]]:
        """Reads one DICOM file."""
        return decode_dicom


def find_dicomdir(path: Path) -> Path | None:
    """The DICOMDIR that a path is, or that lies directly in a folder, in any case."""
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    return next(
        (file for file in sorted(path.iterdir()) if _folded(file.name) == "dicomdir" and file.is_file()), None
    )


def _list(directory: Path) -> _Listing:
    folder = directory.parent
    try:
        files = {name: folder / name for name in scan(folder) if name != directory.name}
    except SourceError:  # a DICOMDIR that is itself a link to elsewhere
        files = {}
    folded: dict[str, str] = {}
    for name in files:
        folded.setdefault(_folded(name), name)
    references = _references(directory)
    items: list[Item] = []
    seen: set[str] = set()
    for asked in references or ():
        name = asked if asked in files else folded.get(_folded(asked), asked)
        if name not in seen:
            seen.add(name)
            items.append(_item(len(items), name, files.get(name), folder))
    others = [name for name in files if name not in seen]
    items += [Item(ordinal=len(items) + at, name=name, payload=files[name]) for at, name in enumerate(others)]
    if not items:
        raise SourceError("The DICOMDIR names no file, and there is none beside it.")
    return _Listing(items=tuple(items), unlisted=len(others), damaged=references is None)


def _item(ordinal: int, name: str, file: Path | None, folder: Path) -> Item:
    if file is not None:
        return Item(ordinal=ordinal, name=name, payload=file)
    if escapes(name) or _leads_away(folder, name):
        return Item(ordinal=ordinal, name=name, payload=None, refused="PATH_ESCAPE")
    detail = "named by the DICOMDIR but missing"
    return Item(ordinal=ordinal, name=name, payload=None, refused="READ_ERROR", refused_detail=detail)


def _leads_away(folder: Path, name: str) -> bool:
    """Whether a path goes through a link out of the folder."""
    try:
        return not (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _references(directory: Path) -> list[str] | None:
    """Relative path of every file that a record names; nothing where the DICOMDIR cannot be parsed."""
    try:
        if directory.stat().st_size > MAX_BYTES:
            return None
        content = directory.read_bytes()
        if DeflatedExplicitVRLittleEndian.encode() in content[:_HEAD]:  # not allowed for a DICOMDIR, PS3.10 8.6
            return None
        with silence():
            dataset = pydicom.dcmread(io.BytesIO(content), specific_tags=[_RECORDS])
            records: Any = dataset[_RECORDS].value
            named = [_reference(record.get("ReferencedFileID")) for record in records]
    except Exception:
        return None
    return [name for name in named if name]


def _reference(value: Any) -> str:
    """Relative path of a Referenced File ID (PS3.3 F.3.2.2); some writers put all of it into one component."""
    parts = [str(part) for part in value] if isinstance(value, (MultiValue, list)) else [str(value or "")]
    joined = "/".join(part.replace("\\", "/") for part in parts if part)
    return PurePosixPath(joined).as_posix() if joined else ""


def _folded(name: str) -> str:
    """A name as different systems copy it: case, version suffix and final dot left out of each component."""
    return "/".join(part.split(";")[0].rstrip(".").casefold() or part for part in name.split("/"))
