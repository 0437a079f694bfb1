"""Named seeds from one root seed, for public randomness only.

Example:
    >>> derive_seed(0, "distill") == derive_seed(0, "distill")
    True
"""

from __future__ import annotations

import hashlib


def derive_seed(root: int, *names: str | int) -> int:
    """Seed of a named purpose, in ``[0, 2**63)``; distinct names give independent seeds."""
    text = "/".join(str(name) for name in (root, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
