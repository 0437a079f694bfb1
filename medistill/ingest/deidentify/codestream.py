"""Compressed frames without comments: everything a decoder does not need is left out.

Comments, application segments, thumbnails, pointers and what follows the end of the image can all hold text. A
stream is copied marker by marker from a list of needed ones. Where that cannot be done with certainty the answer
is ``None``, and the caller stores the decoded pixels instead.

References: ISO/IEC 10918-1 annex B (JPEG), 14495-1 annex C (JPEG-LS), 15444-1 annex A (JPEG 2000).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from pydicom import uid as uids

from medistill.ingest.deidentify.textlike import text_like

_JPEG = (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, uids.JPEGLossless, uids.JPEGLosslessSV1)
_JPEG_LS = (uids.JPEGLSLossless, uids.JPEGLSNearLossless)
_JPEG_2000 = (uids.JPEG2000Lossless, uids.JPEG2000, uids.HTJ2KLossless, uids.HTJ2K)

_SOI, _EOI, _SOS, _DNL = 0xD8, 0xD9, 0xDA, 0xDC
_DHT, _DQT, _DRI, _DAC = 0xC4, 0xDB, 0xDD, 0xCC
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB, 0xF7})
_APPLICATIONS = range(0xE0, 0xF0)
_COMMENT, _LSE = 0xFE, 0xF8
#: Text that compressed data shows by chance rarely.
_LONG_TEXT = re.compile(rb"[A-Za-z0-9 ^.,:/_=\-]{12}")
_SHORT_TEXT = re.compile(rb"[A-Za-z ^]{6}|[0-9]{6}")
_TAIL = 64
_JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"
_HP_COLOUR = b"mrfx"


def clean_frame(frame: bytes, syntax: str) -> bytes | None:
    """One frame without comments.

    Args:
        frame: Codestream of one frame, with or without padding.
        syntax: Transfer syntax UID.

    Returns:
        An equal image in the same syntax, or ``None`` where the stream is not of a known plain form, holds a run
        of readable text, or the syntax is not one that can be cleaned.
    """
    cleaner: Callable[[bytes], bytes | None]
    if syntax in _JPEG or syntax in _JPEG_LS:
        cleaner = _clean_jpeg
    elif syntax in _JPEG_2000:
        cleaner = _clean_jpeg_2000
    else:
        return None
    try:
        return cleaner(frame)
    except (struct.error, IndexError, ValueError):
        return None


def _clean_jpeg(frame: bytes) -> bytes | None:
    if frame[:2] != bytes((0xFF, _SOI)):
        return None
    kept = [frame[:2]]
    for marker, content in _jpeg_segments(frame):
        needed = _needed_segment(marker, content)
        if needed is None:
            return None
        if marker == _EOI:
            kept.append(b"\xff\xd9")
            return b"".join(kept)
        if needed:
            header, scan = needed
            kept.append(struct.pack(">BBH", 0xFF, marker, len(header) + 2) + header + scan)
    return None


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their content up to the next marker: of a scan, its header and its coded data."""
    place = 2
    while True:
        if frame[place] != 0xFF:
            raise ValueError
        while frame[place] == 0xFF:
            place += 1
        marker, place = frame[place], place + 1
        if marker == _EOI:
            yield marker, b""
            return
        (length,) = struct.unpack_from(">H", frame, place)
        end = place + length
        if marker == _SOS:
            end = _end_of_scan(frame, end)
        if end > len(frame) or length < 2:
            raise ValueError
        yield marker, frame[place:end]
        place = end


def _end_of_scan(frame: bytes, place: int) -> int:
    """Place of the first marker after coded data; restart markers and stuffed bytes belong to the data."""
    while True:
        place = frame.index(b"\xff", place)
        follower = frame[place + 1]
        if 0xD0 <= follower <= 0xD7 or follower < 0x80:
            place += 2
        elif follower == 0xFF:
            place += 1
        else:
            return place


def _needed_segment(marker: int, content: bytes) -> tuple[bytes, bytes] | tuple[()] | None:
    """Header and coded data to keep; nothing for a segment to leave out; ``None`` for an unknown one."""
    if marker in (_EOI, _COMMENT):
        return ()
    (length,) = struct.unpack_from(">H", content)
    header, scan = content[2:length], content[length:]
    if marker in _APPLICATIONS:
        return _application(marker, header)
    if marker == _SOS:
        plain = length == 6 + 2 * header[0] and not _shows_text(scan)
        return (header, scan) if plain else None
    if marker in _FRAMES:
        return (header, b"") if length == 8 + 3 * header[5] else None
    return (header, b"") if _is_exact(marker, header) else None


def _is_exact(marker: int, header: bytes) -> bool:
    """Whether a segment is one that decoding needs, of the length its own fields say, and without text."""
    if marker == _DHT:
        return _huffman_is_exact(header) and not text_like(header)
    if marker == _DQT:
        return _quantisation_is_exact(header) and not _holds_word(header)
    if marker == _LSE:
        return len(header) == 11 and header[0] == 1
    return (marker, len(header)) in {(_DRI, 2), (_DRI, 4), (_DNL, 2)}


def _shows_text(data: bytes) -> bool:
    """Whether coded data holds a long readable run anywhere, or a short one where spare bytes would lie."""
    return _LONG_TEXT.search(data) is not None or _holds_word(data[-_TAIL:])


def _holds_word(data: bytes) -> bool:
    return any(len(set(word)) >= 4 for word in _SHORT_TEXT.findall(data))


def _application(marker: int, header: bytes) -> tuple[bytes, bytes] | tuple[()]:
    """What an application segment says about colour, written anew; everything else is left out."""
    if marker == 0xE0 and header.startswith(b"JFIF\0"):
        return _JFIF, b""
    if marker == 0xEE and header.startswith(b"Adobe") and len(header) >= 12 and header[11] <= 2:
        return b"Adobe\0\x64\0\0\0\0" + header[11:12], b""
    if marker == 0xE8 and header[:4] == _HP_COLOUR and len(header) == 5 and header[4] <= 4:
        return _HP_COLOUR + header[4:5], b""
    return ()


def _huffman_is_exact(content: bytes) -> bool:
    place = 0
    while place < len(content):
        if content[place] & 0xEC:
            return False
        place += 17 + sum(content[place + 1 : place + 17])
    return place == len(content)


def _quantisation_is_exact(content: bytes) -> bool:
    place = 0
    while place < len(content):
        if content[place] & 0xEC:
            return False
        place += 1 + (128 if content[place] >> 4 else 64)
    return place == len(content)


_J2K_START = b"\xff\x4f\xff\x51"
_SOT, _SOD, _EOC = 0xFF90, 0xFF93, b"\xff\xd9"
#: SIZ, CAP, CPF, COD, COC, RGN, QCD, QCC, POC, PPM, PPT: what decoding needs.
_J2K_NEEDED = frozenset({0xFF51, 0xFF50, 0xFF59, 0xFF52, 0xFF53, 0xFF5E, 0xFF5C, 0xFF5D, 0xFF5F, 0xFF60, 0xFF61})
#: COM, TLM, PLM, PLT, CRG: comments, and pointers that a decoder can do without.
_J2K_OPTIONAL = frozenset({0xFF64, 0xFF55, 0xFF57, 0xFF58, 0xFF63})


def _clean_jpeg_2000(frame: bytes) -> bytes | None:
    if not frame.startswith(_J2K_START):
        return None
    header = _j2k_header(frame, 2, _SOT)
    if header is None:
        return None
    place = header[1]
    kept: list[bytes] = [frame[:2], header[0]]
    while frame[place : place + 2] != _EOC:
        part = _j2k_tile_part(frame, place)
        if part is None:
            return None
        kept.append(part[0])
        place = part[1]
    if _holds_word(header[0]) or any(map(_shows_text, kept[2:])):
        return None
    return b"".join([*kept, _EOC])


def _j2k_header(frame: bytes, place: int, last: int) -> tuple[bytes, int] | None:
    """Needed segments up to a marker, and where that marker stands."""
    kept: list[bytes] = []
    while True:
        marker, length = struct.unpack_from(">HH", frame, place)
        if marker == last:
            return b"".join(kept), place
        if marker in _J2K_NEEDED:
            kept.append(frame[place : place + 2 + length])
        elif marker not in _J2K_OPTIONAL:
            return None
        place += 2 + length


def _j2k_tile_part(frame: bytes, place: int) -> tuple[bytes, int] | None:
    """One tile-part with its length corrected, and where the next begins."""
    marker, length, tile, size, part, parts = struct.unpack_from(">HHHIBB", frame, place)
    if marker != _SOT or length != 10:
        return None
    end = place + size if size else frame.rindex(_EOC)
    header = _j2k_header(frame, place + 12, _SOD)
    if header is None or not header[1] + 2 <= end <= len(frame) - 2:
        return None
    body = header[0] + frame[header[1] : end]
    return struct.pack(">HHHIBB", _SOT, 10, tile, 12 + len(body), part, parts) + body, end
