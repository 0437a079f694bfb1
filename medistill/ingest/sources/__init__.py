"""Where images come from; one file per kind of source."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from medistill.errors import SourceError
from medistill.ingest.reading import Source
from medistill.ingest.sources.folder import FolderSource, scan
from medistill.ingest.sources.image_folder import EXTENSIONS, ImageFolderSource
from medistill.ingest.sources.npz import NpzSource

__all__ = ["FolderSource", "ImageFolderSource", "NpzSource", "source_for"]

_LOOK_AT = 50


def source_for(path: Path) -> Source:
    """Choose the source that fits a path.

    A ``.npz`` file is read as arrays, a ``.zip`` file as images, a folder as images if most of its first files
    look like images by their extension, and as DICOM otherwise.

    Raises:
        SourceError: If nothing fits.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path)
    if suffix == ".zip":
        return ImageFolderSource(path)
    if not path.is_dir():
        raise SourceError(
            "Expected a folder, a .zip or a .npz file as source; found none of them. Check the path."
        )
    first = [file.suffix.lower() in EXTENSIONS for file in islice(scan(path), _LOOK_AT)]
    return ImageFolderSource(path) if sum(first) > len(first) / 2 else FolderSource(path)
