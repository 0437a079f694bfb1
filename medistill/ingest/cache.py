"""Cohorts on disk.

::

    cohort/
      profile.json        schema version, task, how the images were made, counts, versions
      manifest.csv        one row per image or rejection; pseudonyms and reason codes only
      shards/00000.safetensors    16-bit pixels of 500 images, shape (n, c, h, w) with c of 1 or 3, or of volumes,
                                  shape (n, 1, d, h, w)

A cohort appears complete or not at all: everything is written to a folder beside it, which is renamed at the end.
The manifest has one row per image or rejection in the order of the scan; ``frame`` counts images of one file from
1. Only its owner can open it until the owner decides otherwise.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
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
_OPEN_SHARDS = 64
_OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EBUSY),
}
_KIND = "medistill cohort"
_PROFILE, _MANIFEST, _SHARDS = "profile.json", "manifest.csv", "shards"
_INSTANCE_COLUMNS = tuple(item.name for item in fields(Instance))
_COLUMNS = ("ordinal", "frame", "outcome", "detail", "flags", *_INSTANCE_COLUMNS)
_ACCEPTED = "ACCEPTED"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """An image of the cohort with its position in the scan (and in its file) and what was assumed about it."""

    ordinal: int
    frame: int = 0
    instance: Instance
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardStore:
    """Pixels in shards; only the wanted rows are read.

    Args:
        folder: Folder of the shards.
        shape: Shape of one image, ``(c, h, w)``, or of one volume, ``(c, d, h, w)``.
        count: Number of images.
    """

    folder: Path
    shape: tuple[int, ...]
    count: int

    def read(self, rows: Sequence[int]) -> NDArray[np.uint16]:
        """Pixels of some rows, shape ``(n, *shape)``; 0 is black and 65535 is white.

        Raises:
            DataError: If there is no such row, or the shard is damaged.
        """
        if len(rows) == 1:  # one image at random is what a data loader asks for
            return self._read_one(int(rows[0]))
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.count:
            raise DataError(f"Expected rows from 0 to {self.count - 1}.")
        pixels = np.empty((len(wanted), *self.shape), dtype=np.uint16)
        for shard in np.unique(wanted // SHARD_SIZE):
            places = np.flatnonzero(wanted // SHARD_SIZE == shard)
            self._read_shard(int(shard), wanted[places] % SHARD_SIZE, places, pixels)
        return pixels

    def _read_one(self, row: int) -> NDArray[np.uint16]:
        if not 0 <= row < self.count:
            raise DataError(f"Expected rows from 0 to {self.count - 1}.")
        shard, place = divmod(row, SHARD_SIZE)
        with _damage(shard):
            one: NDArray[np.uint16] = self._content(shard)[place][None]
        return one

    def _read_shard(
        self, shard: int, rows: NDArray[np.int64], places: NDArray[np.int64], pixels: NDArray[np.uint16]
    ) -> None:
        with _damage(shard):
            content = self._content(shard)
            first, last = int(rows.min()), int(rows.max())
            if last - first < 2 * len(rows):
                pixels[places] = content[first : last + 1][rows - first]
                return
            for place, row in zip(places, rows, strict=True):
                pixels[place] = content[int(row)]

    def _content(self, shard: int) -> Any:
        path = f"{self.folder}/{shard_name(shard)}"
        return _open_shard(path, os.stat(path).st_mtime_ns)


@contextmanager
def _damage(shard: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"Shard {shard} of the cohort is damaged or missing. Ingest the source again.") from error


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: str, _changed: int) -> Any:
    """Slices of a shard; kept open, because opening costs five times a read."""
    return safe_open(path, framework="np").__enter__().get_slice("pixels")  # type: ignore[no-untyped-call]


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"{shard:05d}.safetensors"


def write_cohort(
    folder: Path,
    outcomes: Iterable[tuple[Accepted, NDArray[np.uint16]] | Rejected],
    profile: Mapping[str, Any],
) -> int:
    """Write a cohort, holding one shard in memory.

    Args:
        folder: Existing empty folder.
        outcomes: Images, in the order of their ``row``, with pixels of shape ``(c, h, w)`` or ``(c, d, h, w)``;
            and rejections. Rows of the manifest keep this order.
        profile: Task, configuration and counts as plain values.

    Returns:
        Number of images.
    """
    (folder / _SHARDS).mkdir()
    block: list[NDArray[np.uint16]] = []
    images, shape = 0, (1, 0, 0)
    with (folder / _MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for outcome in outcomes:
            if isinstance(outcome, Rejected):
                writer.writerow(_rejected_row(outcome))
                continue
            accepted, pixels = outcome
            writer.writerow(_accepted_row(accepted))
            shape = pixels.shape
            block.append(pixels)
            images += 1
            if len(block) == SHARD_SIZE:
                _write_shard(folder, (images - 1) // SHARD_SIZE, block)
                block = []
        _sync(file)
    if block:
        _write_shard(folder, (images - 1) // SHARD_SIZE, block)
    header = {"kind": _KIND, "schema_version": SCHEMA_VERSION, "images": images, "shape": list(shape)}
    with (folder / _PROFILE).open("w", encoding="utf-8") as file:
        json.dump({**header, **profile}, file, indent=2)
        _sync(file)
    return images


def _write_shard(folder: Path, shard: int, block: Sequence[NDArray[np.uint16]]) -> None:
    with (folder / _SHARDS / shard_name(shard)).open("wb") as file:
        file.write(save({"pixels": np.ascontiguousarray(np.stack(block), dtype="<u2")}))
        _sync(file)


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
        raise OutputError(_explain(error, "nothing was left behind")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder beside ``out`` where an ingestion works; it stays when the block fails, for another try.

    Raises:
        OutputError: If ``out`` exists and is not empty, cannot be written, or the disk is full.
    """
    out = Path(out).absolute()
    partial = out.parent / f".{out.name}.partial"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if (out / _PROFILE).exists() and partial.is_dir() and not (partial / "cohort").exists():
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed after its last step but one
        raise OutputError("The output folder exists and is not empty. Name another folder, or remove this one.")
    if os.path.ismount(out):
        raise OutputError("The output folder is a mount point, which cannot be replaced. Name a folder below it.")
    try:
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise OutputError(_explain(error, "what was read is kept, and the same command goes on")) from None
    except sqlite3.OperationalError:
        raise OutputError(
            "The working folder beside the output cannot be written. Free space or check the disk; what was read "
            "is kept, and the same command goes on."
        ) from None


def publish(partial: Path, out: Path) -> Cohort:
    """Make the finished ``cohort`` of a working folder appear at ``out``, and remove the working folder.

    Raises:
        DataError: If the cohort breaks an invariant; then nobody has seen it.
    """
    out = Path(out).absolute()
    cohort = load_cohort(partial / "cohort")
    if out.exists():
        out.rmdir()
    (partial / "cohort").rename(out)
    _sync_folder(out.parent)
    shutil.rmtree(partial, ignore_errors=True)
    shape = tuple(cohort.profile["shape"])
    return replace(cohort, store=ShardStore(folder=out / _SHARDS, shape=shape, count=len(cohort)))


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
            found = [_instance(row) for row in csv.DictReader(file) if row["outcome"] == _ACCEPTED]
        instances = tuple(sorted(found, key=lambda instance: instance.row))
        shape = tuple(int(value) for value in profile["shape"])
    except DataError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "The cohort is damaged: its manifest cannot be read. Ingest the source again."
        ) from error
    if [instance.row for instance in instances] != list(range(profile.get("images", -1))):
        raise SourceError("The cohort is damaged: its manifest is not complete. Ingest the source again.")
    store = ShardStore(folder=path / _SHARDS, shape=shape, count=len(instances))
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
        "frame": item.frame or "",
        "outcome": _ACCEPTED,
        "detail": "",
        "flags": " ".join(item.flags),
        **values,
        "split": item.instance.split.value,
    }


def _rejected_row(item: Rejected) -> dict[str, Any]:
    return {"ordinal": item.ordinal, "frame": item.frame or "", "outcome": item.code, "detail": item.detail}


def _instance(row: Mapping[str, str]) -> Instance:
    values: dict[str, Any] = {name: sys.intern(row[name]) for name in _INSTANCE_COLUMNS}
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


def _explain(error: OSError, after: str) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"The disk is full. Free space or name another folder; {after}."
    return f"The output folder cannot be written. Name a folder on a writable disk; {after}."
