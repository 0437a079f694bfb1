"""Header values read once into typed records.

:class:`Header` holds original identifiers: it lives inside the function that reads one file and is never stored,
logged or shown (``repr`` is empty). What is written down comes from closed lists or is a pseudonym.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from medistill.core.cohort import SEXES
from medistill.errors import RejectedFile
from medistill.ingest.burned_in.ultrasound import outside_regions
from medistill.ingest.intensity import Lut, Presentation, Window

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MODALITIES = "BI CR CT DX ES GM IO IVUS MG MR NM OCT OP OPT OT PT PX RF RG RTIMAGE SC SM TG US XA XC"
_VIEWS = "AP PA LL RL RLD LLD RLO LLO LAO RAO LPO RPO CC MLO ML LM LMO XCCL XCCM FB SIO ISO"
#: Modalities kept as they are (PS3.3 C.7.3.1.1.1); another value becomes empty.
MODALITIES = frozenset(_MODALITIES.split())
#: View positions kept as they are (PS3.3 C.8.1.1, C.8.11.7); another value becomes empty.
VIEWS = frozenset(_VIEWS.split())
_CROSS_SECTIONAL = frozenset({"CT", "MR", "PT"})
_NOT_DIAGNOSTIC = frozenset(
    {
        "Segmentation Storage",
        "Label Map Segmentation Storage",
        "Height Map Segmentation Storage",
        "Parametric Map Storage",
        "RT Dose Storage",
    }
)
_TEXT_TYPES = frozenset({"SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "DOSE INFO", "DOSE_INFO"})
_HEAD_PARTS = frozenset(
    "HEAD BRAIN SKULL FACE HEADNECK NECK ORBIT SINUS MAXILLA MANDIBLE JAW TMJ NOSE EAR PITUITARY IAC "  # noqa: SIM905
    "WHOLEBODY".split()
)
#: SNOMED CT and SRT codes of head, brain, skull, face (PS3.16 CID 4).
_HEAD_CODES = frozenset(
    "69536005 T-D1100 12738006 T-A0100 89546000 T-11100 89545001 T-D1200 774007 45048000 363654007 "  # noqa: SIM905
    "2095001 38266002".split()
)
_HEAD_WORDS = re.compile(
    r"\b(head|brain|skull|crani|cerebr|neuro|fac(e|ial)\b|sinus|orbit|pituitar|stroke|sch[aä]del|kopf|t[eê]te"
    r"|cerveau|cabeza)",
    re.IGNORECASE,
)
_ASCII = frozenset({"AS", "CS", "DA", "DS", "IS", "UI"})
_LOCAL = frozenset({"LO", "SH"})  #: ASCII means the same in every character set but for shift sequences
_SHORT = frozenset({"US", "SS"})


@dataclass(frozen=True, kw_only=True, repr=False)
class Header:
    """Who and what an image shows, as the source says it. Never leaves the reading function."""

    sop_uid: str = ""
    study_uid: str = ""
    patient_id: str = ""
    issuer: str = ""
    sex: str = ""
    age: str = ""
    birth_date: str = ""
    study_date: str = ""
    institution: str = ""
    modality: str = ""
    view: str = ""
    burned_in: bool = False
    carries_text: bool = False
    diagnostic: bool = True
    localiser: bool = False
    head: bool = False
    outside: tuple[tuple[int, int, int, int], ...] = ()


def read_header(dataset: Dataset) -> Header:
    """Identity and description of an image; a malformed element counts as empty."""
    sex, modality = text(dataset, "PatientSex").upper(), text(dataset, "Modality").upper()
    view = text(dataset, "ViewPosition").upper()
    return Header(
        sop_uid=text(dataset, "SOPInstanceUID"),
        study_uid=text(dataset, "StudyInstanceUID"),
        patient_id=text(dataset, "PatientID"),
        issuer=text(dataset, "IssuerOfPatientID"),
        sex=sex if sex in SEXES else "",
        age=text(dataset, "PatientAge"),
        birth_date=text(dataset, "PatientBirthDate"),
        study_date=text(dataset, "StudyDate"),
        institution=text(dataset, "InstitutionName"),
        modality=modality if modality in MODALITIES else "",
        view=view if view in VIEWS else "",
        burned_in=text(dataset, "BurnedInAnnotation").upper() == "YES",
        carries_text=_carries_text(dataset, modality),
        diagnostic=UID(text(dataset, "SOPClassUID") or "1.2").name not in _NOT_DIAGNOSTIC,
        localiser="LOCALIZER" in _image_type(dataset),
        head=modality in _CROSS_SECTIONAL and is_head(dataset),
        outside=outside_regions(dataset, *_frame_shape(dataset)) if modality == "US" else (),
    )


def _frame_shape(dataset: Dataset) -> tuple[int, int]:
    return integer(dataset, "Rows"), integer(dataset, "Columns")


def is_head(dataset: Dataset) -> bool:
    """Whether an image shows a head, by body part, anatomic region or description.

    Descriptions are free text: they are looked at here and go no further.
    """
    if text(dataset, "BodyPartExamined").upper() in _HEAD_PARTS:
        return True
    try:
        regions = [text(item, "CodeValue") for item in dataset.get("AnatomicRegionSequence") or ()]
    except Exception:
        regions = []
    if any(region in _HEAD_CODES for region in regions):
        return True
    described = (text(dataset, keyword) for keyword in ("SeriesDescription", "StudyDescription", "ProtocolName"))
    return any(_HEAD_WORDS.search(words) for words in described)


def _carries_text(dataset: Dataset, modality: str) -> bool:
    """Whether images of this kind usually have text in their pixels, and the header does not say otherwise."""
    if text(dataset, "BurnedInAnnotation").upper() == "NO":
        return False
    name = UID(text(dataset, "SOPClassUID") or "1.2").name
    return modality == "US" or "Secondary Capture" in name or bool(_TEXT_TYPES & _image_type(dataset))


def _image_type(dataset: Dataset) -> set[str]:
    try:
        values = dataset.get("ImageType") or ()
    except Exception:
        return set()
    return {str(value).strip().upper() for value in ([values] if isinstance(values, str) else values)}


def read_presentation(dataset: Dataset, frame: int = 0) -> Presentation:
    """Grey level description of an image, or of one frame of a multi-frame image.

    Enhanced images keep the rescale values and the window in functional groups (PS3.3 C.7.6.16.2.9 and .10): what
    the frame says comes before what all frames share, which comes before the top level. A window the standard does
    not define (empty, width 0) is treated as absent and marked. Low values are white for MONOCHROME1 and for the
    shape INVERSE; a DX image says both and means one inversion (PS3.3 C.8.11.3).

    Args:
        dataset: Header of the file.
        frame: Number of the frame, from 0.

    Raises:
        RejectedFile: If a lookup table is malformed.
    """
    rescale = _group(dataset, "PixelValueTransformationSequence", frame)
    shown = _group(dataset, "FrameVOILUTSequence", frame)
    signed = integer(dataset, "PixelRepresentation") == 1
    lut = _lut(rescale, "ModalityLUTSequence", signed=signed)
    slope, intercept = _number(rescale, "RescaleSlope", 1.0), _number(rescale, "RescaleIntercept", 0.0)
    window, invalid = _window(shown)
    return Presentation(
        bits_stored=integer(dataset, "BitsStored"),
        signed=signed,
        slope=slope or 1.0,
        intercept=intercept,
        modality_lut=lut,
        window=window,
        voi_lut=_lut(shown, "VOILUTSequence", signed=lut is None and (signed or intercept < 0)),
        padding=_padding(dataset, signed=signed),
        inverted=text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        or text(dataset, "PresentationLUTShape") == "INVERSE",
        invalid_window=invalid,
    )


def has_frame_groups(dataset: Dataset) -> bool:
    """Whether frames describe their grey levels one by one."""
    return has(dataset, "PerFrameFunctionalGroupsSequence")


def has(dataset: Dataset, keyword: str) -> bool:
    """Whether an element is present, even empty."""
    return dataset.get_item(_tag(keyword)) is not None


def text(dataset: Dataset, keyword: str) -> str:
    """First value of an element as stripped text; empty where it is absent or malformed."""
    value = _first(dataset, keyword)
    return "" if value is None else str(value).strip()


def integer(dataset: Dataset, keyword: str) -> int:
    """First value of an element as an integer; 0 where it is absent.

    Raises:
        RejectedFile: If there is a value that is no integer.
    """
    value = _first(dataset, keyword, strict=True)
    try:
        return 0 if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        raise RejectedFile("BAD_VR", f"{keyword} is not an integer") from None


@cache
def _tag(keyword: str) -> BaseTag:
    number = tag_for_keyword(keyword)
    assert number is not None, keyword
    return Tag(number)


def _first(dataset: Dataset, keyword: str, *, strict: bool = False) -> Any:
    """First value, or nothing; plain values are read without pydicom's conversion, which is 20 times slower."""
    try:
        element: Any = dataset.get_item(_tag(keyword))
        if element is None:
            return None
        value = _plain(element) if isinstance(element, RawDataElement) else None
        if value is None:
            value = dataset[_tag(keyword)].value
    except Exception:
        if strict:
            raise RejectedFile("BAD_VR", f"{keyword} is malformed") from None
        return None
    if isinstance(value, (list, tuple, MultiValue)):
        value = value[0] if len(value) else None
    return None if value in ("", b"") else value


def _plain(element: RawDataElement) -> str | int | None:
    """First value of a raw element of a simple VR (PS3.5 table 6.2-1); nothing where pydicom has to look at it."""
    content = element.value
    if not isinstance(content, bytes):
        return None
    if element.VR in _ASCII:
        return content.split(b"\\", 1)[0].decode("latin-1").strip(" \0")
    if element.VR in _LOCAL and content.isascii() and b"\x1b" not in content:
        return content.split(b"\\", 1)[0].decode("ascii").strip(" \0")
    if element.VR in _SHORT and len(content) >= 2:
        order: Literal["little", "big"] = "little" if element.is_little_endian else "big"
        return int.from_bytes(content[:2], order, signed=element.VR == "SS")
    return None


def _group(dataset: Dataset, macro: str, frame: int) -> Dataset:
    """Item of a functional group that holds for a frame, else the data set itself (PS3.3 C.7.6.16)."""
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if not has(dataset, groups):
            continue
        try:
            items = dataset[_tag(groups)].value
            group = items[number].get(_tag(macro)) if number < len(items) else None
            if group is not None and len(group.value):
                return group.value[0]  # type: ignore[no-any-return]
        except Exception:
            raise RejectedFile("BAD_VR", f"{groups} is malformed") from None
    return dataset


def _number(dataset: Dataset, keyword: str, default: float) -> float:
    try:
        value = float(_first(dataset, keyword))
    except (TypeError, ValueError, OverflowError):
        return default
    return value if math.isfinite(value) else default


def _window(dataset: Dataset) -> tuple[Window | None, bool]:
    """First window, and whether an unusable one was given."""
    if not (has(dataset, "WindowCenter") or has(dataset, "WindowWidth")):
        return None, False
    window = Window(
        center=_number(dataset, "WindowCenter", math.nan),
        width=_number(dataset, "WindowWidth", math.nan),
        function=text(dataset, "VOILUTFunction").upper() or "LINEAR",
    )
    return (window, False) if window.usable else (None, True)


def _padding(dataset: Dataset, *, signed: bool) -> tuple[float, float] | None:
    """Range of stored values without image (PS3.3 C.7.5.1.1.2), in the sign of the stored values."""
    prefix = "" if has(dataset, "PixelPaddingValue") else "Float"
    if prefix and has(dataset, "DoubleFloatPixelPaddingValue"):
        prefix = "DoubleFloat"
    try:
        one = float(_first(dataset, f"{prefix}PixelPaddingValue"))
        other = _first(dataset, f"{prefix}PixelPaddingRangeLimit")
        ends = [one, one if other is None else float(other)]
    except (TypeError, ValueError, OverflowError):
        return None
    if not prefix:
        ends = [_with_sign(end, signed=signed) for end in ends]
    return min(ends), max(ends)


def _with_sign(value: float, *, signed: bool) -> float:
    """A 16-bit value that was written with the other sign than the pixels have."""
    if signed and value > 32767:
        return value - 65536
    return value + 65536 if not signed and value < 0 else value


def _lut(dataset: Dataset, sequence: str, *, signed: bool) -> Lut | None:
    """First item of a LUT sequence (PS3.3 C.11.1.1)."""
    if not has(dataset, sequence):
        return None
    try:
        items = dataset[_tag(sequence)].value
        if not items:
            return None
        item = items[0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item.LUTData
        count = count or 65536
        if isinstance(data, bytes):
            order = "<" if dataset.original_encoding[1] is not False else ">"
            packed = bits <= 8 and len(data) < 2 * count  # two entries in a word
            data = np.frombuffer(data[: len(data) // 2 * 2], dtype="u1" if packed else f"{order}u2")
        values = np.atleast_1d(np.asarray(data)).astype(np.float32)[:count]
    except Exception:
        raise RejectedFile("BAD_VR", f"{sequence} is malformed") from None
    if not 1 <= bits <= 16 or len(values) == 0:
        raise RejectedFile("BAD_VR", f"{sequence} has no usable table")
    return Lut(first=int(_with_sign(first, signed=True)) if signed else first, values=values, bits=bits)
