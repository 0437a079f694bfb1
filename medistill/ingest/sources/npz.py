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

from medistill.errors import RejectedFile, SourceError
from medistill.ingest.decode import luminance
from medistill.ingest.frames import Decoded
from medistill.ingest.intensity import Policy
from medistill.ingest.labels import SPLIT_VALUES
from medistill.ingest.reading import Item

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


@dataclass(frozen=True)
class NpzSource:
    """Images of one ``.npz`` file; nothing in it is unpickled.

    Two layouts are read: ``train_images``, ``train_labels``, ``val_…``, ``test_…`` (MedMNIST), or ``images`` with
    optional ``label`` or ``labels``, ``split`` and ``patient_id``. A label table refers to a row by ``index``, and
    by ``split`` too where the file counts within splits.

    Args:
        path: The file.

    Raises:
        SourceError: When read, if the file has another layout, holds pickles or volumes.
    """

    path: Path
    keys: ClassVar[tuple[str, ...]] = ("index",)

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return tuple(_read_blocks(archive))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise SourceError("The source is not a readable .npz file without pickled objects.") from None

    @property
    def labelled(self) -> bool:
        """Whether the file holds one label per image."""
        return all(block.labels for block in self._blocks)

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
    def decode(self) -> Callable[[NDArray[Any], Policy], Iterator[Decoded]]:
        """Reads one array."""
        return decode_array


def decode_array(image: NDArray[Any], policy: Policy) -> Iterator[Decoded]:
    """Grey levels of one array: uint8 and uint16 by their full range, floats as they are.

    Raises:
        RejectedFile: BITS_INCONSISTENT for floats outside ``[0, 1]`` and for other types.
    """
    top = _TOP.get(image.dtype.str[1:])
    if top is None:
        raise RejectedFile("BITS_INCONSISTENT", "expected uint8, uint16 or floats in [0, 1]")
    grey = image.astype(np.float32) / np.float32(top) if image.ndim == 2 else luminance(image[..., :3], top=top)
    if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1 + 1e-5:
        raise RejectedFile("BITS_INCONSISTENT", "expected finite values in [0, 1]")
    yield Decoded(stored=grey, presentation=None, policy=policy)


def _read_blocks(archive: Any) -> Iterator[_Block]:
    names = set(archive.files)
    found = [split for split in _SPLITS if f"{split}_images" in names]
    if not found and "images" not in names:
        raise SourceError("Expected arrays train_images (and val_images, test_images) or images; found neither.")
    for split in found:
        images = _images(archive[f"{split}_images"])
        labels = _labels(archive, (f"{split}_labels",), len(images))
        yield _Block(images=images, labels=labels, splits=(split,) * len(images), patients=(), prefix=f"{split}/")
    if not found:
        images = _images(archive["images"])
        yield _Block(
            images=images,
            labels=_labels(archive, ("label", "labels"), len(images)),
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


def _images(array: NDArray[Any]) -> NDArray[Any]:
    """Shape ``(n, h, w)`` or ``(n, h, w, 3)``."""
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 and not (array.ndim == 4 and array.shape[-1] in {3, 4}):
        raise SourceError(
            "Expected images of shape (n, h, w) or (n, h, w, 3); volumes are not read by this version."
        )
    return array


def _labels(archive: Any, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """One text per image, or nothing where the file has no such array."""
    name = next((name for name in names if name in archive.files), None)
    if name is None:
        return ()
    values = archive[name]
    if values.size != count:
        raise SourceError("Expected one label per image; arrays of several labels need a label table.")
    return tuple(str(value) for value in values.reshape(count).tolist())
