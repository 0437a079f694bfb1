"""Pixel data is what it was, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid as uids

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset
from medistill.ingest.deidentify import encode, rebuild
from medistill.ingest.deidentify.codestream import clean_frame
from medistill.ingest.deidentify.pixels import clean_pixels
from tests.ingest.deidentify.planting import Names, base, with_j2k_text, with_jpeg_text

TEXT = "Quorvexity"


def _image(dtype: str = "u1", shape=(48, 40)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    noise = np.random.default_rng(0).integers(0, 9, shape)
    return ((np.sin(x / 5) + np.cos(y / 7) + 2) * 50 + noise).astype(dtype)


STREAMS = {
    uids.JPEGBaseline8Bit: (
        lambda: with_jpeg_text(imagecodecs.jpeg8_encode(_image(), level=95), TEXT, TEXT),
        imagecodecs.jpeg8_decode,
    ),
    uids.JPEGLSLossless: (
        lambda: with_jpeg_text(imagecodecs.jpegls_encode(_image()), TEXT, TEXT),
        imagecodecs.jpegls_decode,
    ),
    uids.JPEG2000Lossless: (
        lambda: with_j2k_text(
            imagecodecs.jpeg2k_encode(_image(), codecformat="j2k", reversible=True, level=0), TEXT
        ),
        imagecodecs.jpeg2k_decode,
    ),
}


@pytest.mark.parametrize("syntax", STREAMS)
def test_a_cleaned_stream_decodes_to_the_same_pixels(syntax) -> None:
    make, decode = STREAMS[syntax]
    frame = make() + TEXT.encode()
    cleaned = clean_frame(frame, syntax)
    assert cleaned is not None
    assert TEXT.encode() in frame
    assert TEXT.encode() not in cleaned
    assert np.array_equal(decode(cleaned), decode(frame))
    assert clean_frame(cleaned, syntax) == cleaned


@pytest.mark.parametrize("syntax", STREAMS)
def test_a_damaged_stream_is_not_cleaned(syntax) -> None:
    frame = STREAMS[syntax][0]()
    assert clean_frame(frame[: len(frame) // 2], syntax) is None
    assert clean_frame(frame[2:], syntax) is None
    assert clean_frame(b"", syntax) is None
    assert clean_frame(frame, uids.RLELossless) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_makes_the_cleaner_fail(data) -> None:
    syntax = data.draw(st.sampled_from(sorted(STREAMS)))
    frame = bytearray(STREAMS[syntax][0]())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cleaned = clean_frame(bytes(frame), syntax)
    assert cleaned is None or TEXT.encode() not in cleaned


def test_real_files_keep_their_pixels(data: Path, secret, profile) -> None:
    """Every accepted real file decodes to what it decoded to before; a flattened palette to the same colours."""
    compared, refused = 0, set()
    for path in sorted((data / "dicom" / "valid").iterdir()):
        try:
            output = encode(rebuild(read_dataset(path), secret, profile, allow_burned_in=True).dataset)
        except RejectedFile as rejection:
            refused.add(rejection.code)
            continue
        before, after = read_dataset(path), pydicom.dcmread(io.BytesIO(output))
        array = before.pixel_array
        if before.PhotometricInterpretation == "PALETTE COLOR" and after.SamplesPerPixel == 3:
            from pydicom.pixels import apply_color_lut

            array = apply_color_lut(array, before)
        assert np.array_equal(array, after.pixel_array), compared
        compared += 1
    assert compared > 45
    assert refused == {"NON_IMAGE_SOP"}


@pytest.mark.parametrize("signed", [0, 1])
def test_spare_bits_are_overwritten(signed) -> None:
    source = base("CT", Names(1))
    source.PixelRepresentation = signed
    values = np.frombuffer(source.PixelData, "<u2").copy()
    source.PixelData = (values | 0xA000).tobytes()
    source["PixelData"].VR = "OW"
    cleaned = np.frombuffer(clean_pixels(source).data, "<u2")
    expected = np.where(signed & (values >> 11), values | 0xF000, values)
    assert np.array_equal(cleaned, expected)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"Rows": 0}, "DIM_LIMIT"),
        ({"Rows": 64}, "TRUNCATED"),
        ({"HighBit": 15}, "BITS_INCONSISTENT"),
        ({"BitsAllocated": 12}, "BITS_INCONSISTENT"),
        ({"SamplesPerPixel": 3}, "COLOUR_MISMATCH"),
        ({"PhotometricInterpretation": "SMITH"}, "COLOUR_MISMATCH"),
        ({"PixelData": b""}, "NO_PIXELS"),
    ],
)
def test_contradictions_are_refused(changes, code) -> None:
    source = base("CT", Names(1))
    for keyword, value in changes.items():
        setattr(source, keyword, value)
    with pytest.raises(RejectedFile) as refused:
        clean_pixels(source)
    assert refused.value.code == code


def test_black_of_each_kind_of_image() -> None:
    source = base("CR", Names(1), bits=8)
    source.PhotometricInterpretation = "MONOCHROME1"
    array = np.frombuffer(clean_pixels(source, [(0, 0, 2, 2)]).data, "u1").reshape(32, 32)
    assert (array[:2, :2] == source.pixel_array.max()).all()
    colour = base("US", Names(1), bits=8)
    colour.SamplesPerPixel, colour.PhotometricInterpretation, colour.PlanarConfiguration = 3, "YBR_FULL", 0
    colour.PixelData = np.random.default_rng(0).integers(0, 256, 32 * 32 * 3, dtype=np.uint8).tobytes()
    hidden = clean_pixels(colour, [(0, 0, 32, 16)])
    rgb = np.frombuffer(hidden.data, "u1").reshape(32, 32, 3)
    assert hidden.layout.photometric == "RGB"
    assert (rgb[:, :16] == 0).all()
    assert rgb[:, 16:].any()
