from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.geometry import Fit
from medistill.ingest.intensity import PERCENTILES, Policy
from medistill.ingest.quarantine import REASON_CODES
from medistill.ingest.sources import nifti
from medistill.ingest.sources.nifti import NiftiSource, decode_cube, decode_slices, patient_of, read_file
from medistill.ingest.volumes import DecodedVolume

RNG = np.random.default_rng(0)


def write(path: Path, values: np.ndarray, **options: Any) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(options.get("spacing", (1.0, 2.0, 3.0)))
    image.SetDirection(options.get("direction", np.eye(3).ravel().tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def patch(path: Path, offset: int, form: str, *values: Any) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


def cube_of(path: Path, policy: Policy = Policy.PERCENTILE) -> DecodedVolume:
    (decoded,) = decode_cube(path, policy)
    return decoded


def rejection(path: Path, policy: Policy = Policy.NONE) -> str:
    with pytest.raises(RejectedFile) as caught:
        list(decode_cube(path, policy))
    assert caught.value.code in REASON_CODES
    assert path.name not in caught.value.detail
    return caught.value.code


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_have_the_values_of_the_file(tmp_path: Path, suffix: str) -> None:
    values = RNG.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    found = list(decode_slices(write(tmp_path / f"a{suffix}", values), Policy.NONE))
    assert [decoded.frame for decoded in found] == [1, 2, 3, 4, 5]
    expected = stretched(values, -32768, 32767)
    np.testing.assert_allclose([decoded.grey() for decoded in found], expected, atol=1e-6)


@pytest.mark.parametrize("target", ["LPS", "RAS", "LAS", "RPI", "PSL", "SAR", "ILP"])
def test_axes_are_put_into_the_order_of_the_patient(tmp_path: Path, target: str) -> None:
    values = RNG.integers(0, 255, (5, 6, 7)).astype(np.uint8)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(sitk.DICOMOrient(image, target), str(tmp_path / "a.nii"))
    volume = cube_of(tmp_path / "a.nii", Policy.NONE).volume
    np.testing.assert_allclose(volume.array, values / 255, atol=1e-6)
    assert volume.spacing == pytest.approx((3.0, 2.0, 1.0))
    np.testing.assert_allclose(volume.direction, np.eye(3).ravel(), atol=1e-6)


def test_the_percentiles_are_those_of_the_volume(tmp_path: Path) -> None:
    values = RNG.gamma(2.0, 100.0, (4, 20, 20)).astype(np.float32)
    path = write(tmp_path / "a.nii", values)
    expected = stretched(values, *np.percentile(values, PERCENTILES))
    decoded = cube_of(path)
    np.testing.assert_allclose(decoded.volume.array, expected, atol=1e-5)
    assert decoded.flags == ()
    slices = np.array([piece.grey() for piece in decode_slices(path, Policy.PERCENTILE)])
    np.testing.assert_array_equal(slices, decoded.volume.array)


def test_a_window_of_the_header(tmp_path: Path) -> None:
    values = RNG.integers(0, 1000, (4, 5, 6)).astype(np.int16)
    path = write(tmp_path / "a.nii", values)
    without = cube_of(path, Policy.VOI)
    assert without.flags == ("no_window",)
    np.testing.assert_array_equal(without.volume.array, cube_of(path).volume.array)
    patch(path, 124, "<2f", 800.0, 200.0)
    found = cube_of(path, Policy.VOI)
    assert found.flags == ()
    np.testing.assert_allclose(found.volume.array, stretched(values, 200, 800), atol=1e-6)


def test_scaled_values(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (4, 5, 6)).astype(np.uint8)
    path = patch(write(tmp_path / "a.nii", values), 112, "<2f", -2.0, 100.0)
    np.testing.assert_allclose(
        cube_of(path, Policy.NONE).volume.array, stretched(values * -2.0 + 100, -410, 100), atol=1e-6
    )
    patch(path, 124, "<2f", 50.0, -50.0)
    np.testing.assert_allclose(
        cube_of(path, Policy.VOI).volume.array, stretched(values * -2.0 + 100, -50, 50), atol=1e-6
    )


def test_floats_without_a_range(tmp_path: Path) -> None:
    inside = RNG.random((3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(cube_of(write(tmp_path / "a.nii", inside), Policy.NONE).volume.array, inside)
    assert rejection(write(tmp_path / "b.nii", inside * 2)) == "BITS_INCONSISTENT"


def test_values_that_are_not_finite_become_black(tmp_path: Path) -> None:
    values = RNG.random((3, 4, 5)).astype(np.float64)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    found = cube_of(write(tmp_path / "a.nii", values))
    assert found.flags == ("not_finite",)
    expected = stretched(values, *np.percentile(values[np.isfinite(values)], PERCENTILES))
    expected[0, 0, :3] = 0
    np.testing.assert_allclose(found.volume.array, expected, atol=1e-6)
    nothing = cube_of(write(tmp_path / "b.nii", np.full((2, 3, 4), np.nan, np.float32)))
    assert not nothing.volume.array.any()


def test_one_further_dimension_of_size_one(tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (1, 3, 4, 5)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=False), str(tmp_path / "a.nii"))
    patch(tmp_path / "a.nii", 40, "<h", 4)
    np.testing.assert_allclose(cube_of(tmp_path / "a.nii", Policy.NONE).volume.array, values[0] / 255, atol=1e-6)


def good(tmp_path: Path, suffix: str = ".nii") -> Path:
    return write(tmp_path / f"patient{suffix}", RNG.integers(0, 255, (4, 5, 6)).astype(np.uint8))


@pytest.mark.parametrize(
    ("offset", "form", "values", "code"),
    [
        (0, "<i", (7,), "IMAGE_FORMAT"),
        (344, "<4s", (b"ni1\0",), "IMAGE_FORMAT"),
        (40, "<8h", (4, 6, 5, 4, 2, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (2, 6, 20, 1, 1, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (9, 6, 5, 4, 1, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (3, 6, -5, 4, 1, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (3, 6, 0, 4, 1, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (3, 32767, 32767, 32767, 1, 1, 1, 1), "DIM_LIMIT"),
        (40, "<8h", (3, 500, 500, 500, 1, 1, 1, 1), "TRUNCATED"),
        (70, "<h", (128,), "COLOUR_MISMATCH"),
        (70, "<h", (32,), "IMAGE_FORMAT"),
        (70, "<h", (9999,), "IMAGE_FORMAT"),
        (76, "<4f", (1, 0, 1, 1), "GEOM_MIXED"),
        (76, "<4f", (1, np.nan, 1, 1), "GEOM_MIXED"),
        (108, "<f", (np.nan,), "IMAGE_FORMAT"),
        (108, "<f", (-1.0,), "IMAGE_FORMAT"),
        (108, "<f", (1e9,), "IMAGE_FORMAT"),
        (112, "<f", (np.inf,), "IMAGE_FORMAT"),
        (252, "<2h", (0, 0), "GEOM_MIXED"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, offset: int, form: str, values: Any, code: str) -> None:
    assert rejection(patch(good(tmp_path), offset, form, *values)) == code


def test_what_simpleitk_fills_with_zeros_is_truncated(tmp_path: Path) -> None:
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).shape == (4, 5, 6)
    assert rejection(path) == "TRUNCATED"


def test_damaged_compression(tmp_path: Path) -> None:
    whole = good(tmp_path, ".nii.gz").read_bytes()
    path = tmp_path / "patient.nii.gz"
    for content, code in (
        (whole[: len(whole) // 2], "TRUNCATED"),
        (whole[:-6] + bytes([whole[-6] ^ 255]) + whole[-5:], "IMAGE_FORMAT"),
        (whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], "IMAGE_FORMAT"),
        (b"", "IMAGE_FORMAT"),
        (b"text" * 200, "IMAGE_FORMAT"),
        (whole[:2], "TRUNCATED"),
    ):
        path.write_bytes(content)
        assert rejection(path) == code
    assert rejection(tmp_path / "absent.nii") == "READ_ERROR"


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = good(tmp_path).read_bytes()[:352]
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header + bytes(20 << 20)))
    assert rejection(path) == "ZIP_LIMIT"
    monkeypatch.setattr(nifti, "MAX_BYTES", 100)
    assert rejection(good(tmp_path, ".nii.gz")) == "ZIP_LIMIT"
    assert rejection(good(tmp_path)) == "DIM_LIMIT"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"])
def test_values_and_place_as_simpleitk_reads_them(tmp_path: Path, kind: str, suffix: str) -> None:
    values = (RNG.random((4, 5, 6)) * 100).astype(kind)
    turn = sitk.VersorTransform((0.0, 0.6, 0.8), 0.3).GetMatrix()
    path = write(tmp_path / f"a{suffix}", values, direction=turn)
    found = read_file(path)[1]
    expected = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(expected))
    oriented, volume = sitk.DICOMOrient(expected, "LPS"), cube_of(path).volume
    np.testing.assert_allclose(volume.direction, oriented.GetDirection())
    np.testing.assert_allclose(volume.origin, oriented.GetOrigin())


def test_the_other_byte_order(tmp_path: Path) -> None:
    values = RNG.integers(-999, 999, (4, 5, 6)).astype(np.int16)
    path = write(tmp_path / "a.nii", values)
    old, new = path.read_bytes(), bytearray(352)
    for offset, form in [(0, "i"), (40, "8h"), (70, "2h"), (76, "8f"), (108, "3f"), (252, "2h"), (256, "18f")]:
        struct.pack_into(f">{form}", new, offset, *struct.unpack_from(f"<{form}", old, offset))
    path.write_bytes(bytes(new[:344]) + old[344:352] + values.astype(">i2").tobytes())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), values)
    np.testing.assert_array_equal(read_file(path)[1], values)


def test_files_and_patients(tmp_path: Path) -> None:
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/x.nii", "p3/a/b.nii", "top.nii"):
        write(tmp_path / name, np.zeros((2, 2, 2), np.uint8))
    (tmp_path / "note.txt").touch()
    source = NiftiSource(tmp_path)
    items = list(source.items())
    assert [item.patient for item in items] == ["p3", "sub-01", "sub-02", ""]
    assert [item.ordinal for item in items] == [0, 1, 2, 3]
    assert len(source) == 4
    (alone,) = NiftiSource(tmp_path / "p3" / "a" / "b.nii").items()
    assert alone.payload == items[0].payload


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("a/sub-07/ses-1/anat/x.nii", "sub-07"),
        ("sub-07_T1w.nii", "sub-07"),
        ("derivatives/sub-3/x.nii", "sub-3"),
        ("clinic/x.nii", "clinic"),
        ("x.nii", ""),
        ("sub-/x.nii", "sub-"),
    ],
)
def test_patients_of_paths(name: str, patient: str) -> None:
    assert patient_of(name) == patient


def test_where_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(SourceError, match="no NIfTI"):
        len(NiftiSource(tmp_path))
    with pytest.raises(SourceError):
        len(NiftiSource(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="slices or cube"):
        NiftiSource(tmp_path, "both")


@pytest.mark.parametrize(
    ("name", "description", "head"),
    [
        ("sub-01_T1w.nii", "", True),
        ("x_flair.nii", "", True),
        ("Brain.nii", "", True),
        ("x.nii", "MPRAGE", True),
        ("x.nii", "", True),
        ("x.nii", "knee left", False),
        ("liver.nii", "", False),
        ("spleen_t12.nii", "", False),
    ],
)
def test_heads(tmp_path: Path, name: str, description: str, head: bool) -> None:
    path = patch(write(tmp_path / name, np.zeros((2, 2, 2), np.uint8)), 148, "80s", description.encode())
    assert cube_of(path).header.head is head
    assert all(decoded.header.head is head for decoded in decode_slices(path, Policy.NONE))


def test_modes_give_slices_or_one_cube(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.full((4, 6, 8), 255, np.uint8), spacing=(1.0, 1.0, 1.0))
    for mode, count in (("slices", 4), ("cube", 1)):
        source = NiftiSource(path, mode)
        decode = pickle.loads(pickle.dumps(source.decode))
        assert len(list(decode(next(source.items()).payload, Policy.NONE))) == count
    cube = cube_of(path, Policy.NONE).pixels(8, Fit.PAD)
    assert cube.shape == (8, 8, 8)
    assert (cube[2:6, 1:7] == 65535).all()
    assert not cube[:2].any()
    assert not cube[:, :1].any()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=6),
    packed=st.booleans(),
    keep=st.integers(0, 600),
)
def test_damage_gives_a_code(tmp_path: Path, edits: list[tuple[int, int]], packed: bool, keep: int) -> None:
    content = bytearray(good(tmp_path).read_bytes())
    for offset, value in edits:
        content[offset] = value
    content = content[:keep] if keep < len(content) - 100 else content
    path = tmp_path / ("x.nii.gz" if packed else "x.nii")
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    code = ""
    try:
        decoded = cube_of(path, Policy.PERCENTILE)
    except RejectedFile as rejected:
        code = rejected.code
    assert code in {"", *REASON_CODES}
    if not code:
        assert np.isfinite(decoded.volume.array).all()
        assert 0 <= decoded.volume.array.min() <= decoded.volume.array.max() <= 1
