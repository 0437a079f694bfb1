"""Where images come from; one file per kind of source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from medistill.errors import ConfigError, SourceError
from medistill.ingest.reading import Source
from medistill.ingest.sources.archive import ArchiveSource, holds_dicom, is_archive
from medistill.ingest.sources.dicomdir import DicomdirSource, find_dicomdir
from medistill.ingest.sources.folder import FolderSource, scan
from medistill.ingest.sources.image_folder import EXTENSIONS, ImageFolderSource
from medistill.ingest.sources.npz import NpzSource
from medistill.registry import SOURCES, nearest

__all__ = [
    "ArchiveSource",
    "DicomdirSource",
    "FolderSource",
    "ImageFolderSource",
    "NpzSource",
    "open_source",
    "source_for",
]

_LOOK_AT = 50
_NIFTI = (".nii", ".nii.gz")
_VOLUMES = {"folder": "series", "archive": "series", "dicomdir": "series", "nifti": "nifti", "npz": "npz"}


def source_for(path: Path, *, volumes: str = "slices") -> Source:
    """The source that fits a path; see :func:`open_source`."""
    return open_source("auto", path, volumes=volumes)


def open_source(
    kind: str, where: Path | str, *, volumes: str = "slices", options: Mapping[str, Any] | None = None
) -> Source:
    """Open a source by its kind, or by what a path or address looks like.

    ``auto`` takes ``http://`` and ``https://`` for DICOMweb, ``dimse://TITLE@host:port`` for DIMSE, ``.npz`` for
    arrays, ``.nii`` and ``.nii.gz`` for NIfTI, archives and folders for what most of their first files look like,
    a folder with a DICOMDIR for a medium, and every other folder for DICOM files.

    Args:
        kind: ``auto``, or a name of the registry.
        where: Path or address.
        volumes: ``slices``, or ``cubes`` for one volume per series, NIfTI file or entry of an ``.npz`` file.
        options: Further arguments of the source, such as ``studies`` or ``token_file``.

    Raises:
        ConfigError: If the kind or an option is unknown, or the source has no volumes.
        SourceError: If nothing fits the path.
    """
    given: dict[str, Any] = dict(options or {})
    kind = _kind_of(str(where)) if kind == "auto" else kind
    place: Any = str(where)
    if kind == "dimse":
        given = {**_dimse_address(place), **given}
        place = given.pop("host")
    elif kind != "dicomweb":
        place = Path(where)
    if volumes == "cubes":
        if kind not in _VOLUMES:
            raise ConfigError(f"Expected volumes: slices for a source of kind {kind}; it holds no volumes.")
        kind = _VOLUMES[kind]
        given |= {"mode": "cube"} if kind in ("nifti", "npz") else {}
    source = SOURCES.load(kind)
    known = [field.name for field in fields(source)][1:]
    for name in given:
        if name not in known:
            raise ConfigError(f"A source of kind {kind} has no option {name!r}.{nearest(name, known)}")
    try:
        opened: Source = source(place, **given)
    except (TypeError, ValueError):
        raise ConfigError(
            "An option of the source has a value of the wrong kind, such as text for a number."
        ) from None
    return opened


def _kind_of(where: str) -> str:
    scheme = where.partition("://")[0].lower()
    if scheme in ("http", "https", "dimse"):
        return "dimse" if scheme == "dimse" else "dicomweb"
    path = Path(where)
    name = path.name.lower()
    if name.endswith(".npz"):
        return "npz"
    if name.endswith(_NIFTI):
        return "nifti"
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        raise SourceError("Expected a file, a folder or an address as source; found none of them. Check the path.")
    if is_archive(path):
        return "archive" if holds_dicom(path) else "image_folder"
    if name == "dicomdir":
        return "dicomdir"
    raise SourceError(
        "Expected a folder, an archive (.zip, .tar), .npz, .nii or DICOMDIR as source; found another kind of file."
    )


def _kind_of_folder(path: Path) -> str:
    names = [PurePosixPath(name) for name in islice(scan(path), _LOOK_AT)]
    if sum(name.suffix.lower() in EXTENSIONS for name in names) > len(names) / 2:
        return "image_folder"
    if sum(name.name.lower().endswith(_NIFTI) for name in names) > len(names) / 2:
        return "nifti"
    return "dicomdir" if find_dicomdir(path) else "folder"


def _dimse_address(where: str) -> dict[str, Any]:
    """Parts of ``dimse://TITLE@host:port``; a plain host name is the host alone."""
    if "://" not in where:
        return {"host": where}
    parts = urlsplit(where)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise ConfigError("Expected an archive as dimse://TITLE@host:port; found another form.")
    title = {"called_aet": parts.netloc.rpartition("@")[0]} if "@" in parts.netloc else {}
    return {"host": parts.hostname, "port": port, **title}
