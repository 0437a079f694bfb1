"""Noisy answers on disk, so that an interrupted run asks nothing twice."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from medistill.errors import OutputError, PrivacyError

_RESERVATION = "reservation"
_RUNS = "runs.json"
_IDENTITY = re.compile(r"[0-9a-f]{32}")


class Answers:
    """A folder of answers of one reservation, used by one process at a time.

    Args:
        folder: Where they lie; made if absent, for its owner only.

    Raises:
        OutputError: If another process works here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._unlock = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._unlock()
            raise OutputError("Another process asks these queries. Wait for it, or name another folder.") from None

    def close(self) -> None:
        """Let others work here."""
        self._unlock()

    @property
    def reservation(self) -> str | None:
        """Whose answers these are; ``None`` where nothing was reserved yet."""
        path = self._folder / _RESERVATION
        if not path.exists():
            return None
        identity = path.read_text().strip()
        if not _IDENTITY.fullmatch(identity):
            raise PrivacyError("The folder of kept answers is damaged. Begin a new release in another folder.")
        return identity

    def belong_to(self, identity: str) -> None:
        """Note whose answers these will be."""
        self._write(self._folder / _RESERVATION, identity.encode())

    def of_run(self, number: int) -> Answers:
        """The folder below this one, for a later run of the same reservation."""
        return Answers(self._folder / f"{number:04d}")

    def runs(self, candidates: float = math.inf) -> tuple[tuple[int, int], ...] | None:
        """What :meth:`keep_runs` wrote; ``None`` where it was not called.

        Args:
            candidates: Number of recipes there are to choose from.

        Raises:
            PrivacyError: If the record is damaged.
        """
        path = self._folder / _RUNS
        if not path.exists():
            return None
        try:
            found = tuple((int(candidate), int(seed)) for candidate, seed in json.loads(path.read_bytes()))
            if not found or not all(0 <= candidate < candidates and seed >= 0 for candidate, seed in found):
                raise ValueError
            return found
        except (ValueError, TypeError):
            raise PrivacyError(
                "The record of the runs is damaged. Begin a new release in another folder."
            ) from None

    def keep_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        """Write down which candidate and seed every run has, before the first answer."""
        self._write(self._folder / _RUNS, json.dumps(runs).encode())

    def any(self) -> bool:
        """Whether any answer is kept."""
        return next(self._folder.glob("*.safetensors"), None) is not None

    def keep(self, position: int, content: bytes) -> None:
        """Write an answer, as packed, and force it to the disk."""
        self._write(self._path(position), content)

    def digest(self, position: int) -> str | None:
        """SHA-256 of a kept answer, or ``None``."""
        path = self._path(position)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def read(self, position: int, digest: str) -> Tensor:
        """A kept answer.

        Args:
            position: Which query.
            digest: Its SHA-256 from the ledger.

        Raises:
            PrivacyError: If it is not there, or not what the ledger says.
        """
        path = self._path(position)
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise PrivacyError(
                f"The kept answer to query {position + 1} is missing or is not the one in the ledger, and it must "
                "not be drawn again. Put it back, or begin a new release, which spends its budget anew."
            )
        try:
            return load(content)["answer"]
        except (SafetensorError, KeyError):
            raise PrivacyError(f"The kept answer to query {position + 1} cannot be read.") from None

    def forget_before(self, position: int) -> None:
        """Delete answers that are no longer needed."""
        for path in self._folder.glob("*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) < position:
                path.unlink()

    def _path(self, position: int) -> Path:
        return self._folder / f"{position:07d}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            reason = error.strerror or "the operating system refused"
            raise OutputError(f"An answer cannot be kept: {reason}. It was not given.") from error


def packed(answer: Tensor) -> bytes:
    """An answer as bytes, the same for the same numbers."""
    return save({"answer": answer.contiguous()})
