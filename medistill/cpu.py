"""Two settings of this process that make training small networks on a CPU faster and repeatable.

``tests/benchmarks/test_convnet_speed.py`` measures what each saves and costs.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare_cpu() -> None:
    """Apply both settings; for processes of ours only: the command line, the pipelines and their workers."""
    use_one_thread()
    keep_freed_memory()


def use_one_thread() -> None:
    """Compute in one thread per process, unless the user set ``OMP_NUM_THREADS``; cores go to processes.

    The layers are so small that a second thread gains little, and on a core that another process holds it costs a
    factor of three to ten. With one thread the bits do not depend on the number of cores either.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # it has read the variable already
        sys.modules["torch"].set_num_threads(1)


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and to keep what is freed.

    It gives every block above 32 MB back to the system when it is freed, and the next layer of a network faults
    the same pages in again.

    Returns:
        Whether the allocator is glibc's and took the advice.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 1 << 30))
