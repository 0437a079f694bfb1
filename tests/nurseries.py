"""Reading processes that are born quickly: forked from one that has imported the libraries, once for all tests.

Every ingestion starts a process that imports for a second and then reads a few small files. Here it is forked
instead; what it does afterwards is the same. How it is started otherwise is tested in ``ingest/test_isolation.py``
and in ``end_to_end``.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# The process that all others are forked from; each is told its socket, the search path and the environment.
_STEM = """
import json, os, socket, sys
sys.path[:] = json.loads(sys.argv[2])
from importlib import import_module
from medistill.ingest import isolation
for module in (*isolation._PRELOAD, "tests.ingest.conftest"):
    import_module(module)
control = socket.socket(fileno=int(sys.argv[1]))
children = []
while True:
    size, descriptors, _, _ = socket.recv_fds(control, 8, 1)
    if not size:
        break
    told = b""
    while len(told) < int.from_bytes(size, "little"):
        told += control.recv(1 << 20)
    told = json.loads(told)
    child = os.fork()
    if not child:
        os.setsid()
        control.close()
        os.chdir(told["folder"])
        sys.path[:] = told["path"]
        os.environ.clear()
        os.environ.update(told["environment"])
        try:
            isolation.nursery(descriptors[0])
        finally:
            os._exit(0)
    os.close(descriptors[0])
    control.sendall(child.to_bytes(8, "little"))
    children.append(child)
    children = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
"""


@cache
def _stem() -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", _STEM, str(theirs.fileno()), json.dumps([str(_ROOT), *sys.path])]
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Forked:
    """As much of a process as :mod:`medistill.ingest.isolation` asks for."""

    def __init__(self, command: list[str], *, pass_fds: list[int], env: dict[str, str], **_: Any) -> None:
        told = json.dumps({"folder": os.getcwd(), "path": sys.path, "environment": env}).encode()
        stem = _stem()
        socket.send_fds(stem, [len(told).to_bytes(8, "little")], pass_fds)
        stem.sendall(told)
        self.pid = int.from_bytes(stem.recv(8), "little")
        self._handle: int | None
        try:
            self._handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._handle = None

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self._handle is not None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self._handle is not None:
            if not select.select([self._handle], [], [], seconds)[0]:
                return None
            os.close(self._handle)
            self._handle = None
        return -1


def forking() -> SimpleNamespace:
    """What takes the place of the module ``subprocess`` in :mod:`medistill.ingest.isolation`."""
    own = Forked if hasattr(os, "pidfd_open") else subprocess.Popen
    return SimpleNamespace(Popen=own, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
