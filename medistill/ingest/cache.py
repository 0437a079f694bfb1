"""Cohorts on disk.

::

    cohort/
      profile.json        schema version, task, how the images were made, counts, versions
      manifest.csv        one row per image or rejection; pseudonyms and reason codes only
      shards/00000.safetensors    16-bit pixels of 500 images, shape (n, 1, h, w)

A cohort appears complete or not at all: everything is written to a folder beside it, which is renamed at the end.
Only its owner can open it until the owner decides otherwise.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medistill.core.cohort import Cohort, Instance, Split
from medistill.core.task import Task
from medistill.errors import DataError, OutputError, SourceError
from medistill.ingest.quarantine import Rejected

SCHEMA_VERSION = 1
SHARD_SIZE = 500
_KIND = "medistill cohort"
_PROFILE, _MANIFEST, _SHARDS = "profile.json", "manifest.csv", "shards"
_INSTANCE_COLUMNS = tuple(item.name for item in fields(Instance))
_COLUMNS = ("ordinal", "outcome", "detail", "flags", *_INSTANCE_COLUMNS)
_ACCEPTED = "ACCEPTED"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """An image of the cohort with its position in the scan and what was assumed about it."""

    ordinal: int
    instance: Instance
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardStore:
    """Pixels in shards; only the wanted rows are read.

    Args:
        folder: Folder of the shards.
        shape: Shape of one image, ``(c, h, w)``.
        count: Number of images.
    """

    folder: Path
    shape: tuple[int, int, int]
    count: int

    def read(self, rows: Sequence[int]) -> NDArray[np.uint16]:
        """Pixels of some rows, shape ``(n, c, h, w)``; 0 is black and 65535 is white.

        Raises:
            DataError: If there is no such row, or the shard is damaged.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.count:
            raise DataError(f"Expected rows from 0 to {self.count - 1}.")
        pixels = np.empty((len(wanted), *self.shape), dtype=np.uint16)
        for shard in np.unique(wanted // SHARD_SIZE):
            places = np.flatnonzero(wanted // SHARD_SIZE == shard)
            self._read_shard(int(shard), wanted[places] % SHARD_SIZE, places, pixels)
        return pixels

    def _read_shard(
        self, shard: int, rows: NDArray[np.int64], places: NDArray[np.int64], pixels: NDArray[np.uint16]
    ) -> None:
        try:
            with safe_open(self.folder / shard_name(shard), framework="np") as file:
                content = file.get_slice("pixels")
                first, last = int(rows.min()), int(rows.max())
                if last - first < 2 * len(rows):
                    pixels[places] = content[first : last + 1][rows - first]
                    return
                for place, row in zip(places, rows, strict=True):
                    pixels[place] = content[int(row)]
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(
                f"Shard {shard} of the cohort is damaged or missing. Ingest the source again."
            ) from error


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"{shard:05d}.safetensors"


class CohortWriter:
    """Collects pixels in a temporary folder and writes a cohort from them; see :func:`open_writer`.

    Args:
        folder: Temporary folder.
        size: Side length of the images.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._size = size
        self._spool = (folder / "spool").open("wb")
        self._count = 0

    def append(self, pixels: NDArray[np.uint16]) -> int:
        """Keep the pixels of one image; returns their position in the spool."""
        self._spool.write(np.ascontiguousarray(pixels, dtype="<u2").data)
        self._count += 1
        return self._count - 1

    def finish(
        self,
        accepted: Sequence[Accepted],
        spooled: Sequence[int],
        rejected: Sequence[Rejected],
        profile: dict[str, Any],
    ) -> None:
        """Write shards, manifest and profile.

        Args:
            accepted: Images in the order of their ``row``.
            spooled: Position of each in the spool.
            rejected: What stays out.
            profile: Task, configuration and counts as plain values.
        """
        self._write_shards(spooled)
        self._write_manifest(accepted, rejected)
        shape = [1, self._size, self._size]
        content = {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "images": len(accepted),
            "shape": shape,
            **profile,
        }
        with (self.folder / _PROFILE).open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            _sync(file)

    def _write_shards(self, spooled: Sequence[int]) -> None:
        self._spool.close()
        (self.folder / _SHARDS).mkdir()
        shape = (self._count, 1, self._size, self._size)
        spool = np.memmap(self.folder / "spool", dtype="<u2", mode="r", shape=shape)
        for start in range(0, len(spooled), SHARD_SIZE):
            block = np.ascontiguousarray(spool[list(spooled[start : start + SHARD_SIZE])])
            path = self.folder / _SHARDS / shard_name(start // SHARD_SIZE)
            with path.open("wb") as file:
                file.write(save({"pixels": block}))
                _sync(file)
        del spool
        (self.folder / "spool").unlink()

    def _write_manifest(self, accepted: Sequence[Accepted], rejected: Sequence[Rejected]) -> None:
        rows = [_accepted_row(item) for item in accepted]
        rows += [{"ordinal": item.ordinal, "outcome": item.code, "detail": item.detail} for item in rejected]
        with (self.folder / _MANIFEST).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: int(row["ordinal"])))
            _sync(file)

    def close(self) -> None:
        """Close the spool."""
        self._spool.close()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends, and is removed when the block fails.

    Raises:
        OutputError: If ``out`` exists and is not empty, cannot be written, or the disk is full.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError("The output folder exists and is not empty. Name another folder, or remove this one.")
    temporary = out.absolute().parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        _sync_folder(out.absolute().parent)
    except OSError as error:
        raise OutputError(_explain(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def open_writer(out: Path, size: int) -> Iterator[CohortWriter]:
    """Writer of a cohort that appears at ``out`` only if the block ends without an error.

    Raises:
        OutputError: See :func:`atomic_folder`.
    """
    with atomic_folder(out) as folder:
        writer = CohortWriter(folder, size)
        try:
            yield writer
        finally:
            writer.close()


def load_cohort(path: Path) -> Cohort:
    """Open a cohort; pixels are read when asked for.

    Raises:
        SourceError: If the folder is no cohort, is damaged, or was written by a newer version.
        DataError: If the manifest breaks an invariant, for example a patient in two splits.
    """
    path = Path(path)
    profile = _load_profile(path / _PROFILE)
    try:
        task = Task.from_json(profile["task"])
        with (path / _MANIFEST).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["outcome"] == _ACCEPTED]
        instances = tuple(sorted((_instance(row) for row in rows), key=lambda instance: instance.row))
        channels, height, width = (int(value) for value in profile["shape"])
    except DataError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "The cohort is damaged: its manifest cannot be read. Ingest the source again."
        ) from error
    if [instance.row for instance in instances] != list(range(profile.get("images", -1))):
        raise SourceError("The cohort is damaged: its manifest is not complete. Ingest the source again.")
    store = ShardStore(folder=path / _SHARDS, shape=(channels, height, width), count=len(instances))
    _check_shards(store)
    return Cohort(instances=instances, task=task, profile=profile, store=store)


def _load_profile(path: Path) -> Mapping[str, Any]:
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError("Expected a cohort folder written by `medistill ingest`; found none.") from error
    if not isinstance(profile, dict) or profile.get("kind") != _KIND:
        raise SourceError("Expected a cohort folder written by `medistill ingest`; found another kind of folder.")
    version = profile.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise SourceError(
            f"Expected a cohort of schema version {SCHEMA_VERSION} or older. Install a newer medistill to read it."
        )
    return profile


def _check_shards(store: ShardStore) -> None:
    for shard in range(-(-store.count // SHARD_SIZE)):
        expected = [min(SHARD_SIZE, store.count - shard * SHARD_SIZE), *store.shape]
        try:
            with safe_open(store.folder / shard_name(shard), framework="np") as file:
                found = file.get_slice("pixels").get_shape()
        except (OSError, SafetensorError) as error:
            raise SourceError(f"The cohort is damaged: shard {shard} cannot be read. Ingest again.") from error
        if list(found) != expected:
            raise SourceError(f"The cohort is damaged: shard {shard} has another shape. Ingest the source again.")


def _accepted_row(item: Accepted) -> dict[str, Any]:
    values = {name: getattr(item.instance, name) for name in _INSTANCE_COLUMNS}
    return {
        "ordinal": item.ordinal,
        "outcome": _ACCEPTED,
        "detail": "",
        "flags": " ".join(item.flags),
        **values,
        "split": item.instance.split.value,
    }


def _instance(row: Mapping[str, str]) -> Instance:
    values: dict[str, Any] = {name: row[name] for name in _INSTANCE_COLUMNS}
    return Instance(**{**values, "row": int(row["row"]), "split": Split(row["split"])})


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "The disk is full. Nothing was left behind; free space or name another folder."
    return "The output folder cannot be written. Name a folder on a writable disk; nothing was left behind."
