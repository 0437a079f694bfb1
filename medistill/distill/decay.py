"""How step sizes fall."""

from __future__ import annotations

import math


def cosine(done: float, *, floor: float) -> float:
    """Factor falling from 1 to ``floor`` along half a cosine; ``done`` in ``[0, 1]``."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
