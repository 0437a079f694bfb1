"""A small parser of explicit little endian files (PS3.5 7.1, PS3.10 7.1) that accounts for every byte."""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Tags from the outermost sequence inwards.
Path = tuple[int, ...]
PREAMBLE: Path = (0,)
PIXEL_DATA = 0x7FE00010

_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF


class Found(NamedTuple):
    """An element without items: its place, value representation and value."""

    path: Path
    vr: bytes
    value: bytes


def parse(output: bytes) -> tuple[list[Found], list[bytes]]:
    """Elements of a file in their order, and every byte that belongs to none.

    Raises:
        ValueError: If the file has another form, or ends within an element.
    """
    try:
        return _parse_file(output)
    except (struct.error, IndexError, RecursionError):
        raise ValueError("not a whole file of explicit little endian") from None


def _parse_file(output: bytes) -> tuple[list[Found], list[bytes]]:
    if output[128:132] != b"DICM":
        raise IndexError
    elements: list[Found] = [Found(PREAMBLE, b"UN", output[:128])]
    gaps: list[bytes] = []
    end = _parse_elements(output, 132, len(output), (), elements, gaps)
    gaps.append(output[end:])
    return elements, gaps


def _parse_elements(
    data: bytes, place: int, end: int, outer: Path, elements: list[Found], gaps: list[bytes]
) -> int:
    while place < end:
        group, number, vr = struct.unpack_from("<HH2s", data, place)
        tag = group << 16 | number
        if tag == _ITEM_END:
            return place + 8
        if vr in _LONG_VRS:
            gaps.append(data[place + 6 : place + 8].strip(b"\0"))
            (length,) = struct.unpack_from("<I", data, place + 8)
            start = place + 12
        else:
            (length,) = struct.unpack_from("<H", data, place + 6)
            start = place + 8
        path = (*outer, tag)
        if vr == b"SQ":
            place = _parse_items(data, start, length, path, elements, gaps)
        elif length == _UNDEFINED:
            place = _parse_fragments(data, start, path, elements)
        else:
            if start + length > end:
                raise IndexError
            elements.append(Found(path, vr, data[start : start + length]))
            place = start + length
    return place


def _parse_items(
    data: bytes, place: int, length: int, path: Path, elements: list[Found], gaps: list[bytes]
) -> int:
    end = len(data) if length == _UNDEFINED else place + length
    while place < end:
        group, number, size = struct.unpack_from("<HHI", data, place)
        tag = group << 16 | number
        place += 8
        if tag == _SEQUENCE_END:
            return place
        if tag != _ITEM:
            raise IndexError
        item_end = end if size == _UNDEFINED else place + size
        place = _parse_elements(data, place, item_end, path, elements, gaps)
    return place


def _parse_fragments(data: bytes, place: int, path: Path, elements: list[Found]) -> int:
    while True:
        group, number, size = struct.unpack_from("<HHI", data, place)
        tag = group << 16 | number
        place += 8
        if tag == _SEQUENCE_END:
            return place
        if tag != _ITEM or place + size > len(data):
            raise IndexError
        elements.append(Found(path, b"OB", data[place : place + size]))
        place += size


def name(path: Path) -> str:
    """A place as tags, for a person."""
    if path == PREAMBLE:
        return "preamble"
    return " > ".join(f"({tag >> 16:04X},{tag & 0xFFFF:04X})" for tag in path)
