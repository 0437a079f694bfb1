"""Whether a table of numbers looks like text."""

from __future__ import annotations

import re
from itertools import pairwise

_RUN = re.compile(rb"[A-Za-z0-9 ^,.'/_=:\-]{5,}")
_WINDOW = 5


def text_like(data: bytes) -> bool:
    """Whether a lookup table holds readable characters in an order that no smooth table has.

    Read are the bytes as they stand, and the low and the high bytes of 16-bit entries. A run of readable bytes is
    text when it goes up and down: a ramp of grey levels passes through all letters, but in their order.

    Args:
        data: Bytes of the table.
    """
    return any(_goes_up_and_down(run) for view in (data, data[::2], data[1::2]) for run in _RUN.findall(view))


def _goes_up_and_down(run: bytes) -> bool:
    steps = [(b > a) - (b < a) for a, b in pairwise(run)]
    for start in range(len(steps) - _WINDOW + 2):
        directions = [step for step in steps[start : start + _WINDOW - 1] if step]
        turns = sum(a != b for a, b in pairwise(directions))
        if turns >= 2 and len(set(run[start : start + _WINDOW])) >= 4:
            return True
    return False
