"""A folder of DICOM files, any depth, any extension."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from medistill.errors import SourceError
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item


@dataclass(frozen=True)
class FolderSource:
    """All files below a folder, sorted by path.

    Links to folders are not followed, so a loop or a link to another place cannot be entered; a link to a file is
    read only if the file lies inside the folder. Links that are not followed and what is no regular file are items
    too, refused with a code.

    Args:
        path: The folder.

    Raises:
        SourceError: When read, if the folder does not exist or holds no file.
    """

    path: Path
    keys: ClassVar[tuple[str, ...]] = ("sop", "file", "patient")

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    @cached_property
    def _entries(self) -> tuple[tuple[str, str, str], ...]:
        return _scan(Path(self.path))

    def __len__(self) -> int:
        """Number of files, and of links that are not followed."""
        return len(self._entries)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per file."""
        root = Path(self.path)
        for ordinal, (name, code, detail) in enumerate(self._entries):
            payload = None if code else root / name
            yield Item(ordinal=ordinal, name=name, payload=payload, refused=code, refused_detail=detail)

    @property
    def decode(self) -> Callable[[Path, Policy], Iterator[Decoded]]:
        """Reads one DICOM file."""
        return decode_dicom


def scan(folder: Path) -> tuple[str, ...]:
    """Regular files below a folder as paths relative to it, with forward slashes, sorted part by part.

    Raises:
        SourceError: If the folder does not exist or holds no file.
    """
    return tuple(name for name, code, _ in _scan(folder) if not code)


def _scan(folder: Path) -> tuple[tuple[str, str, str], ...]:
    """Names below a folder, each with a reason code and words where it is not read."""
    if not folder.is_dir():
        raise SourceError("The source folder does not exist, or is not a folder. Check the path.")
    root = folder.resolve()
    found = []
    for where, folders, names in os.walk(folder, followlinks=False):
        above = "" if where == str(folder) else f"{Path(where).relative_to(folder).as_posix()}/"
        found += [(f"{above}{name}", *_refusal(Path(where) / name, root)) for name in names]
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        found += [(f"{above}{name}", "PATH_ESCAPE", "a link to a folder, which is not followed") for name in links]
    if all(code for _, code, _ in found):
        raise SourceError("The source folder holds no file. Check the path.")
    return tuple(sorted(found, key=lambda entry: entry[0].split("/")))


def _refusal(path: Path, root: Path) -> tuple[str, str]:
    """Why a path is not read; empty for a regular file, and for a link to one inside the root."""
    try:
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            return "PATH_ESCAPE", "a link that leads outside the folder, or nowhere"
        return ("", "") if path.is_file() else ("READ_ERROR", "no regular file")
    except (OSError, RuntimeError):
        return "READ_ERROR", "the file system refuses it"
