"""Slices to volumes, by what the headers say about space; nothing about space is ever guessed.

Slices are sorted by their position along the normal of their plane (PS3.3 C.7.6.2.1.1). A missing slice, several
slices at one place, or slices of different size, orientation or spacing make the whole set unusable, with a reason
code; localisers among them are left out and counted. Patient axes are those of DICOM: x to the left, y to the
back, z to the head ("LPS").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydicom.multival import MultiValue

from medistill.errors import RejectedFile
from medistill.ingest.frames import Box
from medistill.ingest.geometry import quantise
from medistill.ingest.headers import Header, integer

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from medistill.ingest.geometry import Fit

sitk: Any = SimpleITK  # its functions carry no types
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # processes are the parallelism; threads cost address space

MAX_VOXELS = 1 << 27
#: Code of slices whose position, orientation or spacing is missing or unusable.
NO_GEOMETRY = "GEOM_MIXED"
_SAME_DIRECTION = 2e-3
_SAME_SPACING = 1e-3
_GAP = 0.1
_SAME_PLACE = 1e-3  # mm
_SAME_PART = 0.01
_DRIFT = 0.5
_FEW = 0.25
_FWHM = 2.0 * float(np.sqrt(2.0 * np.log(2.0)))
_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")

_STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class SliceGeometry:
    """Where a slice lies (PS3.3 C.7.6.2).

    Args:
        position: Centre of the first pixel in mm, in patient axes.
        orientation: Directions of a row and of a column, six cosines.
        spacing: Distance between rows and between columns in mm.
        rows: Number of rows.
        columns: Number of columns.
        localiser: Whether the image type says so.
        imager_spacing: Whether the spacing is that of the detector, not of the patient.
    """

    position: Vector
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    rows: int
    columns: int
    localiser: bool = False
    imager_spacing: bool = False

    @property
    def axes(self) -> NDArray[np.float64]:
        """Orthonormal directions of a row, of a column, and of the normal, shape ``(3, 3)``."""
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        row = row / np.linalg.norm(row)
        normal = np.cross(row, column)
        normal = normal / np.linalg.norm(normal)
        return np.array([row, np.cross(normal, row), normal])


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How slices form a volume.

    Args:
        order: Numbers of the slices from the first to the last along the normal.
        left_out: Numbers of the localisers.
        spacing: Between slices, rows and columns in mm.
        origin: Centre of the first voxel in mm.
        direction: Directions of the axes of columns, rows and slices as the columns of a matrix, row by row.
        shifts: Of each slice in its plane, in rows and columns; empty where the slices stand upright.
        flags: Assumptions that were made, as fixed words.
    """

    order: tuple[int, ...]
    left_out: tuple[int, ...]
    spacing: Vector
    origin: Vector
    direction: tuple[float, ...]
    shifts: tuple[tuple[float, float], ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """Voxels in space.

    Args:
        array: Shape ``(d, h, w)``.
        spacing: Between slices, rows and columns in mm.
        origin: Centre of the first voxel in mm, in patient axes.
        direction: Directions of the axes of columns, rows and slices as the columns of a matrix, row by row.
        flags: Assumptions that were made, as fixed words.
        left_out: Number of localisers that were left out.
    """

    array: NDArray[np.float32] = field(repr=False)
    spacing: Vector
    origin: Vector = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = _STRAIGHT
    flags: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def stands_straight(self) -> bool:
        """Whether its voxels are cubes along the axes of the patient, in their order."""
        return len(set(self.spacing)) == 1 and self.direction == _STRAIGHT

    def image(self) -> Any:
        """The same as an image of SimpleITK."""
        image = sitk.GetImageFromArray(self.array)
        image.SetSpacing(self.spacing[::-1])
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedVolume:
    """A decoded volume before it becomes a cube; what :class:`~medistill.ingest.frames.Decoded` is for images.

    Args:
        volume: Grey levels in ``[0, 1]``, 0 is black.
        header: Identity and description; stays inside the reader.
        frame: 0, as the item is one volume.
        flags: Assumptions that were made, as fixed words.
    """

    volume: Volume
    header: Header = field(default_factory=Header, repr=False)
    frame: int = 0
    flags: tuple[str, ...] = ()

    def pixels(self, size: int, _: Fit) -> NDArray[np.uint16]:
        """A cube of shape ``(size, size, size)`` from the feet, the front and the right side; 65535 is white."""
        array = self.volume.array
        if array.shape == (size, size, size) and self.volume.stands_straight:
            return quantise(array)
        return quantise(resample(self.volume, size))

    def colours(self, size: int, fit: Fit) -> NDArray[np.uint16]:
        """The cube three times, shape ``(3, size, size, size)``: volumes have no colour."""
        return np.repeat(self.pixels(size, fit)[None], 3, axis=0)

    def grey(self) -> NDArray[np.float32]:
        """Grey levels of the middle slice, shape ``(h, w)``, where text is looked for."""
        middle: NDArray[np.float32] = self.volume.array[len(self.volume.array) // 2]
        return middle

    def masked(self, boxes: Sequence[Box]) -> DecodedVolume:
        """The same volume with boxes ``(top, left, bottom, right)`` blacked out in every slice."""
        array = self.volume.array.copy()
        for top, left, bottom, right in boxes:
            array[:, top:bottom, left:right] = 0
        return replace(self, volume=replace(self.volume, array=array))


def read_geometry(dataset: Dataset, frame: int = 0) -> SliceGeometry:
    """Geometry of an image, or of one frame of a multi-frame image (PS3.3 C.7.6.16.2).

    PixelSpacing comes first; ImagerPixelSpacing is taken only where it is missing, and marked.

    Args:
        dataset: Header of the file.
        frame: Number of the frame from 1; 0 where the file is one image.

    Raises:
        RejectedFile: :data:`NO_GEOMETRY` if a part is missing, zero or no number.
    """
    places = _groups(dataset, frame)
    position = _numbers(places, "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = _numbers(places, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _numbers(places, "PixelMeasuresSequence", "PixelSpacing", 2)
    imager = () if spacing else _numbers([dataset], "", "ImagerPixelSpacing", 2)
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    if len(position) != 3 or not orientation or not (spacing or imager):
        raise RejectedFile(NO_GEOMETRY, "position, orientation or pixel spacing is missing")
    if not _orthonormal(orientation):
        raise RejectedFile(NO_GEOMETRY, "rows and columns are not perpendicular")
    across, down = spacing or imager
    if not (across > 0 and down > 0):
        raise RejectedFile(NO_GEOMETRY, "expected a pixel spacing above 0")
    return SliceGeometry(
        position=(position[0], position[1], position[2]),
        orientation=orientation,
        spacing=(across, down),
        rows=rows,
        columns=columns,
        localiser=_is_localiser(places),
        imager_spacing=not spacing,
    )


def arrange(slices: Sequence[SliceGeometry], *, straighten: bool = False) -> Arrangement:
    """Order slices into a volume.

    An image counts as localiser by its type, and so do slices of another orientation than most if they are no more
    than a quarter of all.

    Args:
        slices: Geometry of each slice, in any order.
        straighten: Whether a tilted gantry is accepted; see :func:`straightened`.

    Raises:
        RejectedFile: GEOM_GAP, GEOM_MIXED, LOCALISER or DIM_LIMIT.
    """
    kept = _without_localisers(slices)
    first = slices[kept[0]]
    for number in kept:
        _check_alike(first, slices[number])
    if len(kept) < 2:
        raise RejectedFile("GEOM_GAP", "expected at least 2 slices")
    if len(kept) * first.rows * first.columns > MAX_VOXELS:
        raise RejectedFile("DIM_LIMIT", f"expected at most {MAX_VOXELS} voxels")
    axes = first.axes
    positions = np.array([slices[number].position for number in kept])
    heights = positions @ axes[2]
    order = np.argsort(heights, kind="stable")
    distance = _distance(heights[order])
    shifts = _shifts(positions[order], first, straighten=straighten)
    origin = positions[order[0]]
    return Arrangement(
        order=tuple(kept[at] for at in order),
        left_out=tuple(sorted(set(range(len(slices))) - set(kept))),
        spacing=(distance, *first.spacing),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=tuple(float(value) for value in axes.T.ravel()),
        shifts=shifts,
        flags=_arrangement_flags(len(slices) > len(kept), first.imager_spacing, bool(shifts)),
    )


def stack(slices: Sequence[tuple[SliceGeometry, NDArray[np.float32]]], *, straighten: bool = False) -> Volume:
    """A volume from slices in any order.

    Args:
        slices: Geometry and values ``(h, w)`` of each slice.
        straighten: Whether slices of a tilted gantry are shifted upright by interpolation.

    Raises:
        RejectedFile: As :func:`arrange`.
    """
    arrangement = arrange([geometry for geometry, _ in slices], straighten=straighten)
    return placed(np.stack([slices[number][1] for number in arrangement.order]), arrangement)


def placed(array: NDArray[np.float32], arrangement: Arrangement) -> Volume:
    """Values in the order of an arrangement as a volume, set upright where the slices are tilted."""
    volume = Volume(
        array=array,
        spacing=arrangement.spacing,
        origin=arrangement.origin,
        direction=arrangement.direction,
        flags=arrangement.flags,
        left_out=len(arrangement.left_out),
    )
    return straightened(volume, arrangement.shifts) if arrangement.shifts else volume


def straightened(volume: Volume, shifts: Sequence[tuple[float, float]]) -> Volume:
    """Slices moved in their planes to where they are in the patient; the planes grow so that nothing is cut off.

    Args:
        volume: Slices on top of each other.
        shifts: Of each slice, in rows and columns.

    Returns:
        The volume, 0 where no slice reaches.
    """
    low = np.floor(np.min(shifts, axis=0))
    growth = np.ceil(np.max(shifts, axis=0)) - low
    depth, height, width = volume.array.shape
    size = [int(width + growth[1]), int(height + growth[0])]
    array = np.zeros((depth, size[1], size[0]), dtype=np.float32)
    for number, (down, across) in enumerate(shifts):
        picture = sitk.GetImageFromArray(volume.array[number])
        moved = sitk.TranslationTransform(2, (-across, -down))
        grid = ((low[1], low[0]), (1.0, 1.0), (1.0, 0.0, 0.0, 1.0))
        array[number] = sitk.GetArrayFromImage(sitk.Resample(picture, size, moved, sitk.sitkLinear, *grid))
    offset = np.array([low[1] * volume.spacing[2], low[0] * volume.spacing[1], 0.0])
    origin = np.array(volume.origin) + np.array(volume.direction).reshape(3, 3) @ offset
    return replace(volume, array=array, origin=(float(origin[0]), float(origin[1]), float(origin[2])))


def resample(volume: Volume, size: int, *, spacing: float | None = None) -> NDArray[np.float32]:
    r"""A cube of cubic voxels around the centre of a volume.

    The axes of the cube are those of the volume, put into the order and direction nearest to the patient's;
    nothing is turned. Between voxels values are linear. Where the cube is coarser by a factor :math:`f`, whole
    blocks are averaged first, and what remains of the factor is smoothed by a Gaussian with the standard deviation
    :math:`\sqrt{f^2 - 1} / (2 \sqrt{2 \ln 2})` in voxels.

    Args:
        volume: Any size and spacing.
        size: Voxels along each edge.
        spacing: Edge of a voxel in mm; the smallest that holds the whole volume where not given.

    Returns:
        Shape ``(size, size, size)``, from the feet, the front and the right side; 0 outside of the volume.

    References:
        Cardoso et al., "Scale factor point spread function matching", MICCAI 2015.
    """
    shape = np.array(volume.array.shape)
    edge = spacing or float((shape * volume.spacing).max()) / size
    centre = (
        np.array(volume.origin)
        + np.array(volume.direction).reshape(3, 3) @ ((shape - 1) / 2 * volume.spacing)[::-1].copy()
    )
    blocks = [max(1, int(edge / step + 1e-6)) for step in volume.spacing]
    image = sitk.DICOMOrient(_averaged(volume, blocks).image(), "LPS")
    factors = edge / np.array(image.GetSpacing())
    widths = np.sqrt(np.maximum(factors**2 - 1, 0)) / _FWHM * image.GetSpacing()
    if (factors > 1 + 1e-6).any():
        image = sitk.DiscreteGaussian(image, variance=(widths**2).tolist(), maximumKernelWidth=64)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = centre - direction @ np.full(3, edge * (size - 1) / 2)
    grid = (origin.tolist(), [edge] * 3, image.GetDirection(), 0.0, sitk.sitkFloat32)
    cube = sitk.Resample(image, [size] * 3, sitk.Transform(), sitk.sitkLinear, *grid)
    return np.asarray(sitk.GetArrayFromImage(cube), dtype=np.float32)


def _averaged(volume: Volume, blocks: Sequence[int]) -> Volume:
    """Means of whole blocks, the last of each axis of what is left."""
    array = volume.array
    for axis in (1, 2, 0):  # rows first: they are contiguous
        if blocks[axis] > 1:
            array = _block_means(array, axis, blocks[axis])
    steps = np.array(volume.spacing)
    offset = (steps * (np.array(blocks) - 1) / 2)[::-1]
    origin = np.array(volume.origin) + np.array(volume.direction).reshape(3, 3) @ offset
    spacing = steps * blocks
    return replace(
        volume,
        array=array,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
    )


def _block_means(array: NDArray[np.float32], axis: int, block: int) -> NDArray[np.float32]:
    length = array.shape[axis]
    count = -(-length // block)
    total = np.zeros((*array.shape[:axis], count, *array.shape[axis + 1 :]), dtype=np.float32)
    for start in range(block):
        part = array[(slice(None),) * axis + (slice(start, None, block),)]
        total[(slice(None),) * axis + (slice(0, part.shape[axis]),)] += part
    sizes = np.minimum(block, length - block * np.arange(count)).astype(np.float32)
    total /= sizes.reshape(-1, *(1,) * (array.ndim - axis - 1))
    return total


def _groups(dataset: Dataset, frame: int) -> list[Any]:
    """Where the geometry of a frame may be: its functional groups, those all frames share, the data set."""
    places: list[Any] = []
    for keyword, number in (
        ("PerFrameFunctionalGroupsSequence", frame - 1),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        try:
            items = dataset.get(keyword) or ()
            if 0 <= number < len(items):
                places.append(items[number])
        except Exception:
            raise RejectedFile("BAD_VR", f"{keyword} is malformed") from None
    return [*places, dataset]


def _numbers(places: Sequence[Any], macro: str, keyword: str, count: int) -> tuple[float, ...]:
    """Finite numbers of the first place that has them; nothing where none has."""
    for place in places:
        try:
            items = place.get(macro) if macro else None
            value = (items[0] if items else place).get(keyword)
            numbers = tuple(float(number) for number in (value if isinstance(value, (MultiValue, list)) else ()))
        except Exception:
            raise RejectedFile("BAD_VR", f"{keyword} is malformed") from None
        if len(numbers) == count and np.isfinite(numbers).all():
            return numbers
    return ()


def _is_localiser(places: Sequence[Any]) -> bool:
    for place in places:
        for item in (*((place.get(macro) or (None,))[0] for macro in _FRAME_TYPES), place):
            kinds = item.get("FrameType") or item.get("ImageType") or () if item is not None else ()
            if "LOCALIZER" in ([kinds] if isinstance(kinds, str) else list(kinds)):
                return True
    return False


def _orthonormal(orientation: tuple[float, ...]) -> bool:
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.array([row @ row, column @ column])
    return bool(np.abs(lengths - 1).max() < 0.01 and abs(row @ column) < 0.01)


def _without_localisers(slices: Sequence[SliceGeometry]) -> list[int]:
    """Numbers of the slices that form the volume."""
    if not slices:
        raise RejectedFile("GEOM_GAP", "expected at least 2 slices")
    proper = [number for number, geometry in enumerate(slices) if not geometry.localiser]
    if not proper:
        raise RejectedFile("LOCALISER")
    groups: list[list[int]] = []
    for number in proper:
        group = next((group for group in groups if _parallel(slices[group[0]], slices[number])), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
        if len(groups) > 1 + _FEW * len(slices):
            break
    largest = max(groups, key=len)
    if len(proper) - len(largest) > _FEW * len(proper):
        raise RejectedFile("GEOM_MIXED", "slices of different orientation")
    return largest


def _parallel(one: SliceGeometry, other: SliceGeometry) -> bool:
    return bool(np.abs(np.subtract(one.orientation, other.orientation)).max() < _SAME_DIRECTION)


def _check_alike(one: SliceGeometry, other: SliceGeometry) -> None:
    if (one.rows, one.columns) != (other.rows, other.columns):
        raise RejectedFile("GEOM_MIXED", "slices of different size")
    if not np.allclose(one.spacing, other.spacing, rtol=_SAME_SPACING, atol=0):
        raise RejectedFile("GEOM_MIXED", "slices of different pixel spacing")
    if one.imager_spacing != other.imager_spacing:
        raise RejectedFile("GEOM_MIXED", "pixel spacing of the patient and of the detector")


def _distance(heights: NDArray[np.float64]) -> float:
    """Distance between sorted slices in mm."""
    steps = np.diff(heights)
    typical = float(np.median(steps))
    if steps.min() <= max(_SAME_PLACE, _SAME_PART * typical):
        raise RejectedFile("GEOM_MIXED", "several slices at the same position")
    if np.abs(steps - typical).max() > _GAP * typical:
        raise RejectedFile("GEOM_GAP", "the distances between slices differ")
    return float(heights[-1] - heights[0]) / len(steps)


def _shifts(
    positions: NDArray[np.float64], first: SliceGeometry, *, straighten: bool
) -> tuple[tuple[float, float], ...]:
    """Of each slice in its plane, in rows and columns; nothing where they stay below half a pixel."""
    moved = (positions - positions[0]) @ first.axes[:2].T
    shifts = (moved / [first.spacing[1], first.spacing[0]])[:, ::-1]
    if np.abs(shifts).max() <= _DRIFT:
        return ()
    even = np.outer(np.arange(len(shifts)), shifts[-1] / (len(shifts) - 1))
    if np.abs(shifts - even).max() > _DRIFT:
        raise RejectedFile("GEOM_MIXED", "slices are shifted against each other")
    if not straighten:
        raise RejectedFile("GEOM_MIXED", "slices of a tilted gantry")
    return tuple((float(down), float(across)) for down, across in shifts)


def _arrangement_flags(localisers: bool, imager: bool, tilted: bool) -> tuple[str, ...]:
    given = {"localiser_left_out": localisers, "imager_spacing": imager, "straightened": tilted}
    return tuple(name for name, holds in given.items() if holds)
