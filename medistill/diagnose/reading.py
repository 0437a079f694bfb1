"""Files to images as ingestion reads them: the same decoding, window, polarity and geometry, in killable children.

Identifiers are replaced under a key that is drawn for this reading and forgotten with it, inside the child that
reads a file. What comes back can tell patients apart and name none of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from medistill.diagnose.preprocessing import Preprocessing
from medistill.errors import ConfigError, SourceError
from medistill.ingest.burned_in import OCR_MEMORY_MB, OCR_SECONDS, Screen, TextPolicy
from medistill.ingest.frames import decode_dicom
from medistill.ingest.geometry import Fit
from medistill.ingest.identity import KEY_BYTES, Pseudonymiser
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import Limits, isolated
from medistill.ingest.quarantine import REASON_CODES, Rejected
from medistill.ingest.reading import Item, Reader, Reading, Source, Work
from medistill.ingest.sources import open_source
from medistill.ingest.sources.archive import is_archive
from medistill.ingest.sources.series import decode_series

_ARRAYS = (".npz", ".nii", ".nii.gz")


@dataclass(frozen=True, kw_only=True)
class ReadImage:
    """One image as the cohort would have stored it.

    Args:
        ordinal: Position of its file, from 0.
        frame: Number within the file from 1; 0 where the file is one image.
        patient: Token of the patient, good for this reading only.
        pixels: What ingestion would store.
    """

    ordinal: int
    frame: int = 0
    patient: str = field(repr=False)
    pixels: NDArray[np.uint16] = field(repr=False)


@dataclass(frozen=True)
class FileList:
    """DICOM files given one by one.

    Args:
        paths: The files.
        cubes: Whether each is a volume of several frames.
    """

    paths: tuple[Path, ...] = field(repr=False)
    cubes: bool = False
    keys: ClassVar[tuple[str, ...]] = ("sop", "file", "patient")

    @property
    def labelled(self) -> bool:
        """Never."""
        return False

    def __len__(self) -> int:
        return len(self.paths)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per file."""
        for ordinal, path in enumerate(self.paths):
            if not path.is_file():
                yield Item(ordinal=ordinal, name=str(path), payload=None, refused="READ_ERROR")
            else:
                yield Item(ordinal=ordinal, name=str(path), payload=(path,) if self.cubes else path)

    @property
    def decode(self) -> Callable[[Any, Policy], Iterator[Any]]:
        """Reads one DICOM file."""
        return partial(decode_series, straighten=False) if self.cubes else decode_dicom


def open_files(paths: Sequence[Path], preprocessing: Preprocessing) -> Source:
    """The source behind what a user named: DICOM files, or one folder, archive, ``.npz`` or NIfTI file.

    Raises:
        ConfigError: If folders and files are mixed, or single slices are given for a model of volumes.
        SourceError: If nothing is given or the only path does not exist.
    """
    cubes = preprocessing.volumes == "cubes"
    if not paths:
        raise SourceError("Expected at least one DICOM file or a folder; found none.")
    if len(paths) == 1:
        path = Path(paths[0])
        if not path.exists():
            raise SourceError("The file or folder does not exist. Check the path.")
        if path.is_dir() or path.name.lower().endswith(_ARRAYS) or is_archive(path):
            return open_source("auto", path, volumes=preprocessing.volumes)
    if any(Path(path).is_dir() for path in paths):
        raise ConfigError("Expected DICOM files or one folder; found several folders, or both. Give one folder.")
    if cubes and len(paths) > 1:
        raise ConfigError("This model takes volumes. Expected one folder of slices; found several files.")
    return FileList(tuple(Path(path) for path in paths), cubes)


def read_images(
    source: Source, preprocessing: Preprocessing, *, jobs: int | None = 1, limits: Limits | None = None
) -> Iterator[list[ReadImage | Rejected]]:
    """Read every item of a source; the images and rejections of one item come together.

    What ingestion refuses for the sake of privacy alone (heads, declared or suspected text) is read here: the
    files stay with whoever runs this. Text is blacked out where it was in the cohort.

    Args:
        source: From :func:`open_files`.
        preprocessing: How a file becomes an image.
        jobs: Children at work at once.
        limits: What reading one file may cost.

    Yields:
        For each item, in any order, what it holds; an item without any image has one rejection.
    """
    screen, limits = _screen(preprocessing), limits or Limits()
    if screen.policy is TextPolicy.MASK and screen.reads:  # the child then holds the models of OCR
        limits = replace(
            limits,
            memory_mb=max(limits.memory_mb, OCR_MEMORY_MB),
            seconds=max(limits.seconds, OCR_SECONDS),
        )
    reader = Reader(
        decode=source.decode,
        keys=(),
        pseudonymiser=Pseudonymiser(secrets.token_bytes(KEY_BYTES)),
        size=preprocessing.stored,
        fit=Fit(preprocessing.fit),
        policy=Policy(preprocessing.intensity),
        colour=preprocessing.colour == "rgb",
        screen=screen,
        defaced=True,
    )
    found: dict[int, list[ReadImage | Rejected]] = {}
    for outcome in isolated(reader, (Work(item=item) for item in source.items()), jobs=jobs, limits=limits):
        ordinal = outcome.item.item.ordinal
        if outcome.again or outcome.failure:
            found.pop(ordinal, None)
        if isinstance(outcome.result, Rejected):
            found.setdefault(ordinal, []).append(outcome.result)
        elif isinstance(outcome.result, tuple):
            found.setdefault(ordinal, []).append(_image(*outcome.result))
        if outcome.ended:
            lost = Rejected(ordinal=ordinal, code=outcome.failure or "NO_PIXELS", detail="")
            yield found.pop(ordinal, [lost])


def explained(rejected: Rejected) -> str:
    """Why a file was not read, in one sentence."""
    return f"{REASON_CODES[rejected.code]}{f' ({rejected.detail})' if rejected.detail else ''}"


def _screen(preprocessing: Preprocessing) -> Screen:
    masked = preprocessing.burned_in == "mask"
    return Screen(policy=TextPolicy.MASK if masked else TextPolicy.ALLOW, sample_rate=0.0)


def _image(reading: Reading, pixels: NDArray[np.uint16]) -> ReadImage:
    patient = reading.patient or reading.study or reading.own_patient
    return ReadImage(ordinal=reading.ordinal, frame=reading.frame, patient=patient, pixels=pixels)
