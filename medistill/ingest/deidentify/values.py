"""Reading and writing single values of data elements.

A value is read to plain text or numbers and written anew, so that the bytes of the source never reach the output.
Nothing here raises for a malformed value: it reads as ``None``.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.multival import MultiValue

Element: TypeAlias = "DataElement | RawDataElement"
#: ``struct`` codes of binary numbers.
BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_NUMBER = re.compile(r"[+-]?(?:\d{1,12}\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?")
_LONGEST_DS = 16
_LARGE = 1_000_000


def texts(element: Element) -> list[str]:
    """Values as text without padding; empty list for no value. Undecodable bytes become characters of Latin-1."""
    value: Any = element.value
    if value is None:
        return []
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, (MultiValue, list, tuple)):
        return [str(item).strip(" \0") for item in value]
    value = str(value)
    return [item.strip(" \0") for item in value.split("\\")] if value.strip(" \0") else []


def numbers(element: Element, vr: str) -> list[float] | None:
    """Values as numbers.

    Args:
        element: Element of the source.
        vr: Representation to assume where the source does not say.

    Returns:
        The numbers, empty for no value; ``None`` if any is malformed, infinite or not a number.
    """
    value: Any = element.value
    if isinstance(value, bytes):
        own = element.VR if element.VR in BINARY or element.VR in ("DS", "IS") else vr
        return _unpack(value, own, element) if own in BINARY else _parse(texts(element))
    if value is None or value == "":
        return []
    many = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    if all(isinstance(item, (int, float)) for item in many):
        return [float(item) for item in many] if all(math.isfinite(item) for item in many) else None
    return _parse([str(item) for item in many])


def _unpack(value: bytes, vr: str, element: Element) -> list[float] | None:
    size = struct.calcsize(BINARY[vr])
    if len(value) % size:
        return None
    order = "<" if getattr(element, "is_little_endian", True) else ">"
    found = struct.unpack(f"{order}{len(value) // size}{BINARY[vr]}", value)
    return [float(item) for item in found] if all(map(math.isfinite, found)) else None


def _parse(items: Sequence[str]) -> list[float] | None:
    if not all(map(_NUMBER.fullmatch, items)):
        return None
    return [float(item) for item in items]


def encode_numbers(values: Sequence[float], vr: str, digits: int = 12) -> bytes | None:
    """Bytes of numbers, little endian.

    Args:
        values: Finite numbers.
        vr: Representation to write.
        digits: Significant digits to keep of a fraction; numbers from a million keep five.

    Returns:
        Padded bytes, or ``None`` if a value does not fit.
    """
    values = [float(f"{value:.5g}") if abs(value) >= _LARGE else value for value in values]
    if vr == "IS":
        return encode_text("\\".join(str(int(value)) for value in values))
    if vr == "DS":
        return encode_text("\\".join(_decimal(value, digits) for value in values))
    exact = [float(f"{value:.{digits}g}") if vr in ("FL", "FD") else int(value) for value in values]
    try:
        return struct.pack(f"<{len(exact)}{BINARY[vr]}", *exact)
    except (struct.error, OverflowError):
        return None


def _decimal(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    while len(text) > _LONGEST_DS:
        digits -= 1
        text = f"{value:.{digits}g}"
    return text


def encode_text(text: str, *, uid: bool = False) -> bytes:
    """ASCII bytes of even length."""
    content = text.encode("ascii")
    return content + (b"\0" if uid else b" ") * (len(content) % 2)
