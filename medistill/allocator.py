"""Keep freed memory in the process, so that training on a CPU does not wait for fresh pages.

glibc gives every block above 32 MB back to the system when it is freed, and the next layer of a network faults the
same pages in again. ``tests/benchmarks/test_convnet_speed.py`` measures what keeping them saves and costs.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap; for processes of ours only, called by the command line.

    Returns:
        Whether the allocator is glibc's and took the advice.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 1 << 30))
