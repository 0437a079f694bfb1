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
    read only if the file lies inside the folder.

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
    def _files(self) -> tuple[str, ...]:
        return scan(Path(self.path))

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per file."""
        root = Path(self.path)
        for ordinal, name in enumerate(self._files):
            yield Item(ordinal=ordinal, name=name, payload=root / name)

    @property
    def decode(self) -> Callable[[Path, Policy], Iterator[Decoded]]:
        """Reads one DICOM file."""
        return decode_dicom


def scan(folder: Path) -> tuple[str, ...]:
    """Files below a folder as paths relative to it, with forward slashes, sorted part by part.

    Raises:
        SourceError: If the folder does not exist or holds no file.
    """
    if not folder.is_dir():
        raise SourceError("The source folder does not exist, or is not a folder. Check the path.")
    root = folder.resolve()
    found = [
        name if where == str(folder) else f"{Path(where).relative_to(folder).as_posix()}/{name}"
        for where, _, names in os.walk(folder, followlinks=False)
        for name in names
        if _inside(Path(where) / name, root)
    ]
    if not found:
        raise SourceError("The source folder holds no file. Check the path.")
    return tuple(sorted(found, key=lambda name: name.split("/")))


def _inside(path: Path, root: Path) -> bool:
    """Whether a path is a regular file, and for a link, one inside the root."""
    try:
        return path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(root))
    except (OSError, RuntimeError):
        return False
