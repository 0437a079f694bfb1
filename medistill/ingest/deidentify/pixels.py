"""Pixel data that holds pixels and nothing else.

Uncompressed data is cut to its exact length, and bits that no pixel uses (where old overlays lie, PS3.5 8.1.2) are
overwritten. Compressed data keeps its compression where every frame can be cleaned (:mod:`.codestream`);
otherwise, and where boxes are blacked out, the decoded pixels are stored uncompressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, ExplicitVRLittleEndian

from medistill.errors import RejectedFile
from medistill.ingest import imagecodecs_plugin
from medistill.ingest.deidentify.codestream import clean_frame
from medistill.ingest.deidentify.textlike import text_like
from medistill.ingest.headers import integer, text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Box = tuple[int, int, int, int]
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_MAX_PIXELS = 1 << 30
_PALETTES = tuple(
    f"{segmented}{colour}PaletteColorLookupTableData"
    for segmented in ("", "Segmented")
    for colour in ("Red", "Green", "Blue")
)

imagecodecs_plugin.register()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pixel data is laid out (PS3.3 C.7.6.3).

    Args:
        photometric: PhotometricInterpretation.
        planar: PlanarConfiguration; 0 for one sample.
        frames: Number of frames, 0 where the source does not say.
    """

    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    frames: int
    allocated: int
    stored: int
    signed: bool

    @property
    def count(self) -> int:
        """Number of frames."""
        return self.frames or 1

    @property
    def length(self) -> int:
        """Bytes of uncompressed data without padding."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return (self.count * self.rows * self.columns * samples * self.allocated + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Cleaned pixel data.

    Args:
        layout: Layout of the new data.
        data: Value of PixelData, padded to even length.
        syntax: Transfer syntax of the data.
        flattened: Whether colours were stored instead of entries of colour tables.
    """

    layout: Layout
    data: bytes
    syntax: UID
    flattened: bool = False


def read_layout(dataset: Dataset) -> Layout:
    """Layout of an image.

    Raises:
        RejectedFile: NO_PIXELS, DIM_LIMIT, BITS_INCONSISTENT or COLOUR_MISMATCH.
    """
    if "PixelData" not in dataset or not dataset.get_item("PixelData").value:
        raise RejectedFile("NO_PIXELS")
    stored = integer(dataset, "BitsStored")
    layout = Layout(
        rows=integer(dataset, "Rows"),
        columns=integer(dataset, "Columns"),
        samples=integer(dataset, "SamplesPerPixel"),
        photometric=text(dataset, "PhotometricInterpretation"),
        planar=integer(dataset, "PlanarConfiguration"),
        frames=integer(dataset, "NumberOfFrames"),
        allocated=integer(dataset, "BitsAllocated"),
        stored=stored,
        signed=integer(dataset, "PixelRepresentation") == 1,
    )
    if not 0 < layout.rows * layout.columns * layout.count <= _MAX_PIXELS:
        raise RejectedFile("DIM_LIMIT", "the image is empty or too large")
    high = integer(dataset, "HighBit") if "HighBit" in dataset else stored - 1
    if layout.allocated not in (1, 8, 16, 32) or not 0 < stored <= layout.allocated or high != stored - 1:
        raise RejectedFile("BITS_INCONSISTENT", "expected 0 < BitsStored <= BitsAllocated and HighBit one below")
    expected = {1: (*_GREY, "PALETTE COLOR"), 3: _COLOUR}.get(layout.samples, ())
    if layout.photometric not in expected:
        raise RejectedFile("COLOUR_MISMATCH", "SamplesPerPixel does not fit PhotometricInterpretation")
    return layout


def clean_pixels(dataset: Dataset, boxes: Sequence[Box] = ()) -> Pixels:
    """Pixels of an image, and nothing else.

    Args:
        dataset: The source; is not changed.
        boxes: Regions to black out in every frame as ``(top, left, bottom, right)``, ends not included.

    Raises:
        RejectedFile: With the code of what is wrong with the pixel data.
    """
    layout = read_layout(dataset)
    syntax = UID(text(dataset.file_meta, "TransferSyntaxUID"))
    if layout.photometric == "PALETTE COLOR" and _palette_is_suspicious(dataset):
        return _flat_colours(dataset, layout, boxes)
    if not boxes and not syntax.is_encapsulated and syntax.is_little_endian:
        return Pixels(layout=layout, data=_native(dataset, layout), syntax=ExplicitVRLittleEndian)
    if not boxes and syntax.is_encapsulated:
        frames = _clean_frames(dataset, layout, syntax)
        if frames is not None:
            return Pixels(layout=layout, data=encapsulate(frames), syntax=syntax)
    array, layout = decode_frames(dataset, layout)
    if boxes:
        array = array.copy()
        black = _black(array, dataset, layout)
        for top, left, bottom, right in boxes:
            array[:, top:bottom, left:right] = black
    return _stored(array, layout)


def _native(dataset: Dataset, layout: Layout) -> bytes:
    data: bytes = dataset.get_item("PixelData").value
    if len(data) < layout.length:
        raise RejectedFile("TRUNCATED", "pixel data is shorter than Rows, Columns and BitsAllocated say")
    if layout.allocated == 1:
        return _pad(_without_spare_bits(data[: layout.length], layout))
    if layout.stored == layout.allocated:
        return _pad(data[: layout.length])
    kind = f"<{'i' if layout.signed else 'u'}{layout.allocated // 8}"
    return _pad(_used_bits(np.frombuffer(data, kind, layout.length * 8 // layout.allocated), layout).tobytes())


def _used_bits(values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Values with the bits above BitsStored set to zero, or to the sign."""
    spare = 8 * values.dtype.itemsize - layout.stored
    if layout.signed:
        signed: NDArray[Any] = (values << spare) >> spare
        return signed
    used: NDArray[Any] = values & values.dtype.type((1 << layout.stored) - 1)
    return used


def _without_spare_bits(data: bytes, layout: Layout) -> bytes:
    spare = -(layout.count * layout.rows * layout.columns * layout.samples) % 8
    return data[:-1] + bytes((data[-1] & (0xFF >> spare),)) if spare else data


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)


def _clean_frames(dataset: Dataset, layout: Layout, syntax: UID) -> list[bytes] | None:
    """All frames cleaned, or ``None`` if one cannot be; offset tables are not believed beyond finding frames."""
    frames = []
    try:
        for frame in generate_frames(dataset.PixelData, number_of_frames=layout.count):
            cleaned = clean_frame(frame, syntax)
            if cleaned is None:
                return None
            frames.append(_pad(cleaned))
    except (ValueError, OSError, EOFError):
        return None
    return frames if len(frames) == layout.count else None


def decode_frames(dataset: Dataset, layout: Layout) -> tuple[NDArray[Any], Layout]:
    """Decoded samples; luminance and chrominance become red, green and blue.

    Returns:
        Array of shape ``(frames, rows, columns)`` or ``(frames, rows, columns, 3)``, and its layout.

    Raises:
        RejectedFile: CODEC_UNSUPPORTED, CODEC_FAIL or OOM_LIMIT.
    """
    syntax = UID(text(dataset.file_meta, "TransferSyntaxUID"))
    options: dict[str, Any] = (
        {"decoding_plugin": imagecodecs_plugin.LABEL} if syntax in imagecodecs_plugin.SUPPORTED else {}
    )
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RejectedFile("CODEC_UNSUPPORTED") from None
    if not decoder.is_available:
        raise RejectedFile("CODEC_UNSUPPORTED")
    try:
        array, found = decoder.as_array(dataset, **options)
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except Exception:
        raise RejectedFile("CODEC_FAIL") from None
    shape = (layout.count, layout.rows, layout.columns, *((3,) if layout.samples == 3 else ()))
    if array.size != np.prod(shape) or array.dtype.kind not in "iu":
        raise RejectedFile("CODEC_FAIL", "decoded size differs from Rows and Columns")
    decoded = Layout(
        rows=layout.rows,
        columns=layout.columns,
        samples=layout.samples,
        photometric="RGB" if layout.samples == 3 else str(found["photometric_interpretation"]),
        planar=0,
        frames=layout.frames,
        allocated=8 * array.dtype.itemsize,
        stored=min(layout.stored, 8 * array.dtype.itemsize),
        signed=array.dtype.kind == "i",
    )
    return array.reshape(shape), decoded


def _stored(array: NDArray[Any], layout: Layout, *, flattened: bool = False) -> Pixels:
    plain = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if layout.stored < layout.allocated:
        plain = _used_bits(plain, layout)
    data = _pad(plain.tobytes())
    return Pixels(layout=layout, data=data, syntax=ExplicitVRLittleEndian, flattened=flattened)


def _black(array: NDArray[Any], dataset: Dataset, layout: Layout) -> Any:
    """Stored value of black: the darkest value of this image, or the darkest colour."""
    if layout.photometric == "MONOCHROME1":
        return array.max()
    if layout.photometric == "PALETTE COLOR":
        used = np.unique(array)
        colours = _apply_palette(used.reshape(1, -1), dataset).reshape(len(used), -1)
        return used[colours.sum(axis=1, dtype=np.int64).argmin()]
    return 0 if layout.samples == 3 else array.min()


def _palette_is_suspicious(dataset: Dataset) -> bool:
    return any(text_like(bytes(dataset.get_item(name).value)) for name in _PALETTES if name in dataset)


def _flat_colours(dataset: Dataset, layout: Layout, boxes: Sequence[Box]) -> Pixels:
    """Colours instead of table entries, for an image whose colour tables may hold text."""
    array, decoded = decode_frames(dataset, layout)
    colours = _apply_palette(array, dataset)[..., :3].copy()
    for top, left, bottom, right in boxes:
        colours[:, top:bottom, left:right] = 0
    bits = 8 * colours.dtype.itemsize
    flat = Layout(
        rows=decoded.rows,
        columns=decoded.columns,
        samples=3,
        photometric="RGB",
        planar=0,
        frames=decoded.frames,
        allocated=bits,
        stored=bits,
        signed=False,
    )
    return _stored(colours, flat, flattened=True)


def _apply_palette(array: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    try:
        colours: NDArray[Any] = apply_color_lut(array, dataset)
    except Exception:
        raise RejectedFile("COLOUR_MISMATCH", "the palette is malformed") from None
    return colours
