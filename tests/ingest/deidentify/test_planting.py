"""Nothing planted survives, and everything the answer key asks for is there, on every kind of image."""

from __future__ import annotations

import io
from datetime import date

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset
from medistill.ingest.deidentify import deidentify, encode, survivors
from tests.ingest.deidentify.planting import (
    ACTIONS,
    CLASSES,
    UTILITY,
    Names,
    Planted,
    base,
    encodings,
    plant,
    surviving,
)

SYNTAXES = [("", 12), ("", 8), (uids.JPEGBaseline8Bit, 8), (uids.JPEGLSLossless, 12), (uids.JPEG2000Lossless, 12)]
MASK = (4, 6, 12, 20)


def run(planted: Planted, secret, profile, **options) -> tuple[bytes, Dataset]:
    output = encode(deidentify(read_dataset(planted.payload), secret, profile, screened=True, **options))
    return output, pydicom.dcmread(io.BytesIO(output))


@pytest.mark.parametrize("iod", CLASSES)
@pytest.mark.parametrize(("syntax", "bits"), SYNTAXES)
def test_no_planted_text_survives(iod, syntax, bits, secret, profile) -> None:
    planted = plant(iod, syntax=syntax, bits=bits)
    assert len(planted.texts) > 120
    assert set(surviving(planted.texts, planted.payload)) >= {"PatientID", "private 0", "preamble and meta 4"}
    output, _ = run(planted, secret, profile)
    assert surviving(planted.texts, output) == []
    assert survivors(read_dataset(planted.payload), output, profile) == []


def test_every_planted_text_is_in_the_file_it_was_planted_in() -> None:
    """Without this the search for survivors would prove nothing."""
    planted = plant("CT")
    found = set(surviving(planted.texts, planted.payload))
    missing = set(planted.texts) - found
    shapeless = {"overlay bits", "dates 07.04.1931", "fraction SliceLocation", "fraction SpacingBetweenSlices"}
    assert missing <= shapeless


@pytest.mark.parametrize("iod", CLASSES)
def test_answer_key(iod, secret, profile) -> None:
    planted = plant(iod)
    source = pydicom.dcmread(io.BytesIO(planted.payload))
    _, result = run(planted, secret, profile)
    assert {answer.action for answer in planted.key} == set(ACTIONS)
    shifts = set()
    for answer in planted.key:
        if answer.action in ("tag_retained", "text_retained"):
            assert result[answer.keyword].value == source[answer.keyword].value, answer.keyword
        elif answer.action == "text_notnull":
            assert str(result[answer.keyword].value)
        elif answer.action == "date_shifted":
            moved = date.fromisoformat(result[answer.keyword].value)
            shifts.add((date.fromisoformat(str(answer.value)) - moved).days)
        elif answer.action == "uid_changed":
            assert result[answer.keyword].value == secret.uid(str(answer.value)) != answer.value
    assert len(shifts) == 1
    assert 36525 <= shifts.pop() < 36525 + 18262
    assert result.SourceImageSequence == [] if "SourceImageSequence" in result else True
    assert not result.PatientBirthDate
    assert result.PatientAge == "090Y"
    assert result.PatientIdentityRemoved == "YES"


@pytest.mark.parametrize("iod", CLASSES)
def test_uids_and_patients_are_consistent_across_files(iod, secret, profile) -> None:
    names = Names(5)
    first, second = base(iod, names, seed=1), base(iod, names, seed=2)
    second.PatientID, second.StudyInstanceUID = f"  {first.PatientID} ", first.StudyInstanceUID
    second.StudyDate = "20170722"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = first.SOPClassUID, first.SOPInstanceUID
    second.ReferencedImageSequence = [reference]
    one, two = (deidentify(ds, secret, profile, screened=True) for ds in (first, second))
    assert one.PatientID == two.PatientID == one.PatientName
    assert one.StudyInstanceUID == two.StudyInstanceUID
    assert two.ReferencedImageSequence[0].ReferencedSOPInstanceUID == one.SOPInstanceUID
    assert (date.fromisoformat(two.StudyDate) - date.fromisoformat(one.StudyDate)).days == 37


@pytest.mark.parametrize("iod", CLASSES)
@pytest.mark.parametrize(("syntax", "bits"), SYNTAXES)
def test_pixels_are_retained(iod, syntax, bits, secret, profile) -> None:
    planted = plant(iod, syntax=syntax, bits=bits)
    before = read_dataset(planted.payload)
    _, after = run(planted, secret, profile)
    assert np.array_equal(before.pixel_array & (1 << bits) - 1, after.pixel_array)


@pytest.mark.parametrize(("syntax", "bits"), SYNTAXES)
def test_pixels_are_hidden_under_a_mask_and_nowhere_else(syntax, bits, secret, profile) -> None:
    planted = plant("CR", syntax=syntax, bits=bits)
    before = read_dataset(planted.payload).pixel_array & (1 << bits) - 1
    _, after = run(planted, secret, profile, masks=[MASK])
    top, left, bottom, right = MASK
    hidden = np.zeros(before.shape, bool)
    hidden[top:bottom, left:right] = True
    assert np.array_equal(after.pixel_array[~hidden], before[~hidden])
    assert (after.pixel_array[hidden] == before.min()).all()
    assert after.BurnedInAnnotation == "NO"


def test_the_source_is_not_changed(secret, profile) -> None:
    planted = plant("MR")
    source = read_dataset(planted.payload)
    deidentify(source, secret, profile)
    fresh = read_dataset(planted.payload)
    assert [str(element) for element in source] == [str(element) for element in fresh]
    assert source.preamble == fresh.preamble


def test_the_key_decides_everything_that_is_new(secret, profile) -> None:
    source = base("CT", Names(1))
    other = type(secret)(bytes(32))
    one, two = deidentify(source, secret, profile), deidentify(source, other, profile)
    assert one.StudyDate != two.StudyDate
    assert one.PatientID != two.PatientID
    assert encode(one) == encode(deidentify(source, secret, profile))


@pytest.mark.parametrize("iod", ["US", "SC"])
def test_images_that_often_carry_text_need_a_search_of_their_pixels(iod, secret, profile) -> None:
    with pytest.raises(RejectedFile) as refused:
        deidentify(base(iod, Names(1)), secret, profile)
    assert refused.value.code == "BURNED_IN"


def test_a_header_that_declares_text_needs_a_search_too(secret, profile) -> None:
    source = base("CT", Names(1))
    source.BurnedInAnnotation = "YES"
    with pytest.raises(RejectedFile) as refused:
        deidentify(source, secret, profile)
    assert refused.value.code == "BURNED_IN"


@pytest.mark.parametrize(
    "uid", [uids.SegmentationStorage, uids.EncapsulatedPDFStorage, uids.RTDoseStorage, "1.2.3"]
)
def test_other_kinds_are_turned_away(uid, secret, profile) -> None:
    source = base("CT", Names(1))
    source.SOPClassUID = uid
    with pytest.raises(RejectedFile) as refused:
        deidentify(source, secret, profile)
    assert refused.value.code == "NON_IMAGE_SOP"


def test_utility_tags_are_all_in_the_profile(profile) -> None:
    retained = profile.retained()
    for iod, values in UTILITY.items():
        assert set(values) <= set(retained[iod])


def test_encodings_are_searched() -> None:
    assert surviving({"a": "Zorquv"}, "xxZORQUVxx".encode("utf-16-be")) == ["a"]
    assert b"zorquv" in encodings("Zorquv")
