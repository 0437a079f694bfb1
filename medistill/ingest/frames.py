"""One DICOM file to its frames, and a frame to a square of 16-bit grey levels.

Making an image square takes one of three ways with the same result (at most one level of 65535 apart, which is
rounding in float32):

1. Grey levels that are a :class:`~medistill.ingest.intensity.Ramp` with integer ends commute with averaging once
   the stored integers are clipped to the ends: clip at full resolution, resize the integers, apply the ramp to the
   few pixels that remain.
2. Otherwise the grey levels are computed at full resolution and then resized.
3. An image that already has the wanted size is not resized.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import RLELossless, SecondaryCaptureImageStorage

from medistill.errors import RejectedFile
from medistill.ingest import imagecodecs_plugin
from medistill.ingest.decode import RETIRED_JPEG, OpenImage, PixelFormat, luminance, open_image
from medistill.ingest.geometry import Fit, fit_inside, fit_square, on_square, quantise
from medistill.ingest.headers import Header, has, has_frame_groups, read_header, read_presentation
from medistill.ingest.intensity import (
    Policy,
    Presentation,
    Ramp,
    find_ramp,
    is_padding,
    is_small,
    normalise,
    percentile_limits,
    stretch,
)

#: Pixel rows and columns ``(top, left, bottom, right)``; bottom and right are not part of the box.
Box = tuple[int, int, int, int]
_ROUNDING = 1e-6
_ITEM, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """One decoded image (a frame or a slice) before it is made square.

    Args:
        stored: Shape ``(h, w)``: stored values of a grey image, or grey levels in ``[0, 1]``; shape ``(h, w, 3)``
            for red, green and blue.
        presentation: What the header says about stored values; ``None`` for grey levels and for colour.
        policy: How grey levels are chosen.
        header: Identity and description; stays inside the reader.
        frame: Number of the frame within its file from 1; 0 where the file is one image.
        flags: Assumptions that were made, as fixed words.
        hidden: Boxes that are black in every result.
        top: Value of full intensity in a colour image.
    """

    stored: NDArray[Any] = field(repr=False)
    presentation: Presentation | None
    policy: Policy
    header: Header = field(default_factory=Header, repr=False)
    frame: int = 0
    flags: tuple[str, ...] = ()
    hidden: tuple[Box, ...] = field(default=(), repr=False)
    top: float = field(default=1.0, repr=False)

    def grey(self) -> NDArray[np.float32]:
        """Grey levels in ``[0, 1]`` at full resolution, 0 is black; of a colour image its luminance.

        Raises:
            RejectedFile: If a value that is not padding is not finite.
        """
        if self.presentation is not None:
            grey = normalise(self.stored, self.presentation, self.policy)
        else:
            grey = self._luminance()
            if self.policy is Policy.PERCENTILE:
                grey = stretch(grey, *percentile_limits(grey)).astype(np.float32, copy=False)
        for top, left, bottom, right in self.hidden:
            grey[top:bottom, left:right] = 0
        return grey

    def _luminance(self) -> NDArray[np.float32]:
        return self.stored.astype(np.float32) if self.stored.ndim == 2 else luminance(self.stored, top=self.top)

    def colours(self, size: int, fit: Fit) -> NDArray[np.uint16]:
        """Shape ``(3, size, size)``: red, green and blue; three times the same for a grey image.

        Where levels are stretched, the three channels are stretched alike, by the percentiles of the luminance.

        Raises:
            RejectedFile: If a value that is not padding is not finite.
        """
        if self.stored.ndim == 2:
            return np.repeat(self.pixels(size, fit)[None], 3, axis=0)
        limits = percentile_limits(self._luminance()) if self.policy is Policy.PERCENTILE else None
        planes = []
        for channel in range(3):
            plane = self.stored[..., channel].astype(np.float32) / np.float32(self.top)
            if limits is not None:
                plane = stretch(plane, *limits).astype(np.float32, copy=False)
            for top, left, bottom, right in self.hidden:
                plane[top:bottom, left:right] = 0
            planes.append(fit_square(plane, size, fit))
        return np.stack(planes)

    def pixels(self, size: int, fit: Fit) -> NDArray[np.uint16]:
        """Shape ``(size, size)``; 0 is black and 65535 is white.

        Raises:
            RejectedFile: If a value that is not padding is not finite.
        """
        clip = self._clip()
        if clip is None:
            return fit_square(self.grey(), size, fit)
        stored = self.stored
        if self.hidden:
            stored = stored.copy()
            for top, left, bottom, right in self.hidden:
                stored[top:bottom, left:right] = round(clip.ramp.black) + clip.bottom
        return on_square(quantise(clip.ramp.apply(fit_inside(stored, size, fit, clip))), size)

    def masked(self, boxes: Sequence[Box]) -> Decoded:
        """The same image with boxes blacked out."""
        return replace(self, hidden=(*self.hidden, *boxes))

    def _clip(self) -> _Clip | None:
        """What to do with stored values before they are resized as integers; nothing where that is not exact."""
        if self.presentation is None or not is_small(self.stored):
            return None
        ramp = find_ramp(self.stored, self.presentation, self.policy)
        if ramp is None:
            return None
        limit = np.iinfo(self.stored.dtype)
        low, high = sorted((ramp.black, ramp.white))
        inside = [end for end in (low, high) if limit.min < end < limit.max]
        if any(abs(end - round(end)) > _ROUNDING for end in inside):
            return None
        bottom, top = (min(max(round(end), limit.min), limit.max) for end in (low, high))
        padding = self.presentation.padding
        if (padding is not None or self.hidden) and not limit.min <= ramp.black <= limit.max:
            return None
        if padding is not None and (padding[1] <= bottom if ramp.black < ramp.white else padding[0] >= top):
            padding = None  # clipped to black anyway
        shown = Ramp(black=ramp.black - bottom, white=ramp.white - bottom)
        return _Clip(ramp=shown, bottom=bottom, top=top, padding=padding)


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """Clips stored integers to the ends of a ramp; padding becomes its black.

    Results count from ``bottom``, as the ramp does: averages of small numbers keep more digits in float32.
    """

    ramp: Ramp
    bottom: int
    top: int
    padding: tuple[float, float] | None

    @property
    def largest(self) -> int:
        """Largest result."""
        return self.top - self.bottom

    def __call__(self, stored: NDArray[Any], /) -> NDArray[Any]:
        clipped: NDArray[Any] = np.clip(stored, self.bottom, self.top)
        if self.padding is not None:
            clipped[is_padding(stored, self.padding)] = round(self.ramp.black) + self.bottom
        unsigned = clipped.view(f"u{clipped.itemsize}")
        unsigned -= unsigned.dtype.type(self.bottom % (1 << 8 * clipped.itemsize))
        return unsigned


def decode_dicom(payload: Path | bytes | Dataset, policy: Policy) -> Iterator[Decoded]:
    """Read every frame of one DICOM file, one at a time.

    Call it within :func:`~medistill.ingest.decode.silence`.

    Args:
        payload: A file, its content, or a data set in memory.
        policy: How grey levels are chosen.

    Yields:
        Frames in order, with flags ``colour``, ``invalid_window``, ``no_meta``, ``excess_bytes``,
        ``frames_counted``, ``masked_bits`` and ``last_resort`` where they apply.

    Raises:
        RejectedFile: If the file holds no readable image; also while iterating, where a later frame is damaged.
    """
    with open_image(payload) as image:
        header = read_header(image.dataset)
        single = None if image.pixels.colour or has_frame_groups(image.dataset) else _presentation(image, 0)
        for index, (stored, top, flags) in enumerate(read_frames(image)):
            presentation = single
            if single is None and not image.pixels.colour:
                presentation = _presentation(image, index)
            yield Decoded(
                stored=stored,
                presentation=presentation,
                policy=policy,
                header=header,
                frame=index + 1 if image.pixels.frames > 1 else 0,
                flags=(*image.flags, *_flags(presentation), *flags),
                top=top,
            )


def _presentation(image: OpenImage, index: int) -> Presentation:
    presentation = read_presentation(image.dataset, index)
    return presentation if image.pixels.keyword == "PixelData" else replace(presentation, bits_stored=0)


def _flags(presentation: Presentation | None) -> tuple[str, ...]:
    if presentation is None:
        return ("colour",)
    return ("invalid_window",) if presentation.invalid_window else ()


def read_frames(image: OpenImage) -> Iterator[tuple[NDArray[Any], float, tuple[str, ...]]]:
    """Every frame in order: grey stored values, shape ``(h, w)``, or red, green and blue, shape ``(h, w, 3)``.

    Yields:
        The frame, the value of full intensity in a colour image, and flags, ``masked_bits`` or ``last_resort``.

    Raises:
        RejectedFile: With the code of what is wrong, see :data:`medistill.ingest.quarantine.REASON_CODES`.
    """
    pixels = image.pixels
    frames = _compressed_frames(image) if pixels.syntax.is_encapsulated else _native_frames(image)
    try:
        for array, flags in frames:
            if array.shape[:2] != (pixels.rows, pixels.columns):
                raise RejectedFile("CODEC_FAIL", "decoded size differs from Rows and Columns")
            if pixels.colour:
                yield *_red_green_blue(array, image.dataset, pixels), flags
            else:
                stored, masked = _significant(array, pixels)
                yield stored, 1.0, ("masked_bits", *flags) if masked else flags
    except RejectedFile:
        raise
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except Exception:
        raise RejectedFile("CODEC_FAIL") from None


def _native_frames(image: OpenImage) -> Iterator[tuple[NDArray[Any], tuple[str, ...]]]:
    """Uncompressed frames, each read when it is asked for."""
    pixels = image.pixels
    options = _options(pixels) | {"number_of_frames": 1, "pixel_vr": "OB"}
    for index in range(pixels.frames):
        content = _frame_bytes(image, index)
        if pixels.allocated == 1:
            skip, count = index * pixels.frame_bits % 8, pixels.rows * pixels.columns
            bits = np.unpackbits(content, bitorder="little")[skip : skip + count]
            yield bits.reshape(pixels.rows, pixels.columns), ()
        elif pixels.samples == 1:
            yield content.view(pixels.dtype).reshape(pixels.rows, pixels.columns), ()
        else:
            yield get_decoder(pixels.syntax).as_array(content.tobytes(), index=0, validate=False, **options)[0], ()


def _frame_bytes(image: OpenImage, index: int) -> NDArray[np.uint8]:
    """Bytes of one frame; 8-bit cells written as big endian words are put in order (PS3.5 8.1.1)."""
    pixels = image.pixels
    first, last = index * pixels.frame_bits // 8, -(-(index + 1) * pixels.frame_bits // 8)
    swapped = not pixels.syntax.is_little_endian and pixels.allocated == 8 and pixels.vr == "OW"
    begin, stop = (first - first % 2, last + last % 2) if swapped else (first, last)
    content = np.empty(min(stop, image.end - image.start) - begin, dtype=np.uint8)
    image.file.seek(image.start + begin)
    view, done = memoryview(content), 0  # type: ignore[arg-type]
    while done < len(view):
        count = image.file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise RejectedFile("TRUNCATED", "the file ends within the pixel data")
        done += count
    if swapped:
        content = content[: len(content) // 2 * 2].view(np.uint16).byteswap().view(np.uint8)
        content = np.ascontiguousarray(content[first - begin : last - begin])
    return content


def _compressed_frames(image: OpenImage) -> Iterator[tuple[NDArray[Any], tuple[str, ...]]]:
    """Frames of encapsulated pixel data; only one is in memory."""
    frames = image.pixels.frames
    if _count_fragments(image) < frames:
        raise RejectedFile("TRUNCATED", "fewer frames than NumberOfFrames says")
    image.file.seek(image.start)
    found = 0
    for found, frame in enumerate(islice(_decoded(image), frames), start=1):  # noqa: B007 - counts
        yield frame
    if found < frames:
        raise RejectedFile("TRUNCATED", f"expected {frames} frames, found {found}")


def _decoded(image: OpenImage) -> Iterator[tuple[NDArray[Any], tuple[str, ...]]]:
    """Frames by pydicom with our decoders, or by SimpleITK where pydicom does not know the syntax."""
    pixels = image.pixels
    if pixels.syntax in RETIRED_JPEG:
        encoded = generate_frames(image.file, number_of_frames=pixels.frames, extended_offsets=_offsets(image))
        for content in encoded:
            yield _last_resort(content, pixels), ("last_resort",)
        return
    options = _options(pixels) | {"extended_offsets": _offsets(image)}
    if pixels.syntax in imagecodecs_plugin.SUPPORTED:
        options["decoding_plugin"] = imagecodecs_plugin.LABEL
    for array, _ in get_decoder(pixels.syntax).iter_array(image.file, validate=False, **options):
        yield array, ()


def _offsets(image: OpenImage) -> tuple[bytes, bytes] | None:
    """The extended offset table (PS3.3 C.7.6.3.1.8)."""
    if has(image.dataset, "ExtendedOffsetTable") and has(image.dataset, "ExtendedOffsetTableLengths"):
        return image.dataset.ExtendedOffsetTable, image.dataset.ExtendedOffsetTableLengths
    return None


def _last_resort(content: bytes, pixels: PixelFormat) -> NDArray[Any]:
    """One grey frame by SimpleITK, which reads JPEG processes that were retired from the standard.

    It is given a file in memory with nothing but the pixels, so that it neither inverts MONOCHROME1 nor rescales.
    """
    import SimpleITK  # noqa: PLC0415 - 100 MB that nearly no worker needs

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pixels.syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.rows, pixels.columns
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.allocated, pixels.stored, pixels.stored - 1
    dataset.PixelRepresentation = int(pixels.signed)
    dataset.PixelData = encapsulate([content])
    dataset["PixelData"].VR = "OB"
    with os.fdopen(os.memfd_create("frame"), "wb") as file, _no_messages():
        dataset.save_as(file, enforce_file_format=True)
        file.flush()
        picture = SimpleITK.ReadImage(f"/proc/self/fd/{file.fileno()}", imageIO="GDCMImageIO")
        array: NDArray[Any] = SimpleITK.GetArrayFromImage(picture)
    return array.reshape(pixels.rows, pixels.columns)


@contextmanager
def _no_messages() -> Iterator[None]:
    """Keep what a C library writes to standard error from the terminal and from logs."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _count_fragments(image: OpenImage) -> int:
    """Fragments of encapsulated pixel data without the offset table (PS3.5 A.4); all must be complete."""
    file, position, count = image.file, image.start, -1
    while position < image.end:
        file.seek(position)
        head = file.read(8)
        if head[:4] == _SEQUENCE_END:
            break
        if len(head) < 8:
            raise RejectedFile("TRUNCATED", "the file ends within the pixel data")
        if head[:4] != _ITEM:
            raise RejectedFile("CODEC_FAIL", "the pixel data is not encapsulated as the transfer syntax says")
        count += 1
        position += 8 + int.from_bytes(head[4:], "little")
    if position > image.end:
        raise RejectedFile("TRUNCATED", "the file ends within the pixel data")
    return count


def _options(pixels: PixelFormat) -> dict[str, Any]:
    """What pydicom's decoders need to know."""
    return {
        "transfer_syntax_uid": pixels.syntax,
        "pixel_keyword": pixels.keyword,
        "pixel_vr": pixels.vr,
        "rows": pixels.rows,
        "columns": pixels.columns,
        "number_of_frames": pixels.frames,
        "samples_per_pixel": pixels.samples,
        "photometric_interpretation": pixels.photometric,
        "planar_configuration": int(pixels.planar),
        "bits_allocated": pixels.allocated,
        "bits_stored": pixels.stored,
        "pixel_representation": int(pixels.signed),
        "correct_unused_bits": pixels.colour,
    }


def _significant(array: NDArray[Any], pixels: PixelFormat) -> tuple[NDArray[Any], bool]:
    """Stored bits only, sign extended; the array itself where nothing else is set.

    Codestreams other than run lengths hold values, not cells, so their high bit is the one below BitsStored.
    """
    cells = not pixels.syntax.is_encapsulated or pixels.syntax == RLELossless
    bits = 8 * array.dtype.itemsize
    if array.dtype.kind == "f" or pixels.stored >= bits or pixels.syntax in imagecodecs_plugin.SIGN_AWARE:
        return array, False
    shift = pixels.high + 1 - pixels.stored if cells else 0
    top = (1 << pixels.stored - pixels.signed) - 1
    if not shift and array.max() <= top and (not pixels.signed or array.min() >= -top - 1):
        return array, False
    native = array.astype(array.dtype.newbyteorder("="))
    native <<= bits - pixels.stored - shift
    native >>= bits - pixels.stored
    outside = (array >> shift) != native
    return native, bool(outside.any())


def _red_green_blue(array: NDArray[Any], dataset: Dataset, pixels: PixelFormat) -> tuple[NDArray[Any], float]:
    """Shape ``(h, w, 3)``, and the value of full intensity."""
    rgb, bits = array, pixels.stored
    if pixels.photometric == "PALETTE COLOR":
        try:
            rgb = apply_color_lut(_significant(array, pixels)[0], dataset)
        except Exception:
            raise RejectedFile("COLOUR_MISMATCH", "the palette is malformed") from None
        bits = 8 * rgb.dtype.itemsize
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise RejectedFile("COLOUR_MISMATCH", "expected three colour channels")
    return rgb, 2.0**bits - 1
