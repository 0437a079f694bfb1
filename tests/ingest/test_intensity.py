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
from medistill.ingest.decode import silence
from medistill.ingest.frames import decode_dicom
from medistill.ingest.headers import read_presentation
from medistill.ingest.intensity import Lut, Policy, Presentation, Window, find_ramp, normalise


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
        with silence():
            dataset = pydicom.dcmread(path)
            frame = next(decode_dicom(path, Policy.VOI))
            presentation = frame.presentation
            enhanced = "SharedFunctionalGroupsSequence" in dataset
            if presentation is None or presentation.padding or not presentation.bits_stored or enhanced:
                continue
            expected = reference(frame.stored, dataset)
        np.testing.assert_allclose(frame.grey(), expected, atol=2e-4, err_msg=path.name)
        compared += 1
    assert compared >= 25


def test_real_values_agree_with_other_decoders(data: Path) -> None:
    """Smallest and largest values as the manifest has them from another set of plugins."""
    compared = 0
    with (data / "dicom" / "manifest.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("valid/") and row["samples"] == "1"]
    for row in rows:
        with silence():
            frames = list(decode_dicom(data / "dicom" / row["path"], Policy.VOI))
        if frames[0].presentation is not None and frames[0].stored.dtype.kind in "iu":
            found = [int(frame.stored.min()) for frame in frames], [int(frame.stored.max()) for frame in frames]
            assert abs(min(found[0]) - int(float(row["vmin"]))) <= 1, row["path"]
            assert abs(max(found[1]) - int(float(row["vmax"]))) <= 1, row["path"]
            compared += 1
    assert compared >= 35


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


@pytest.mark.parametrize("bits", [8, 16])
def test_table_entries_of_eight_bits(bits: int) -> None:
    """One entry per word, or two (LUTData as OW with half the bytes)."""
    dataset = header(BitsStored=8)
    item = Dataset()
    item.LUTDescriptor = [4, 0, 8]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = np.array([0, 51, 102, 255], dtype=f"u{bits // 8}").tobytes()
    item["LUTData"].VR = "OW"
    dataset.VOILUTSequence = Sequence([item])
    dataset.set_original_encoding(False, True)
    grey = normalise(np.arange(4, dtype=np.uint8), read_presentation(dataset))
    np.testing.assert_allclose(grey, [0, 0.2, 0.4, 1], atol=1e-6)


def test_table_comes_before_the_window() -> None:
    lut = Lut(first=0, values=np.array([0, 255], dtype=np.float32), bits=8)
    presentation = Presentation(bits_stored=8, voi_lut=lut, window=Window(center=0, width=1))
    assert normalise(np.array([0, 1, 9], dtype=np.uint8), presentation).tolist() == [0, 1, 1]


def test_linear_window_of_width_one_is_a_threshold() -> None:
    """PS3.3 C.11.2.1.2.1: at most c - 0.5 black, above white."""
    presentation = read_presentation(header(WindowCenter=10, WindowWidth=1, BitsStored=8))
    assert normalise(np.array([9, 10], dtype=np.uint8), presentation).tolist() == [0, 1]


def test_missing_slope_counts_as_one() -> None:
    for values in ({"RescaleIntercept": -10}, {"RescaleIntercept": -10, "RescaleSlope": 0}):
        presentation = read_presentation(header(WindowCenter=0.5, WindowWidth=11, BitsStored=8, **values))
        found = normalise(np.array([5, 10, 15], dtype=np.uint8), presentation)
        np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-6)


def test_negative_slope_turns_the_order() -> None:
    presentation = read_presentation(header(RescaleSlope=-1, RescaleIntercept=255, BitsStored=8))
    assert normalise(np.array([0, 255], dtype=np.uint8), presentation).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("signed", "vr", "value", "expected"),
    [
        (True, "US", 63536, -2000),
        (True, "SS", -2000, -2000),
        (False, "US", 63536, 63536),
        (False, "SS", -2000, 63536),
    ],
)
def test_padding_has_the_sign_of_the_pixels(signed: bool, vr: str, value: int, expected: int) -> None:
    dataset = header(PixelRepresentation=int(signed))
    dataset.add_new("PixelPaddingValue", vr, value)
    assert read_presentation(dataset).padding == (expected, expected)


def test_padding_range_in_any_order() -> None:
    dataset = header()
    dataset.add_new("PixelPaddingValue", "US", 90)
    dataset.add_new("PixelPaddingRangeLimit", "US", 80)
    assert read_presentation(dataset).padding == (80, 90)


def test_constant_images() -> None:
    stored = np.full((300, 300), 7, dtype=np.uint16)
    assert normalise(stored, Presentation(bits_stored=12), Policy.PERCENTILE).max() == 0
    everything = Presentation(bits_stored=12, padding=(0, 4095))
    for policy in Policy:
        assert normalise(stored, everything, policy).max() == 0


def test_floating_point_range_is_that_of_the_image() -> None:
    stored = np.array([[-2.0, 0.0, 6.0, np.nan]], dtype=np.float32)
    presentation = Presentation(bits_stored=0, padding=(np.nan, np.nan))
    assert normalise(stored, presentation).tolist() == [[0, 0.25, 1, 0]]
    with pytest.raises(RejectedFile) as caught:
        normalise(stored, Presentation(bits_stored=0))
    assert caught.value.code == "BITS_INCONSISTENT"


def test_wide_integers_keep_their_precision() -> None:
    stored = np.array([4_000_000_000, 4_000_000_128, 4_000_000_256], dtype=np.uint32)
    window = Window(center=4_000_000_128, width=256, function="LINEAR_EXACT")
    assert normalise(stored, Presentation(bits_stored=32, window=window)).tolist() == [0, 0.5, 1]


@settings(deadline=None)
@given(
    dtype=st.sampled_from(["u1", "i1", "u2", "i2"]),
    seed=st.integers(0, 10**6),
    size=st.integers(1, 3000),
    slope=st.sampled_from([1.0, 0.1, -3.0]),
    padded=st.booleans(),
)
def test_percentiles_equal_numpy(dtype: str, seed: int, size: int, slope: float, padded: bool) -> None:
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    ends = np.sort(rng.integers(limits.min, limits.max, 2, endpoint=True))
    stored = rng.integers(ends[0], ends[1], size, dtype=dtype, endpoint=True)
    padding = (float(stored[0]), float(stored[0])) if padded else None
    presentation = Presentation(
        bits_stored=8 * stored.itemsize, signed=dtype[0] == "i", slope=slope, intercept=7, padding=padding
    )
    kept = stored[stored != stored[0]] if padded else stored
    ramp = find_ramp(stored, presentation, Policy.PERCENTILE)
    low, high = np.percentile(kept * slope + 7, (0.5, 99.5)) if kept.size else (0, 0)
    if ramp is None:
        assert low == high
    else:
        ends = [slope * ramp.black + 7, slope * ramp.white + 7]
        np.testing.assert_allclose(ends, [low, high], rtol=1e-9, atol=1e-9)


def functional_groups(frames: int, **shared: object) -> Dataset:
    """An enhanced image whose frames have their own slope, and share what is given."""
    dataset = header(NumberOfFrames=frames, BitsStored=8)

    def macro(name: str, **values: object) -> Dataset:
        item, inner = Dataset(), Dataset()
        for keyword, value in values.items():
            setattr(inner, keyword, value)
        setattr(item, name, Sequence([inner]))
        return item

    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [
            macro("PixelValueTransformationSequence", RescaleSlope=number + 1, RescaleIntercept=-number)
            for number in range(frames)
        ]
    )
    if shared:
        dataset.SharedFunctionalGroupsSequence = Sequence([macro("FrameVOILUTSequence", **shared)])
    return dataset


def test_every_frame_has_its_own_rescale_values() -> None:
    dataset = functional_groups(3, WindowCenter=[20, 1], WindowWidth=[30, 1], VOILUTFunction="LINEAR_EXACT")
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope = 1, 1, 1
    found = [read_presentation(dataset, frame) for frame in range(3)]
    assert [(each.slope, each.intercept) for each in found] == [(1, 0), (2, -1), (3, -2)]
    assert {each.window for each in found} == {Window(center=20, width=30, function="LINEAR_EXACT")}


def test_what_a_frame_says_comes_first() -> None:
    dataset = functional_groups(2, WindowCenter=20, WindowWidth=30)
    own = Dataset()
    own.WindowCenter, own.WindowWidth = 5, 6
    dataset.PerFrameFunctionalGroupsSequence[1].FrameVOILUTSequence = Sequence([own])
    assert read_presentation(dataset, 0).window == Window(center=20, width=30)
    assert read_presentation(dataset, 1).window == Window(center=5, width=6)


def test_top_level_holds_without_groups() -> None:
    dataset = functional_groups(2)
    dataset.WindowCenter, dataset.WindowWidth = 5, 6
    assert read_presentation(dataset, 1).window == Window(center=5, width=6)
    assert read_presentation(dataset, 9).slope == 1  # more frames than groups
