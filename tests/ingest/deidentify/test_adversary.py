"""Places and tricks that the allowlist was not written for, each with the texts that must not come through."""

from __future__ import annotations

import io
import struct

import imagecodecs
import numpy as np
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset
from medistill.ingest.deidentify import check, deidentify, encode
from tests.ingest.deidentify.planting import Names, base, code, surviving

WORD, NUMBER = "Quorvexity", "83719254"


def fresh(iod: str = "CT", **options) -> Dataset:
    return base(iod, Names(77), **options)


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**values) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def encapsulated(ds: Dataset, frames: list[bytes], syntax: str) -> bytes:
    ds.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2) for frame in frames], has_bot=False)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    return written(ds)


def text_in_a_double() -> bytes:
    ds = fresh()
    ds.SpiralPitchFactor = struct.unpack("<d", WORD[:6].encode() + struct.pack("<d", 1.2)[6:])[0]
    return written(ds)


def text_in_an_array_of_shorts() -> bytes:
    ds = fresh("MR")
    ds.AcquisitionMatrix = list(struct.unpack("<4H", WORD[:8].encode()))
    return written(ds)


def text_in_a_vector_of_detectors() -> bytes:
    ds = fresh("NM")
    ds.add_new("DetectorVector", "US", list(struct.unpack("<5H", WORD.encode())))
    return written(ds)


def text_in_attribute_tags() -> bytes:
    ds = fresh("XA")
    ds.add_new(0x00280009, "AT", [0x75516F72, 0x65767869])
    return written(ds)


def number_in_numbers() -> bytes:
    ds = fresh("PT")
    ds.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose = NUMBER
    ds.RescaleIntercept, ds.SliceLocation, ds.ActualFrameDuration = f"-{NUMBER}", f"1.{NUMBER}", NUMBER
    ds.WindowCenter, ds.WindowWidth = ["40", NUMBER], ["400", NUMBER]
    return written(ds)


def text_in_a_nested_allowed_item() -> bytes:
    ds = fresh("US")
    region = ds.SequenceOfUltrasoundRegions[0]
    region.add_new(0x00291010, "LO", WORD)
    region.PatientName, region.ImageComments, region.TransducerFrequency = WORD, WORD, int(NUMBER)
    return written(ds)


def text_around_a_known_code() -> bytes:
    ds = fresh("DX")
    view = code("399348003", "SCT", WORD)
    view.CodingSchemeVersion, view.LongCodeValue, view.ContextUID = WORD[:8], WORD, f"1.2.{NUMBER}"
    view.ViewModifierCodeSequence = [code(NUMBER, "99X", WORD)]
    ds.ViewCodeSequence = [view]
    return written(ds)


def class_uid_with_a_number() -> bytes:
    ds = fresh()
    ds.ReferencedImageSequence = [
        item(ReferencedSOPClassUID=f"1.2.840.{NUMBER}", ReferencedSOPInstanceUID=f"1.{NUMBER}")
    ]
    return written(ds)


def known_manufacturer_with_more() -> bytes:
    ds = fresh()
    ds.Manufacturer, ds.ManufacturerModelName = f"SIEMENS {WORD}", f"Avanto {WORD}"
    return written(ds)


def text_in_an_enhanced_frame() -> bytes:
    ds = fresh("EMR")
    frame = ds.PerFrameFunctionalGroupsSequence[0]
    frame.MRImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "T1", WORD.upper()])]
    frame.FrameContentSequence = [item(StackID=WORD, FrameComments=WORD, FrameLabel=WORD)]
    frame.add_new(0x00211010, "UN", WORD.encode())
    return written(ds)


def text_in_a_palette() -> bytes:
    ds = fresh("US", bits=8)
    ds.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        table = bytearray((np.arange(256, dtype="<u2") * 257).tobytes())
        table[100:110] = WORD.encode()
        ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", bytes(table))
    return written(ds)


def bytes_after_the_file() -> bytes:
    return written(fresh()) + WORD.encode() * 4


def implicit_with_private() -> bytes:
    ds = fresh()
    ds.ImageComments = WORD
    ds.add_new(0x00091010, "UN", WORD.encode())
    ds.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian
    buffer = io.BytesIO()
    ds.save_as(buffer, implicit_vr=True, little_endian=True, enforce_file_format=True)
    return buffer.getvalue()


def planar_colour_with_a_tail() -> bytes:
    ds = fresh("US", bits=8)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 1
    ds.PixelData = bytes(32 * 32 * 3) + WORD.encode()
    ds["PixelData"].VR = "OB"
    return written(ds)


def spare_fragment_behind_jpeg_2000() -> bytes:
    ds = fresh()
    pixels = np.frombuffer(ds.PixelData, "<u2").reshape(32, 32)
    frame = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0)
    return encapsulated(ds, [frame, WORD.encode()], uids.JPEG2000Lossless)


def quantisation_table_of_text() -> bytes:
    ds = fresh(bits=8)
    pixels = np.frombuffer(ds.PixelData, "u1").reshape(32, 32)
    frame = bytearray(imagecodecs.jpeg8_encode(pixels, level=60))
    place = frame.index(b"\xff\xdb") + 10
    frame[place : place + len(WORD)] = WORD.encode()
    return encapsulated(ds, [bytes(frame)], uids.JPEGBaseline8Bit)


def text_at_the_end_of_a_scan() -> bytes:
    ds = fresh(bits=8)
    pixels = np.frombuffer(ds.PixelData, "u1").reshape(32, 32)
    frame = imagecodecs.jpeg8_encode(pixels, level=60)
    return encapsulated(ds, [frame[:-2] + WORD.encode() + frame[-2:]], uids.JPEGBaseline8Bit)


def name_in_kanji() -> bytes:
    ds = fresh()
    ds.SpecificCharacterSet = ["ISO 2022 IR 13", "ISO 2022 IR 87"]
    ds.PatientName, ds.StudyDescription = "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎", "山田太郎"
    return written(ds)


def pixels_that_spell_a_name_of_the_header() -> bytes:
    ds = fresh(bits=8)
    ds.InstitutionName = f"{WORD} clinic"
    ds.PixelData = ds.PixelData[:100] + WORD.encode() + ds.PixelData[110:]
    ds["PixelData"].VR = "OB"
    return written(ds)


def samples_that_spell_a_name_of_the_header() -> bytes:
    ds = fresh(bits=12)
    ds.PatientAddress = WORD
    wide = WORD.encode("utf-16-le")
    ds.PixelData = ds.PixelData[:100] + wide + ds.PixelData[100 + len(wide) :]
    ds["PixelData"].VR = "OW"
    return written(ds)


REFUSED = {pixels_that_spell_a_name_of_the_header, samples_that_spell_a_name_of_the_header}
CASES = [
    text_in_a_double, text_in_an_array_of_shorts, text_in_a_vector_of_detectors, text_in_attribute_tags,
    number_in_numbers, text_in_a_nested_allowed_item, text_around_a_known_code, class_uid_with_a_number,
    known_manufacturer_with_more, text_in_an_enhanced_frame, text_in_a_palette, bytes_after_the_file,
    implicit_with_private, planar_colour_with_a_tail, spare_fragment_behind_jpeg_2000, quantisation_table_of_text,
    text_at_the_end_of_a_scan, name_in_kanji, *REFUSED,
]  # fmt: skip
TEXTS = {"word": WORD, "start": WORD[:8], "six": WORD[:6], "number": NUMBER, "kanji": "山田", "kana": "ﾔﾏﾀﾞ"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_comes_through(case, secret, profile) -> None:
    payload = case()
    source = read_dataset(payload)
    output = encode(deidentify(source, secret, profile, screened=True))
    if case in REFUSED:
        with pytest.raises(RejectedFile) as refused:
            check(source, output, profile)
        assert refused.value.code == "PHI_RESIDUAL"
        assert WORD not in refused.value.detail
        return
    check(source, output, profile)
    assert surviving(TEXTS, output) == []
