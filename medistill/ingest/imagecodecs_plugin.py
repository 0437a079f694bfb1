"""Decoder plugin for pydicom that reads JPEG, JPEG-LS, JPEG 2000, HTJ2K and run lengths with imagecodecs.

It reads what pydicom's usual plugins cannot (12-bit lossy JPEG) and is several times faster for JPEG lossless,
JPEG-LS and run lengths. Register it with :func:`register`; pydicom calls the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid as uids
from pydicom.pixels.decoders.base import get_decoder

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner

LABEL = "medistill-imagecodecs"
_JPEG_END = b"\xff\xd9"  # cannot occur in entropy coded data
_JPEG = (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, uids.JPEGLossless, uids.JPEGLosslessSV1)
_JPEG_LS = (uids.JPEGLSLossless, uids.JPEGLSNearLossless)
_JPEG_2000 = (uids.JPEG2000Lossless, uids.JPEG2000)
_HTJ2K = (uids.HTJ2KLossless, uids.HTJ2KLosslessRPCL, uids.HTJ2K)
#: Syntaxes where pydicom corrects sign and precision by what the codestream says.
SIGN_AWARE = frozenset({*_JPEG_LS, *_JPEG_2000, *_HTJ2K})
SUPPORTED = (*_JPEG, *_JPEG_LS, *_JPEG_2000, *_HTJ2K, uids.RLELossless)
DECODER_DEPENDENCIES = {syntax: ("imagecodecs>=2025.3.30",) for syntax in SUPPORTED}


def _codec(uid: str) -> Any:
    if uid in _JPEG:
        return imagecodecs.JPEG8
    if uid in _JPEG_LS:
        return imagecodecs.JPEGLS
    if uid in _HTJ2K:
        return imagecodecs.HTJ2K
    return imagecodecs.JPEG2K if uid in _JPEG_2000 else imagecodecs.DICOMRLE


def is_available(uid: str) -> bool:
    """Whether this build of imagecodecs can read a transfer syntax."""
    return uid in SUPPORTED and bool(_codec(uid).available)


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """Decode one frame for pydicom, without colour conversion.

    Args:
        source: Codestream of one frame.
        runner: pydicom's description of the pixel data; its container size and the order of colour components are
            set to what was decoded.

    Returns:
        Decoded samples, little endian. Writable, because pydicom corrects signs in place.

    Raises:
        ValueError: If a JPEG or JPEG-LS codestream has no end.
    """
    if runner.transfer_syntax == uids.RLELossless:
        return _decode_run_lengths(source, runner)
    if runner.transfer_syntax in (*_JPEG, *_JPEG_LS) and _JPEG_END not in source:
        raise ValueError("no end: libjpeg would fill in grey, and CharLS would search for seconds")
    array = _decoder(runner.transfer_syntax, runner.samples_per_pixel)(source)
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * array.dtype.itemsize)
    return bytearray(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))


def _decode_run_lengths(source: bytes, runner: DecodeRunner) -> bytearray:
    """One segment per byte of a cell and colour component (PS3.5 annex G)."""
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 1)
    return bytearray(imagecodecs.dicomrle_decode(source, dtype=f"<u{runner.bits_allocated // 8}"))


def _decoder(syntax: str, samples: int) -> Callable[[bytes], NDArray[np.generic]]:
    if syntax in _JPEG and samples == 3:
        return _raw_jpeg
    decoders: tuple[tuple[tuple[str, ...], Any], ...] = (
        (_JPEG, imagecodecs.jpeg8_decode),
        (_JPEG_LS, imagecodecs.jpegls_decode),
        (_HTJ2K, _whole_htj2k),
        (_JPEG_2000, imagecodecs.jpeg2k_decode),
    )
    chosen: Callable[[bytes], NDArray[np.generic]] = next(decode for known, decode in decoders if syntax in known)
    return chosen


def _raw_jpeg(source: bytes) -> NDArray[np.generic]:
    """Components as they are coded: naming the same colour space twice switches conversion off."""
    components: NDArray[np.generic] = imagecodecs.jpeg8_decode(source, colorspace="YCBCR", outcolorspace="YCBCR")
    return components


def _whole_htj2k(source: bytes) -> NDArray[np.generic]:
    """A codestream without damage: the decoder reports errors in C and then returns what it has."""
    reported: list[bool] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: reported.append(True)
    try:
        components: NDArray[np.generic] = imagecodecs.htj2k_decode(source)
    finally:
        sys.unraisablehook = before
    if reported:
        raise ValueError("the codestream is damaged")
    return components


def register() -> None:
    """Make pydicom know this plugin; safe to call more than once."""
    for syntax in SUPPORTED:
        decoder = get_decoder(syntax)
        if LABEL not in decoder.available_plugins and is_available(syntax):
            decoder.add_plugin(LABEL, (__name__, "decode_frame"))
