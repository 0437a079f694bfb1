"""Work on untrusted files in child processes that may crash, hang or eat memory without harming anything else.

One *nursery* process imports the libraries once and then forks children on request, so that a fresh child costs
milliseconds. Each child works on one item at a time and sends its results through a socket of its own. A child
that dies, sends nothing for too long or passes its memory limit costs the item it was working on; another child
takes over. Children end with the nursery, and the nursery with the process that started it, even if it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import cloudpickle

from medistill.errors import ConfigError, DataError
from medistill.parallel import cpu_count, parallel_map

Item = TypeVar("Item")
Result = TypeVar("Result")

_PRELOAD = ("medistill.ingest.reading", "medistill.ingest.frames", "PIL.Image")
_START = "import sys; sys.path[:] = {path!r}; from medistill.ingest.isolation import nursery; nursery({fd})"
_READY, _RESULT, _END, _FAILED = range(4)
_PR_SET_PDEATHSIG = 1
_PATIENCE = 30.0
_CLUSTER_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one item may cost.

    Args:
        seconds: Longest wait for the next result of an item before its child is killed.
        memory_mb: Address space that a child may take beyond what it has when it starts; enforced on Linux.
        recycle_after: Items after which a child is replaced, so that leaks of libraries do not add up.

    Raises:
        ConfigError: If a limit is not positive.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    seconds: float = 60.0
    memory_mb: int = 1536
    recycle_after: int = 500

    def __post_init__(self) -> None:
        problems = [
            f"expected {name} > 0, got {getattr(self, name)}"
            for name in ("seconds", "memory_mb", "recycle_after")
            if not getattr(self, name) > 0
        ]
        if problems:
            raise ConfigError("Limits: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """One thing that happened to an item: a result, or its end.

    Args:
        item: The item.
        result: A result; ``None`` at the end.
        ended: Whether this was the last of the item.
        failure: Reason code at the end of an item whose child was lost: ``CODEC_CRASH``, ``TIMEOUT`` or
            ``OOM_LIMIT``; results that came before do not count.
        again: Whether the item begins once more, because its child died and may have been killed from outside;
            results that came before do not count.
    """

    item: Item = field(repr=False)
    result: Result | None = field(default=None, repr=False)
    ended: bool = False
    failure: str = ""
    again: bool = False


def isolated(
    function: Callable[[Item], Iterable[Result]],
    items: Iterable[Item],
    *,
    jobs: int | None = None,
    limits: Limits | None = None,
    engine: str = "local",
) -> Iterator[Outcome[Item, Result]]:
    """Apply a function that gives several results to every item, each in a killable child.

    Items are taken one by one as children become free, so nothing piles up. Results of one item come in order;
    items end in any order.

    Args:
        function: Picklable; may be slow, crash or never return.
        items: Picklable arguments; may be a generator.
        jobs: Children at work at once; all cores where not given.
        limits: What one item may cost.
        engine: ``local``, or ``ray`` to spread batches over a Ray cluster, where every worker keeps a nursery and
            children of its own.

    Yields:
        What happens, as it happens.

    Raises:
        ConfigError: If the system has no fork, or the engine is unknown or not installed.
        DataError: If children cannot be started.
    """
    limits = limits or Limits()
    if engine == "local":
        pool: _Pool[Item, Result] = _Pool(_pickled(function, limits), jobs or cpu_count(), limits)
        with pool:
            yield from pool.run(items)
        return
    work = _ClusterWork(_pickled(function, limits), limits)
    for outcomes in parallel_map(work, _batched(items, _CLUSTER_BATCH), jobs=jobs, engine=engine):
        yield from outcomes


def _pickled(function: Callable[[Item], Iterable[Result]], limits: Limits) -> bytes:
    """What the nursery needs to begin; by value where the function belongs to a script."""
    return bytes(cloudpickle.dumps((function, limits)))


@dataclass(frozen=True)
class _ClusterWork:
    """Work of one cluster worker: a batch of items, through one child of this worker."""

    work: bytes = field(repr=False)
    limits: Limits

    def __call__(self, items: list[Any]) -> list[Outcome[Any, Any]]:
        return list(_worker_pool(self.work, self.limits).run(items))


@lru_cache(maxsize=1)
def _worker_pool(work: bytes, limits: Limits) -> _Pool[Any, Any]:
    """The pool that a cluster worker keeps between batches; it ends with the worker."""
    return _Pool(work, 1, limits)


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# -- the side of the main process --------------------------------------------------------------------------------


class _Child(Generic[Item]):
    """A child seen from outside."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.item: Item | None = None
        self.busy = False
        self.tried = False
        self.deadline = 0.0
        self.done = 0

    def give(self, item: Item, seconds: float, *, tried: bool) -> bool:
        """Hand over an item; returns whether the child was there to take it."""
        self.item, self.busy, self.tried = item, True, tried
        self.deadline = time.monotonic() + seconds
        try:
            self.connection.send(item)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.connection.close()


class _Pool(Generic[Item, Result]):
    """A nursery and the children at work."""

    def __init__(self, work: bytes, jobs: int, limits: Limits) -> None:
        if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
            raise ConfigError("Isolated reading needs Linux or macOS. On Windows, use the Linux subsystem.")
        self._limits = limits
        self._jobs = jobs
        self._children: list[_Child[Item]] = []
        self._again: list[tuple[Item, bool]] = []
        self._control, other = socket.socketpair()
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
        self._nursery = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-c", _START.format(path=sys.path, fd=other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is for the main process alone
            env=environment,
        )
        other.close()
        self._control.sendall(len(work).to_bytes(8, "little") + work)

    def __enter__(self) -> _Pool[Item, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        for child in self._children:
            child.kill()
        self._nursery.kill()
        self._nursery.wait()

    def run(self, items: Iterable[Item]) -> Iterator[Outcome[Item, Result]]:
        """Work through the items."""
        waiting = iter(items)
        more = True
        self._again.clear()
        while True:
            idle = [child for child in self._children if not child.busy]
            while (more or self._again) and (idle or len(self._children) < self._jobs):
                item, tried = self._again.pop() if self._again else (next(waiting, _NOTHING), False)
                if item is _NOTHING:
                    more = False
                    continue
                child = idle.pop() if idle else self._new_child()
                if not child.give(item, self._limits.seconds, tried=tried):
                    yield self._lost(child, "CODEC_CRASH")
            if not any(child.busy for child in self._children):
                if more or self._again:
                    continue
                return
            yield from self._listen()

    def _listen(self) -> Iterator[Outcome[Item, Result]]:
        busy = [child for child in self._children if child.busy]
        patience = max(0.0, min(child.deadline for child in busy) - time.monotonic())
        ready = wait([child.connection for child in busy], patience)
        for child in busy:
            if child.connection in ready:
                yield self._receive(child)
            elif time.monotonic() >= child.deadline and not child.connection.poll():
                yield self._lost(child, "TIMEOUT")

    def _receive(self, child: _Child[Item]) -> Outcome[Item, Result]:
        assert child.item is not None
        try:
            kind, content = child.connection.recv()
        except Exception:  # cut off in the middle, or bytes that a broken child sent
            return self._lost(child, "CODEC_CRASH")
        if kind == _RESULT:
            child.deadline = time.monotonic() + self._limits.seconds
            return Outcome(child.item, result=content)
        child.done += 1
        child.busy = False
        outcome: Outcome[Item, Result] = Outcome(child.item, ended=True, failure=content or "")
        if child.done >= self._limits.recycle_after or kind == _FAILED:
            self._remove(child)
        return outcome

    def _lost(self, child: _Child[Item], code: str) -> Outcome[Item, Result]:
        """What follows for the item; one whose child died is tried once more, as others may have killed it."""
        self._remove(child)
        self._check_nursery()
        assert child.item is not None
        if code == "CODEC_CRASH" and not child.tried:
            self._again.append((child.item, True))
            return Outcome(child.item, again=True)
        return Outcome(child.item, ended=True, failure=code)

    def _check_nursery(self) -> None:
        """Blame no item where the nursery itself has gone, and all children with it."""
        if self._nursery.poll() is not None:
            raise DataError("The reading processes were ended from outside. Run the same command again to go on.")

    def _remove(self, child: _Child[Item]) -> None:
        self._children.remove(child)
        child.kill()

    def _new_child(self) -> _Child[Item]:
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
                connection = Connection(ours.detach())
            if not connection.poll(_PATIENCE):
                raise OSError
            _, pid = connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nursery.wait(1.0)  # its sockets close a moment before it is gone
            self._check_nursery()
            raise DataError("Reading processes cannot be started. Free memory, or use fewer jobs.") from None
        child: _Child[Item] = _Child(connection, pid)
        self._children.append(child)
        return child


_NOTHING: Any = object()


# -- the side of the nursery and its children --------------------------------------------------------------------


def nursery(descriptor: int) -> None:
    """Import what children need, then fork one for every socket that arrives; never returns a result itself.

    Args:
        descriptor: Socket to the main process; the nursery ends when it is closed.
    """
    control = socket.socket(fileno=descriptor)
    for module in _PRELOAD:
        import_module(module)
    size = int.from_bytes(_receive_exactly(control, 8), "little")
    function, limits = pickle.loads(_receive_exactly(control, size))  # noqa: S301 - sent by our own main process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children leave nothing behind
    gc.collect()
    gc.freeze()  # so that children share these pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _serve(Connection(descriptors[0]), function, limits)
            finally:
                os._exit(0)
        os.close(descriptors[0])


def _receive_exactly(control: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        block = control.recv(min(1 << 20, size - len(content)))
        if not block:
            raise SystemExit(0)
        content += block
    return bytes(content)


def _serve(connection: Connection, function: Callable[[Any], Iterable[Any]], limits: Limits) -> None:
    """Work on items until the main process hangs up."""
    _end_with_parent()
    _limit_memory(limits.memory_mb)
    connection.send((_READY, os.getpid()))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            for result in function(item):
                connection.send((_RESULT, result))
            connection.send((_END, ""))
        except MemoryError:
            connection.send((_FAILED, "OOM_LIMIT"))
            return
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:
            connection.send((_FAILED, "CODEC_CRASH"))
            return


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(megabytes: int) -> None:
    """Cap the address space; other systems than Linux do not enforce it."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
