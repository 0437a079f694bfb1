"""Rules applied to elements: every value is checked and written anew, or replaced, or left out."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag

from medistill.errors import RejectedFile
from medistill.ingest.deidentify import vocabulary
from medistill.ingest.deidentify.dates import Calendar, days_back, start_of_study
from medistill.ingest.deidentify.profile import ITEM, Profile, Rule
from medistill.ingest.deidentify.textlike import text_like
from medistill.ingest.deidentify.values import BINARY, Element, encode_numbers, encode_text, numbers, texts
from medistill.ingest.identity import Pseudonymiser

_MAX_DEPTH = 32
_PLAIN_CODE = Rule(kind="code", vr="SQ")
_IDENTITY_GROUPS = (0x0010, 0x0012, 0x0032, 0x0038)
_IDENTITY_TAGS = frozenset({0x00080050, 0x00200010, 0x00401001, 0x00400009, 0x00402016, 0x00402017, 0x00181000})
_LONG_NUMBER = re.compile(rb"\d{5,}")
_MODIFIERS = (
    "PatientOrientationModifierCodeSequence",
    "AnatomicRegionModifierSequence",
    "PrimaryAnatomicStructureModifierSequence",
    "ViewModifierCodeSequence",
)


@cache
def tag_of(keyword: str) -> BaseTag:
    """Tag of an attribute of the data dictionary."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return BaseTag(tag)


CODE = tuple(tag_of(keyword) for keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
_MODIFIER_TAGS = tuple(map(tag_of, _MODIFIERS))


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Applies rules to the elements of one file."""

    secret: Pseudonymiser = field(repr=False)
    profile: Profile
    patient: str
    study: str
    calendar: Calendar = field(repr=False)
    signed: bool
    private_numbers: frozenset[bytes] = field(repr=False)
    private_words: frozenset[str] = field(repr=False)
    actions: Counter[str] = field(default_factory=Counter)
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset, secret: Pseudonymiser, profile: Profile) -> Builder:
        """Builder for one file: its patient, its dates, and what identifies someone in it."""
        first = {
            keyword: "".join(first_texts(dataset, keyword)[:1])
            for keyword in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SOPInstanceUID", "StudyDate")
        }
        study = first["StudyInstanceUID"]
        if first["PatientID"]:
            patient = secret.patient(first["IssuerOfPatientID"], first["PatientID"])
        else:
            patient = secret.token("own patient", study or first["SOPInstanceUID"])
        times = tuple("".join(first_texts(dataset, keyword)[:1]) for keyword in ("StudyTime", "SeriesTime"))
        start, day = start_of_study(first["StudyDate"], times)
        return cls(
            secret=secret,
            profile=profile,
            patient=patient,
            study=secret.study(study or first["SOPInstanceUID"]),
            calendar=Calendar(days=days_back(secret, patient), start=start, start_day=day),
            signed=first_texts(dataset, "PixelRepresentation") == ["1"],
            private_numbers=_private_numbers(dataset),
            private_words=_private_words(dataset),
            flags=() if first["PatientID"] else ("no_patient_id",),
        )

    def elements(
        self, source: Dataset, rules: Mapping[BaseTag, Rule], depth: int = 0
    ) -> dict[BaseTag, DataElement | RawDataElement]:
        """New elements of a data set or an item, by tag in order."""
        if depth > _MAX_DEPTH:
            raise RejectedFile("NEST_LIMIT")
        made: dict[BaseTag, DataElement | RawDataElement] = {}
        for tag in sorted(source.keys() & rules.keys()):
            rule = rules[tag]
            if rule.kind == "pixel":
                continue
            if rule.vr == "SQ":
                sequence = self._sequence(source, tag, rule, depth)
                if sequence is not None:
                    made[tag] = DataElement(tag, "SQ", sequence, already_converted=True)
                continue
            vr = _plain_vr(rule.vr, signed=self.signed)
            value = self._value(source.get_item(tag), rule, vr)
            if value is not None:
                made[tag] = raw_element(tag, vr, value)
        return made

    def _value(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        """New bytes of one value, or ``None`` to leave the element out."""
        textual = vr not in BINARY and vr not in ("AT", "OW")
        empty = not texts(element) if textual else element.value in (None, "", b"")
        if empty and rule.kind != "pseudonym":
            return b""
        many = textual and rule.most and len(texts(element)) > rule.most
        value = None if many else _ACTIONS[rule.kind](self, element, rule, vr)
        if value is None:
            instead = rule.instead
            self.actions["emptied" if instead == "" else "replaced" if instead is not None else "removed"] += 1
            return None if instead in (None, ITEM) else encode_text(instead or "")
        self.actions[_COUNTED.get(rule.kind, "kept")] += 1
        return value

    def _sequence(self, source: Dataset, tag: BaseTag, rule: Rule, depth: int) -> DicomSequence | None:
        try:
            items = source[tag].value
        except Exception:
            items = b""  # not a sequence after all
        if rule.kind == "empty" or not isinstance(items, DicomSequence) or not items:
            return DicomSequence() if rule.kind == "empty" or isinstance(items, DicomSequence) else None
        if rule.kind == "code":
            made = [code for code in (self._code(item, rule, depth) for item in items) if code is not None]
        else:
            made = [made_dataset(found) for item in items if (found := self._item(item, rule, depth)) is not None]
        if not made:
            self.actions["removed"] += 1
            return DicomSequence() if rule.instead == "" else None
        self.actions["kept"] += 1
        return DicomSequence(made)

    def _item(self, item: Dataset, rule: Rule, depth: int) -> dict[BaseTag, DataElement | RawDataElement] | None:
        """New elements of an item; ``None`` where one that the item is worth nothing without could not be kept."""
        made = self.elements(item, rule.items, depth + 1)
        lost = any(inner.instead == ITEM and tag not in made for tag, inner in rule.items.items())
        return None if lost else made

    def _code(self, item: Dataset, rule: Rule, depth: int) -> Dataset | None:
        """A code of the standard with its meaning written anew (PS3.3 section 8); ``None`` for any other."""
        value, scheme = (
            "".join(first_texts(item, keyword)[:1]) for keyword in ("CodeValue", "CodingSchemeDesignator")
        )
        meaning = vocabulary.code_meaning(scheme, value)
        if meaning is None or not meaning.isascii() or len(meaning) > 64 or len(value) > 16:
            return None
        made: dict[BaseTag, DataElement | RawDataElement] = {
            tag: raw_element(tag, vr, encode_text(text))
            for tag, vr, text in zip(CODE, ("SH", "SH", "LO"), (value, scheme, meaning), strict=True)
        }
        for tag in _MODIFIER_TAGS:
            if tag in item:
                nested = [self._code(inner, _PLAIN_CODE, depth + 1) for inner in item[tag].value or ()]
                modifiers = DicomSequence([code for code in nested if code is not None])
                made[tag] = DataElement(tag, "SQ", modifiers, already_converted=True)
        return made_dataset({**made, **self.elements(item, rule.items, depth + 1)})

    def _pseudonym(self, element: Element, rule: Rule, vr: str) -> bytes:
        return encode_text(self.patient)

    def _empty(self, element: Element, rule: Rule, vr: str) -> bytes:
        return b""

    def _fixed(self, element: Element, rule: Rule, vr: str) -> bytes:
        return encode_text(rule.instead or "")

    def _uid(self, element: Element, rule: Rule, vr: str) -> bytes:
        return encode_text("\\".join(self.secret.uid(uid) if uid else "" for uid in texts(element)), uid=True)

    def _class(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = texts(element)
        return encode_text("\\".join(found), uid=True) if all(map(vocabulary.is_public_uid, found)) else None

    def _date(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        if not self.profile.options.keep_dates:
            return b""
        return _joined([self.calendar.date(text) for text in texts(element)])

    def _time(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        if not (self.profile.options.keep_times and self.profile.options.keep_dates):
            return b""
        return _joined([self.calendar.time(text) for text in texts(element)])

    def _datetime(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        options = self.profile.options
        if not options.keep_dates:
            return b""
        return _joined([self.calendar.datetime(text, times=options.keep_times) for text in texts(element)])

    def _age(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = re.fullmatch(r"(\d{3})([DWMY])", texts(element)[0].upper())
        if found is None or not self.profile.options.keep_age:
            return None
        years = int(int(found[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[found[2]])
        if years > 130:
            return None
        return encode_text("090Y" if years > self.profile.options.age_limit else f"{years:03d}Y")

    def _attribute_tag(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        value: Any = element.value
        if isinstance(value, bytes):
            if len(value) % 4:
                return None
            order = "<" if getattr(element, "is_little_endian", True) else ">"
            halves = struct.unpack(f"{order}{len(value) // 2}H", value)
            found = [halves[place] << 16 | halves[place + 1] for place in range(0, len(halves), 2)]
        else:
            found = [
                int(tag) for tag in (value if isinstance(value, (list, tuple)) or _is_many(value) else [value])
            ]
        if not all(map(vocabulary.is_public_tag, found)):
            return None
        return b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in found)

    def _words(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        if not self.profile.options.keep_words:
            return None
        spoken = re.findall(r"[A-Za-z0-9]+", " ".join(texts(element)))
        kept = [
            word
            for word in spoken
            if word.casefold() in vocabulary.WORDS and word.casefold() not in self.private_words
        ]
        return encode_text(" ".join(kept)[:64].strip()) if kept else None

    def _orientation(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = texts(element)
        plain = len(found) == 2 and all(vocabulary.matches("orientation", text) for text in found)
        return encode_text("\\".join(found)) if plain else None

    def _number(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = numbers(element, vr)
        if not found or not _is_plausible(found, rule):
            return None
        encoded = encode_numbers(found, vr, rule.digits)
        if encoded is None or (vr in BINARY and text_like(encoded)):
            return None
        if not self._names_someone(encoded if vr in ("DS", "IS") else _printed(found)):
            return encoded
        rounded = encode_numbers(found, vr, 3) if vr in ("DS", "FD", "FL") else None
        return None if rounded is None or self._names_someone(_printed(_decoded(rounded, vr))) else rounded

    def _names_someone(self, printed: bytes) -> bool:
        """Whether the digits of a number hold a number of the patient."""
        if not self.private_numbers:
            return False
        digits = printed.replace(b".", b"")
        return any(number in digits for number in self.private_numbers)

    def _padding(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = numbers(element, vr)
        if found is None or len(found) != 1 or self._names_someone(_printed(found)):
            return None
        return encode_numbers(found, vr)

    def _terms(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        upper = rule.vr == "CS"
        if texts(element) and rule.vr == "CS" and not self.profile.options.keep_sex and rule.terms == _SEXES:
            return b""
        return _listed(texts(element), rule.terms, upper=upper)

    def _body_part(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        return _listed(texts(element), vocabulary.BODY_PARTS, upper=True)

    def _manufacturer(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        return _listed(texts(element), vocabulary.MANUFACTURERS, upper=False)

    def _model(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        return _listed(texts(element), vocabulary.MODELS, upper=False)

    def _image_type(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = [text.upper() for text in texts(element)]
        if not found:
            return None
        kept = [found[0] if found[0] in ("ORIGINAL", "DERIVED", "MIXED") else "DERIVED"]
        kept += [found[1] if found[1] in ("PRIMARY", "SECONDARY") else "SECONDARY"] if len(found) > 1 else []
        for text in found[2:]:
            if text and not (text.isascii() and text.casefold() in vocabulary.IMAGE_TYPES):
                break
            kept.append(text)
        return encode_text("\\".join(kept))

    def _kernel(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = texts(element)
        known = len(found) <= 2 and all(vocabulary.matches("kernel", text) for text in found)
        return encode_text("\\".join(found)) if known else None

    def _window_names(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = texts(element)
        known = all(text.isascii() and text.casefold() in vocabulary.WINDOW_NAMES for text in found)
        return encode_text("\\".join(found)) if known else None

    def _descriptor(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        found = numbers(element, vr)
        if found is None or len(found) != 3 or found[2] not in range(1, 17):
            return None
        return b"".join(struct.pack("<H" if value >= 0 else "<h", int(value)) for value in found)

    def _curve(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        """A table that never turns back: it can hold no text."""
        entries = _entries(element)
        if entries is None or len(entries) == 0:
            return None
        packed = np.frombuffer(entries.tobytes(), np.uint8)
        return entries.astype("<u2").tobytes() if _never_turns(entries) or _never_turns(packed) else None

    def _palette(self, element: Element, rule: Rule, vr: str) -> bytes | None:
        entries = _entries(element)
        if entries is None or text_like(entries.tobytes()):
            return None
        return entries.astype("<u2").tobytes()


_Action = Callable[[Builder, Any, Rule, str], "bytes | None"]
_SEXES = frozenset({"m", "f", "o"})
_ACTIONS: Mapping[str, _Action] = {
    "pseudonym": Builder._pseudonym,
    "empty": Builder._empty,
    "fixed": Builder._fixed,
    "uid": Builder._uid,
    "class": Builder._class,
    "date": Builder._date,
    "time": Builder._time,
    "datetime": Builder._datetime,
    "age": Builder._age,
    "tag": Builder._attribute_tag,
    "words": Builder._words,
    "orientation": Builder._orientation,
    "number": Builder._number,
    "integer": Builder._number,
    "terms": Builder._terms,
    "body_part": Builder._body_part,
    "manufacturer": Builder._manufacturer,
    "model": Builder._model,
    "image_type": Builder._image_type,
    "kernel": Builder._kernel,
    "window_names": Builder._window_names,
    "descriptor": Builder._descriptor,
    "curve": Builder._curve,
    "palette": Builder._palette,
    "padding": Builder._padding,
}
_COUNTED = {
    "pseudonym": "replaced",
    "fixed": "replaced",
    "empty": "emptied",
    "uid": "remapped",
    "date": "shifted",
    "time": "shifted",
    "datetime": "shifted",
}


def first_texts(dataset: Dataset, keyword: str) -> list[str]:
    """Values as text, without converting the element in the source."""
    tag = tag_of(keyword)
    if tag not in dataset:
        return []
    element = dataset.get_item(tag)
    if element.VR in BINARY or (isinstance(element.value, bytes) and keyword == "PixelRepresentation"):
        return [f"{value:g}" for value in numbers(element, "US") or ()]
    return texts(element)


def _listed(found: list[str], terms: frozenset[str], *, upper: bool) -> bytes | None:
    """Values of a closed list; others are left out, and nothing is left where none is known."""
    kept = [text.upper() if upper else text for text in found if text.casefold() in terms and text.isascii()]
    return encode_text("\\".join(kept)) if kept else None


def _joined(parts: Sequence[str | None]) -> bytes | None:
    return None if None in parts else encode_text("\\".join(part for part in parts if part is not None))


def _printed(values: Sequence[float] | None) -> bytes:
    return "\\".join(f"{value:.12g}" for value in values or ()).encode()


def _decoded(encoded: bytes, vr: str) -> list[float]:
    return numbers(raw_element(BaseTag(0), vr, encoded), vr) or []


def _is_plausible(found: Sequence[float], rule: Rule) -> bool:
    """Whether numbers are as many, as large and as whole as their attribute asks for."""
    few = not rule.most or len(found) <= rule.most
    whole = rule.kind == "number" or all(value == int(value) for value in found)
    return few and whole and all(rule.low <= value <= rule.high for value in found)


def _is_many(value: Any) -> bool:
    return type(value).__name__ == "MultiValue"


def _entries(element: Element) -> np.ndarray[Any, Any] | None:
    """Entries of a lookup table as unsigned 16-bit numbers."""
    value: Any = element.value
    if isinstance(value, bytes):
        order = "<" if getattr(element, "is_little_endian", True) else ">"
        return np.frombuffer(value[: len(value) // 2 * 2], f"{order}u2").astype("<u2")
    try:
        return np.asarray(value, dtype=np.int64).reshape(-1).astype("<u2")
    except (TypeError, ValueError, OverflowError):
        return None


def _never_turns(entries: np.ndarray[Any, Any]) -> bool:
    steps = np.diff(entries.astype(np.int32))
    return bool((steps >= 0).all() or (steps <= 0).all())


def _private_numbers(dataset: Dataset) -> frozenset[bytes]:
    """Numbers of five digits or more that identify the patient or the order."""
    found: set[bytes] = set()
    for tag in dataset.keys():  # noqa: SIM118 - iterating over the data set would convert its elements
        if tag >> 16 in _IDENTITY_GROUPS or tag in _IDENTITY_TAGS:
            value: Any = dataset.get_item(tag).value
            content = value if isinstance(value, bytes) else str(value).encode()
            found.update(_LONG_NUMBER.findall(content[:4096]))
    return frozenset(number for number in found if len(set(number)) > 1)


def _private_words(dataset: Dataset) -> frozenset[str]:
    """Parts of the names of people."""
    names = " ".join(
        text
        for keyword in ("PatientName", "OtherPatientNames", "PatientBirthName", "ReferringPhysicianName")
        for text in first_texts(dataset, keyword)
    )
    return frozenset(word.casefold() for word in re.findall(r"[^\W_]+", names))


def _plain_vr(vr: str, *, signed: bool) -> str:
    if vr == "US or SS":
        return "SS" if signed else "US"
    return {"US or OW": "OW", "OB or OW": "OW"}.get(vr, vr)


def raw_element(tag: BaseTag, vr: str, value: bytes) -> RawDataElement:
    """Element of bytes that are ready to be written."""
    return RawDataElement(tag, vr, len(value), value, 0, False, True)


def made_dataset(elements: dict[BaseTag, DataElement | RawDataElement]) -> Dataset:
    """Data set of elements that are ready to be written."""
    dataset = Dataset(elements)
    dataset.set_original_encoding(False, True, "iso8859")
    return dataset
