"""Files to stored values: every encoding of the standard, and every way to be damaged."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medistill.errors import RejectedFile
from medistill.ingest import decode
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.quarantine import REASON_CODES
from tests.ingest.conftest import make_dicom

RAMP = (np.arange(64 * 48, dtype=np.uint16) % 4096).reshape(64, 48)
SMOOTH = np.ascontiguousarray(np.broadcast_to(np.linspace(0, 4095, 48), (64, 48)).astype(np.uint16))
RGB = np.stack([np.add.outer(np.arange(32), np.arange(40)) * k % 256 for k in (1, 2, 3)], axis=-1).astype(np.uint8)
COLOUR: dict[str, Any] = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
ODD = {
    "DICOMDIR-nooffset": "NON_IMAGE_SOP",
    "DICOMDIR-nopatient": "NON_IMAGE_SOP",
    "ExplVR_BigEndNoMeta.dcm": "NON_IMAGE_SOP",
    "ExplVR_LitEndNoMeta.dcm": "NON_IMAGE_SOP",
    "JPEG2000-embedded-sequence-delimiter.dcm": "CODEC_FAIL",
    "MR_truncated.dcm": "TRUNCATED",
    "README.txt": "NOT_DICOM",
    "UN_sequence.dcm": "NO_PIXELS",
    "empty_charset_LEI.dcm": "NO_PIXELS",
    "liver_deflate.dcm": "CODEC_UNSUPPORTED",
    "liver_nonbyte_aligned_rle.dcm": "CODEC_UNSUPPORTED",
    "meta_missing_tsyntax.dcm": "BAD_TS",
    "nested_priv_SQ.dcm": "DIM_LIMIT",
    "no_meta.dcm": "NO_META",
    "no_meta_group_length.dcm": "NO_PIXELS",
    "reportsi.dcm": "NON_IMAGE_SOP",
    "rtplan.dcm": "NON_IMAGE_SOP",
    "rtplan_truncated.dcm": "NON_IMAGE_SOP",
    "rtstruct.dcm": "NON_IMAGE_SOP",
    "test-SR.dcm": "NON_IMAGE_SOP",
    "waveform_ecg.dcm": "NON_IMAGE_SOP",
    "zipMR.gz": "NOT_DICOM",
}


def frames(payload: Path | bytes | Dataset) -> list[Decoded]:
    with decode.silence():
        return list(decode_dicom(payload, Policy.VOI))


def one(payload: Path | bytes | Dataset) -> Decoded:
    (only,) = frames(payload)
    return only


def code(payload: Path | bytes | Dataset) -> str:
    with pytest.raises(RejectedFile) as caught:
        frames(payload)
    return caught.value.code


def written(path: Path, dataset: Dataset, syntax: UID, content: bytes | None = None, vr: str = "OB") -> Path:
    dataset.file_meta.TransferSyntaxUID = syntax
    if content is not None:
        dataset.PixelData = content
        dataset["PixelData"].VR = vr
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_odd_files_are_accounted_for(data: Path) -> None:
    found = {}
    for path in sorted((data / "dicom" / "odd").iterdir()):
        try:
            frames(path)
        except RejectedFile as rejection:
            found[path.name] = rejection.code
    assert found == ODD
    assert set(found.values()) <= set(REASON_CODES)


def test_every_valid_file_is_read(data: Path) -> None:
    paths = sorted((data / "dicom" / "valid").iterdir())
    counts = {path.name: len(frames(path)) for path in paths}
    assert len(counts) == 63
    for path in paths:
        declared = int(pydicom.dcmread(path, stop_before_pixels=True).get("NumberOfFrames") or 1)
        assert counts[path.name] == declared, path.name


def test_content_and_data_set_give_the_same_as_the_file(data: Path) -> None:
    for path in sorted((data / "dicom" / "valid").iterdir()):
        expected = frames(path)
        for other in (path.read_bytes(), pydicom.dcmread(path)):
            with decode.silence():
                found = list(decode_dicom(other, Policy.VOI))
            for one_way, other_way in zip(expected, found, strict=True):
                np.testing.assert_array_equal(one_way.stored, other_way.stored, err_msg=path.name)


@pytest.mark.parametrize(
    ("syntax", "encode", "lossless"),
    [
        (JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k"), True),
        (HTJ2KLossless, imagecodecs.htj2k_encode, True),
        (JPEGLSLossless, imagecodecs.jpegls_encode, True),
        (JPEGLSNearLossless, lambda a: imagecodecs.jpegls_encode(a, level=2), False),
        (JPEGLossless, lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=4, bitspersample=12), True),
        (JPEGLosslessSV1, lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=12), True),
        (JPEGExtended12Bit, lambda a: imagecodecs.jpeg8_encode(a, level=98, bitspersample=12), False),
    ],
)
def test_compressed_equals_plain(tmp_path: Path, syntax: UID, encode: Any, lossless: bool) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", SMOOTH, BitsStored=12, HighBit=11)
    path = written(tmp_path / "2.dcm", dataset, syntax, encapsulate([encode(SMOOTH)]))
    difference = one(path).stored.astype(int) - SMOOTH
    assert np.abs(difference).max() <= (0 if lossless else 40)


def run_lengths(pixels: np.ndarray) -> bytes:
    """PS3.5 annex G in the plainest way: literal runs only, one segment per byte, most significant first."""
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., channel] for channel in range(pixels.shape[2])]
    segments = []
    for plane in planes:
        big = plane.astype(plane.dtype.newbyteorder(">")).tobytes()
        for byte in range(plane.itemsize):
            cells = big[byte :: plane.itemsize]
            runs = [cells[start : start + 128] for start in range(0, len(cells), 128)]
            segment = b"".join(bytes([len(run) - 1]) + run for run in runs)
            segments.append(segment + b"\0" * (len(segment) % 2))
    offsets = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    head = struct.pack("<16L", len(segments), *offsets, *[0] * (15 - len(segments)))
    return head + b"".join(segments)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("samples", [1, 3])
def test_run_length_encoding(tmp_path: Path, dtype: str, samples: int) -> None:
    shape = (20, 30) if samples == 1 else (20, 30, 3)
    pixels = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    dataset = make_dicom(tmp_path / "1.dcm", pixels, **(COLOUR if samples == 3 else {}))
    plain = one(tmp_path / "1.dcm")
    found = one(written(tmp_path / "2.dcm", dataset, RLELossless, encapsulate([run_lengths(pixels)])))
    np.testing.assert_array_equal(found.stored, plain.stored)


@pytest.mark.parametrize("syntax", ["53", "55"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_retired_jpeg_is_read_by_the_last_resort(tmp_path: Path, syntax: str, photometric: str) -> None:
    """Neither inverted nor rescaled, which SimpleITK would do by itself."""
    pixels = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", progressive=True, quality=95)
    dataset = make_dicom(
        tmp_path / "1.dcm", pixels, PhotometricInterpretation=photometric, RescaleSlope=2, RescaleIntercept=-5
    )
    path = written(
        tmp_path / "1.dcm", dataset, UID(f"1.2.840.10008.1.2.4.{syntax}"), encapsulate([content.getvalue()])
    )
    decoded = one(path)
    assert decoded.flags == ("last_resort",)
    np.testing.assert_array_equal(decoded.stored, np.asarray(Image.open(content)))


# ------------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("count", [1, 3])
def test_native_frames(tmp_path: Path, syntax: UID, dtype: str, count: int) -> None:
    """Also odd lengths, and 8-bit cells in big endian words."""
    rng = np.random.default_rng(1)
    info = np.iinfo(dtype)
    pixels = rng.integers(info.min, info.max, (count, 5, 7), dtype=dtype, endpoint=True)
    dataset = make_dicom(tmp_path / "1.dcm", pixels[0], NumberOfFrames=count)
    big = syntax == ExplicitVRBigEndian
    content = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    content += b"\0" * (len(content) % 2)
    if big and pixels.itemsize == 1:
        content = np.frombuffer(content, "u2").byteswap().tobytes()
    found = frames(written(tmp_path / "1.dcm", dataset, syntax, content, vr="OW"))
    np.testing.assert_array_equal([frame.stored for frame in found], pixels)
    assert [frame.frame for frame in found] == ([0] if count == 1 else [1, 2, 3])


@settings(deadline=None, max_examples=60)
@given(
    stored=st.integers(1, 16),
    spare=st.integers(0, 15),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
    rle=st.booleans(),
)
def test_bits_outside_of_the_stored_ones_do_not_count(
    tmp_path_factory: pytest.TempPathFactory, stored: int, spare: int, signed: bool, seed: int, rle: bool
) -> None:
    """Overlays above, padding below (HighBit moved up), lies about BitsStored and missing sign extension."""
    high = min(15, stored - 1 + spare)
    cells = np.random.default_rng(seed).integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    expected = np.zeros((8, 8), dtype=int)
    for place, cell in np.ndenumerate(cells):
        value = (int(cell) >> (high + 1 - stored)) & ((1 << stored) - 1)
        expected[place] = value - (1 << stored) if signed and value >= 1 << (stored - 1) else value
    path = tmp_path_factory.mktemp("bits") / "1.dcm"
    dataset = make_dicom(path, cells, BitsStored=stored, HighBit=high, PixelRepresentation=int(signed))
    if rle:
        written(path, dataset, RLELossless, encapsulate([run_lengths(cells)]))
    found = one(path)
    np.testing.assert_array_equal(found.stored, expected)
    outside = (cells & (0xFFFF ^ (((1 << stored) - 1) << (high + 1 - stored)))).any()
    if "masked_bits" in found.flags:
        assert outside


def test_overlay_bits_are_masked_and_flagged(tmp_path: Path) -> None:
    make_dicom(tmp_path / "1.dcm", RAMP | 0x8000, BitsStored=12, HighBit=11)
    found = one(tmp_path / "1.dcm")
    np.testing.assert_array_equal(found.stored, RAMP)
    assert found.flags == ("masked_bits",)


def test_sign_bits_of_a_signed_value_are_not_outside(tmp_path: Path) -> None:
    pixels = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    make_dicom(tmp_path / "1.dcm", pixels, BitsStored=12, HighBit=11)
    found = one(tmp_path / "1.dcm")
    np.testing.assert_array_equal(found.stored, pixels)
    assert found.flags == ()


def test_single_bits_across_byte_borders(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 2, (3, 5, 7), dtype=np.uint8)
    dataset = make_dicom(tmp_path / "1.dcm", pixels[0], BitsAllocated=1, BitsStored=1, HighBit=0, NumberOfFrames=3)
    content = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    content += b"\0" * (len(content) % 2)
    found = frames(written(tmp_path / "1.dcm", dataset, ExplicitVRLittleEndian, content))
    np.testing.assert_array_equal([frame.stored for frame in found], pixels)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_floating_point_pixels(tmp_path: Path, keyword: str, dtype: str) -> None:
    pixels = np.linspace(-3.5, 7.25, 48).reshape(2, 4, 6).astype(dtype)
    dataset = make_dicom(tmp_path / "1.dcm", pixels[0], NumberOfFrames=2)
    for absent in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, absent)
    setattr(dataset, keyword, pixels.tobytes())
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    found = frames(tmp_path / "1.dcm")
    np.testing.assert_array_equal([frame.stored for frame in found], pixels)
    assert found[0].grey().min() == 0
    assert found[0].grey().max() == 1


# ------------------------------------------------------------------------------------------------ colour


def luminance_of(rgb: np.ndarray, top: int = 255) -> np.ndarray:
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114]) / top)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_colour_becomes_luminance(tmp_path: Path, planar: int, dtype: str) -> None:
    pixels = RGB.astype(dtype)
    dataset = make_dicom(tmp_path / "1.dcm", pixels, **(COLOUR | {"PlanarConfiguration": planar}))
    laid = pixels.transpose(2, 0, 1) if planar else pixels
    decoded = one(written(tmp_path / "1.dcm", dataset, ExplicitVRLittleEndian, laid.tobytes(), vr="OW"))
    top = 255 if dtype == "u1" else 65535
    np.testing.assert_allclose(decoded.grey(), luminance_of(RGB, top), atol=1e-6)
    assert decoded.flags == ("colour",)
    assert decoded.presentation is None


def test_half_sampled_chrominance(tmp_path: Path) -> None:
    """Y1 Y2 B R (PS3.3 C.7.6.3.1.2); without chrominance Y is the luminance."""
    brightness = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cells = np.full((6, 4, 4), 128, dtype=np.uint8)
    cells[..., :2] = brightness.reshape(6, 4, 2)
    dataset = make_dicom(
        tmp_path / "1.dcm", brightness, **(COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"})
    )
    decoded = one(written(tmp_path / "1.dcm", dataset, ExplicitVRLittleEndian, cells.tobytes()))
    np.testing.assert_allclose(decoded.grey(), brightness / 255, atol=1e-6)


@pytest.mark.parametrize("ids", ["RGB", "YCbCr"])
def test_jpeg_colour_follows_the_codestream(tmp_path: Path, ids: str) -> None:
    """RGB components without APP14 are named R, G, B; YCbCr components are converted."""
    smooth = np.stack([np.add.outer(np.arange(32), np.arange(40)) * k for k in (1, 2, 3)], axis=-1)
    smooth = smooth.astype(np.uint8)
    if ids == "RGB":
        content = imagecodecs.jpeg8_encode(smooth, level=98, colorspace="RGB", outcolorspace="RGB")
        at = content.index(b"\xff\xee")
        content = content[:at] + content[at + 16 :]
        assert b"Adobe" not in content
    else:
        content = imagecodecs.jpeg8_encode(smooth, level=98, subsampling="444")
    photometric = "RGB" if ids == "RGB" else "YBR_FULL"
    dataset = make_dicom(tmp_path / "1.dcm", smooth, **(COLOUR | {"PhotometricInterpretation": photometric}))
    decoded = one(written(tmp_path / "1.dcm", dataset, JPEGBaseline8Bit, encapsulate([content])))
    np.testing.assert_allclose(decoded.grey(), luminance_of(smooth), atol=0.03)


@pytest.mark.parametrize("depth", [8, 16])
def test_palette(tmp_path: Path, depth: int) -> None:
    index = np.arange(48, dtype=np.uint8).reshape(6, 8)
    tables = [(np.arange(48) * k).astype(f"u{depth // 8}") for k in (1, 3, 5)]
    dataset = make_dicom(tmp_path / "1.dcm", index, PhotometricInterpretation="PALETTE COLOR")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [48, 0, depth])
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(dataset, f"{name}PaletteColorLookupTableData", table.tobytes())
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    expected = luminance_of(np.stack(tables, axis=-1)[index], 2**depth - 1)
    np.testing.assert_allclose(one(tmp_path / "1.dcm").grey(), expected, atol=1e-6)


def test_segmented_palette(tmp_path: Path) -> None:
    """One linear segment from 0 to 47 (PS3.3 C.7.9.2.2)."""
    index = np.arange(48, dtype=np.uint8).reshape(6, 8)
    segments = struct.pack("<HHH", 0, 1, 0) + struct.pack("<HHH", 1, 47, 47 * 256)
    dataset = make_dicom(tmp_path / "1.dcm", index, PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [48, 0, 16])
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(dataset, f"Segmented{name}PaletteColorLookupTableData", segments)
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    expected = index.astype(float) * 256 / 65535
    np.testing.assert_allclose(one(tmp_path / "1.dcm").grey(), expected, atol=2 / 65535)


def test_malformed_palette(tmp_path: Path) -> None:
    make_dicom(tmp_path / "1.dcm", RAMP.astype(np.uint8), PhotometricInterpretation="PALETTE COLOR")
    assert code(tmp_path / "1.dcm") == "COLOUR_MISMATCH"


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NumberOfFrames": 2}, "TRUNCATED"),
        ({"Rows": 0}, "DIM_LIMIT"),
        ({"Rows": 60000, "Columns": 60000}, "DIM_LIMIT"),
        ({"Rows": 65}, "TRUNCATED"),
        ({"BitsStored": 17}, "BITS_INCONSISTENT"),
        ({"BitsStored": 0}, "BITS_INCONSISTENT"),
        ({"HighBit": 11}, "BITS_INCONSISTENT"),
        ({"HighBit": 16}, "BITS_INCONSISTENT"),
        ({"BitsAllocated": 24}, "BITS_INCONSISTENT"),
        ({"SamplesPerPixel": 3}, "COLOUR_MISMATCH"),
        ({"PhotometricInterpretation": "RGB"}, "COLOUR_MISMATCH"),
        ({"PhotometricInterpretation": ""}, "COLOUR_MISMATCH"),
        ({"PixelData": b""}, "NO_PIXELS"),
        ({"PixelData": b"", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "NON_IMAGE_SOP"),
    ],
)
def test_reason_codes(tmp_path: Path, values: dict[str, object], expected: str) -> None:
    make_dicom(tmp_path / "1.dcm", RAMP, **values)
    assert code(tmp_path / "1.dcm") == expected


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [("1.2.3", "BAD_TS"), ("", "BAD_TS"), ("1.2.840.10008.1.2.4.100", "CODEC_UNSUPPORTED")],
)
def test_transfer_syntaxes(tmp_path: Path, syntax: str, expected: str) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    assert code(dataset) == expected


def test_surplus_bytes_are_flagged(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    path = written(tmp_path / "1.dcm", dataset, ExplicitVRLittleEndian, RAMP.tobytes() + bytes(6), vr="OW")
    found = one(path)
    np.testing.assert_array_equal(found.stored, RAMP)
    assert found.flags == ("excess_bytes",)


def test_file_cut_short_anywhere(tmp_path: Path) -> None:
    """A cut file is rejected for what is missing; nothing but the last padding may be cut unnoticed."""
    make_dicom(tmp_path / "1.dcm", RAMP)
    content = (tmp_path / "1.dcm").read_bytes()
    codes = {code(content[:size]) for size in range(0, len(content), 97)}
    assert codes <= {"NOT_DICOM", "NO_META", "NO_PIXELS", "TRUNCATED", "BAD_TS", "BAD_VR", "NON_IMAGE_SOP"}
    assert code(content[:-1]) == "TRUNCATED"
    assert code(b"") == "NOT_DICOM"


@pytest.mark.parametrize(
    "syntax", [JPEGLSLossless, JPEGLosslessSV1, JPEGBaseline8Bit, JPEG2000Lossless, RLELossless]
)
def test_compressed_file_cut_short(tmp_path: Path, syntax: UID) -> None:
    pixels = SMOOTH.astype(np.uint8)
    encoders: dict[UID, Any] = {
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEGLosslessSV1: lambda a: imagecodecs.jpeg8_encode(a, lossless=True),
        JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
        JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k"),
        RLELossless: run_lengths,
    }
    dataset = make_dicom(tmp_path / "1.dcm", pixels)
    stream = encoders[syntax](pixels)
    content = written(tmp_path / "1.dcm", dataset, syntax, encapsulate([stream])).read_bytes()
    assert one(content).stored.shape == pixels.shape
    assert code(content[: -len(stream) // 2]) == "TRUNCATED"
    half = written(tmp_path / "2.dcm", dataset, syntax, encapsulate([stream[: len(stream) // 2]]))
    assert code(half) == "CODEC_FAIL"


def test_fewer_frames_than_declared(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", SMOOTH, BitsStored=12, HighBit=11, NumberOfFrames=3)
    content = encapsulate([imagecodecs.jpegls_encode(SMOOTH)] * 2)
    assert code(written(tmp_path / "1.dcm", dataset, JPEGLSLossless, content)) == "TRUNCATED"


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("offsets", [True, False])
def test_fragments_of_frames(tmp_path: Path, fragments: int, offsets: bool) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", SMOOTH, BitsStored=12, HighBit=11, NumberOfFrames=2)
    streams = [imagecodecs.jpegls_encode(SMOOTH), imagecodecs.jpegls_encode(SMOOTH[::-1].copy())]
    content = encapsulate(streams, fragments_per_frame=fragments, has_bot=offsets)
    found = frames(written(tmp_path / "1.dcm", dataset, JPEGLSLossless, content))
    np.testing.assert_array_equal([frame.stored for frame in found], [SMOOTH, SMOOTH[::-1]])


def test_plain_pixels_under_a_compressed_syntax(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    assert code(dataset) == "CODEC_FAIL"


def test_damaged_codestream(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    content = encapsulate([b"\xff\x4f\xff\x51 Meier was here"])
    with pytest.raises(RejectedFile) as caught:
        frames(written(tmp_path / "1.dcm", dataset, JPEG2000Lossless, content))
    assert caught.value.code == "CODEC_FAIL"
    assert "Meier" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_malformed_number_of_frames(tmp_path: Path) -> None:
    """Counted from plain pixels where they fit; not guessed for compressed ones."""
    make_dicom(tmp_path / "1.dcm", RAMP, NumberOfFrames=7)
    content = (tmp_path / "1.dcm").read_bytes()
    at = content.index(b"\x28\x00\x08\x00IS\x02\x00") + 8
    content = content[:at] + b"1A" + content[at + 2 :]
    found = one(content)
    np.testing.assert_array_equal(found.stored, RAMP)
    assert found.flags == ("frames_counted",)
    assert code(content[:-40]) == "BAD_VR"


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_bytes_never_crash(data: st.DataObject) -> None:
    content = bytearray(_SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = ""
    try:
        for frame in frames(bytes(content)):
            frame.grey()
    except RejectedFile as rejection:
        found = rejection.code
    assert not found or found in REASON_CODES


def _small() -> bytes:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.PatientID, dataset.WindowCenter, dataset.WindowWidth = "P0", [5, 6], [7, 8]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 4
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [2, 0, 8], [1, 2]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    dataset.VOILUTSequence = Sequence([item])
    dataset.PixelData = bytes(range(32))
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


_SMALL = _small()

# ------------------------------------------------------------------------------------------------ structure


def elements(dataset: Dataset) -> list[tuple[object, ...]]:
    """Tag, VR and value of every element; malformed values count as such."""
    found: list[tuple[object, ...]] = []
    for tag in sorted(dataset.keys()):
        try:
            element = dataset[tag]
            found.append((tag, element.VR, str(element.value)))
        except Exception as error:
            found.append((tag, type(error)))
    return found


def assert_same_elements(content: bytes) -> bool:
    """Whether the quick parser took the file; what it gives equals what pydicom gives."""
    with decode.silence():
        quick = decode._quick_elements(content[: 1 << 16])
        if quick is None:
            return False
        dataset, position = quick
        file = io.BytesIO(content)
        expected = pydicom.dcmread(file, stop_before_pixels=True)
        assert file.tell() == position
        assert elements(dataset) == elements(expected)
        assert elements(dataset.file_meta) == elements(expected.file_meta)
        assert dataset.original_encoding == expected.original_encoding
        assert dataset._character_set == expected._character_set
    return True


def test_quick_parser_equals_pydicom(data: Path) -> None:
    paths = [path for path in sorted((data / "dicom").rglob("*")) if path.is_file()]
    taken = [assert_same_elements(path.read_bytes()) for path in paths]
    assert len(taken) >= 140
    assert sum(taken) >= 60


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_quick_parser_equals_pydicom_on_damage(data: st.DataObject) -> None:
    """Where it takes a damaged header at all."""
    content = bytearray(_SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(132, len(content) - 40))] = data.draw(st.integers(0, 255))
    try:
        with decode.silence():
            pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    except Exception:
        return
    assert_same_elements(bytes(content))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_without_meta_header(tmp_path: Path, syntax: UID) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    content = RAMP.astype(">u2").tobytes() if syntax == ExplicitVRBigEndian else RAMP.tobytes()
    dataset.PixelData = content
    del dataset.file_meta
    dataset.save_as(
        tmp_path / "1.dcm",
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
        enforce_file_format=False,
    )
    found = one(tmp_path / "1.dcm")
    np.testing.assert_array_equal(found.stored, RAMP)
    assert found.flags == ("no_meta",)


def test_other_files() -> None:
    assert code(b"\x08\x00 tea and biscuits" * 9) == "NOT_DICOM"
    assert code(b"PK\x03\x04" + bytes(400)) == "NOT_DICOM"
    assert code(b"?" * 20 + b"1.2.840.10008.1.2" + b"?" * 20) == "NO_META"


def nested(depth: int, *, defined: bool) -> bytes:
    """A small image with a sequence nested in itself."""
    inner = b""
    for _ in range(depth):
        length = struct.pack("<L", len(inner) if defined else 0xFFFFFFFF)
        item = b"\xfe\xff\x00\xe0" + length + inner + (b"" if defined else b"\xfe\xff\x0d\xe0\0\0\0\0")
        length = struct.pack("<L", len(item) if defined else 0xFFFFFFFF)
        inner = b"\x08\x00\x40\x11SQ\0\0" + length + item + (b"" if defined else b"\xfe\xff\xdd\xe0\0\0\0\0")
    at = _SMALL.index(b"\x10\x00\x20\x00LO")
    return _SMALL[:at] + inner + _SMALL[at:]


@pytest.mark.parametrize("defined", [True, False])
def test_nesting(defined: bool) -> None:
    assert one(nested(63, defined=defined)).stored.shape == (4, 4)  # _SMALL itself has one more item
    assert code(nested(65, defined=defined)) == "NEST_LIMIT"
    assert code(nested(200, defined=defined)) == "NEST_LIMIT"
    assert code(nested(2000, defined=defined)) == "NEST_LIMIT"


def test_many_items_side_by_side_are_not_nested(tmp_path: Path) -> None:
    items = []
    for number in range(200):
        item = Dataset()
        item.ReferencedSOPInstanceUID = f"1.2.{number}"
        items.append(item)
    make_dicom(tmp_path / "1.dcm", RAMP, ReferencedImageSequence=Sequence(items))
    np.testing.assert_array_equal(one(tmp_path / "1.dcm").stored, RAMP)


def test_icon_is_not_the_image(tmp_path: Path) -> None:
    icon = Dataset()
    icon.Rows = icon.Columns = 2
    icon.PixelData = b"\1\2\3\4"
    icon["PixelData"].VR = "OB"
    make_dicom(tmp_path / "1.dcm", RAMP, IconImageSequence=Sequence([icon]))
    np.testing.assert_array_equal(one(tmp_path / "1.dcm").stored, RAMP)


def test_deflate_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", np.zeros((512, 512), dtype=np.uint8))
    path = written(tmp_path / "1.dcm", dataset, DeflatedExplicitVRLittleEndian)
    assert one(path).grey().max() == 0
    with decode.silence():
        assert len(decode.read_dataset(path).PixelData) == 512 * 512
    monkeypatch.setattr(decode, "MAX_INFLATED", 1 << 16)
    assert code(path) == "ZIP_LIMIT"


def test_unreadable_files(tmp_path: Path) -> None:
    assert code(tmp_path / "absent") == "READ_ERROR"
    assert code(tmp_path) == "READ_ERROR"


def test_nothing_is_warned_or_logged(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pydicom")
    before = list(logger.handlers), logger.propagate, pydicom.config.settings.reading_validation_mode
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        for path in sorted((data / "dicom" / "odd").iterdir()):
            with decode.silence():
                try:
                    list(decode_dicom(path, Policy.VOI))
                except RejectedFile:
                    continue
    assert not caught
    assert not caplog.records
    assert (logger.handlers, logger.propagate, pydicom.config.settings.reading_validation_mode) == before


# ------------------------------------------------------------------------------------------------ oracles


def test_values_agree_with_pydicom(data: Path) -> None:
    """Every grey file that pydicom decodes by itself; codecs without exact rules may differ by one."""
    compared = 0
    for path in sorted((data / "dicom" / "valid").iterdir()):
        found = frames(path)
        if found[0].presentation is None:
            continue
        with decode.silence():
            try:
                expected = np.asarray(pydicom.dcmread(path).pixel_array)
            except (RuntimeError, AttributeError):
                continue
        expected = expected.reshape(len(found), *found[0].stored.shape)
        for frame, other in zip(found, expected, strict=True):
            assert np.abs(frame.stored.astype(np.float64) - other).max() <= (1 if other.dtype.kind in "iu" else 0)
        compared += 1
    assert compared >= 30


def test_colours_agree_with_pydicom(data: Path) -> None:
    compared = 0
    for path in sorted((data / "dicom" / "valid").iterdir()):
        found = frames(path)
        with decode.silence():
            dataset = pydicom.dcmread(path)
            if found[0].presentation is not None or dataset.PhotometricInterpretation == "PALETTE COLOR":
                continue
            try:
                rgb = dataset.pixel_array.reshape(len(found), *found[0].stored.shape[:2], 3)
            except RuntimeError:
                continue
        for frame, other in zip(found, rgb, strict=True):
            expected = luminance_of(other, 2**dataset.BitsStored - 1)
            np.testing.assert_allclose(frame.grey(), expected, atol=1e-6, err_msg=path.name)
        compared += 1
    assert compared >= 10


def test_a_damaged_htj2k_stream_is_not_half_an_image(data: Path) -> None:
    """The codec reports damage where nobody listens and returns an image all the same."""
    path = next(
        path
        for path in sorted((data / "dicom" / "valid").iterdir())
        if b"1.2.840.10008.1.2.4.20" in path.read_bytes()[:1000]
    )
    content = path.read_bytes()
    assert next(decode_dicom(content, Policy.NONE)).stored.size
    damaged = bytearray(content)
    for position in range(len(content) - 2000, len(content) - 200, 7):
        damaged[position] ^= 0x55
    with decode.silence(), pytest.raises(RejectedFile) as caught:
        next(decode_dicom(bytes(damaged), Policy.NONE))
    assert caught.value.code == "CODEC_FAIL"
