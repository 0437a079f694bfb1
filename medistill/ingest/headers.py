"""Header values read once into typed records.

:class:`Header` holds original identifiers: it lives inside the function that reads one file and is never stored,
logged or shown (``repr`` is empty). What is written down comes from closed lists or is a pseudonym.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medistill.core.cohort import SEXES
from medistill.errors import RejectedFile
from medistill.ingest.intensity import Lut, Presentation, Window

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MODALITIES = "BI CR CT DX ES GM IO IVUS MG MR NM OCT OP OPT OT PT PX RF RG RTIMAGE SC SM TG US XA XC"
_VIEWS = "AP PA LL RL RLD LLD RLO LLO LAO RAO LPO RPO CC MLO ML LM LMO XCCL XCCM FB SIO ISO"
#: Modalities kept as they are (PS3.3 C.7.3.1.1.1); another value becomes empty.
MODALITIES = frozenset(_MODALITIES.split())
#: View positions kept as they are (PS3.3 C.8.1.1, C.8.11.7); another value becomes empty.
VIEWS = frozenset(_VIEWS.split())


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
    )


def read_presentation(dataset: Dataset) -> Presentation:
    """Grey level description of an image.

    A window the standard does not define (empty, width 0) is treated as absent and marked. Low values are white
    for MONOCHROME1 and for the shape INVERSE; a DX image says both and means one inversion (PS3.3 C.8.11.3).

    Raises:
        RejectedFile: If a lookup table is malformed.
    """
    signed = integer(dataset, "PixelRepresentation") == 1
    lut = _lut(dataset, "ModalityLUTSequence", signed=signed)
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    shifted_signed = signed if lut is None and intercept >= 0 else lut is None
    window, invalid = _window(dataset)
    return Presentation(
        bits_stored=integer(dataset, "BitsStored") or 8,
        signed=signed,
        slope=slope or 1.0,
        intercept=intercept,
        modality_lut=lut,
        window=window,
        voi_lut=_lut(dataset, "VOILUTSequence", signed=shifted_signed),
        padding=_padding(dataset),
        inverted=text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        or text(dataset, "PresentationLUTShape") == "INVERSE",
        invalid_window=invalid,
    )


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


def _first(dataset: Dataset, keyword: str, *, strict: bool = False) -> Any:
    try:
        value = dataset.get(keyword)
    except Exception:
        if strict:
            raise RejectedFile("BAD_VR", f"{keyword} is malformed") from None
        return None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        value = value[0] if len(value) else None
    return None if value in ("", b"") else value


def _number(dataset: Dataset, keyword: str, default: float) -> float:
    try:
        value = float(_first(dataset, keyword))
    except (TypeError, ValueError, OverflowError):
        return default
    return value if math.isfinite(value) else default


def _window(dataset: Dataset) -> tuple[Window | None, bool]:
    """First window, and whether an unusable one was given."""
    given = "WindowCenter" in dataset or "WindowWidth" in dataset
    window = Window(
        center=_number(dataset, "WindowCenter", math.nan),
        width=_number(dataset, "WindowWidth", math.nan),
        function=text(dataset, "VOILUTFunction").upper() or "LINEAR",
    )
    return (window, False) if window.usable else (None, given)


def _padding(dataset: Dataset) -> tuple[int, int] | None:
    if "PixelPaddingValue" not in dataset:
        return None
    try:
        one = int(_first(dataset, "PixelPaddingValue"))
        other = _first(dataset, "PixelPaddingRangeLimit")
        ends = (one, one if other is None else int(other))
    except (TypeError, ValueError, OverflowError):
        return None
    return min(ends), max(ends)


def _lut(dataset: Dataset, sequence: str, *, signed: bool) -> Lut | None:
    """First item of a LUT sequence (PS3.3 C.11.1.1)."""
    if not dataset.get(sequence):
        return None
    try:
        item = dataset[sequence][0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item.LUTData
        if isinstance(data, bytes):
            order = "<" if dataset.original_encoding[1] is not False else ">"
            data = np.frombuffer(data[: len(data) // 2 * 2], dtype=f"{order}u2")
        values = np.atleast_1d(np.asarray(data)).astype(np.float32)[: count or 65536]
    except Exception:
        raise RejectedFile("BAD_VR", f"{sequence} is malformed") from None
    if not 1 <= bits <= 16 or len(values) == 0:
        raise RejectedFile("BAD_VR", f"{sequence} has no usable table")
    if signed and first > 32767:
        first -= 65536
    return Lut(first=first, values=values, bits=bits)
