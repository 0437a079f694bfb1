"""NIfTI files (``.nii``, ``.nii.gz``) as axial slices or as volumes.

The header is checked before anything is allocated. Voxels are read here and only their place in space is taken
from SimpleITK, which would fill what is missing at the end of a file and what is not finite with zeros and say
nothing. Version 1 with header and voxels in one file is read.

NIfTI has no display window of its own, so grey levels are chosen for the whole volume, the same for all its
slices:

* ``voi``: from ``cal_min`` to ``cal_max`` where the header gives them, else as ``percentile`` with the flag
  ``no_window``.
* ``percentile``: from the 0.5 to the 99.5 percentile of the finite values of this volume.
* ``none``: the full range of an integer type, after the header's scaling; floats must lie in ``[0, 1]``.

Values that are not finite become black, with the flag ``not_finite``.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.frames import Decoded
from medistill.ingest.headers import Header
from medistill.ingest.intensity import Policy, percentile_limits, stretch
from medistill.ingest.reading import Item
from medistill.ingest.sources.folder import scan
from medistill.ingest.volumes import MAX_VOXELS, NO_GEOMETRY, DecodedVolume, Volume

sitk: Any = SimpleITK  # its functions carry no types

SUFFIXES = (".nii", ".nii.gz")
MAX_BYTES = 1 << 30
_PIECE = 1 << 20
_HEADER = 348
_MAX_OFFSET = 1 << 24
_GZIP = b"\x1f\x8b"
_TYPES: dict[int, Any] = {
    **{2: np.uint8, 4: np.int16, 8: np.int32, 256: np.int8, 512: np.uint16, 768: np.uint32},
    **{16: np.float32, 64: np.float64},
}
_COLOURS = (128, 2304)
_MAGIC = slice(344, 348)
_FIELDS = {
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl": (112, "2f"),
    "cal": (124, "2f"),
    "descrip": (148, "80s"),
    "form_codes": (252, "2h"),
}
_SUBJECT = re.compile(r"^sub-[A-Za-z0-9]+$")
_SUBJECT_FILE = re.compile(r"^(sub-[A-Za-z0-9]+)_")
_HEAD_WORDS = re.compile(
    r"(head|brain|skull|cranial|neuro|face|facial|mprage|mp2rage|(?<![a-z0-9])(t1w|t2w|t2star|flair|bold|dwi|pdw|t1|t2)"
    r"(?![a-z0-9]))",
    re.IGNORECASE,
)
#: NIfTI has no field for the body part; a file that names none of these may show a head.
_OTHER_WORDS = re.compile(
    r"(chest|thora|lung|breast|heart|cardi|aort|abdom|liver|hepat|spleen|kidney|renal|pancrea|colon|bladder|pelvi"
    r"|prostat|uter|spine|lumbar|shoulder|elbow|wrist|hand|knee|ankle|foot|femur|(?<![a-z])hip(?![a-z]))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NiftiSource:
    """NIfTI files of a folder, or one file.

    The format does not say which part of the body it shows: a file counts as a head unless its name or description
    names another part.

    The patient of a file is the part ``sub-…`` of its path (BIDS), else the uppermost folder that holds it, else
    unknown. A label table refers to a file by ``file``.

    Args:
        path: Folder or file.
        mode: ``slices`` (every axial slice is an image) or ``cube`` (the file is one volume).

    Raises:
        ConfigError: If the mode is another.
        SourceError: When read, if there is no NIfTI file.
    """

    path: Path
    mode: str = "slices"
    keys: ClassVar[tuple[str, ...]] = ("file",)

    def __post_init__(self) -> None:
        if self.mode not in ("slices", "cube"):
            raise ConfigError(f"NIfTI source: expected mode to be slices or cube, got {self.mode!r}.")

    @cached_property
    def _names(self) -> tuple[str, ...]:
        path = Path(self.path)
        names = (path.name,) if path.is_file() else scan(path)
        chosen = tuple(name for name in names if name.lower().endswith(SUFFIXES))
        if not chosen:
            raise SourceError("The source holds no NIfTI file. Expected files ending in .nii or .nii.gz.")
        return chosen

    @property
    def labelled(self) -> bool:
        """Never: labels come from a table."""
        return False

    def __len__(self) -> int:
        """Number of files."""
        return len(self._names)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per file."""
        path = Path(self.path)
        root = path.parent if path.is_file() else path
        for ordinal, name in enumerate(self._names):
            yield Item(ordinal=ordinal, name=name, payload=root / name, patient=patient_of(name))

    @property
    def decode(self) -> Callable[[Path, Policy], Iterator[Decoded | DecodedVolume]]:
        """Reads one file."""
        return decode_slices if self.mode == "slices" else decode_cube


def patient_of(name: str) -> str:
    """Patient that a path names, or empty: BIDS first, then the uppermost folder."""
    parts = PurePosixPath(name).parts
    subject = next((part for part in parts[:-1] if _SUBJECT.match(part)), "")
    given = _SUBJECT_FILE.match(parts[-1])
    if subject or given:
        return subject or str(given and given.group(1))
    return parts[0] if len(parts) > 1 else ""


def decode_slices(path: Path, policy: Policy) -> Iterator[Decoded]:
    """Axial slices of a file from the feet up, front above, the patient's right on the left.

    Yields:
        Luminance in ``[0, 1]``; frames count from 1.

    Raises:
        RejectedFile: As :func:`decode_cube`.
    """
    decoded = next(decode_cube(path, policy))
    for number, grey in enumerate(decoded.volume.array, start=1):
        yield Decoded(
            stored=grey,
            presentation=None,
            policy=Policy.NONE,  # grey levels were chosen for the whole volume
            header=decoded.header,
            frame=number,
            flags=decoded.flags,
        )


def decode_cube(path: Path, policy: Policy) -> Iterator[DecodedVolume]:
    """The volume of a file, its axes put into the order of the patient's.

    Yields:
        One volume.

    Raises:
        RejectedFile: IMAGE_FORMAT, DIM_LIMIT, ZIP_LIMIT, TRUNCATED, READ_ERROR, COLOUR_MISMATCH, GEOM_MIXED or
            BITS_INCONSISTENT.
    """
    header, values = read_file(path)
    image = _oriented(path, values)
    grey, flags = grey_levels(sitk.GetArrayViewFromImage(image), header, policy)
    spacing, origin = image.GetSpacing(), image.GetOrigin()
    volume = Volume(array=grey, spacing=spacing[::-1], origin=origin, direction=image.GetDirection(), flags=flags)
    described = f"{path.name} {header.description}"
    head = bool(_HEAD_WORDS.search(described)) or not _OTHER_WORDS.search(described)
    yield DecodedVolume(volume=volume, header=Header(head=head), flags=flags)


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """What is needed of a header.

    Args:
        shape: Voxels along x, y and z.
        dtype: Type of a stored value.
        slope: Scaling of stored values; 1 where the header gives none.
        intercept: Added after scaling.
        window: ``cal_min`` and ``cal_max`` where they are given.
        offset: Position of the first voxel.
        description: Free text; looked at for words that mean a head, and goes no further.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    slope: float = 1.0
    intercept: float = 0.0
    window: tuple[float, float] | None = None
    offset: int = 0
    description: str = ""

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return self.shape[0] * self.shape[1] * self.shape[2]


def read_file(path: Path) -> tuple[NiftiHeader, NDArray[Any]]:
    """Header and values after the header's scaling, shape ``(z, y, x)``.

    Raises:
        RejectedFile: As :func:`decode_cube`.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        with gzip.open(path) if packed else path.open("rb") as file:
            header = parse_header(file.read(_HEADER))
            if header.offset + header.voxels * header.dtype.itemsize > MAX_BYTES:
                raise RejectedFile("ZIP_LIMIT" if packed else "DIM_LIMIT", "the volume is too large")
            values = _voxels(file, header)
    except RejectedFile:
        raise
    except EOFError:
        raise RejectedFile("TRUNCATED") from None
    except (gzip.BadGzipFile, zlib.error):
        raise RejectedFile("IMAGE_FORMAT", "the compressed file is damaged") from None
    except OSError:
        raise RejectedFile("READ_ERROR") from None
    if (header.slope, header.intercept) != (1.0, 0.0):
        exact: Any = np.float32 if header.dtype.itemsize <= 2 else np.float64
        values = values.astype(exact) * exact(header.slope) + exact(header.intercept)
    return header, values


def _voxels(file: Any, header: NiftiHeader) -> NDArray[Any]:
    """Stored values; reads on to the end, which checks the sum of a compressed file, but not far."""
    file.seek(header.offset)
    values = np.empty(header.shape[::-1], dtype=header.dtype)
    target = values.data.cast("B")
    while len(target) and (count := file.readinto(target[:_PIECE])):
        target = target[count:]
    if len(target):
        raise RejectedFile("TRUNCATED", "the file is shorter than its header says")
    beyond = 0
    while piece := file.read(_PIECE):
        beyond += len(piece)
        if beyond > _MAX_OFFSET:
            raise RejectedFile("ZIP_LIMIT", "the file is longer than its header says")
    return values.astype(header.dtype.newbyteorder("="), copy=False)


def parse_header(content: bytes) -> NiftiHeader:
    """Check the first bytes of a file, in either byte order and version.

    Raises:
        RejectedFile: IMAGE_FORMAT, DIM_LIMIT, COLOUR_MISMATCH or GEOM_MIXED.
    """
    order = next((order for order in "<>" if content[:4] == struct.pack(f"{order}i", _HEADER)), "")
    if not order or len(content) < _HEADER or content[_MAGIC] != b"n+1\0":
        raise RejectedFile("IMAGE_FORMAT", "expected NIfTI version 1 with header and voxels in one file")
    fields = {name: struct.unpack_from(order + form, content, at) for name, (at, form) in _FIELDS.items()}
    (datatype,), (offset,), steps = fields["datatype"], fields["vox_offset"], fields["pixdim"]
    (slope, intercept), (high, low) = fields["scl"], fields["cal"]
    if datatype in _COLOURS:
        raise RejectedFile("COLOUR_MISMATCH", "expected a grey volume")
    if datatype not in _TYPES:
        raise RejectedFile("IMAGE_FORMAT", "expected integers of at most 32 bits or floats")
    if not np.isfinite([slope, intercept, high, low, offset]).all() or not _HEADER <= offset <= _MAX_OFFSET:
        raise RejectedFile("IMAGE_FORMAT", "the header is damaged")
    shape = _shape(fields["dim"])
    if not all(0 < step < np.inf for step in steps[1:4]):
        raise RejectedFile(NO_GEOMETRY, "expected a voxel size above 0")
    if max(fields["form_codes"]) <= 0:
        raise RejectedFile(NO_GEOMETRY, "the orientation is not given")
    return NiftiHeader(
        shape=shape,
        dtype=np.dtype(_TYPES[datatype]).newbyteorder(order),
        slope=slope or 1.0,
        intercept=intercept if slope else 0.0,
        window=(low, high) if high > low else None,
        offset=int(offset),
        description=fields["descrip"][0].decode("latin-1"),
    )


def _shape(dimensions: tuple[int, ...]) -> tuple[int, int, int]:
    """Voxels along three axes; further axes may have one voxel."""
    count, sizes = dimensions[0], dimensions[1:]
    if not 3 <= count <= 7 or any(size != 1 for size in sizes[3:count]):
        raise RejectedFile("DIM_LIMIT", "expected 3 dimensions")
    x, y, z = sizes[:3]
    if min(x, y, z) < 1 or x * y * z > MAX_VOXELS:
        raise RejectedFile("DIM_LIMIT", f"expected 1 to {MAX_VOXELS} voxels")
    return x, y, z


def _oriented(path: Path, values: NDArray[Any]) -> Any:
    """Image whose axes point left, back and up."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings name the file
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        axes = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
        image = sitk.GetImageFromArray(values)
        image.SetSpacing(reader.GetSpacing()[:3])
        image.SetOrigin(reader.GetOrigin()[:3])
        image.SetDirection(axes.ravel().tolist())
        return sitk.DICOMOrient(image, "LPS")
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except Exception:
        raise RejectedFile(NO_GEOMETRY, "the orientation cannot be read") from None


def grey_levels(
    values: NDArray[Any], header: NiftiHeader, policy: Policy
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Grey levels in ``[0, 1]`` of scaled values, and flags; see the module docstring.

    Raises:
        RejectedFile: BITS_INCONSISTENT for floats outside of ``[0, 1]`` under ``none``.
    """
    finite = np.isfinite(values)
    whole = bool(finite.all())
    kept = values if whole else values[finite]
    flags: tuple[str, ...] = () if whole else ("not_finite",)
    if policy is Policy.VOI and header.window:
        limits = header.window
    elif policy is Policy.NONE:
        limits = _full_range(kept, header)
    else:
        limits = percentile_limits(kept)
        flags += ("no_window",) if policy is Policy.VOI else ()
    exact = np.float32 if values.dtype.itemsize <= 2 or values.dtype == np.float32 else np.float64
    grey = stretch(values.astype(exact, copy=False), *limits).astype(np.float32, copy=False)
    if not whole:
        grey[~finite] = 0
    return grey, flags


def _full_range(kept: NDArray[Any], header: NiftiHeader) -> tuple[float, float]:
    if header.dtype.kind != "f":
        limit = np.iinfo(header.dtype)
        ends = [header.slope * float(end) + header.intercept for end in (limit.min, limit.max)]
        return min(ends), max(ends)
    if kept.size and (kept.min() < 0 or kept.max() > 1):
        raise RejectedFile("BITS_INCONSISTENT", "expected floats in [0, 1]")
    return 0.0, 1.0
