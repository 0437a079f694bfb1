"""From grey values to the pixels of a DICOM data set: 12-bit storing, text, polarity, display, compression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from medistill.ingest.phantom.film import FloatImage

StoredImage = npt.NDArray[np.uint16]

MAXIMUM = 4095
TRANSFER_SYNTAXES: dict[UID, float] = {
    ExplicitVRLittleEndian: 0.28,
    ImplicitVRLittleEndian: 0.24,
    RLELossless: 0.15,
    JPEGLossless: 0.13,
    JPEGLSLossless: 0.10,
    JPEG2000Lossless: 0.10,
}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How one film is stored.

    Args:
        black: Stored value of grey 0 in MONOCHROME2.
        span: Stored values from grey 0 to grey 1.
        inverted: MONOCHROME1.
        transfer_syntax: One of :data:`TRANSFER_SYNTAXES`.
        display: ``"window"``, ``"two windows"``, ``"lut"`` or ``"none"``.
        rescale: Slope and intercept, or ``None``.
    """

    black: int
    span: int
    inverted: bool
    transfer_syntax: UID
    display: str
    rescale: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TextBox:
    """Burned-in text and the pixels it covers: left, top, right, bottom, the latter two exclusive."""

    text: str
    box: tuple[int, int, int, int]


def draw_storage(rng: np.random.Generator, *, fluoroscopy: bool) -> Storage:
    """Draw how a film is stored; RF images are MONOCHROME2 (PS3.3 C.8.7.1), so two in three CR are not."""
    inverted = rng.random() < 2 / 3
    syntaxes = list(TRANSFER_SYNTAXES)
    syntax = syntaxes[int(rng.choice(len(syntaxes), p=list(TRANSFER_SYNTAXES.values())))]
    display = str(rng.choice(["window", "two windows", "lut", "none"], p=[0.76, 0.07, 0.07, 0.10]))
    rescale = (float(rng.choice([0.5, 2.0])), float(rng.integers(-200, 200))) if rng.random() < 0.25 else None
    return Storage(
        black=int(rng.integers(80, 500)),
        span=int(rng.integers(2500, 3500)),
        inverted=inverted and not fluoroscopy,
        transfer_syntax=syntax,
        display=display,
        rescale=None if fluoroscopy or display == "lut" else rescale,
    )


def quantise(image: FloatImage, storage: Storage) -> StoredImage:
    """Stored values in ``[0, 4095]`` with bright anatomy high, as MONOCHROME2 has them."""
    stored = np.clip(np.rint(storage.black + storage.span * image), 0, MAXIMUM)
    return stored.astype(np.uint16)


def burn_in(stored: StoredImage, lines: list[str], rng: np.random.Generator) -> tuple[StoredImage, list[TextBox]]:
    """Write lines of text over the pixels, bright or faint, in one of the four corners."""
    size = stored.shape[0]
    font = ImageFont.load_default(max(10, size // 18))
    height = max(12, size // 15)
    top = 3 if rng.random() < 0.5 else size - 3 - height * len(lines)
    right_aligned = rng.random() < 0.3
    strength = float(rng.choice([1.0, 1.0, 0.55]))
    burned = stored.astype(np.float64)
    boxes = []
    for number, line in enumerate(lines):
        canvas = Image.new("L", (size, size))
        pen = ImageDraw.Draw(canvas)
        left = size - 4 - pen.textlength(line, font=font) if right_aligned else 4
        pen.text((max(left, 0), top + number * height), line, fill=255, font=font)
        box = canvas.getbbox()
        if box is None:
            continue
        share = strength * np.asarray(canvas, dtype=np.float64) / 255.0
        burned += share * (MAXIMUM - burned)
        boxes.append(TextBox(text=line, box=box))
    return np.rint(burned).astype(np.uint16), boxes


def set_pixels(dataset: Dataset, stored: StoredImage, storage: Storage) -> None:
    """Put MONOCHROME2 stored values into a data set under the polarity, display and syntax of ``storage``."""
    pixels = MAXIMUM - stored if storage.inverted else stored
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if storage.inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    spacing = f"{300.0 / pixels.shape[0]:.5f}"
    dataset.ImagerPixelSpacing = [spacing, spacing]
    if storage.rescale is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = (f"{value:g}" for value in storage.rescale)
        dataset.RescaleType = "US"
    _set_display(dataset, storage)
    encoded = encode(pixels, storage.transfer_syntax)
    if storage.transfer_syntax.is_compressed:
        dataset.add_new("PixelData", "OB", encapsulate([encoded]))
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.add_new("PixelData", "OW", encoded)


def encode(pixels: StoredImage, transfer_syntax: UID) -> bytes:
    """Lossless frame of 12-bit pixels in a transfer syntax; raw little-endian where it is not compressed."""
    import imagecodecs  # noqa: PLC0415
    from rle.utils import encode_pixel_data  # noqa: PLC0415

    raw = pixels.astype("<u2").tobytes()
    if transfer_syntax == RLELossless:
        rows, columns = pixels.shape
        return encode_pixel_data(
            raw, byteorder="<", rows=rows, columns=columns, samples_per_pixel=1, bits_allocated=16
        )
    if transfer_syntax == JPEGLossless:
        return bytes(imagecodecs.ljpeg_encode(pixels, bitspersample=12))
    if transfer_syntax == JPEGLSLossless:
        stream = bytes(imagecodecs.jpegls_encode(pixels))
        # DICOM carries the bare JPEG-LS stream: drop the SPIFF header in front of the frame.
        return b"\xff\xd8" + stream[stream.index(b"\xff\xf7") :]
    if transfer_syntax == JPEG2000Lossless:
        return bytes(
            imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True, bitspersample=12)
        )
    return raw


def _set_display(dataset: Dataset, storage: Storage) -> None:
    """Window or VOI LUT that spans the grey scale; MONOCHROME1 mirrors it exactly (PS3.3 C.11.2.1.2.1)."""
    if storage.display == "none":
        return
    if storage.display == "lut":
        dataset.VOILUTSequence = Sequence([_lookup_table(storage)])
        return
    slope, intercept = storage.rescale or (1.0, 0.0)
    centre = storage.black + storage.span / 2
    centre = slope * (MAXIMUM + 1 - centre if storage.inverted else centre) + intercept
    centres, widths = [f"{centre:g}"], [f"{slope * storage.span:g}"]
    if storage.display == "two windows":
        centres.append(centres[0])
        widths.append(f"{slope * storage.span * 0.7:g}")
        dataset.WindowCenterWidthExplanation = ["NORMAL", "HARD"]
    dataset.WindowCenter, dataset.WindowWidth = centres, widths


def _lookup_table(storage: Storage) -> Dataset:
    """Slightly S-shaped display curve over all stored values."""
    grey = np.clip((np.arange(MAXIMUM + 1) - storage.black) / storage.span, 0.0, 1.0)
    white = 2**16 - 1  # a VOI LUT inside an image has 8 or 16 bits (PS3.3 C.11.2.1.1)
    curve = np.rint(white * (0.7 * grey + 0.3 * grey**2 * (3.0 - 2.0 * grey)))
    if storage.inverted:
        curve = white - curve[::-1]
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [MAXIMUM + 1, 0, 16])
    item.LUTExplanation = "NORMAL"
    item.add_new("LUTData", "OW", curve.astype("<u2").tobytes())
    return item
