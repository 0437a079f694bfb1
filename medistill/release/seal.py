"""``SHA256SUMS``: which files belong to a release and what they hold, as ``sha256sum -c`` reads it.

The seal shows damage and careless changes. Whoever can write the folder can seal it anew; against that a seal can
be signed (:mod:`medistill.release.signature`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

SEAL_FILE = "SHA256SUMS"
SIGNATURE_FILE = "SHA256SUMS.sig"
#: A seal larger than this is not read.
LARGEST_SEAL = 1 << 20

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?")
#: Names that open a device instead of a file on Windows, whatever follows the first dot.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
_DEEPEST = 8


def seal(files: Mapping[str, bytes]) -> bytes:
    """One line per file, sorted by name.

    Args:
        files: Contents by relative name with forward slashes, without the seal itself.
    """
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return "".join(lines).encode("ascii")


def parse_seal(content: bytes) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read a seal without trusting it.

    Args:
        content: What ``SHA256SUMS`` holds.

    Returns:
        Digest per file name, and every problem found; a name that could lead out of the folder is a problem and is
        never returned.
    """
    digests: dict[str, str] = {}
    spelled = {SEAL_FILE.casefold(): SEAL_FILE, SIGNATURE_FILE.casefold(): SIGNATURE_FILE}
    problems = []
    text = content.decode("utf-8", errors="replace")
    if text and not text.endswith("\n"):
        problems.append(f"{SEAL_FILE} does not end with a newline: cut off")
    for position, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{SEAL_FILE} line {position} is not 'digest, two spaces, name'")
        elif not is_inside(match[2]):
            problems.append(f"{SEAL_FILE} line {position} names a place outside the release: {match[2]!a}")
        elif _collides(match[2], spelled):
            problems.append(f"{SEAL_FILE} line {position} names {match[2]} again, perhaps in another case")
        else:
            digests[match[2]] = match[1]
    return digests, tuple(problems)


def _collides(name: str, spelled: dict[str, str]) -> bool:
    """Whether a file system without cases would put this where something else is; folders end in a slash."""
    parts = name.split("/")
    folders = ["/".join(parts[:count]) for count in range(1, len(parts))]
    file = name.casefold()
    if file in spelled or f"{file}/" in spelled:
        return True
    for folder in folders:
        if folder.casefold() in spelled or spelled.setdefault(f"{folder.casefold()}/", folder) != folder:
            return True
    spelled[file] = name
    return False


def is_inside(name: str) -> bool:
    """Whether a name is a plain relative one on every system: no drive, no ``..``, no device, nothing hidden."""
    parts = name.split("/")
    plain = all(_PART.fullmatch(part) and not _DEVICE.fullmatch(part) for part in parts)
    return plain and len(parts) <= _DEEPEST
