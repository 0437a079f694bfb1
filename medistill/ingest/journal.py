"""The working folder of an ingestion: everything read so far, safe against being killed at any moment.

::

    .cohort.partial/
      lock             held while a process works here
      journal.sqlite   one row per item and one per image or rejection; pseudonyms and reason codes only, except
                       for the names of items where the hospital wants private notes
      spool            16-bit pixels of images, in the order they were read

Pixels reach the spool before their rows are committed. After a crash, rows that were not committed do not exist,
and pixels without rows are cut off, so an item counts once or not at all. Rows lie on disk: memory does not grow
with the number of images.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medistill.errors import OutputError
from medistill.ingest.quarantine import Rejected
from medistill.ingest.reading import Reading

_COMMIT_SECONDS = 1.0
_COMMIT_ITEMS = 200
#: Outcomes that another attempt may change.
PASSING = ("NET_PARTIAL", "READ_ERROR", "TIMEOUT", "OOM_LIMIT", "CODEC_CRASH")
_COLUMNS = tuple(item.name for item in fields(Reading))
_SCHEMA = f"""
create table if not exists setting (name text primary key, value text);
create table if not exists item (
    token text primary key, scan integer, ordinal integer, digest blob, passing integer
) without rowid;
create table if not exists image (
    id integer primary key, token text, spooled integer, outcome text default '', detail text default '',
    {", ".join(_COLUMNS)}
);
create index if not exists image_token on image (token);
create table if not exists name (token text primary key, name blob) without rowid;
"""


class Journal:
    """Rows and pixels of one ingestion.

    Args:
        folder: Working folder; made if absent.
        fingerprint: What the results depend on besides the files; with another one everything begins again.
        shape: Shape of one image.

    Raises:
        OutputError: If another process works here, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, fingerprint: str, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self._shape = shape
        self._image_bytes = 2 * int(np.prod(shape))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _locked(folder / "lock")
        try:
            self.rows = _connected(folder)
            self._open(fingerprint)
        except ValueError:
            self._begin_again(fingerprint)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self.rows.close()
                self._lock.close()
                raise
            self._begin_again(fingerprint)  # nothing in it can be trusted
        self._spool: IO[bytes] = (folder / "spool").open("r+b")
        self._spooled = self._cut_spool()
        self._uncommitted = 0
        self._committed_at = time.monotonic()
        self.rows.execute("begin")

    def _open(self, fingerprint: str) -> None:
        self.rows.execute("pragma journal_mode = wal")
        self.rows.execute("pragma synchronous = normal")
        self.rows.execute("pragma cache_size = -16384")
        self.rows.executescript(_SCHEMA)
        found = dict(self.rows.execute("select name, value from setting"))
        if found.get("fingerprint", fingerprint) != fingerprint:
            raise ValueError
        self.scan = int(found.get("scan", "0")) + 1
        self.rows.executemany(
            "insert or replace into setting values (?, ?)",
            [("fingerprint", fingerprint), ("scan", str(self.scan))],
        )
        (self.folder / "spool").touch(mode=0o600)

    def _begin_again(self, fingerprint: str) -> None:
        self.rows.close()
        for file in self.folder.iterdir():
            if file.name != "lock" and file.is_file():
                file.unlink()
        self.rows = _connected(self.folder)
        self._open(fingerprint)

    def _cut_spool(self) -> int:
        """Position behind the last image that counts; forgets images whose pixels a power cut has lost."""
        whole = os.fstat(self._spool.fileno()).st_size // self._image_bytes
        self.rows.execute("delete from item where token in (select token from image where spooled >= ?)", (whole,))
        self.rows.execute("delete from image where token not in (select token from item)")
        (last,) = self.rows.execute("select coalesce(max(spooled), -1) from image").fetchone()
        self._spool.truncate((last + 1) * self._image_bytes)
        self._spool.seek(0, os.SEEK_END)
        return int(last) + 1

    def close(self) -> None:
        """Commit and let others work here."""
        with contextlib.suppress(sqlite3.Error, OSError):
            self.commit()
        self.rows.close()
        self._spool.close()
        self._lock.close()

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def known(self) -> int:
        """Items that an earlier run has read."""
        (count,) = self.rows.execute("select count(*) from item where not passing").fetchone()
        return int(count)

    def digest(self, token: str) -> bytes | None:
        """Content hash with which an item was read; empty where it has none, ``None`` for an unknown item."""
        row = self.rows.execute("select digest from item where token = ? and not passing", (token,)).fetchone()
        return None if row is None else row[0]

    def home(self, token: str) -> int | None:
        """Position of an item that this run has come to the end of; ``None`` for another."""
        found = "select ordinal from item where token = ? and scan = ?"
        row = self.rows.execute(found, (token, self.scan)).fetchone()
        return None if row is None else int(row[0])

    def keep(self, token: str, ordinal: int) -> None:
        """An item is still there and its content has not changed."""
        self.rows.execute("update item set scan = ?, ordinal = ? where token = ?", (self.scan, ordinal, token))
        self.rows.execute(
            "update image set ordinal = ? where token = ? and ordinal != ?", (ordinal, token, ordinal)
        )
        self._commit_sometimes()

    def name(self, token: str, name: str) -> None:
        """Remember what an item is called, for the hospital's private notes."""
        self._insert("name", {"token": token, "name": name.encode("utf-8", "surrogateescape")})

    def forget(self, token: str) -> None:
        """Drop what was recorded of an item."""
        self.rows.execute("delete from image where token = ?", (token,))
        self.rows.execute("delete from item where token = ?", (token,))

    def add(self, token: str, reading: Reading, pixels: NDArray[np.uint16]) -> None:
        """Record one image of an item that has not ended."""
        self._spool.write(np.ascontiguousarray(pixels, dtype="<u2").data)
        values = {name: getattr(reading, name) for name in _COLUMNS}
        values |= {"keys": " ".join(reading.keys), "flags": " ".join(reading.flags)}
        self._insert("image", {"token": token, "spooled": self._spooled, **values})
        self._spooled += 1

    def reject(self, token: str, rejected: Rejected) -> None:
        """Record one rejection; without a frame it is of the whole item and replaces what came before."""
        if not rejected.frame:
            self.rows.execute("delete from image where token = ?", (token,))
        values = {"ordinal": rejected.ordinal, "frame": rejected.frame}
        self._insert("image", {"token": token, "outcome": rejected.code, "detail": rejected.detail, **values})

    def end(self, token: str, ordinal: int, digest: bytes, *, passing: bool) -> None:
        """An item is complete."""
        values = {"token": token, "scan": self.scan, "ordinal": ordinal, "digest": digest, "passing": passing}
        self._insert("item", values)
        self._commit_sometimes()

    def _insert(self, table: str, values: dict[str, Any]) -> None:
        places = ", ".join("?" * len(values))
        self.rows.execute(
            f"insert or replace into {table} ({', '.join(values)}) values ({places})",  # noqa: S608 - our own names
            tuple(values.values()),
        )

    def _commit_sometimes(self) -> None:
        self._uncommitted += 1
        if self._uncommitted >= _COMMIT_ITEMS or time.monotonic() - self._committed_at > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything recorded so far outlive this process."""
        self._spool.flush()
        os.fsync(self._spool.fileno())
        self.rows.execute("commit")
        self.rows.execute("begin")
        self._uncommitted, self._committed_at = 0, time.monotonic()

    # -- afterwards --------------------------------------------------------------------------------------------

    def drop_vanished(self) -> None:
        """Forget items of earlier runs that the source no longer has."""
        self.rows.execute("delete from item where scan != ?", (self.scan,))
        self.rows.execute("delete from image where token not in (select token from item)")
        self.commit()

    def pixels(self, place: int) -> NDArray[np.uint16]:
        """Pixels by their position in the spool."""
        content = os.pread(self._spool.fileno(), self._image_bytes, place * self._image_bytes)
        return np.frombuffer(content, dtype="<u2").reshape(self._shape)


def _connected(folder: Path) -> sqlite3.Connection:
    """A connection; sources that retrieve ahead in a thread of theirs ask through it what is known."""
    return sqlite3.connect(folder / "journal.sqlite", isolation_level=None, check_same_thread=False)


def _locked(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OutputError("Another process is writing this cohort. Wait for it, or name another folder.") from None
    return file
