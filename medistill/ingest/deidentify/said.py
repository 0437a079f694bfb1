"""What a file says: every text of a source, at every depth, in every form it could be repeated in."""

from __future__ import annotations

import math
import re
import struct
from functools import cache
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from medistill.ingest.deidentify import vocabulary
from medistill.ingest.deidentify.elements import PIXEL_DATA, PREAMBLE, Path
from medistill.ingest.deidentify.search import LONG, LONGEST
from medistill.ingest.deidentify.textlike import text_like

SHORT, BULK = 3, 4096
#: Data of lookup tables: numbers that pass through all letters.
TABLES = frozenset({*range(0x00281201, 0x00281204), *range(0x00281221, 0x00281224), 0x00283006})
WORD = re.compile(r"[^\W_]+")
_NUMERIC = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_NUMERIC_VRS = frozenset({*_NUMERIC, "DS", "IS", "US or SS"})
_PRINTABLE = re.compile(rb"[\x20-\x7e]{4,}")
_WIDE = re.compile(rb"(?:[\x20-\x7e]\0){3,}|(?:\0[\x20-\x7e]){3,}")
_BINARY_VRS = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "OB or OW", "US or OW"})
_DATE = re.compile(r"(1[89]\d\d|20\d\d)[.\-/]?(0[1-9]|1[0-2])[.\-/]?(0[1-9]|[12]\d|3[01])")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


class Said:
    """Texts of a source with the place of each."""

    def __init__(self) -> None:
        self.words: dict[str, Path] = {}
        self.long: dict[str, Path] = {}
        self.values: dict[str, Path] = {}
        self.uids: set[str] = set()
        self.dates: set[str] = set()
        self.numbers: dict[Path, set[float]] = {}
        self.at: dict[Path, set[str]] = {}
        self.people: set[str] = set()

    def read_file(self, dataset: Dataset) -> None:
        """Take up everything a file says, preamble and meta information included."""
        self._text((getattr(dataset, "preamble", None) or b"").decode("latin-1"), PREAMBLE)
        if hasattr(dataset, "file_meta"):
            self._dataset(dataset.file_meta, ())
        self._dataset(dataset, ())

    def _dataset(self, dataset: Dataset, outer: Path) -> None:
        entries: list[tuple[Any, Any]] = list(dataset.items())
        for tag, found in entries:
            path = (*outer, int(tag))
            packed = found.VR == "SQ" or (found.VR in (None, "UN") and isinstance(found.value, bytes))
            element = self._converted(dataset, found) if packed else found
            value: Any = element.value
            if isinstance(value, DicomSequence):
                for item in value:
                    self._dataset(item, path)
            elif path == (PIXEL_DATA,):
                self._tail(dataset, value)
            elif value is not None:
                self._value(path, element, value)

    def _tail(self, dataset: Dataset, value: Any) -> None:
        """Texts behind the last uncompressed pixel."""
        shape = [dataset.get(name) or 1 for name in ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel")]
        try:
            length = math.prod(map(int, shape)) * int(dataset.BitsAllocated) // 8
        except (AttributeError, TypeError, ValueError):
            return
        if isinstance(value, bytes) and value[:4] != b"\xfe\xff\x00\xe0":
            self._blob((PIXEL_DATA,), value[length:])

    @staticmethod
    def _converted(dataset: Dataset, element: Any) -> Any:
        """Element with its nested items read, where it has any."""
        is_sequence = element.VR == "SQ" or _known_vr(element.tag) == "SQ" or element.value[:2] == b"\xfe\xff"
        if not is_sequence:
            return element
        try:
            return dataset[element.tag]
        except Exception:
            return element

    def _value(self, path: Path, element: Any, value: Any) -> None:
        vr = element.VR or _known_vr(path[-1])
        if isinstance(value, bytes):
            if vr in _NUMERIC_VRS and vr not in ("DS", "IS"):
                self._binary(path, vr, value, element)
                return
            if vr in _BINARY_VRS or not value.rstrip(b"\0").isascii() or b"\0" in value.rstrip(b"\0"):
                self._blob(path, value)
                return
            text = value.decode("ascii")
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
            text = "\\".join(str(item) for item in value)
        else:
            text = str(value)
        if vr == "UI" or (vr == "UN" and re.fullmatch(r"[\d.\\\0 ]+", text)):
            found = {uid for uid in re.split(r"[\\\0 ]+", text) if uid and not vocabulary.is_public_uid(uid)}
            self.uids.update(found)
            self.long.update(dict.fromkeys((uid.casefold() for uid in found if len(uid) >= LONG), path))
            if re.fullmatch(r"[\d.\\\0 ]*", text):
                return
        if vr in ("DS", "IS"):
            self._decimal(path, text)
            return
        if vr == "PN":
            self._person(path, text)
        self._text(text, path, free=vr in ("PN", "LO", "SH", "LT", "ST", "UT"))

    def _blob(self, path: Path, value: bytes) -> None:
        """Texts inside bytes that are not plain text: readable runs, in 8-bit and 16-bit characters."""
        if path[-1] in TABLES and not text_like(value):
            return
        if len(value) <= BULK and path[-1] >> 16 != 0x0028:
            for encoding in ("utf-8", "latin-1"):
                self._text(value.decode(encoding, "replace").replace("\0", " "), path)
        for found in _PRINTABLE.findall(value):
            self._text(found.decode("ascii"), path)
        if b"\0" in value:
            for found in _WIDE.findall(value):
                self._text(found.replace(b"\0", b"").decode("ascii"), path)

    def _binary(self, path: Path, vr: str, value: bytes, element: Any) -> None:
        code = _NUMERIC.get(vr, "H")
        size = struct.calcsize(code)
        order = "<" if getattr(element, "is_little_endian", True) else ">"
        if len(value) > BULK or len(value) % size:
            return
        self.numbers.setdefault(path, set()).update(struct.unpack(f"{order}{len(value) // size}{code}", value))

    def _decimal(self, path: Path, text: str) -> None:
        numbers = self.numbers.setdefault(path, set())
        for part in text.split("\\"):
            try:
                numbers.add(float(part))
            except ValueError:
                self._text(part, path)

    def _person(self, path: Path, text: str) -> None:
        parts = [part for part in re.split(r"[\^=\s\\,]+", text.strip(" \0")) if part]
        self.people.update(part.casefold() for part in parts)
        for first in parts:
            for second in parts:
                if first is not second and len(first) + len(second) >= LONG - 1:
                    for between in ("", " ", ",", ", ", "_", ".", "^", "-"):
                        self.long.setdefault(f"{first}{between}{second}".casefold(), path)

    def _text(self, text: str, path: Path, *, free: bool = False) -> None:
        text = text.strip(" \0")
        if len(text) < SHORT:
            return
        self.at.setdefault(path, set()).add(text.casefold())
        if len(text) > BULK * 16:
            text = text[: BULK * 16]
        folded = text.casefold()
        for part in map(str.strip, re.split(r"[\\^=\0\r\n\t]+", folded)):
            if len(part) >= LONG and _is_telling(part):
                self.long.setdefault(part[:LONGEST], path)
        for word in WORD.findall(folded):
            if len(word) >= SHORT and not word.isdigit():
                self.words.setdefault(word, path)
            if len(word) >= LONG - (word.isdigit()) and _is_telling(word):
                self.long.setdefault(word[:LONGEST], path)
        for found in _DATE.finditer(text):
            self._date(path, *found.groups())

    def _date(self, path: Path, year: str, month: str, day: str) -> None:
        self.dates.add(year + month + day)
        name = _MONTHS[int(month) - 1]
        for form in (
            f"{year}{month}{day}", f"{day}{month}{year}", f"{month}{day}{year}",
            *(f"{year}{s}{month}{s}{day}" for s in "-./"), *(f"{day}{s}{month}{s}{year}" for s in "-./"),
            *(f"{month}{s}{day}{s}{year}" for s in "-./"), f"{day} {name} {year}", f"{day}-{name}-{year}",
            f"{day}{name}{year}", f"{int(day)} {name} {year}",
        ):  # fmt: skip
            self.long.setdefault(form, path)


def _is_telling(text: str) -> bool:
    """Whether a long text is worth a search: neither a run of few characters nor a short number."""
    return len(set(text)) >= 3


@cache
def _known_vr(tag: int) -> str:
    """Value representation of a tag in the data dictionary, ``UN`` where it is not listed."""
    try:
        return str(dictionary_VR(tag))
    except KeyError:
        return "UN"
