"""The one door to embarrassingly parallel work.

Everything goes through joblib: ``loky`` processes here, and on a cluster any backend registered with joblib
(Ray, Dask) chosen by :func:`joblib.parallel_config` around the call.

Example:
    >>> list(parallel_map(abs, [-1, 2], jobs=1))
    [1, 2]
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_STARTING_COSTS = 2e7

Item = TypeVar("Item")
Result = TypeVar("Result")


def cpu_count() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth_processes(pixels: float) -> int | None:
    """Processes for training work: all cores for a lot of it, this process alone for a little.

    Args:
        pixels: Pixels that training will pass through the network in all; starting processes costs about as much
            as twenty million of them.

    Returns:
        The ``jobs`` argument of :func:`parallel_map`.
    """
    return None if pixels > _STARTING_COSTS else 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int | None = None
) -> Iterator[Result]:
    """Apply a function to every item, in order, keeping few results in memory.

    Args:
        function: A picklable function.
        items: Arguments; may be a generator.
        jobs: Processes; ``None`` takes all cores, ``1`` stays in this process.

    Yields:
        Results in the order of the items.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    from joblib import Parallel, delayed  # noqa: PLC0415

    pool = Parallel(n_jobs=jobs or cpu_count(), return_as="generator", batch_size="auto")
    results = pool(delayed(function)(item) for item in items)
    try:
        for result in results:  # noqa: UP028 - closing must happen below, not on the way out
            yield result
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # results that an interruption leaves unused
            results.close()
        _stop_idle_workers()


def _stop_idle_workers() -> None:
    """Give back the memory of local workers, which would otherwise wait for minutes with all libraries loaded."""
    from joblib.externals.loky import get_reusable_executor  # noqa: PLC0415

    get_reusable_executor().shutdown(wait=True)
