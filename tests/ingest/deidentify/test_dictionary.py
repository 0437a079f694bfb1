"""Something planted in every attribute of the data dictionary, at the top and inside every sequence."""

from __future__ import annotations

import io

import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from medistill.ingest.decode import read_dataset
from medistill.ingest.deidentify import check, deidentify, encode
from tests.ingest.deidentify.planting import CLASSES, Names, base, surviving

_NEEDED = {0x00080016, 0x00080018, 0x00080005, 0x00080301}
_SKIPPED = {"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "NONE", "AT", "US", "SS", "UL", "SL", "FL", "FD", "UV", "SV"}


def _value(vr: str, names: Names) -> tuple[bytes, str]:
    """Bytes of a legal value and the text to look for."""
    if vr in ("DS", "IS"):
        text = names.number(10)
    elif vr == "UI":
        text = names.uid()
    elif vr in ("DA", "TM", "DT"):
        seed = int(names.number(8))
        day = f"19{10 + seed % 80}0{1 + seed // 80 % 9}{10 + seed // 720 % 18}"
        clock = f"1{seed // 13000 % 10}{10 + seed % 49}{10 + seed // 49 % 49}"
        text = {"DA": day, "TM": clock, "DT": day + clock}[vr]
    elif vr == "AS":
        text = "101Y"
    else:
        text = names.word()
        text = text.upper() if vr == "CS" else text
    return text.encode() + b" " * (len(text) % 2), text


def _plantable() -> list[tuple[int, str]]:
    return [
        (tag, vr.split(" ")[0])
        for tag, (vr, *_) in DicomDictionary.items()
        if tag >> 16 > 2 and tag not in _NEEDED and tag >> 16 != 0x0028 and tag < 0x7FE00000
    ]


def _fill(ds: Dataset, names: Names, texts: dict[str, str], place: str) -> None:
    for tag, vr in _plantable():
        if vr in _SKIPPED or tag in ds or tag & 0xFFFF == 0:
            continue
        value, text = _value(vr, names)
        ds[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
        if vr not in ("TM", "AS"):
            texts[f"{place} {tag:08X}"] = text


def _sequences(ds: Dataset, names: Names, texts: dict[str, str]) -> None:
    for tag, vr in _plantable():
        if vr != "SQ" or tag in ds:
            continue
        word, uid, number = names.word(), names.uid(), names.number(10)
        item = Dataset()
        item.CodeValue, item.CodeMeaning, item.CodingSchemeDesignator = number, word, "99LOCAL"
        item.PatientName, item.ReferencedSOPInstanceUID, item.ImageComments = word, uid, word
        item.SeriesNumber, item.FrameComments = number, word
        ds[Tag(tag)] = DataElement(Tag(tag), "SQ", Sequence([item]))
        texts |= {f"{tag:08X} word": word, f"{tag:08X} uid": uid, f"{tag:08X} number": number}


@pytest.mark.parametrize(
    "iod", [iod if iod in ("CT", "EMR") else pytest.param(iod, marks=pytest.mark.long) for iod in CLASSES]
)
def test_no_attribute_lets_a_text_through(iod, secret, profile) -> None:
    names, texts = Names(sorted(CLASSES).index(iod), syllables=5), {}
    ds = base(iod, names)
    _fill(ds, names, texts, "top")
    _sequences(ds, names, texts)
    if iod == "EMR":
        frame = ds.PerFrameFunctionalGroupsSequence[0]
        _fill(frame, names, texts, "frame")
        for sequence in [element for element in frame if element.VR == "SQ"]:
            _fill(sequence.value[0], names, texts, f"{sequence.tag}")
    assert len(texts) > 3000
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    source = read_dataset(buffer.getvalue())
    output = encode(deidentify(source, secret, profile, screened=True))
    assert surviving(texts, output) == []
    check(source, output, profile)
