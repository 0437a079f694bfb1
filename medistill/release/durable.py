"""Files that are whole or absent, on a disk that may be full."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medistill.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an :class:`OutputError` that names the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"The disk is full; {target.name} was not written. "
                "Free space or choose another folder, then repeat."
            ) from error
        raise OutputError(
            f"Cannot write {target.name}: {error.strerror or 'the operating system refused'}. "
            "Choose a folder you may write to."
        ) from error


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and force it to the disk, creating its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file beside ``path`` and move it there; an interruption leaves the old file, or none."""
    partial = partial_name(path)
    try:
        write_durably(partial, content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """A hidden, unused name beside ``path`` for something that is not finished."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where the operating system can do so."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
