"""The search of outputs finds what a broken rebuilding leaves, and nothing in ordinary files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset, silence
from medistill.ingest.deidentify import check, encode, rebuild, survivors
from medistill.ingest.deidentify.search import find_texts
from tests.ingest.deidentify.planting import Names, Planted, base, code, plant


def _put(keyword: str, location: str):
    def leak(out: Dataset, planted: Planted) -> None:
        setattr(out, keyword, planted.texts[location])

    return leak


def _private(out: Dataset, planted: Planted) -> None:
    out.private_block(0x0029, "MAKER", create=True).add_new(1, "OB", planted.texts["private 2"].encode() + b"\0")


def _wide(out: Dataset, planted: Planted) -> None:
    out.add_new(0x00291001, "UN", planted.texts["private 4"].encode("utf-16-be"))


def _upper_case(out: Dataset, planted: Planted) -> None:
    out.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", planted.texts["code strings ImageType 4"].upper()]


def _code_meaning(out: Dataset, planted: Planted) -> None:
    out.ViewCodeSequence = [code("399348003", "SCT", planted.texts["nested 4"])]


def _nested_uid(out: Dataset, planted: Planted) -> None:
    item = Dataset()
    item.ReferencedSOPInstanceUID = planted.texts["nested uid 0"]
    out.ReferencedImageSequence = [item]


def _deep_name(out: Dataset, planted: Planted) -> None:
    inner, outer = Dataset(), Dataset()
    inner.PatientName = planted.texts["nested 5"]
    outer.ModifiedAttributesSequence = [inner]
    out.OriginalAttributesSequence = [outer]


def _overlay(out: Dataset, planted: Planted) -> None:
    out.add_new(0x60003000, "OW", planted.texts["graphics 2"].encode().ljust(32, b"\0"))


def _icc(out: Dataset, planted: Planted) -> None:
    out.ICCProfile = bytes(100) + planted.texts["attachments 2"].encode() + b"\0"


def _pixels(out: Dataset, planted: Planted) -> None:
    data, text = out.PixelData, planted.texts["behind the pixels"].encode()
    out.PixelData = data[:400] + text + data[400 + len(text) :]
    out["PixelData"].VR = "OW"


def _tail(out: Dataset, planted: Planted) -> None:
    out.PixelData = out.PixelData + planted.texts["behind the pixels"].encode().ljust(32, b" ")
    out["PixelData"].VR = "OW"


def _free_text(out: Dataset, planted: Planted) -> None:
    out.ImageComments = f"chest of ({planted.texts['free text ImageComments']})"


def _date_in_other_form(out: Dataset, planted: Planted) -> None:
    out.StudyDescription = "CT chest 15.06.2017"


def _date(out: Dataset, planted: Planted) -> None:
    out.SeriesDate = planted.texts["StudyDate"]


def _two_parts(out: Dataset, planted: Planted) -> None:
    out.SeriesDescription = f"{planted.texts['PatientName given']}{planted.texts['PatientName family']}".lower()


def _table(out: Dataset, planted: Planted) -> None:
    item = Dataset()
    item.add_new("LUTData", "OW", planted.texts["tables 0"].encode() + planted.texts["tables 1"].encode())
    out.VOILUTSequence = [item]


def _number(out: Dataset, planted: Planted) -> None:
    out.SeriesNumber = planted.dataset.PatientID


LEAKS = {
    "name": _put("PatientName", "PatientName family"),
    "number": _put("PatientID", "PatientID"),
    "unit": _put("AccessionNumber", "AccessionNumber"),
    "station": _put("StationName", "ordinary StationName"),
    "study uid": _put("StudyInstanceUID", "StudyInstanceUID"),
    "birth": _put("PatientBirthDate", "PatientBirthDate"),
    "phone": _put("PatientTelephoneNumbers", "ordinary PatientTelephoneNumbers"),
    "private": _private,
    "wide": _wide,
    "code string": _upper_case,
    "code meaning": _code_meaning,
    "nested uid": _nested_uid,
    "deep name": _deep_name,
    "overlay": _overlay,
    "icc": _icc,
    "pixels": _pixels,
    "tail": _tail,
    "free text": _free_text,
    "date": _date,
    "other form": _date_in_other_form,
    "two parts": _two_parts,
    "table": _table,
    "number in a number": _number,
}


@pytest.fixture(scope="module")
def planted() -> Planted:
    with silence():
        return plant("CT", bits=16)


def _leaking(planted: Planted, secret, profile, leak) -> tuple[Dataset, bytes]:
    source = read_dataset(planted.payload)
    out = rebuild(source, secret, profile).dataset
    leak(out, planted)
    buffer = io.BytesIO()
    out.save_as(buffer, enforce_file_format=True)
    return source, buffer.getvalue()


@pytest.mark.parametrize("place", LEAKS)
def test_a_leak_of_any_kind_is_found(place, planted, secret, profile) -> None:
    source, output = _leaking(planted, secret, profile, LEAKS[place])
    found = survivors(source, output, profile)
    assert found
    with pytest.raises(RejectedFile) as refused:
        check(source, output, profile)
    assert refused.value.code == "PHI_RESIDUAL"
    assert not any(text in refused.value.detail for text in planted.texts.values())
    assert not any(text in repr(found) for text in planted.texts.values())


@pytest.mark.parametrize(
    "keyword", ["SourceApplicationEntityTitle", "ImplementationVersionName", "PrivateInformation"]
)
def test_a_leak_in_the_meta_information_is_found(keyword, planted, secret, profile) -> None:
    def leak(out: Dataset, planted: Planted) -> None:
        out.file_meta.PrivateInformationCreatorUID = "1.2.3"
        value = getattr(read_dataset(planted.payload).file_meta, keyword)
        setattr(out.file_meta, keyword, value)

    source, output = _leaking(planted, secret, profile, leak)
    assert survivors(source, output, profile)


def test_leaks_outside_of_elements_are_found(planted, secret, profile) -> None:
    source = read_dataset(planted.payload)
    output = encode(rebuild(source, secret, profile).dataset)
    name = planted.texts["PatientName family"].encode()
    assert not survivors(source, output, profile)
    assert survivors(source, name.ljust(128, b"\0") + output[128:], profile)
    with pytest.raises(RejectedFile):
        check(source, output + name, profile)


def test_a_source_can_be_given_as_bytes(planted, secret, profile) -> None:
    output = encode(rebuild(read_dataset(planted.payload), secret, profile).dataset)
    with silence():
        assert survivors(planted.payload, output, profile) == []


def test_clean_files_raise_no_alarm(data: Path, secret, profile) -> None:
    """Over all real files that are accepted."""
    names = ("valid", "multi_patient", "phi", "series")
    seen = 0
    for path in sorted(path for name in names for path in (data / "dicom" / name).rglob("*") if path.is_file()):
        try:
            with silence():
                output = encode(rebuild(read_dataset(path), secret, profile, allow_burned_in=True).dataset)
        except RejectedFile:
            continue
        with silence():
            assert survivors(read_dataset(path), output, profile) == [], seen
        seen += 1
    assert seen > 95


def _naive(data: bytes, texts: list[str]) -> set[str]:
    def forms(text: str) -> list[bytes]:
        return [text.encode(code, "ignore").lower() for code in ("utf-8", "latin-1", "utf-16-le")]

    folded = data.lower()
    return {text for text in texts if any(form in folded for form in forms(text) if len(form) >= 6)}


@settings(max_examples=60, deadline=None)
@given(
    noise=st.binary(max_size=300),
    texts=st.lists(st.text("abcdefghijk0123 ^", min_size=6, max_size=12), min_size=1, max_size=5, unique=True),
    place=st.integers(0, 150),
    wide=st.booleans(),
    upper=st.booleans(),
)
def test_search_in_bulk_agrees_with_a_naive_one(noise, texts, place, wide, upper) -> None:
    text = texts[0].upper() if upper else texts[0]
    place = 2 * min(place, len(noise) // 2)
    planted = noise[:place] + text.encode("utf-16-le" if wide else "ascii") + noise[place:]
    found = find_texts(planted, texts)
    assert texts[0] in found
    assert found == _naive(planted, texts) or found <= _naive(planted + planted[1:], texts)


def test_search_in_bulk_finds_nothing_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    assert find_texts(noise, ["johnson", "20170615", "müller-lüdenscheidt"]) == set()
    assert find_texts(noise + "MÜLLER-LÜDENSCHEIDT".encode(), ["müller-lüdenscheidt"]) == set()
    assert find_texts(noise + "müller-lüdenscheidt".encode("latin-1"), ["müller-lüdenscheidt"])


def test_vocabulary_that_is_the_patients_name_is_dropped(secret, profile) -> None:
    source = base("CT", Names(3))
    source.PatientName, source.SeriesDescription = "Thorax^Axial", "thorax axial contrast"
    assert rebuild(source, secret, profile).dataset.SeriesDescription == "contrast"


def test_an_output_that_cannot_be_read_back_is_refused(planted, secret, profile) -> None:
    source = read_dataset(planted.payload)
    output = encode(rebuild(source, secret, profile).dataset)
    for broken in (output[:100], output[132:], output[: len(output) // 2]):
        with pytest.raises(RejectedFile):
            survivors(source, broken, profile)
    assert pydicom.dcmread(io.BytesIO(output)).PatientID
