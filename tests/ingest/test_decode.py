from __future__ import annotations

import logging
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medistill.errors import RejectedFile
from medistill.ingest import decode
from medistill.ingest.intensity import Policy
from medistill.ingest.quarantine import REASON_CODES
from medistill.ingest.sources.folder import FolderSource, decode_dicom
from tests.ingest.conftest import make_dicom

RAMP = (np.arange(64 * 48, dtype=np.uint16) % 4096).reshape(64, 48)
ODD = {
    "ExplVR_LitEndNoMeta.dcm": "NO_META",
    "MR_truncated.dcm": "TRUNCATED",
    "README.txt": "NOT_DICOM",
    "meta_missing_tsyntax.dcm": "BAD_TS",
    "rtplan.dcm": "NON_IMAGE_SOP",
    "waveform_ecg.dcm": "NON_IMAGE_SOP",
    "zipMR.gz": "NOT_DICOM",
    "DICOMDIR-nopatient": "NON_IMAGE_SOP",
}


def code(path: Path) -> str:
    with pytest.raises(RejectedFile) as caught:
        decode_dicom(path, Policy.VOI)
    return caught.value.code


def test_odd_files_never_crash(data: Path) -> None:
    found = {}
    for item in FolderSource(data / "dicom" / "odd").items():
        try:
            decode_dicom(item.payload, Policy.VOI)  # type: ignore[arg-type]
        except RejectedFile as rejection:
            found[item.name] = rejection.code
    assert {name: found.get(name) for name in ODD} == ODD
    assert set(found.values()) <= set(REASON_CODES)
    assert "JPEG-lossy.dcm" not in found  # 12-bit lossy JPEG is read


@pytest.mark.parametrize(
    ("syntax", "encode", "lossless"),
    [
        (JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k"), True),
        (JPEGLSLossless, imagecodecs.jpegls_encode, True),
        (JPEGLosslessSV1, lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=12), True),
        (JPEGExtended12Bit, lambda a: imagecodecs.jpeg8_encode(a, level=98, bitspersample=12), False),
    ],
)
def test_compressed_equals_plain(tmp_path: Path, syntax: UID, encode: object, lossless: bool) -> None:
    smooth = np.broadcast_to(np.linspace(0, 4095, 48), (64, 48)).astype(np.uint16)
    dataset = make_dicom(tmp_path / "1.dcm", smooth, BitsStored=12, HighBit=11)
    plain = decode_dicom(tmp_path / "1.dcm", Policy.VOI).grey
    dataset.PixelData = encapsulate([encode(np.ascontiguousarray(smooth))])  # type: ignore[operator]
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(tmp_path / "2.dcm", enforce_file_format=True)
    found = decode_dicom(tmp_path / "2.dcm", Policy.VOI).grey
    np.testing.assert_allclose(found, plain, atol=1e-6 if lossless else 0.01)


def test_run_length_encoding(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    plain = decode_dicom(tmp_path / "1.dcm", Policy.VOI).grey
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "2.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(decode_dicom(tmp_path / "2.dcm", Policy.VOI).grey, plain)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NumberOfFrames": 2}, "MULTI_FRAME"),
        ({"Rows": 0}, "DIM_LIMIT"),
        ({"Rows": 60000, "Columns": 60000}, "DIM_LIMIT"),
        ({"Rows": 65}, "TRUNCATED"),
        ({"BitsStored": 17}, "BITS_INCONSISTENT"),
        ({"HighBit": 11}, "BITS_INCONSISTENT"),
        ({"SamplesPerPixel": 3}, "COLOUR_MISMATCH"),
        ({"PhotometricInterpretation": "RGB"}, "COLOUR_MISMATCH"),
        ({"PixelData": b""}, "NO_PIXELS"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "NON_IMAGE_SOP"),
    ],
)
def test_reason_codes(tmp_path: Path, values: dict[str, object], expected: str) -> None:
    make_dicom(tmp_path / "1.dcm", RAMP, **values)
    assert code(tmp_path / "1.dcm") == expected


def test_damaged_codestream(tmp_path: Path) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", RAMP)
    dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51 Meier was here"])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    assert code(tmp_path / "1.dcm") == "CODEC_FAIL"


def test_deflate_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dicom(tmp_path / "1.dcm", np.zeros((512, 512), dtype=np.uint8))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    assert decode_dicom(tmp_path / "1.dcm", Policy.VOI).grey.max() == 0
    monkeypatch.setattr(decode, "MAX_INFLATED", 1 << 16)
    assert code(tmp_path / "1.dcm") == "ZIP_LIMIT"


def test_unreadable_and_empty_files(tmp_path: Path) -> None:
    assert code(tmp_path / "absent") == "READ_ERROR"
    (tmp_path / "empty").touch()
    assert code(tmp_path / "empty") == "NOT_DICOM"


def test_nothing_is_warned_or_logged(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger("pydicom").level
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        for item in FolderSource(data / "dicom" / "odd").items():
            with decode.silence():
                try:
                    decode_dicom(item.payload, Policy.VOI)  # type: ignore[arg-type]
                except RejectedFile:
                    continue
    assert not caught
    assert not caplog.records
    assert logging.getLogger("pydicom").level == before


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    rgb = np.zeros((4, 6, 3), dtype=np.uint8)
    rgb[..., 1] = 255
    make_dicom(tmp_path / "1.dcm", rgb, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    decoded = decode_dicom(tmp_path / "1.dcm", Policy.VOI)
    np.testing.assert_allclose(decoded.grey, 0.587, atol=1e-6)
    assert decoded.flags == ("colour",)
