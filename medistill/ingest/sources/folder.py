"""A folder of DICOM files, any depth, any extension."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from medistill.errors import SourceError
from medistill.ingest.decode import is_colour, read_dataset, read_pixels
from medistill.ingest.headers import read_header, read_presentation
from medistill.ingest.intensity import PERCENTILES, Policy, normalise, stretch
from medistill.ingest.reading import Decoded, Item


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
    def _files(self) -> tuple[Path, ...]:
        return scan(Path(self.path))

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def items(self) -> Iterator[Item]:
        """One item per file."""
        for ordinal, file in enumerate(self._files):
            yield Item(ordinal=ordinal, name=file.relative_to(self.path).as_posix(), payload=file)

    @property
    def decode(self) -> Callable[[Path, Policy], Decoded]:
        """Reads one DICOM file."""
        return decode_dicom


def scan(folder: Path) -> tuple[Path, ...]:
    """Files below a folder, sorted.

    Raises:
        SourceError: If the folder does not exist or holds no file.
    """
    if not folder.is_dir():
        raise SourceError("The source folder does not exist, or is not a folder. Check the path.")
    root = folder.resolve()
    found = [
        Path(where) / name
        for where, _, names in os.walk(folder, followlinks=False)
        for name in names
        if _inside(Path(where) / name, root)
    ]
    if not found:
        raise SourceError("The source folder holds no file. Check the path.")
    return tuple(sorted(found))


def _inside(path: Path, root: Path) -> bool:
    """Whether a path is a regular file, and for a link, one inside the root."""
    try:
        return path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(root))
    except (OSError, RuntimeError):
        return False


def decode_dicom(path: Path, policy: Policy) -> Decoded:
    """Read one DICOM file.

    Raises:
        RejectedFile: If the file is not a readable grey or colour image of one frame.
    """
    dataset = read_dataset(path)
    stored = read_pixels(dataset)
    header = read_header(dataset)
    if is_colour(dataset):
        grey = stored.astype(np.float32, copy=False)
        if policy is Policy.PERCENTILE:
            low, high = np.percentile(grey, PERCENTILES)
            grey = stretch(grey, float(low), float(high))
        return Decoded(grey=grey, header=header, flags=("colour",))
    presentation = read_presentation(dataset)
    flags = ("invalid_window",) if presentation.invalid_window else ()
    return Decoded(grey=normalise(stored, presentation, policy), header=header, flags=flags)
