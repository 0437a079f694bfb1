"""Arrays in a NumPy ``.npz`` file, in the layout of MedMNIST or as ``images`` and ``label``."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from medistill.core.task import joint_label
from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.frames import Decoded
from medistill.ingest.intensity import Policy, percentile_limits, stretch
from medistill.ingest.labels import SPLIT_VALUES
from medistill.ingest.reading import Item
from medistill.ingest.volumes import MAX_VOXELS, DecodedVolume, Volume

_SPLITS = ("train", "val", "test")
_TOP = {"u1": 255.0, "u2": 65535.0, "f4": 1.0, "f8": 1.0, "f2": 1.0, "b1": 1.0}


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Images of one split, with what else the file says about each."""

    images: NDArray[Any]
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    patients: tuple[str, ...]
    prefix: str
    joint: bool


@dataclass(frozen=True)
class NpzSource:
    """Images or volumes of one ``.npz`` file; nothing in it is unpickled.

    Two layouts are read: ``train_images``, ``train_labels``, ``val_…``, ``test_…`` (MedMNIST), or ``images`` with
    optional ``label`` or ``labels``, ``split`` and ``patient_id``. A label table refers to a row by ``index``, and
    by ``split`` too where the file counts within splits.

    Images have the shape ``(n, h, w)`` or, in colour, ``(n, h, w, 3)``; volumes ``(n, d, h, w)``, with cubic
    voxels, whose axes are taken as they are. Labels of shape ``(n, k)`` with ``k > 1`` say by 0 and 1 which of the
    classes hold for each image, in a cohort whose labels are ``multilabel``; an array ``class_names`` names them,
    otherwise they are called by their number.

    Args:
        path: The file.
        mode: ``slices`` for images, ``cube`` for volumes.

    Raises:
        ConfigError: If the mode is unknown.
        SourceError: When read, if the file has another layout, holds pickles, or volumes where images are wanted.
    """

    path: Path
    mode: str = "slices"
    keys: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        if self.mode not in ("slices", "cube"):
            raise ConfigError(f"Expected mode slices or cube, got {self.mode!r}.")

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return tuple(_read_blocks(archive, cube=self.mode == "cube"))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise SourceError("The source is not a readable .npz file without pickled objects.") from None

    @property
    def labelled(self) -> bool:
        """Whether the file holds one label per image."""
        return all(block.labels for block in self._blocks)

    @property
    def joint_labels(self) -> bool:
        """Whether a label says of each of several classes whether it holds."""
        return any(block.joint for block in self._blocks)

    @property
    def in_colour(self) -> bool:
        """Whether all images are red, green and blue."""
        return self.mode == "slices" and all(block.images.ndim == 4 for block in self._blocks)

    def __len__(self) -> int:
        """Number of images."""
        return sum(len(block.images) for block in self._blocks)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per image."""
        ordinal = 0
        for block in self._blocks:
            for index, image in enumerate(block.images):
                yield Item(
                    ordinal=ordinal,
                    name=f"{block.prefix}{index}",
                    payload=image,
                    label=block.labels[index] if block.labels else "",
                    split=block.splits[index] if block.splits else "",
                    patient=block.patients[index] if block.patients else "",
                    index=str(index),
                )
                ordinal += 1

    @property
    def decode(self) -> Callable[[NDArray[Any], Policy], Iterator[Decoded | DecodedVolume]]:
        """Reads one array."""
        return decode_array if self.mode == "slices" else decode_cube


def decode_array(image: NDArray[Any], policy: Policy) -> Iterator[Decoded]:
    """One image: uint8 and uint16 by their full range, floats as they are.

    Raises:
        RejectedFile: BITS_INCONSISTENT for floats outside ``[0, 1]`` and for other types.
    """
    stored = _levels(image if image.ndim == 2 else image[..., :3])
    flags = ("colour",) if stored.ndim == 3 else ()
    yield Decoded(stored=stored, presentation=None, policy=policy, flags=flags)


def decode_cube(array: NDArray[Any], policy: Policy) -> Iterator[DecodedVolume]:
    """One volume, as :func:`decode_array`.

    Raises:
        RejectedFile: BITS_INCONSISTENT or DIM_LIMIT.
    """
    if array.size > MAX_VOXELS:
        raise RejectedFile("DIM_LIMIT", f"expected at most {MAX_VOXELS} voxels")
    grey = _levels(array)
    if policy is Policy.PERCENTILE:
        grey = stretch(grey, *percentile_limits(grey)).astype(np.float32, copy=False)
    yield DecodedVolume(volume=Volume(array=grey, spacing=(1.0, 1.0, 1.0)))


def _levels(array: NDArray[Any]) -> NDArray[np.float32]:
    top = _TOP.get(array.dtype.str[1:])
    if top is None:
        raise RejectedFile("BITS_INCONSISTENT", "expected uint8, uint16 or floats in [0, 1]")
    levels = array.astype(np.float32) / np.float32(top)
    if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > 1 + 1e-5:
        raise RejectedFile("BITS_INCONSISTENT", "expected finite values in [0, 1]")
    return levels


def _read_blocks(archive: Any, *, cube: bool) -> Iterator[_Block]:
    names = set(archive.files)
    found = [split for split in _SPLITS if f"{split}_images" in names]
    if not found and "images" not in names:
        raise SourceError("Expected arrays train_images (and val_images, test_images) or images; found neither.")
    for split in found:
        images = _images(archive[f"{split}_images"], cube=cube)
        labels, joint = _image_labels(archive, (f"{split}_labels",), len(images))
        yield _Block(
            images=images,
            labels=labels,
            splits=(split,) * len(images),
            patients=(),
            prefix=f"{split}-",  # no folder: a folder can stand for a patient
            joint=joint,
        )
    if not found:
        images = _images(archive["images"], cube=cube)
        labels, joint = _image_labels(archive, ("label", "labels"), len(images))
        yield _Block(
            images=images,
            labels=labels,
            joint=joint,
            splits=_known(_labels(archive, ("split",), len(images))),
            patients=_labels(archive, ("patient_id", "patient"), len(images)),
            prefix="",
        )


def _known(splits: tuple[str, ...]) -> tuple[str, ...]:
    """Split names in their usual spelling; a name nobody knows could hide a given test split."""
    usual = tuple(split.strip().casefold() for split in splits)
    unknown = sum(split not in SPLIT_VALUES for split in usual)
    if unknown:
        raise SourceError(
            f"The array split holds {unknown} values other than train, validation, val, holdout and test."
        )
    return usual


def _images(array: NDArray[Any], *, cube: bool) -> NDArray[Any]:
    """Shape ``(n, h, w)`` or ``(n, h, w, 3)``; of volumes ``(n, d, h, w)``."""
    if array.ndim == (5 if cube else 4) and array.shape[-1] == 1:
        array = array[..., 0]
    if cube:
        if array.ndim != 4 or array.shape[-1] in {3, 4}:
            raise SourceError("Expected volumes of shape (n, d, h, w); found images. Ingest with volumes: slices.")
    elif array.ndim != 3 and not (array.ndim == 4 and array.shape[-1] in {3, 4}):
        raise SourceError(
            "Expected images of shape (n, h, w) or (n, h, w, 3); found another. If these are volumes, ingest them "
            "with volumes: cubes."
        )
    return array


def _image_labels(archive: Any, names: tuple[str, ...], count: int) -> tuple[tuple[str, ...], bool]:
    """One label per image, and whether labels may join several classes."""
    values = next((archive[name] for name in names if name in archive.files), None)
    if values is None or values.ndim != 2 or values.shape[0] != count or values.shape[1] < 2:
        return _labels(archive, names, count), False
    if values.dtype.kind not in "biu" or not np.isin(values, (0, 1)).all():
        raise SourceError("Expected labels of several classes as an array (n, k) of 0 and 1; found other values.")
    columns = range(values.shape[1])
    called = _labels(archive, ("class_names",), values.shape[1]) or tuple(map(str, columns))
    return tuple(joint_label(called[c] for c in columns if row[c]) for row in values), True


def _labels(archive: Any, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """One text per image, or nothing where the file has no such array."""
    name = next((name for name in names if name in archive.files), None)
    if name is None:
        return ()
    values = archive[name]
    if values.size != count:
        raise SourceError(f"Expected {count} values in the array {name}; found {values.size}.")
    return tuple(str(value) for value in values.reshape(count).tolist())
