"""The one door to embarrassingly parallel work.

Everything goes through joblib: ``loky`` processes here, and Ray on a cluster (``engine="ray"``).

Example:
    >>> list(parallel_map(abs, [-1, 2], jobs=1))
    [1, 2]
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from medistill.cpu import keep_freed_memory
from medistill.errors import ConfigError

ENGINES = ("local", "ray")
_STARTING_COSTS = 2e7
_ITEMS_PER_WORKER = 4

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
    function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int | None = None, engine: str = "local"
) -> Iterator[Result]:
    """Apply a function to every item, in order, keeping few results in memory.

    Args:
        function: A picklable function.
        items: Arguments; may be a generator.
        jobs: Processes; ``None`` takes all cores (of the cluster, for another engine), ``1`` stays in this process
            for the engine ``local``.
        engine: ``local`` or ``ray``; a Ray cluster is joined where its address is known (``RAY_ADDRESS``), and
            started on this machine otherwise.

    Yields:
        Results in the order of the items.

    Raises:
        ConfigError: If the engine is unknown or not installed.
    """
    if engine == "local" and jobs == 1:
        yield from map(function, items)
        return
    if engine == "local":
        yield from _on_this_machine(function, items, jobs or cpu_count())
        return
    yield from _on_a_cluster(function, items, jobs, engine)


def check_engine(engine: str) -> None:
    """Refuse an engine that cannot work, before anything is begun.

    Raises:
        ConfigError: If it is unknown or not installed.
    """
    if engine != "local":
        _backend(engine)


def _on_this_machine(function: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    from joblib import Parallel, delayed  # noqa: PLC0415

    pool = Parallel(n_jobs=jobs, return_as="generator", batch_size="auto")
    results = pool(delayed(_in_worker)(function, item) for item in items)
    try:
        for result in results:  # noqa: UP028 - closing must happen below, not on the way out
            yield result
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # results that an interruption leaves unused
            results.close()
        _stop_idle_workers()


def _in_worker(function: Callable[[Item], Result], item: Item) -> Result:
    """The function, in a process of ours; what the allocator was told is not inherited."""
    keep_freed_memory()
    return function(item)


def _on_a_cluster(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int | None, engine: str
) -> Iterator[Result]:
    """Windows of items, one after the other: cluster backends of joblib give no generator."""
    from joblib import Parallel, delayed, parallel_config  # noqa: PLC0415

    with parallel_config(backend=_backend(engine)), Parallel(n_jobs=jobs or -1, batch_size=1) as pool:
        window = pool._effective_n_jobs() * _ITEMS_PER_WORKER
        waiting = iter(items)
        while some := list(islice(waiting, window)):
            yield from pool(delayed(_in_worker)(function, item) for item in some)


def _backend(engine: str) -> str:
    """Name under which joblib knows an engine, after making it known."""
    if engine != "ray":
        raise ConfigError(f"Expected engine to be one of {', '.join(ENGINES)}, got {engine!r}.")
    try:
        from ray.util.joblib import register_ray  # noqa: PLC0415
    except ImportError:
        raise ConfigError("The engine 'ray' is not installed. Run `pip install \"medistill[cluster]\"`.") from None
    register_ray()
    return "ray"


def _stop_idle_workers() -> None:
    """Give back the memory of local workers, which would otherwise wait for minutes with all libraries loaded."""
    from joblib.externals.loky import get_reusable_executor  # noqa: PLC0415

    get_reusable_executor().shutdown(wait=True)
