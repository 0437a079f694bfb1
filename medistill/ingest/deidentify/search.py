"""Search for many texts at once in binary data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

#: Shortest text that is searched, and how much of a text is compared.
LONG, LONGEST = 6, 256
_WIDEST = 256


def find_texts(data: bytes, texts: Iterable[str]) -> set[str]:
    """Which texts of six characters or more stand in binary data, without regard to case.

    Every byte is looked up once in a table that tells at which of the first six places of any text it may stand;
    a place where six bytes in a row fit is compared in full. Read are the bytes as they stand and 16-bit
    characters in both orders.

    Args:
        data: Binary data.
        texts: Texts in lower case.
    """
    wanted: dict[bytes, list[tuple[bytes, str]]] = {}
    for text in texts:
        for encoding in ("utf-8",) if text.isascii() else ("utf-8", "latin-1"):
            encoded = text.encode(encoding, "ignore").lower()
            if len(encoded) >= LONG:
                wanted.setdefault(encoded[:LONG], []).append((encoded, text))
    if not wanted or len(data) < LONG:
        return set()
    table = bytearray(256)
    for place, bytes_here in enumerate(zip(*wanted, strict=True)):
        for byte in set(bytes_here):
            table[byte] |= 1 << place
            table[bytes((byte,)).upper()[0]] |= 1 << place
    found: set[str] = set()
    for characters, fits in _views(data, bytes(table)):
        for place in _candidates(fits):
            part = characters[place : place + LONGEST].tobytes().lower()
            found.update(text for encoded, text in wanted.get(part[:LONG], ()) if part.startswith(encoded))
    return found


def _views(data: bytes, table: bytes) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Characters of 8 and of 16 bits, and the places of a text each may stand at."""
    octets = np.frombuffer(data, np.uint8)
    fits = np.frombuffer(data.translate(table), np.uint8)
    yield octets, fits
    size = len(octets) // 2 * 2
    wide = np.frombuffer(data, "<u2", size // 2)
    for first, empty in ((0, wide < _WIDEST), (1, (wide & 0xFF) == 0)):
        if np.count_nonzero(empty) >= LONG:
            yield octets[first:size:2], np.where(empty, fits[first:size:2], 0)


def _candidates(fits: NDArray[np.uint8]) -> list[int]:
    """Places where six characters in a row may begin a text."""
    count = len(fits) - LONG + 1
    if count <= 0 or not fits[::2].any() or not fits[1::2].any():
        return []
    together = fits[:count].copy()
    for place in range(1, LONG):
        together &= fits[place : place + count] >> place
    together &= 1
    return [int(place) for place in np.flatnonzero(together.view(np.bool_))] if together.any() else []
