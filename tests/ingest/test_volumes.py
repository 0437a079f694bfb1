from __future__ import annotations

import math
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage

from medistill.errors import RejectedFile
from medistill.ingest.decode import silence
from medistill.ingest.geometry import Fit
from medistill.ingest.intensity import PERCENTILES, Policy, Presentation, Window, normalise
from medistill.ingest.quarantine import REASON_CODES
from medistill.ingest.sources.series import SeriesSource, decode_series
from medistill.ingest.volumes import (
    DecodedVolume,
    SliceGeometry,
    Volume,
    arrange,
    read_geometry,
    resample,
    stack,
)
from tests.ingest.conftest import make_dicom

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
RNG = np.random.default_rng(0)


def turned(angles: Sequence[float]) -> np.ndarray:
    """A rotation matrix."""
    transform = sitk.Euler3DTransform()
    transform.SetRotation(*angles)
    return np.array(transform.GetMatrix()).reshape(3, 3)


def geometries(
    count: int, *, step: float = 2.0, axes: np.ndarray | None = None, **values: Any
) -> list[SliceGeometry]:
    axes = np.eye(3) if axes is None else axes
    common: dict[str, Any] = {"spacing": (0.5, 0.75), "rows": 6, "columns": 5, **values}
    orientation = tuple(axes[:, :2].T.ravel().tolist())
    corner = np.array([-10.0, 20.0, 30.0])
    return [
        SliceGeometry(
            position=tuple((corner + step * number * axes[:, 2]).tolist()), orientation=orientation, **common
        )
        for number in range(count)
    ]


def code_of(slices: Sequence[SliceGeometry], **options: Any) -> tuple[str, str]:
    with pytest.raises(RejectedFile) as caught:
        arrange(slices, **options)
    assert caught.value.code in REASON_CODES
    return caught.value.code, caught.value.detail


def physical_ramp(volume: Volume, slope: np.ndarray) -> Volume:
    """The volume with the value ``slope · x`` at every point ``x`` in space."""
    depth, height, width = volume.array.shape
    index = np.stack(np.meshgrid(*map(np.arange, (width, height, depth)), indexing="ij"), -1)
    points = index * volume.spacing[::-1] @ np.array(volume.direction).reshape(3, 3).T + volume.origin
    return replace(volume, array=(points @ slope).T.astype(np.float32))


def cube_points(volume: Volume, size: int, edge: float) -> np.ndarray:
    """Points in space of a cube along the patient's axes, shape ``(z, y, x, 3)``; for unturned volumes."""
    shape = np.array(volume.array.shape[::-1])
    direction = np.array(volume.direction).reshape(3, 3)
    centre = np.array(volume.origin) + direction @ ((shape - 1) / 2 * volume.spacing[::-1])
    steps = (np.arange(size) - (size - 1) / 2) * edge
    z, y, x = np.meshgrid(steps, steps, steps, indexing="ij")
    return np.stack([x, y, z], -1) + centre


# -- arranging


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(2, 12),
    step=st.floats(0.1, 8),
    angles=st.tuples(*[st.floats(-math.pi, math.pi)] * 3),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_order_and_any_obliquity(count: int, step: float, angles: tuple[float, ...], shuffle: Any) -> None:
    axes = turned(angles)
    slices = geometries(count, step=step, axes=axes)
    order = list(range(count))
    shuffle.shuffle(order)
    found = arrange([slices[number] for number in order])
    assert [order[at] for at in found.order] == list(range(count))
    assert found.spacing == pytest.approx((step, 0.5, 0.75))
    assert found.origin == pytest.approx(slices[0].position)
    np.testing.assert_allclose(found.direction, axes.ravel(), atol=1e-9)
    assert found.flags == ()


def test_values_follow_their_slices() -> None:
    slices = geometries(4)
    arrays = [np.full((6, 5), number, np.float32) for number in range(4)]
    volume = stack([(slices[number], arrays[number]) for number in (2, 0, 3, 1)])
    assert volume.array[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert volume.array.dtype == np.float32


def test_a_missing_slice() -> None:
    slices = geometries(8)
    assert code_of(slices[:3] + slices[4:])[0] == "GEOM_GAP"
    assert code_of([slices[0], slices[1], slices[3]])[0] == "GEOM_GAP"
    assert code_of([*slices, geometries(200)[-1]])[0] == "GEOM_GAP"
    assert code_of(slices[:1])[0] == "GEOM_GAP"
    assert code_of([])[0] == "GEOM_GAP"
    assert arrange(slices[:2]).spacing[0] == pytest.approx(2)


def test_rounded_positions_are_no_gap() -> None:
    slices = [
        replace(slice_, position=(*slice_.position[:2], round(slice_.position[2], 1)))
        for slice_ in geometries(40, step=0.625)
    ]
    assert code_of(slices)[0] == "GEOM_GAP"  # 0.6 and 0.7 mm: 0.1 mm is 16 % of the distance
    slices = [
        replace(slice_, position=(*slice_.position[:2], round(slice_.position[2], 2)))
        for slice_ in geometries(40, step=0.625)
    ]
    assert arrange(slices).spacing[0] == pytest.approx(0.625, abs=1e-3)


def test_two_slices_at_one_place() -> None:
    slices = geometries(5)
    assert code_of([*slices, slices[2]]) == ("GEOM_MIXED", "several slices at the same position")
    assert code_of([*slices, *slices]) == ("GEOM_MIXED", "several slices at the same position")
    assert code_of([slices[0], slices[0]]) == ("GEOM_MIXED", "several slices at the same position")


@pytest.mark.parametrize(
    "change", [{"rows": 7}, {"columns": 4}, {"spacing": (0.5, 0.8)}, {"imager_spacing": True}]
)
def test_slices_that_do_not_belong_together(change: dict[str, Any]) -> None:
    slices = geometries(6)
    assert code_of([*slices[:5], replace(slices[5], **change)])[0] == "GEOM_MIXED"


def test_localisers_are_left_out_and_counted() -> None:
    slices = geometries(8)
    scout = replace(slices[0], orientation=(0, 1, 0, 0, 0, -1), rows=99)
    typed = replace(slices[3], localiser=True)
    found = arrange([scout, *slices, typed])
    assert (found.left_out, found.flags) == ((0, 9), ("localiser_left_out",))
    assert len(found.order) == 8
    assert code_of([replace(slice_, localiser=True) for slice_ in slices])[0] == "LOCALISER"
    half = [replace(slice_, orientation=(0, 1, 0, 0, 0, -1)) for slice_ in slices[4:]]
    assert code_of([*slices[:4], *half]) == ("GEOM_MIXED", "slices of different orientation")
    fan = geometries(1) + [geometries(1, axes=turned((0.1 * number, 0, 0)))[0] for number in range(1, 40)]
    assert code_of(fan)[0] == "GEOM_MIXED"


def test_a_spacing_of_the_detector_is_marked() -> None:
    assert arrange(geometries(3, imager_spacing=True)).flags == ("imager_spacing",)


def test_too_many_voxels() -> None:
    assert code_of(geometries(3, rows=1 << 14, columns=1 << 14))[0] == "DIM_LIMIT"


def tilted(count: int, shift: float = 1.0) -> list[SliceGeometry]:
    return [
        replace(slice_, position=(slice_.position[0], slice_.position[1] + shift * number, slice_.position[2]))
        for number, slice_ in enumerate(geometries(count, rows=24, columns=20))
    ]


def test_a_tilted_gantry_is_refused_or_straightened() -> None:
    slices = tilted(6)
    assert code_of(slices) == ("GEOM_MIXED", "slices of a tilted gantry")
    slope = np.array([0.1, -0.2, 0.3])
    rows, columns = np.mgrid[:24, :20]
    values = [
        slope[0] * (slice_.position[0] + 0.75 * columns)
        + slope[1] * (slice_.position[1] + 0.5 * rows)
        + slope[2] * slice_.position[2]
        for slice_ in slices
    ]
    pairs = [(slice_, value.astype(np.float32)) for slice_, value in zip(slices, values, strict=True)]
    volume = stack(pairs[::-1], straighten=True)
    assert volume.flags == ("straightened",)
    assert volume.array.shape == (6, 24 + 10, 20)
    inside = np.array([volume.array[number, 2 * number : 2 * number + 24] for number in range(6)])
    expected = physical_ramp(volume, slope).array
    wanted = np.array([expected[number, 2 * number : 2 * number + 24] for number in range(6)])
    np.testing.assert_allclose(inside, wanted, atol=1e-4)
    assert not volume.array[5, :9].any()


def test_tilting_to_the_other_side_and_by_parts_of_pixels() -> None:
    slices = tilted(5, shift=-0.3)
    rows = np.mgrid[:24, :20][0]
    pairs = [(slice_, (slice_.position[1] + 0.5 * rows).astype(np.float32)) for slice_ in slices]
    volume = stack(pairs, straighten=True)
    expected = physical_ramp(volume, np.array([0.0, 1.0, 0.0])).array
    for number, slice_ in enumerate(slices):
        first = (slice_.position[1] - volume.origin[1]) / 0.5
        inner = slice(math.ceil(first), math.floor(first + 23) + 1)
        np.testing.assert_allclose(volume.array[number, inner], expected[number, inner], atol=1e-4)


def test_slices_shifted_at_random_are_refused_even_so() -> None:
    slices = tilted(6)
    slices[3] = replace(slices[3], position=(99.0, *slices[3].position[1:]))
    assert code_of(slices, straighten=True) == ("GEOM_MIXED", "slices are shifted against each other")


# -- resampling


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "edge"),
    [
        ((12, 14, 10), (1.0, 1.0, 1.0), 24, 0.5),
        ((12, 28, 24), (3.0, 0.7, 0.9), 20, None),
        ((40, 48, 44), (1.0, 1.0, 1.0), 12, None),
        ((10, 64, 60), (5.0, 0.8, 0.8), 16, 3.0),
        ((30, 31, 29), (1.0, 1.0, 1.0), 12, 2.7),
    ],
)
def test_a_ramp_in_space_stays_that_ramp(
    shape: tuple[int, ...], spacing: tuple[float, float, float], size: int, edge: float | None
) -> None:
    slope = np.array([0.02, -0.03, 0.05])
    volume = physical_ramp(
        Volume(array=np.zeros(shape, np.float32), spacing=spacing, origin=(-3.0, 5.0, 7.0)), slope
    )
    cube = resample(volume, size, spacing=edge)
    edge = edge or max(np.array(shape) * spacing) / size
    points = cube_points(volume, size, edge)
    margin = 2.2 * np.maximum(edge, spacing[::-1])
    lower = np.array(volume.origin) + margin
    upper = np.array(volume.origin) + (np.array(shape[::-1]) - 1) * spacing[::-1] - margin
    inside = ((points >= lower) & (points <= upper)).all(-1)
    assert inside.sum() > 8
    np.testing.assert_allclose(cube[inside], (points @ slope)[inside], atol=2e-5)


@pytest.mark.parametrize("orientation", ["RAS", "PIR", "ASL", "LPI"])
def test_the_axes_of_the_cube_are_those_of_the_patient(orientation: str) -> None:
    image = sitk.GetImageFromArray(RNG.random((4, 5, 6)).astype(np.float32))
    upright = Volume(array=sitk.GetArrayFromImage(image), spacing=(1.0, 1.0, 1.0))
    other = sitk.DICOMOrient(image, orientation)
    volume = Volume(
        array=sitk.GetArrayFromImage(other),
        spacing=other.GetSpacing()[::-1],
        origin=other.GetOrigin(),
        direction=other.GetDirection(),
    )
    np.testing.assert_allclose(resample(volume, 9), resample(upright, 9), atol=1e-5)


def test_padding_is_black_and_the_volume_keeps_its_proportions() -> None:
    volume = Volume(array=np.ones((4, 8, 16), np.float32), spacing=(2.0, 1.0, 1.0))
    cube = resample(volume, 16)
    assert cube.shape == (16, 16, 16)
    assert cube[4:12, 4:12, :].min() == pytest.approx(1)
    assert cube.sum() == pytest.approx(8 * 8 * 16)


def test_one_to_one_is_untouched() -> None:
    array = RNG.random((9, 9, 9)).astype(np.float32)
    np.testing.assert_array_equal(resample(Volume(array=array, spacing=(1.5, 1.5, 1.5)), 9), array)


@pytest.mark.parametrize("factor", [2, 4])
def test_whole_factors_are_means_of_blocks(factor: int) -> None:
    array = RNG.random((8 * factor,) * 3).astype(np.float32)
    blocks = array.reshape(8, factor, 8, factor, 8, factor).mean((1, 3, 5))
    np.testing.assert_allclose(resample(Volume(array=array, spacing=(1.0,) * 3), 8), blocks, atol=1e-6)


@pytest.mark.parametrize("size", [20, 13, 9])
def test_shrinking_does_not_alias(size: int) -> None:
    """The finest chequered pattern must become grey, not moiré; plain linear interpolation fails this."""
    array = (np.indices((32, 32, 32)).sum(0) % 2).astype(np.float32)
    volume = Volume(array=array, spacing=(1.0, 1.0, 1.0))
    inner = slice(2, -2)
    assert np.ptp(resample(volume, size)[inner, inner, inner]) < 0.1
    edge = 32 / size
    grid = ([(size, size, size)], [edge] * 3, [(edge - 1) / 2] * 3)
    plain = sitk.Resample(
        volume.image(), grid[0][0], sitk.Transform(), sitk.sitkLinear, grid[2], grid[1], np.eye(3).ravel().tolist()
    )
    assert np.ptp(sitk.GetArrayFromImage(plain)[inner, inner, inner]) > 0.1


# -- headers


def header(**values: Any) -> Dataset:
    dataset = Dataset()
    dataset.Rows, dataset.Columns = 6, 5
    dataset.ImagePositionPatient = [1, 2, 3]
    dataset.ImageOrientationPatient = list(AXIAL)
    dataset.PixelSpacing = [0.5, 0.75]
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


def test_the_geometry_of_a_header() -> None:
    found = read_geometry(header(ImagerPixelSpacing=[9, 9]))
    assert found == SliceGeometry(
        position=(1, 2, 3), orientation=AXIAL, spacing=(0.5, 0.75), rows=6, columns=5, localiser=False
    )
    assert read_geometry(header(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])).localiser
    assert not read_geometry(header(ImageType="ORIGINAL")).localiser
    imager = read_geometry(header(PixelSpacing=None, ImagerPixelSpacing=[0.1, 0.2]))
    assert (imager.spacing, imager.imager_spacing) == ((0.1, 0.2), True)


@pytest.mark.parametrize(
    "values",
    [
        {"PixelSpacing": None},
        {"PixelSpacing": ["0.000", "0.000"]},
        {"PixelSpacing": [-1, 1]},
        {"PixelSpacing": [1]},
        {"PixelSpacing": ""},
        {"ImagePositionPatient": None},
        {"ImagePositionPatient": [1, 2]},
        {"ImageOrientationPatient": None},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        {"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]},
    ],
    ids=str,
)
def test_no_geometry_is_ever_invented(values: dict[str, Any]) -> None:
    with silence(), pytest.raises(RejectedFile) as caught:
        read_geometry(header(**values))
    assert caught.value.code == "GEOM_MIXED"


def test_zero_spacing_does_not_fall_back_to_the_detector() -> None:
    with pytest.raises(RejectedFile):
        read_geometry(header(PixelSpacing=[0, 0], ImagerPixelSpacing=[1, 1]))


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def enhanced(frames: int) -> Dataset:
    dataset = Dataset()
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 6, 5, frames
    dataset.SharedFunctionalGroupsSequence = Items(
        [
            item(
                PlaneOrientationSequence=Items([item(ImageOrientationPatient=list(AXIAL))]),
                PixelMeasuresSequence=Items([item(PixelSpacing=[0.5, 0.75])]),
            )
        ]
    )
    dataset.PerFrameFunctionalGroupsSequence = Items(
        [
            item(
                PlanePositionSequence=Items([item(ImagePositionPatient=[-10, 20, 30 + 2 * frame])]),
                MRImageFrameTypeSequence=Items([item(FrameType=["ORIGINAL", "PRIMARY", "M", "NONE"])]),
            )
            for frame in range(frames)
        ]
    )
    return dataset


def test_the_geometry_of_functional_groups() -> None:
    dataset = enhanced(4)
    assert [read_geometry(dataset, frame) for frame in range(1, 5)] == geometries(4)
    groups = dataset.PerFrameFunctionalGroupsSequence
    groups[1].MRImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    assert [read_geometry(dataset, frame).localiser for frame in range(1, 5)] == [False, True, False, False]
    with pytest.raises(RejectedFile):
        read_geometry(dataset, 5)


# -- series


def write_series(
    folder: Path, count: int = 5, *, step: float = 2.0, series: str = "1.2.5.1", **values: Any
) -> Path:
    """Slices whose value is their number times ten, last slice first."""
    for number in range(count):
        make_dicom(
            folder / f"{count - number}.dcm",
            np.full((6, 5), 10 * number, np.int16),
            **{
                "SOPClassUID": CTImageStorage,
                "SOPInstanceUID": f"{series}.{number}",
                "SeriesInstanceUID": series,
                "Modality": "CT",
                "ImagePositionPatient": [0, 0, step * number],
                "ImageOrientationPatient": list(AXIAL),
                "PixelSpacing": [1, 1],
                "RescaleSlope": 1,
                "RescaleIntercept": 0,
                "WindowCenter": 20,
                "WindowWidth": 40,
                "VOILUTFunction": "LINEAR_EXACT",
                **{key: value[number] if isinstance(value, dict) else value for key, value in values.items()},
            },
        )
    return folder


def volumes(path: Path, policy: Policy = Policy.VOI, **options: Any) -> list[DecodedVolume | str]:
    """What every item of a series source becomes: a volume or its code."""
    source = SeriesSource(path, **options)
    decode = pickle.loads(pickle.dumps(source.decode))
    items = list(source.items())
    assert len(items) == len(source)
    assert [item.ordinal for item in items] == list(range(len(items)))
    found: list[DecodedVolume | str] = []
    for item_ in items:
        if item_.refused:
            found.append(item_.refused)
            continue
        try:
            found.append(next(decode(pickle.loads(pickle.dumps(item_.payload)), policy)))
        except RejectedFile as rejection:
            found.append(rejection.code)
    return found


def volume(path: Path, policy: Policy = Policy.VOI, **options: Any) -> DecodedVolume:
    (found,) = volumes(path, policy, **options)
    assert isinstance(found, DecodedVolume), found
    return found


def test_the_same_as_the_reader_of_simpleitk(data: Path) -> None:
    folder = data / "dicom" / "series"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    expected = reader.Execute()
    values = sitk.GetArrayFromImage(expected).astype(np.float32)
    found = volume(folder, Policy.PERCENTILE)
    low, high = np.percentile(values, PERCENTILES)
    np.testing.assert_allclose(found.volume.array, np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    assert found.volume.spacing == pytest.approx(expected.GetSpacing()[::-1])
    assert found.volume.origin == pytest.approx(expected.GetOrigin())
    assert found.volume.direction == pytest.approx(expected.GetDirection())
    cube = found.pixels(32, Fit.PAD)
    assert (cube.shape, cube.dtype) == ((32, 32, 32), np.uint16)
    grey = sitk.GetImageFromArray(found.volume.array)
    grey.CopyInformation(expected)
    upright = sitk.DICOMOrient(grey, "LPS")
    centre = upright.TransformContinuousIndexToPhysicalPoint([(count - 1) / 2 for count in upright.GetSize()])
    corner = np.array(centre) - np.array(upright.GetDirection()).reshape(3, 3) @ np.full(3, 1.5 * 39 / 2)
    grid = ([40] * 3, sitk.Transform(), sitk.sitkLinear, corner.tolist(), [1.5] * 3, upright.GetDirection())
    wanted = sitk.GetArrayFromImage(sitk.Resample(upright, *grid))
    np.testing.assert_allclose(resample(found.volume, 40, spacing=1.5), wanted, atol=1e-5)


def test_an_oblique_volume_is_not_turned() -> None:
    axes = turned((0.2, -0.3, 0.1))
    array = RNG.random((7, 8, 9)).astype(np.float32)
    plain = Volume(array=array, spacing=(2.0, 1.0, 1.0))
    oblique = replace(plain, origin=(5.0, -6.0, 7.0), direction=tuple(axes.ravel().tolist()))
    np.testing.assert_allclose(resample(oblique, 12), resample(plain, 12), atol=1e-4)


def test_folder_archive_and_medium_give_the_same_volume(data: Path, tmp_path: Path) -> None:
    folder = data / "dicom" / "series"
    expected = volume(folder)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    shutil.make_archive(str(tmp_path / "y"), "gztar", folder)
    for path in (tmp_path / "x.zip", tmp_path / "y.tar.gz"):
        np.testing.assert_array_equal(volume(path).volume.array, expected.volume.array)
    shutil.copytree(folder, tmp_path / "medium")
    (tmp_path / "medium" / "DICOMDIR").write_bytes(b"damaged")
    np.testing.assert_array_equal(volume(tmp_path / "medium").volume.array, expected.volume.array)


def test_series_are_told_apart_and_everything_is_accounted_for(tmp_path: Path) -> None:
    write_series(tmp_path / "a", series="1.2.5.1")
    write_series(tmp_path / "b", series="1.2.5.2", ImagePositionPatient={0: [0] * 3, 1: [0, 0, 2], 2: [0, 0, 9],
                                                                      3: [0, 0, 11], 4: [0, 0, 13]})  # fmt: skip
    (tmp_path / "a" / "note.txt").write_bytes(b"text")
    make_dicom(tmp_path / "c" / "1.dcm", np.zeros((4, 4), np.uint8))
    found = volumes(tmp_path)
    assert isinstance(found[0], DecodedVolume)
    assert found[1:] == ["NOT_DICOM", "GEOM_GAP", "GEOM_MIXED"]
    assert found[0].header.sop_uid == "1.2.5.1"


def test_slices_in_reversed_order_of_files(tmp_path: Path) -> None:
    found = volume(write_series(tmp_path))
    np.testing.assert_allclose(found.volume.array[:, 0, 0], [0, 0.25, 0.5, 0.75, 1])
    assert found.grey().shape == (6, 5)
    np.testing.assert_allclose(found.grey(), 0.5)
    assert found.flags == ()


def test_one_rule_for_all_slices(tmp_path: Path) -> None:
    folder = write_series(tmp_path, WindowWidth={0: 1000, 1: 1000, 2: 40, 3: 1000, 4: 1000})
    found = volume(folder)
    np.testing.assert_allclose(found.volume.array[:, 0, 0], [0, 0.25, 0.5, 0.75, 1])
    assert found.flags == ("one_window",)
    stretched = volume(folder, Policy.PERCENTILE)
    values = np.repeat([0.0, 10, 20, 30, 40], 30)
    low, high = np.percentile(values, PERCENTILES)
    expected = np.clip((np.array([0, 10, 20, 30, 40]) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(stretched.volume.array[:, 0, 0], expected, atol=1e-6)
    assert stretched.flags == ()


def test_slices_with_a_slope_of_their_own(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path, RescaleSlope={0: 1, 1: 2, 2: 1, 3: 0.5, 4: 1}, PixelPaddingValue={0: 7, 1: 7, 2: 7, 3: 7, 4: 40}
    )
    found = volume(folder)
    np.testing.assert_allclose(found.volume.array[:, 0, 0], [0, 0.5, 0.5, 0.375, 0])
    assert found.flags == ("rescaled_slices",)
    rest = volume(folder, Policy.PERCENTILE).volume.array[:, 0, 0]
    np.testing.assert_allclose(rest, [0, 1, 1, 0.75, 0], atol=1e-6)


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("kind", ["u1", "i2", "u2"])
def test_levels_are_those_of_the_whole_volume_as_one_image(tmp_path: Path, policy: Policy, kind: str) -> None:
    values = (RNG.gamma(2.0, 20.0, (5, 6, 5)) % 250).astype(kind)
    rule = Presentation(
        bits_stored=8 * values.itemsize,
        signed=kind == "i2",
        slope=-2.0,
        intercept=5.0,
        padding=(9.0, 9.0),
        window=Window(center=-100, width=200),
    )
    folder = write_series(
        tmp_path,
        PixelPaddingValue=9,
        RescaleSlope=-2,
        RescaleIntercept=5,
        WindowCenter=-100,
        WindowWidth=200,
        VOILUTFunction="LINEAR",
        **pixels(values),
    )
    np.testing.assert_allclose(volume(folder, policy).volume.array, normalise(values, rule, policy), atol=1e-6)


def pixels(values: np.ndarray) -> dict[str, Any]:
    bits = 8 * values.itemsize
    return {
        **{"PixelData": {number: plane.tobytes() for number, plane in enumerate(values)}, "BitsAllocated": bits},
        **{"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": int(values.dtype.kind == "i")},
    }


@pytest.mark.parametrize("policy", Policy)
def test_constant_volumes(tmp_path: Path, policy: Policy) -> None:
    folder = write_series(
        tmp_path, **pixels(np.full((5, 6, 5), 20, np.int16)), RescaleSlope={0: 1, 1: 2, 2: 2, 3: 2, 4: 2}
    )
    found = volume(folder, policy).volume.array
    assert np.isfinite(found).all()
    flat = write_series(tmp_path / "flat", **pixels(np.full((5, 6, 5), 20, np.int16)), series="1.8")
    level = {Policy.VOI: 0.5, Policy.PERCENTILE: 0, Policy.NONE: (20 + 32768) / 65535}[policy]
    np.testing.assert_allclose(volume(flat, policy).volume.array, level, atol=1e-6)


def test_padding_is_black_and_low_is_white_where_the_header_says_so(tmp_path: Path) -> None:
    folder = write_series(tmp_path, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=20)
    np.testing.assert_allclose(volume(folder).volume.array[:, 0, 0], [1, 0.75, 0, 0.25, 0])
    mixed = {0: "MONOCHROME1", **dict.fromkeys(range(1, 5), "MONOCHROME2")}
    assert (
        volumes(write_series(tmp_path / "mixed", PhotometricInterpretation=mixed, series="1.9"))[-1]
        == "GEOM_MIXED"
    )


def test_a_slice_that_cannot_be_read_refuses_the_volume(tmp_path: Path) -> None:
    write_series(tmp_path)
    path = tmp_path / "3.dcm"
    path.write_bytes(path.read_bytes()[:-20])
    assert volumes(tmp_path) == ["TRUNCATED"]


def test_a_copy_counts_once_and_another_image_of_the_same_name_not_at_all(tmp_path: Path) -> None:
    write_series(tmp_path)
    shutil.copy(tmp_path / "3.dcm", tmp_path / "copy.dcm")
    found = volume(tmp_path)
    assert found.volume.array.shape == (5, 6, 5)
    assert found.flags == ("duplicate_slices",)
    dataset = pydicom.dcmread(tmp_path / "2.dcm")
    dataset.SOPInstanceUID = pydicom.dcmread(tmp_path / "3.dcm").SOPInstanceUID
    dataset.save_as(tmp_path / "2.dcm")
    assert volumes(tmp_path) == ["DUP_SOP_DIFF"]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"PixelSpacing": [0, 0]}, "GEOM_MIXED"),
        ({"PixelSpacing": ""}, "GEOM_MIXED"),
        ({"ImagePositionPatient": ""}, "GEOM_MIXED"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALISER"),
        ({"ImagePositionPatient": [0, 0, 0]}, "GEOM_MIXED"),
        ({"PatientID": {0: "A", 1: "A", 2: "A", 3: "A", 4: "B"}}, "ID_CONFLICT"),
    ],
    ids=str,
)
def test_series_that_are_refused(tmp_path: Path, values: dict[str, Any], code: str) -> None:
    assert volumes(write_series(tmp_path, **values)) == [code]


def test_mixed_sizes_and_colour(tmp_path: Path) -> None:
    write_series(tmp_path)
    base = {"SeriesInstanceUID": "1.2.5.1", "ImagePositionPatient": [0, 0, 10], "PixelSpacing": [1, 1]}
    base["ImageOrientationPatient"] = list(AXIAL)
    make_dicom(tmp_path / "9.dcm", np.zeros((7, 5), np.int16), **base)
    assert volumes(tmp_path) == ["GEOM_MIXED"]
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    make_dicom(tmp_path / "9.dcm", np.zeros((6, 5, 3), np.uint8), **base, **colour)
    assert volumes(tmp_path) == ["COLOUR_MISMATCH"]


def test_a_tilted_series_on_request(tmp_path: Path) -> None:
    positions = {number: [0, 1.0 * number, 2.0 * number] for number in range(5)}
    folder = write_series(tmp_path, ImagePositionPatient=positions)
    assert volumes(folder) == ["GEOM_MIXED"]
    found = volume(folder, straighten=True)
    assert found.flags == ("straightened",)
    assert found.volume.array.shape == (5, 10, 5)


def test_heads_are_known(tmp_path: Path) -> None:
    assert volume(write_series(tmp_path / "a", BodyPartExamined="HEAD")).header.head
    assert not volume(write_series(tmp_path / "b", BodyPartExamined="CHEST")).header.head


def test_an_enhanced_file_is_a_volume(tmp_path: Path) -> None:
    dataset = enhanced(4)
    values = RNG.integers(0, 1000, (4, 6, 5)).astype(np.uint16)
    groups = {
        key: dataset[key].value for key in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    }
    make_dicom(
        tmp_path / "1.dcm",
        values[0],
        SeriesInstanceUID="1.7",
        NumberOfFrames=4,
        PixelData=values.tobytes(),
        **groups,
    )
    found = volume(tmp_path, Policy.NONE)
    np.testing.assert_allclose(found.volume.array, values / 65535, atol=1e-6)
    assert found.volume.spacing == pytest.approx((2, 0.5, 0.75))


def test_text_is_blacked_out_in_every_slice(tmp_path: Path) -> None:
    found = volume(write_series(tmp_path), Policy.NONE)
    masked = found.masked([(1, 2, 3, 4)])
    assert not masked.volume.array[:, 1:3, 2:4].any()
    assert found.volume.array[1:, 1:3, 2:4].all()
    np.testing.assert_array_equal(masked.volume.array[:, 0], found.volume.array[:, 0])


def test_refused_members_of_an_archive_stay_items(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted((tmp_path / "a").iterdir()):
            archive.write(file, file.name)
        archive.writestr("../up", b"x")
    found = volumes(tmp_path / "x.zip")
    assert found[0] == "PATH_ESCAPE"
    assert isinstance(found[1], DecodedVolume)


def test_the_items_of_a_series_hold_places_only(data: Path) -> None:
    (alone,) = SeriesSource(data / "dicom" / "series").items()
    assert alone.payload == tuple(sorted((data / "dicom" / "series").iterdir()))
    with pytest.raises(RejectedFile):
        next(decode_series((), Policy.NONE))


def test_real_series_of_two_patients(data: Path) -> None:
    """Radiographs, single slices, cut-down series, scouts, projections from all sides, and one volume."""
    found = volumes(data / "dicom" / "multi_patient")
    codes = Counter(each if isinstance(each, str) else "" for each in found)
    assert codes == {"": 1, "LOCALISER": 1, "GEOM_GAP": 5, "GEOM_MIXED": 6}
    (whole,) = (each for each in found if isinstance(each, DecodedVolume))
    assert whole.volume.spacing == pytest.approx((2.5, 0.488281, 0.488281))


def test_a_cohort_of_volumes_is_read_at_another_size(tmp_path: Path) -> None:
    from medistill.ingest import IngestConfig, ingest
    from tests.ingest.conftest import KEY, write_csv

    rows = [("file", "label")]
    for number in range(16):
        values = np.random.default_rng(number).integers(0, 200, (9, 10, 11)).astype(np.uint8)
        path = tmp_path / "scans" / f"sub-{number:02d}" / "liver.nii"
        path.parent.mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        rows.append((f"sub-{number:02d}/liver.nii", "ill" if number % 2 else "well"))
    labels = write_csv(tmp_path / "labels.csv", rows)
    config = IngestConfig(size=8, volumes="cubes", burned_in="allow")
    cohort = ingest(tmp_path / "scans", tmp_path / "c", key=KEY, labels=labels, config=config, jobs=1)
    assert cohort.store.read([0, 1]).shape == (2, 1, 8, 8, 8)
    assert len(cohort.patients) == 16
    assert torch.equal(cohort.images(8).images, torch.tensor(cohort.store.read(range(16)) / 65535.0).float())
    halved = cohort.images(4).images
    assert halved.shape == (16, 1, 4, 4, 4)
    assert halved.flatten(1).mean(1) == pytest.approx(cohort.images(8).images.flatten(1).mean(1), abs=0.02)
