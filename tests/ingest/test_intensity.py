"""Grey levels against pydicom's own implementation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from medistill.errors import RejectedFile
from medistill.ingest.decode import is_colour, read_dataset, read_pixels, silence
from medistill.ingest.headers import read_presentation
from medistill.ingest.intensity import Policy, Presentation, Window, normalise


def header(**values: object) -> Dataset:
    dataset = Dataset()
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.PixelRepresentation = 0
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def reference(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """The same steps by pydicom, mapped to [0, 1]."""
    values = apply_modality_lut(stored, dataset)
    shown = apply_voi_lut(values, dataset, prefer_lut=True)
    if dataset.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif dataset.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    else:
        low, high = (float(end) for end in _stored_range(dataset))
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        low, high = low * slope + intercept, high * slope + intercept
    grey = (shown.astype(np.float64) - low) / (high - low)
    inverse = dataset.PhotometricInterpretation == "MONOCHROME1"
    shown = 1 - grey if inverse else grey
    return np.asarray(np.clip(shown, 0, 1))


def _stored_range(dataset: Dataset) -> tuple[int, int]:
    bits = dataset.BitsStored
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)


def test_real_files_agree_with_pydicom(data: Path) -> None:
    compared = 0
    for path in sorted((data / "dicom" / "valid").iterdir()):
        try:
            with silence():
                dataset = read_dataset(path)
                stored = read_pixels(dataset)
        except RejectedFile:
            continue
        if is_colour(dataset) or "PixelPaddingValue" in dataset:
            continue
        with silence():
            expected = reference(stored, dataset)
        found = normalise(stored, read_presentation(dataset))
        np.testing.assert_allclose(found, expected, atol=2e-4, err_msg=path.name)
        compared += 1
    assert compared >= 20


def test_real_values_agree_with_pydicom_decoders(data: Path) -> None:
    """Every file that pydicom can decode by itself gives the same stored values."""
    compared = 0
    for path in sorted((data / "dicom" / "valid").iterdir()):
        try:
            with silence():
                dataset = read_dataset(path)
                if is_colour(dataset):
                    continue
                stored = read_pixels(dataset)
                expected = pydicom.dcmread(path).pixel_array
        except (RejectedFile, RuntimeError):
            continue
        assert np.abs(stored.astype(np.int64) - expected.astype(np.int64)).max() <= 1, path.name
        compared += 1
    assert compared >= 20


def test_real_values_agree_with_other_decoders(data: Path) -> None:
    """Smallest and largest values as the manifest has them from another set of plugins."""
    compared = 0
    with (data / "dicom" / "manifest.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("valid/") and row["samples"] == "1"]
    for row in rows:
        try:
            with silence():
                stored = read_pixels(read_dataset(data / "dicom" / row["path"]))
        except RejectedFile:
            continue
        if stored.dtype.kind in "iu":
            assert abs(int(stored.min()) - int(row["vmin"])) <= 1, row["path"]
            assert abs(int(stored.max()) - int(row["vmax"])) <= 1, row["path"]
            compared += 1
    assert compared >= 20


def test_real_colours_agree_with_pydicom(data: Path) -> None:
    compared = 0
    for path in sorted((data / "dicom" / "valid").iterdir()):
        try:
            with silence():
                dataset = read_dataset(path)
                if not is_colour(dataset) or dataset.PhotometricInterpretation == "PALETTE COLOR":
                    continue
                grey = read_pixels(dataset)
                rgb = pydicom.dcmread(path).pixel_array
        except (RejectedFile, RuntimeError):
            continue
        expected = rgb @ np.array([0.299, 0.587, 0.114]) / (2.0**dataset.BitsStored - 1)
        np.testing.assert_allclose(grey, expected, atol=1e-6, err_msg=path.name)
        compared += 1
    assert compared >= 10


@settings(deadline=None)
@given(
    center=st.floats(-3000, 3000),
    width=st.floats(1, 8000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    slope=st.sampled_from([1.0, 0.5, 2.0]),
    intercept=st.sampled_from([0.0, -1024.0]),
    signed=st.booleans(),
    inverted=st.booleans(),
)
def test_windows_agree_with_pydicom(
    center: float, width: float, function: str, slope: float, intercept: float, signed: bool, inverted: bool
) -> None:
    center, width = round(center, 3), round(width, 3)
    stored = np.linspace(-2000, 4000, 301).astype(np.int16) if signed else np.arange(0, 4096, 7, dtype=np.uint16)
    dataset = header(
        BitsStored=13 if signed else 12,
        PixelRepresentation=int(signed),
        WindowCenter=center,
        WindowWidth=width,
        VOILUTFunction=function,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
    )
    with np.errstate(over="ignore"):
        expected = reference(stored, dataset)
    found = normalise(stored, read_presentation(dataset))
    # At an edge of a window as narrow as rounding, both values are right.
    agree = np.isclose(found, expected, atol=1e-3 + 1e-3 / width)
    assert agree.mean() > 0.98 if width < 1.01 else agree.all()


def test_table_equals_direct_evaluation() -> None:
    rng = np.random.default_rng(0)
    presentation = Presentation(
        bits_stored=16, signed=True, slope=0.5, intercept=-7, window=Window(center=100, width=700), padding=(-9, 9)
    )
    large = rng.integers(-2000, 2000, (300, 300)).astype(np.int16)
    np.testing.assert_array_equal(normalise(large, presentation)[0], normalise(large[0], presentation))


@pytest.mark.parametrize(("center", "width"), [(10, 0), (10, -5), (None, None), ("", "")])
def test_unusable_window_counts_as_absent(center: object, width: object) -> None:
    presentation = read_presentation(header(WindowCenter=center, WindowWidth=width, BitsStored=8))
    assert presentation.invalid_window
    stored = np.array([[0, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(normalise(stored, presentation), [[0, 1]])


def test_first_of_several_windows_is_used() -> None:
    presentation = read_presentation(header(WindowCenter=[50, 500], WindowWidth=[100, 1000]))
    assert presentation.window == Window(center=50, width=100)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "", True),
        ("MONOCHROME1", "INVERSE", True),  # what DX demands: one inversion, said twice
    ],
)
def test_polarity(photometric: str, shape: str, inverted: bool) -> None:
    dataset = header(PhotometricInterpretation=photometric, BitsStored=8)
    if shape:
        dataset.PresentationLUTShape = shape
    grey = normalise(np.array([0, 255], dtype=np.uint8), read_presentation(dataset))
    assert grey.tolist() == ([1, 0] if inverted else [0, 1])


def test_padding_is_black_even_when_inverted() -> None:
    presentation = Presentation(bits_stored=8, inverted=True, padding=(0, 2))
    assert normalise(np.array([0, 1, 2, 255, 51], dtype=np.uint8), presentation).tolist() == pytest.approx(
        [0, 0, 0, 0, 0.8]
    )


def test_policies() -> None:
    stored = np.arange(1000, dtype=np.uint16)
    presentation = Presentation(bits_stored=12, window=Window(center=10, width=11))
    none = normalise(stored, presentation, Policy.NONE)
    np.testing.assert_allclose(none, stored / 4095, atol=1e-6)
    percentile = normalise(stored, presentation, Policy.PERCENTILE)
    assert percentile[4] == 0
    assert percentile[-5] == 1
    assert normalise(np.full(9, 7, dtype=np.uint8), presentation, Policy.PERCENTILE).tolist() == [0] * 9


def test_lookup_tables_agree_with_pydicom() -> None:
    dataset = header(BitsStored=12)
    for sequence, first, entries, bits in (("ModalityLUTSequence", 5, 900, 16), ("VOILUTSequence", 300, 700, 12)):
        item = Dataset()
        item.LUTDescriptor = [entries, first, bits]
        item["LUTDescriptor"].VR = "US"
        item.LUTData = np.linspace(3, 2**bits - 1, entries).astype(int).tolist()
        item["LUTData"].VR = "US"
        setattr(dataset, sequence, Sequence([item]))
    stored = np.arange(0, 4096, dtype=np.uint16)
    found = normalise(stored, read_presentation(dataset))
    np.testing.assert_allclose(found, reference(stored, dataset), atol=1e-6)


def test_malformed_table_is_rejected() -> None:
    dataset = header()
    dataset.VOILUTSequence = Sequence([Dataset()])
    with pytest.raises(RejectedFile) as caught:
        read_presentation(dataset)
    assert caught.value.code == "BAD_VR"
