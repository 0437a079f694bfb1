"""DICOM files to stored values; every failure becomes a reason code.

One file is one image: a file with several frames is turned away with ``MULTI_FRAME``. Colour images become grey by
luminance, ``0.299 R + 0.587 G + 0.114 B``. Exception texts of libraries can quote header values, so they are
neither kept nor logged, and pydicom's own log is silent meanwhile.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from medistill.errors import RejectedFile
from medistill.ingest import imagecodecs_plugin
from medistill.ingest.headers import integer, text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_PIXELS = 1 << 26
MAX_INFLATED = 1 << 28
LUMINANCE = (0.299, 0.587, 0.114)
_PREAMBLE = 132
_GROUP_LENGTH_ELEMENT = 12
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")

imagecodecs_plugin.register()


@contextmanager
def silence() -> Iterator[None]:
    """Switch pydicom's warnings and log off: they quote header values."""
    logger = logging.getLogger("pydicom")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def read_dataset(path: Path) -> Dataset:
    """Parse a file.

    Raises:
        RejectedFile: NOT_DICOM, NO_META, READ_ERROR, ZIP_LIMIT, NEST_LIMIT, OOM_LIMIT, TRUNCATED or BAD_VR.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() in head:
            _check_inflated_size(path)
        dataset = pydicom.dcmread(path)
    except RejectedFile:
        raise
    except InvalidDicomError:
        raise RejectedFile("NO_META" if _looks_like_dicom(head) else "NOT_DICOM") from None
    except OSError as error:
        code = "TRUNCATED" if isinstance(error, EOFError) else "READ_ERROR"
        raise RejectedFile(code) from None
    except RecursionError:
        raise RejectedFile("NEST_LIMIT") from None
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except EOFError:
        raise RejectedFile("TRUNCATED") from None
    except Exception:
        raise RejectedFile("BAD_VR", "the header cannot be parsed") from None
    return dataset


def read_pixels(dataset: Dataset) -> NDArray[Any]:
    """Decode one grey image.

    Returns:
        Stored values, shape ``(h, w)``: integers or floats for a grey source, float32 luminance in ``[0, 1]`` for
        a colour source (see :func:`is_colour`).

    Raises:
        RejectedFile: With the code of what is wrong, see :data:`medistill.ingest.quarantine.REASON_CODES`.
    """
    _check_image(dataset)
    syntax = _transfer_syntax(dataset)
    decoder = _decoder(syntax)
    options = {"decoding_plugin": imagecodecs_plugin.LABEL} if syntax in imagecodecs_plugin.SUPPORTED else {}
    try:
        array, properties = decoder.as_array(dataset, index=0, **options)
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except Exception:
        raise RejectedFile("CODEC_FAIL") from None
    shape = (integer(dataset, "Rows"), integer(dataset, "Columns"))
    if array.shape[:2] != shape:
        raise RejectedFile("CODEC_FAIL", "decoded size differs from Rows and Columns")
    if is_colour(dataset):
        return _colour_to_grey(array, dataset, int(properties["bits_stored"]))
    return array  # type: ignore[no-any-return]


def is_colour(dataset: Dataset) -> bool:
    """Whether the image is anything but one grey channel."""
    return text(dataset, "PhotometricInterpretation") not in _MONOCHROME


def _looks_like_dicom(head: bytes) -> bool:
    """Whether a file without meta header begins like a data set: group 2 or 8 in either byte order."""
    return len(head) >= 8 and bool({head[:2], head[1::-1]} & {b"\x02\x00", b"\x08\x00"})


def _check_inflated_size(path: Path) -> None:
    """Inflate a deflated data set piece by piece and stop at the limit; nothing is kept."""
    offset = _PREAMBLE + _GROUP_LENGTH_ELEMENT + int(read_file_meta_info(path).FileMetaInformationGroupLength)
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(offset)
        while block := inflater.unconsumed_tail or file.read(1 << 16):
            total += len(inflater.decompress(block, 1 << 20))
            if total > MAX_INFLATED:
                raise RejectedFile("ZIP_LIMIT", f"the data set inflates beyond {MAX_INFLATED >> 20} MiB")
            if inflater.eof:
                return


def _check_image(dataset: Dataset) -> None:
    name = UID(text(dataset, "SOPClassUID") or "1.2").name
    known_other = not name.startswith("1.") and "Image" not in name
    if known_other or "DirectoryRecordSequence" in dataset or "FloatPixelData" in dataset:
        raise RejectedFile("NON_IMAGE_SOP")
    _transfer_syntax(dataset)
    if "PixelData" not in dataset or not dataset.get("PixelData"):
        raise RejectedFile("NO_PIXELS")
    frames = integer(dataset, "NumberOfFrames") or 1
    if frames != 1:
        raise RejectedFile("MULTI_FRAME", f"expected 1 frame, found {frames}")
    pixels = integer(dataset, "Rows") * integer(dataset, "Columns")
    if not 0 < pixels <= MAX_PIXELS:
        raise RejectedFile("DIM_LIMIT", f"expected 1 to {MAX_PIXELS} pixels")
    _check_bits(dataset)
    _check_length(dataset, pixels)


def _check_bits(dataset: Dataset) -> None:
    stored, allocated = integer(dataset, "BitsStored"), integer(dataset, "BitsAllocated")
    samples, photometric = integer(dataset, "SamplesPerPixel"), text(dataset, "PhotometricInterpretation")
    high = integer(dataset, "HighBit") if "HighBit" in dataset else stored - 1
    if not 0 < stored <= allocated <= 64 or high != stored - 1:
        raise RejectedFile("BITS_INCONSISTENT", "expected 0 < BitsStored <= BitsAllocated and HighBit one below")
    expected = 1 if photometric in (*_MONOCHROME, "PALETTE COLOR") else 3
    if not photometric or samples != expected:
        raise RejectedFile("COLOUR_MISMATCH", "SamplesPerPixel does not fit PhotometricInterpretation")


def _check_length(dataset: Dataset, pixels: int) -> None:
    """Uncompressed pixel data must be complete; surplus bytes are ignored."""
    if _transfer_syntax(dataset).is_encapsulated:
        return
    samples = (
        2 if text(dataset, "PhotometricInterpretation") == "YBR_FULL_422" else integer(dataset, "SamplesPerPixel")
    )
    needed = (pixels * samples * integer(dataset, "BitsAllocated") + 7) // 8
    if len(dataset.PixelData) < needed:
        raise RejectedFile("TRUNCATED", "pixel data is shorter than Rows, Columns and BitsAllocated say")


def _transfer_syntax(dataset: Dataset) -> UID:
    value = text(dataset.file_meta, "TransferSyntaxUID") if hasattr(dataset, "file_meta") else ""
    if not UID(value).is_transfer_syntax if value else True:
        raise RejectedFile("BAD_TS")
    return UID(value)


def _decoder(syntax: UID) -> Any:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RejectedFile("CODEC_UNSUPPORTED") from None
    if not decoder.is_available:
        raise RejectedFile("CODEC_UNSUPPORTED")
    return decoder


def _colour_to_grey(array: NDArray[Any], dataset: Dataset, bits: int) -> NDArray[np.float32]:
    rgb = array
    if text(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        try:
            rgb = apply_color_lut(array, dataset)
        except Exception:
            raise RejectedFile("COLOUR_MISMATCH", "the palette is malformed") from None
        bits = 8 * rgb.dtype.itemsize
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise RejectedFile("COLOUR_MISMATCH", "expected three colour channels")
    return luminance(rgb, top=2.0**bits - 1)


def luminance(rgb: NDArray[Any], *, top: float) -> NDArray[np.float32]:
    """Grey levels of a colour image.

    Args:
        rgb: Shape ``(h, w, 3)``.
        top: Value of full intensity.

    Returns:
        Luminance in ``[0, 1]``, shape ``(h, w)``.
    """
    weights = np.array(LUMINANCE, dtype=np.float32)
    grey: NDArray[np.float32] = (rgb.astype(np.float32) @ weights) / np.float32(top)
    return grey
