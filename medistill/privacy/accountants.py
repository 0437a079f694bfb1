"""The accountants themselves: dp-accounting (PLD) and Opacus (PRV, RDP), each in a process that can be stopped.

They are libraries of others and are made for reasonable parameters. What they are given was checked before (see
:mod:`medistill.privacy.accounting`); should one still hang or ask for too much memory, its process is ended. The
libraries are imported in that process only, so nothing else pays for them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

#: Accountant and the library it is in.
LIBRARIES = {"pld": "dp-accounting", "prv": "Opacus", "rdp": "Opacus"}
_MEMORY = 4 << 30
_START = "from medistill.privacy.accountants import serve; serve()"
_IMPORTS = 120.0
_COARSEST, _HALVINGS = 1e-3, 7
Gaussian = tuple[float, float, int]  #: noise multiplier, sampling rate, count


class Stopped(Exception):  # noqa: N818 - an outcome, told to the caller in words
    """An accountant that gave no answer, and why."""


class Process:
    """A child that answers one question at a time, started when first asked.

    Threads wait for each other, and a forked process gets a child of its own. A question that was broken off takes
    the child with it, so that its answer is never taken for that to another question.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._turn = threading.Lock()

    def ask(self, accountant: str, mechanisms: Sequence[Gaussian], delta: float, seconds: float) -> float:
        """Epsilon from one accountant.

        Raises:
            Stopped: If there is no answer within the time, or the library fails.
        """
        question = {"accountant": accountant, "mechanisms": [list(one) for one in mechanisms], "delta": delta}
        with self._turn:
            try:
                answer = self._answer(json.dumps(question).encode(), seconds)
            except OSError:
                self.stop()
                raise Stopped("its process ended") from None
            except BaseException:
                self.stop()
                raise
        if "epsilon" not in answer:
            raise Stopped(str(answer["failed"]))
        return float(answer["epsilon"])

    def _answer(self, question: bytes, seconds: float) -> dict[str, Any]:
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(question + b"\n")
        child.stdin.flush()
        answer: dict[str, Any] = json.loads(_line(child.stdout, seconds))
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            home = str(Path(__file__).resolve().parents[2])
            path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._child = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            assert self._child.stdout is not None
            _line(self._child.stdout, _IMPORTS)
        return self._child

    def stop(self) -> None:
        """End the child, if there is one; the next question starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _line(pipe: IO[bytes], seconds: float) -> bytes:
    """One line from a child, which writes nothing else, or :class:`Stopped` when the time is over."""
    ends, read = time.monotonic() + seconds, b""
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            raise Stopped(f"stopped after {seconds:g} s")
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            raise Stopped("its process ended")
        read += part
    return read


# One child for each library, so that one that is stopped does not take the other with it.
PROCESSES = {library: Process() for library in set(LIBRARIES.values())}


@atexit.register
def _stop_all() -> None:
    for process in PROCESSES.values():
        process.stop()


def serve() -> None:
    """The child: questions on standard input, answers on standard output, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    _limit_memory()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        found: dict[str, float | str]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = {"epsilon": _epsilon(**question)}
        except Exception as error:  # whatever a library raises, it gave no answer
            found = {"failed": f"failed ({type(error).__name__})"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - absent on Windows

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _epsilon(accountant: str, mechanisms: list[list[float]], delta: float) -> float:
    gaussians = [(sigma, rate, int(count)) for sigma, rate, count in mechanisms]
    return {"pld": pld, "prv": prv, "rdp": rdp}[accountant](gaussians, delta)


def pld(mechanisms: Sequence[Gaussian], delta: float) -> float:
    """Epsilon by privacy loss distributions (dp-accounting), rounded towards more loss: an upper bound.

    Losses are put on a grid, and the error falls with the square of its step. The step is halved until that
    changes little; many steps of little loss need a fine one, and few of much loss would take long with it.
    """
    found = _pld(mechanisms, delta, _COARSEST)
    for halvings in range(1, _HALVINGS):
        finer = _pld(mechanisms, delta, _COARSEST / 2**halvings)
        little = abs(found - finer) <= 3e-3 * finer
        found = min(found, finer)
        if little:
            break
    return found


def _pld(mechanisms: Sequence[Gaussian], delta: float, step: float) -> float:
    from dp_accounting import dp_event, privacy_accountant  # noqa: PLC0415
    from dp_accounting.pld import pld_privacy_accountant  # noqa: PLC0415

    relation = privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld_privacy_accountant.PLDAccountant(relation, value_discretization_interval=step)
    for sigma, rate, count in mechanisms:
        gaussian = dp_event.GaussianDpEvent(sigma)
        accountant.compose(gaussian if rate >= 1 else dp_event.PoissonSampledDpEvent(rate, gaussian), count)
    return float(accountant.get_epsilon(delta))


def prv(mechanisms: Sequence[Gaussian], delta: float) -> float:
    """Epsilon by privacy random variables (Opacus), its upper estimate."""
    from opacus.accountants import PRVAccountant  # noqa: PLC0415

    accountant = PRVAccountant()
    accountant.history = list(mechanisms)
    return float(accountant.get_epsilon(delta))


def rdp(mechanisms: Sequence[Gaussian], delta: float) -> float:
    """Epsilon by Rényi divergences (Opacus); an upper bound, and a loose one."""
    from opacus.accountants import RDPAccountant  # noqa: PLC0415

    accountant = RDPAccountant()
    accountant.history = list(mechanisms)
    return float(accountant.get_epsilon(delta))
