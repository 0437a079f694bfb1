"""A new data set from an allowlist: what is not listed is not copied, what is listed is checked and written anew.

Example::

    profile = default_profile()
    clean = deidentify(read_dataset(path), Pseudonymiser(key), profile)
    payload = encode(clean)

References: PS3.15 Annex E (basic application confidentiality profile and options), PS3.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag
from pydicom.uid import UID

from medistill.errors import RejectedFile
from medistill.ingest.deidentify.builder import CODE, Builder, first_texts, made_dataset, raw_element, tag_of
from medistill.ingest.deidentify.pixels import Box, Pixels, clean_pixels
from medistill.ingest.deidentify.profile import Profile
from medistill.ingest.deidentify.values import encode_text
from medistill.ingest.identity import Pseudonymiser

IMPLEMENTATION_UID = UID("2.25.305828488182831875890203105390285383139")
IMPLEMENTATION_NAME = "MEDISTILL"
METHOD = "medistill allowlist"
#: Options of PS3.15 Annex E by code (CID 7050).
_METHODS = {
    "113100": "Basic Application Confidentiality Profile",
    "113101": "Clean Pixel Data Option",
    "113105": "Clean Descriptors Option",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
}
_PIXEL_DATA = tag_of("PixelData")


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A new data set and what was done.

    Args:
        dataset: With file meta information; encode it with :func:`~medistill.ingest.deidentify.writing.encode`.
        actions: How many elements were ``kept``, ``replaced``, ``shifted``, ``remapped``, ``emptied`` and
            ``removed``.
        patient: Pseudonym of the patient.
        study: Pseudonym of the study.
        flags: What was assumed, as fixed words.
    """

    dataset: Dataset = field(repr=False)
    actions: Mapping[str, int]
    patient: str
    study: str
    flags: tuple[str, ...] = ()


def deidentify(
    dataset: Dataset,
    pseudonymiser: Pseudonymiser,
    profile: Profile,
    *,
    masks: Sequence[Box] = (),
    screened: bool = False,
) -> Dataset:
    """New data set of an image; see :func:`rebuild`."""
    return rebuild(dataset, pseudonymiser, profile, masks=masks, screened=screened).dataset


def rebuild(
    dataset: Dataset,
    pseudonymiser: Pseudonymiser,
    profile: Profile,
    *,
    masks: Sequence[Box] = (),
    screened: bool = False,
    allow_burned_in: bool = False,
) -> Rebuilt:
    """New data set of an image, with a record of what was done.

    Args:
        dataset: The source with its file meta information; is not changed.
        pseudonymiser: Replaces identifiers under the secret key.
        profile: The allowlist.
        masks: Regions to black out in every frame, ``(top, left, bottom, right)`` with ends not included.
        screened: Whether the pixels were searched for text; ``masks`` then covers all that was found.
        allow_burned_in: Accept images that were not searched although their kind commonly carries text, or their
            header says so.

    Raises:
        RejectedFile: NON_IMAGE_SOP for a kind of image outside the profile, BURNED_IN, NEST_LIMIT, BAD_VR, or what
            :func:`~medistill.ingest.deidentify.pixels.clean_pixels` raises.
    """
    kind = "".join(first_texts(dataset, "SOPClassUID")[:1])
    iod = profile.iods.get(kind)
    if iod is None:
        raise RejectedFile("NON_IMAGE_SOP", "the kind of image is not in the profile")
    marked = "YES" in first_texts(dataset, "BurnedInAnnotation")
    if (iod.screen or marked) and not (screened or allow_burned_in):
        raise RejectedFile("BURNED_IN", "the pixels were not searched for text")
    builder = Builder.of(dataset, pseudonymiser, profile)
    pixels = clean_pixels(dataset, masks)
    try:
        elements = builder.elements(dataset, iod.rules)
    except RecursionError:
        raise RejectedFile("NEST_LIMIT") from None
    builder.actions["removed"] = max(0, len(dataset) - len(elements) - 1)
    _put_pixels(elements, pixels, dataset)
    _put_statement(elements, profile, kind=kind, screened=screened, masked=bool(masks))
    instance = "".join(first_texts(dataset, "SOPInstanceUID")[:1])
    if not instance:
        raise RejectedFile("BAD_VR", "SOPInstanceUID is missing")
    _put(elements, "SOPInstanceUID", pseudonymiser.uid(instance))
    built = made_dataset(elements)
    built.preamble = b"\0" * 128
    built.file_meta = _meta(kind, pseudonymiser.uid(instance), pixels.syntax)
    return Rebuilt(
        dataset=built,
        actions=dict(builder.actions),
        patient=builder.patient,
        study=builder.study,
        flags=builder.flags,
    )


def _put(elements: dict[BaseTag, Any], keyword: str, value: str | int | bytes) -> None:
    tag = tag_of(keyword)
    vr = dictionary_VR(tag)
    if isinstance(value, int):
        encoded = struct.pack("<H", value) if vr == "US" else encode_text(str(value))
    else:
        encoded = value if isinstance(value, bytes) else encode_text(value, uid=vr == "UI")
    elements[tag] = raw_element(tag, vr, encoded)


def _put_pixels(elements: dict[BaseTag, Any], pixels: Pixels, source: Dataset) -> None:
    layout = pixels.layout
    values: dict[str, str | int] = {
        "SamplesPerPixel": layout.samples,
        "PhotometricInterpretation": layout.photometric,
        "Rows": layout.rows,
        "Columns": layout.columns,
        "BitsAllocated": layout.allocated,
        "BitsStored": layout.stored,
        "HighBit": layout.stored - 1,
        "PixelRepresentation": int(layout.signed),
    }
    if layout.samples > 1:
        values["PlanarConfiguration"] = layout.planar
    if layout.frames:
        values["NumberOfFrames"] = layout.frames
    for keyword, value in values.items():
        _put(elements, keyword, value)
    if pixels.flattened:
        for tag in [tag for tag in elements if 0x00281101 <= tag <= 0x00281223]:
            del elements[tag]
    wide = not pixels.syntax.is_encapsulated and layout.allocated > 8
    element = DataElement(_PIXEL_DATA, "OW" if wide else "OB", pixels.data, already_converted=True)
    element.is_undefined_length = pixels.syntax.is_encapsulated
    elements[_PIXEL_DATA] = element
    pointer = elements.get(tag_of("FrameIncrementPointer"))
    if pointer is not None and not all(tag in elements for tag in _pointed(pointer.value)):
        del elements[pointer.tag]


def _pointed(value: bytes) -> list[int]:
    halves = struct.unpack(f"<{len(value) // 2}H", value)
    return [halves[place] << 16 | halves[place + 1] for place in range(0, len(halves), 2)]


def _put_statement(
    elements: dict[BaseTag, Any], profile: Profile, *, kind: str, screened: bool, masked: bool
) -> None:
    """What was done, in the words of the standard (PS3.15 E.1.1, PS3.3 C.7.1.1)."""
    options = profile.options
    used = {
        "113100": True,
        "113101": masked,
        "113105": options.keep_words,
        "113107": options.keep_dates,
        "113108": options.keep_sex or options.keep_age,
    }
    codes = [
        made_dataset(
            {
                tag: raw_element(tag, vr, encode_text(text))
                for tag, vr, text in zip(CODE, ("SH", "SH", "LO"), (code, "DCM", _METHODS[code]), strict=True)
            }
        )
        for code, wanted in used.items()
        if wanted
    ]
    _put(elements, "SOPClassUID", kind)
    _put(elements, "PatientIdentityRemoved", "YES")
    _put(elements, "DeidentificationMethod", METHOD)
    sequence = tag_of("DeidentificationMethodCodeSequence")
    elements[sequence] = DataElement(sequence, "SQ", DicomSequence(codes), already_converted=True)
    modified = "MODIFIED" if options.keep_dates else "REMOVED"
    _put(elements, "LongitudinalTemporalInformationModified", modified)
    if screened:
        _put(elements, "BurnedInAnnotation", "NO")


def _meta(kind: str, instance: str, syntax: UID) -> FileMetaDataset:
    """File meta information of our own making (PS3.10 7.1)."""
    elements: dict[BaseTag, Any] = {
        tag_of("FileMetaInformationVersion"): raw_element(BaseTag(0x00020001), "OB", b"\0\1")
    }
    _put(elements, "MediaStorageSOPClassUID", kind)
    _put(elements, "MediaStorageSOPInstanceUID", instance)
    _put(elements, "TransferSyntaxUID", str(syntax))
    _put(elements, "ImplementationClassUID", IMPLEMENTATION_UID)
    _put(elements, "ImplementationVersionName", IMPLEMENTATION_NAME)
    return FileMetaDataset(elements)
