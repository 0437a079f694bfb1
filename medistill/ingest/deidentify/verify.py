"""Search of a written file for anything its source said: a second opinion that shares no code with the rebuilding.

The output is read by a small parser of its own, byte by byte. What is public by its place (a listed term, a code
with its meaning, a registered or newly made UID, a number that stands at the same tag in the source) is set aside;
every other byte, gaps between elements and the pixel data included, is searched for every text of the source, in
several encodings and forms.

Short texts (three to five characters) are looked for as whole words outside the pixel data; texts of six and more
characters anywhere. Findings name tags, never values.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from medistill.errors import RejectedFile
from medistill.ingest.decode import silence
from medistill.ingest.deidentify import vocabulary
from medistill.ingest.deidentify.elements import PIXEL_DATA, Found, name, parse
from medistill.ingest.deidentify.profile import Profile, Rule
from medistill.ingest.deidentify.said import BULK, SHORT, TABLES, WORD, Said
from medistill.ingest.deidentify.search import LONG, find_texts

_NUMERIC = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d"}
#: Rows, Columns, SamplesPerPixel, BitsAllocated, BitsStored and PixelRepresentation.
_PIXEL_TAGS = (0x00280010, 0x00280011, 0x00280002, 0x00280100, 0x00280101, 0x00280103)
_NEW_UID = re.compile(r"2\.25\.[1-9]\d{30,38}")
_TIME = re.compile(r"(?:[01]\d|2[0-3])[0-5]\d[0-5]\d(?:\.\d{3})?")
#: A number from here on may stand only if all but a few of its digits are zeros: a dose, a count, no identifier.
_LARGE, _FEW_DIGITS = 1_000_000, 5
#: What the output says about itself.
_OWN = frozenset(
    {
        "yes", "no", "modified", "removed", "medistill", "medistill allowlist", "dcm", "113100", "113101",
        "113105", "113107", "113108", "basic application confidentiality profile", "clean pixel data option",
        "clean descriptors option", "retain longitudinal temporal information modified dates option",
        "retain patient characteristics option", "unspecified", "contrast", "coil", "map", "120000",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A text of the source found in the output.

    Args:
        where: Place in the output: tags from the outermost sequence inwards, ``"between elements"`` or
            ``"preamble"``.
        origin: Place in the source in the same form.
        text: What was found; never shown.
    """

    where: str
    origin: str
    text: str = field(repr=False, compare=False)


def check(source: Dataset, output: bytes, profile: Profile) -> None:
    """Refuse an output that says anything its source said.

    Raises:
        RejectedFile: PHI_RESIDUAL, naming the tags.
    """
    found = survivors(source, output, profile)
    if found:
        places = sorted({survivor.where for survivor in found})
        raise RejectedFile("PHI_RESIDUAL", "at " + ", ".join(places[:5]))


def survivors(source: Dataset | bytes, output: bytes, profile: Profile) -> list[Survivor]:
    """Every text of the source that stands in the output where it is not public.

    Args:
        source: The original file.
        output: The new file: explicit little endian with a preamble.
        profile: Tells which terms are public at which attribute.

    Returns:
        Findings in the order of the output; empty for a clean file.

    Raises:
        RejectedFile: PHI_RESIDUAL if the output is not of the form this module can read in full.
    """
    if isinstance(source, bytes):
        with silence():
            source = pydicom.dcmread(io.BytesIO(source), force=True)
    said = Said()
    said.read_file(source)
    try:
        elements, gaps = parse(output)
    except ValueError:
        raise RejectedFile("PHI_RESIDUAL", "the new file cannot be read back") from None
    residue, findings = _unexplained(elements, said, _public_terms(profile))
    residue += [("between elements", gap) for gap in gaps if gap]
    findings += [*_search_residue(residue, said), *_surplus(elements)]
    for element in elements:
        if len(element.value) > BULK or element.path[-1] in (PIXEL_DATA, *TABLES):
            findings += _search_bulk(element, said)
    return findings


def _surplus(elements: Sequence[Found]) -> list[Survivor]:
    """Room for hidden text: uncompressed pixel data longer than its image, or with bits that no pixel uses."""
    top = {element.path[0]: element.value for element in elements if len(element.path) == 1}
    if PIXEL_DATA not in top:
        raise RejectedFile("PHI_RESIDUAL", "the new file cannot be read back: it has no pixels")
    if sum(element.path == (PIXEL_DATA,) for element in elements) > 1:
        return []
    rows, columns, samples, allocated, stored, signed = (
        int.from_bytes(top.get(tag, b""), "little") for tag in _PIXEL_TAGS
    )
    frames = int(top.get(0x00280008, b"").decode("latin-1").strip(" \0") or 1)
    if top.get(0x00280004, b"").startswith(b"YBR_FULL_422"):
        samples = 2
    data, bits = top[PIXEL_DATA], frames * rows * columns * samples * allocated
    spare = False
    if stored < allocated in (8, 16, 32):
        values = np.frombuffer(
            data, f"<{'i' if signed else 'u'}{allocated // 8}", min(bits, 8 * len(data)) // allocated
        )
        low, high = (-(1 << stored - 1), 1 << stored - 1) if signed else (0, 1 << stored)
        spare = bool(len(values)) and not low <= int(values.min()) <= int(values.max()) < high
    if len(data) != (bits + 15) // 16 * 2 or spare:
        return [Survivor(where=name((PIXEL_DATA,)), origin=name((PIXEL_DATA,)), text="surplus")]
    return []


def _public_terms(profile: Profile) -> Mapping[int, frozenset[str]]:
    """Public terms by tag: those of the profile's closed lists."""
    return _terms_of(tuple(sorted(profile.iods)), profile)


_TERMS: dict[str, Mapping[int, frozenset[str]]] = {}


def _terms_of(classes: tuple[str, ...], profile: Profile) -> Mapping[int, frozenset[str]]:
    if profile.fingerprint not in _TERMS:
        table: dict[int, frozenset[str]] = {}
        for uid in classes:
            _collect(profile.iods[uid].rules, table)
        _TERMS[profile.fingerprint] = table
    return _TERMS[profile.fingerprint]


def _collect(rules: Mapping[Any, Rule], table: dict[int, frozenset[str]]) -> None:
    lists = {
        "body_part": vocabulary.BODY_PARTS,
        "manufacturer": vocabulary.MANUFACTURERS,
        "model": vocabulary.MODELS,
        "image_type": vocabulary.IMAGE_TYPES,
        "window_names": vocabulary.WINDOW_NAMES,
    }
    for tag, rule in rules.items():
        terms = lists.get(rule.kind, rule.terms)
        instead = frozenset({rule.instead.casefold()}) if rule.instead else frozenset()
        table[int(tag)] = table.get(int(tag), frozenset()) | terms | instead
        _collect(rule.items, table)


_MARKS = {0x00080104: "meaning", 0x00080100: "code", 0x00080102: "scheme"}
_PHOTOMETRIC = frozenset({"monochrome1", "monochrome2", "rgb", "ybr_full", "ybr_full_422", "palette color",
                          "ybr_ict", "ybr_rct"})  # fmt: skip
_WORD_TAGS = frozenset({0x00081030, 0x0008103E, 0x00181030})
_PATTERN_TAGS = {0x00181210: "kernel", 0x00200020: "orientation", 0x00101010: "age"}
_HARMLESS = frozenset({0x00020000, 0x00020001})


def _unexplained(
    elements: Iterable[Found], said: Said, public: Mapping[int, frozenset[str]]
) -> tuple[list[tuple[str, bytes]], list[Survivor]]:
    """Values that are not public by their place, and numbers too long to be a measurement."""
    residue: list[tuple[str, bytes]] = []
    findings: list[Survivor] = []
    for element in elements:
        tag = element.path[-1]
        bulky = len(element.value) > BULK or tag in TABLES
        if tag == PIXEL_DATA or tag in _HARMLESS or not element.value or bulky:
            continue
        if element.vr in _NUMERIC or element.vr in (b"DS", b"IS"):
            problem = _number_is_new(element, said)
            if problem is None:
                continue
            if problem:
                findings.append(Survivor(where=name(element.path), origin=name(element.path), text=problem))
                continue
        elif element.vr == b"AT" or _is_public(element, said, public.get(tag, frozenset())):
            continue
        residue.append((name(element.path), element.value))
    return residue, findings


def _number_is_new(element: Found, said: Said) -> str | None:
    """``None`` for a public number, a text for one that may identify, empty for one to search."""
    code = _NUMERIC.get(element.vr)
    try:
        if code is None:
            values = {float(part) for part in element.value.decode("ascii").split("\\") if part.strip()}
        else:
            values = set(struct.unpack(f"<{len(element.value) // struct.calcsize(code)}{code}", element.value))
    except (ValueError, struct.error):
        return ""
    if any(abs(value) >= _LARGE and len(f"{abs(value):.0f}".rstrip("0")) > _FEW_DIGITS for value in values):
        return "large number"
    digits = [str(abs(int(value))) for value in values if abs(value) >= 10_000]
    if any(text in said.long for text in digits):
        return "number of an identifier"
    return None


def _is_public(element: Found, said: Said, terms: frozenset[str]) -> bool:
    """Whether a value may coincide with the source because of what it is."""
    text = element.value.decode("latin-1").rstrip(" \0")
    tag, parts = element.path[-1], [part.strip().casefold() for part in text.split("\\")]
    if element.vr in (b"UI", b"TM", b"DA"):
        return all(_is_new(element, part, said) for part in parts)
    if tag in _MARKS:
        return text.casefold() in vocabulary.code_texts() or text.casefold() in _OWN
    if tag in _PATTERN_TAGS:
        return all(vocabulary.matches(_PATTERN_TAGS[tag], part) for part in text.split("\\"))
    if tag in _WORD_TAGS:
        return all(word in vocabulary.WORDS and word not in said.people for word in text.casefold().split())
    listed = terms | _OWN | (_PHOTOMETRIC if tag == 0x00280004 else frozenset())
    return all(not part or part in listed for part in parts)


def _is_new(element: Found, part: str, said: Said) -> bool:
    """Whether a UID, date or time is registered or made by us, and not one of the source."""
    if element.vr == b"UI":
        made = _NEW_UID.fullmatch(part) is not None and part not in said.uids
        return made or vocabulary.is_public_uid(part)
    if element.vr == b"DA":
        return len(part) == 8 and part.isdigit() and part not in said.dates
    return _TIME.fullmatch(part) is not None and (part == "120000" or part not in said.at.get(element.path, ()))


def _search_residue(residue: list[tuple[str, bytes]], said: Said) -> list[Survivor]:
    findings = []
    for where, value in residue:
        views = {text.casefold() for text in _readings(value)}
        words = {word for view in views for word in WORD.findall(view) if len(word) >= SHORT}
        hits = {word: said.words[word] for word in words if word in said.words}
        together = "\n".join(views)
        hits.update({text: path for text, path in said.long.items() if text in together})
        findings += [Survivor(where=where, origin=name(path), text=text) for text, path in hits.items()]
    return findings


def _readings(value: bytes) -> Iterator[str]:
    """A value as text in every encoding that was thought of."""
    yield value.decode("latin-1")
    yield value.decode("utf-8", "ignore")
    if b"\0" in value:
        yield value.decode("utf-16-le", "ignore")
        yield value.decode("utf-16-be", "ignore")
        yield value.replace(b"\0", b"").decode("latin-1")


def _search_bulk(element: Found, said: Said) -> list[Survivor]:
    """Long texts in pixel data and large tables."""
    table = element.path[-1] in TABLES
    texts = {
        text: path
        for text, path in said.long.items()
        if len(text) >= LONG and len(set(text)) >= 4 and not (table and _is_ramp(text))
    }
    return [
        Survivor(where=name(element.path), origin=name(texts[text]), text=text)
        for text in find_texts(element.value, texts)
    ]


def _is_ramp(text: str) -> bool:
    """Whether a text is what a ramp of numbers spells, such as ``123456``."""
    return list(text) in (sorted(text), sorted(text, reverse=True))
