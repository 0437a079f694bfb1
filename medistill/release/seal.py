"""``SHA256SUMS``: which files belong to a release and what they hold, as ``sha256sum -c`` reads it.

The seal shows damage and careless changes. It is not a signature: whoever can write the folder can seal it anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

SEAL_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


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
        elif match[2] in digests or match[2] == SEAL_FILE:
            problems.append(f"{SEAL_FILE} line {position} names {match[2]} again")
        else:
            digests[match[2]] = match[1]
    return digests, tuple(problems)


def is_inside(name: str) -> bool:
    """Whether a name is a plain relative one: no drive, no leading slash, no ``..``, nothing hidden."""
    return all(_PART.fullmatch(part) for part in name.split("/"))
