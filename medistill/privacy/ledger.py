"""What was spent on a cohort: one file, only ever added to, that composes every release of the same patients.

::

    ledger.jsonl    one line per entry, each with the hash of the one before:
                    opened        the lifetime budget
                    reserved      a plan with its noise, written before the first answer is given
                    sealed        SHA-256 of one noisy answer, written before the answer is given
    ledger.head     number and hash of the last line, so that lines cut off the end are missed

A reservation counts in full, whether or not all of it was asked. No entry holds a patient's value, a path or
a name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from medistill.core.guarantee import EPSILON_RANGE, Budget, PrivacyPlan
from medistill.errors import OutputError, PrivacyError
from medistill.privacy.accounting import PATIENCE, Bound, Mechanism, Selected, analytic_noise, epsilon_of
from medistill.privacy.calibration import whole

SCHEMA_VERSION = 1
#: Its name beside a cohort.
NAME = "ledger.jsonl"
#: What may be spent on a cohort where nothing else is said.
LIFETIME = Budget(epsilon=6.0, delta=1e-5)
_FIRST = "0" * 64
_ROUNDING = 1e-9
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{0,64}")
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)?")


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """One release's part of the ledger.

    Args:
        identity: Random name.
        plan: What may be asked.
        noise_multipliers: One for each entry of the plan's queries.
        budget: What the plan was calibrated to.
        recipe: Fingerprint of the release's recipe; may be empty.
        epsilon: Bound of the plan on its own, at the budget's delta.
        accountants: Who gave it, and who else gave a valid one.
        date: Day in UTC, ``YYYY-MM-DD``; empty in entries that do not say.
        sealed: SHA-256 of each answer given, by position.
    """

    identity: str
    plan: PrivacyPlan
    noise_multipliers: tuple[float, ...]
    budget: Budget
    recipe: str
    epsilon: float
    accountants: tuple[str, ...]
    date: str = ""
    sealed: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _FINGERPRINT.fullmatch(self.recipe):
            raise PrivacyError("Expected a fingerprint in hexadecimal digits; the ledger takes nothing else.")
        if not _DATE.fullmatch(self.date):
            raise PrivacyError("Expected a date as YYYY-MM-DD; the ledger takes nothing else.")

    @property
    def mechanisms(self) -> tuple[Mechanism | Selected, ...]:
        """What it is to an accountant."""
        return whole(self.plan, self.noise_multipliers)

    def open_at(self, position: int) -> bool:
        """Whether an answer at a position, counted over all runs, may be given now."""
        most = math.inf if self.plan.selects else self.plan.total
        return max(self.sealed, default=-1) < position < most


@dataclass(kw_only=True)
class _State:
    """What the lines say, as far as they were read."""

    lifetime: Budget | None = None
    reservations: dict[str, Reservation] = field(default_factory=dict)
    count: int = 0
    last: str = _FIRST
    end: int = 0


class Ledger:
    """The ledger of one cohort. Several processes may use it at once.

    Args:
        path: The file; made when something is first reserved.
        lifetime: What may be spent on the cohort in all; fixed when the file is made, 6 at delta 1e-5 where not
            given.

    Raises:
        PrivacyError: If the file was changed, or says another lifetime budget.
        OutputError: If it cannot be written.
    """

    def __init__(self, path: Path, *, lifetime: Budget | None = None) -> None:
        self._path, self._head = path, files(path)[1]
        self._wanted = lifetime
        self._state = _State()
        if path.exists() or self._head.exists():
            with self._open() as file:
                self._read(file)
            self._check_lifetime()

    @property
    def lifetime(self) -> Budget:
        """What may be spent on the cohort in all."""
        return self._state.lifetime or self._wanted or LIFETIME

    def reservations(self) -> tuple[Reservation, ...]:
        """Everything reserved so far, oldest first."""
        self._refresh()
        return tuple(self._state.reservations.values())

    def find(self, identity: str) -> Reservation | None:
        """One reservation, if the ledger holds it."""
        self._refresh()
        return self._state.reservations.get(identity)

    def spent(self, *, seconds: float = PATIENCE) -> Bound | None:
        """Epsilon of everything reserved together, at the lifetime's delta; ``None`` if nothing is."""
        self._refresh()
        mechanisms = _mechanisms(self._state.reservations.values())
        return epsilon_of(mechanisms, self.lifetime.delta, seconds=seconds) if mechanisms else None

    def left(self, *, seconds: float = PATIENCE) -> float | None:
        """The largest epsilon, to 1 % and at the lifetime's delta, of one more release of unsampled queries.

        Args:
            seconds: Longest time for each accountant and evaluation.

        Returns:
            ``None`` where not even the smallest legal epsilon is left.
        """
        self._refresh()
        mechanisms, delta = _mechanisms(self._state.reservations.values()), self.lifetime.delta

        def fits(epsilon: float) -> bool:
            more = Mechanism(noise_multiplier=analytic_noise(epsilon, delta))
            try:
                found = epsilon_of((*mechanisms, more), delta, seconds=seconds).epsilon
            except PrivacyError:
                return False
            return found <= self.lifetime.epsilon * (1 + _ROUNDING)

        low, high = EPSILON_RANGE[0], self.lifetime.epsilon
        if fits(high):
            return high
        if not fits(low):
            return None
        while high > 1.01 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def reserve(self, reservation: Reservation, *, seconds: float = PATIENCE) -> None:
        """Write down a whole plan before its first answer, if the lifetime budget allows it.

        Args:
            reservation: The plan, with its noise.
            seconds: Longest time for each accountant.

        Raises:
            PrivacyError: If the lifetime budget would be exceeded; nothing is written then.
        """
        with self._open() as file:
            self._read(file)
            self._check_lifetime()
            self._check_room(reservation, seconds)
            if self._state.lifetime is None:
                self._append(file, {"entry": "opened", "lifetime": self.lifetime.to_json()})
            self._append(file, _reserved(reservation))

    def seal(self, identity: str, position: int, digest: str) -> None:
        """Write down the hash of an answer, before the answer is given.

        Args:
            identity: The reservation.
            position: Which query of its plan, counted from 0 and over all runs; the next one.
            digest: SHA-256 of the noisy answer.

        Raises:
            PrivacyError: If this is not the next query of the plan.
        """
        if not _DIGEST.fullmatch(digest):
            raise PrivacyError("Expected a SHA-256 in hexadecimal digits.")
        with self._open() as file:
            self._read(file, trust=True)
            found = self._state.reservations.get(identity)
            if found is None or not found.open_at(position):
                raise PrivacyError(
                    f"Query {position + 1} is not open: it is not in the plan that was reserved, or its answer "
                    "was drawn before. Nothing more may be asked."
                )
            entry = {"entry": "sealed", "reservation": identity, "position": position, "sha256": digest}
            self._append(file, entry)

    # -- the file ----------------------------------------------------------------------------------------------

    def _check_lifetime(self) -> None:
        found = self._state.lifetime
        if found is not None and self._wanted is not None and found != self._wanted:
            raise PrivacyError(
                f"The ledger was opened for epsilon {found.epsilon:g} at delta {found.delta:g} over the cohort's "
                f"lifetime, not {self._wanted.epsilon:g} at {self._wanted.delta:g}. It cannot be changed later."
            )

    def _check_room(self, wanted: Reservation, seconds: float) -> None:
        mechanisms = (*_mechanisms(self._state.reservations.values()), *wanted.mechanisms)
        try:
            found: float = epsilon_of(mechanisms, self.lifetime.delta, seconds=seconds).epsilon
            would = f"{found:.3g}"
        except PrivacyError:
            found, would = float("inf"), "more than 100"
        # A release that takes the whole lifetime budget may be a rounding error above it.
        if found > self.lifetime.epsilon * (1 + _ROUNDING):
            raise PrivacyError(
                f"The cohort's lifetime budget does not allow it: together with {len(self._state.reservations)} "
                f"earlier reservations epsilon would be {would}, and {self.lifetime.epsilon:g} is allowed at "
                f"delta {self.lifetime.delta:g}. Ask for a smaller epsilon, or use new patients."
            )

    def _refresh(self) -> None:
        if self._path.exists() or self._head.exists():
            with self._open() as file:
                self._read(file)

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """The file, locked against other processes."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else (error.strerror or "the operating system refused")
            raise OutputError(f"The ledger cannot be used: {what}. No answer was given.") from error

    def _read(self, file: IO[bytes], *, trust: bool = False) -> None:
        """Check the chain of lines; with ``trust`` only of those that came since the last look."""
        head = self._head_line()
        if not (trust and head == (self._state.count, self._state.last)):
            self._state = _State()
        state = self._state
        file.seek(state.end)
        content = file.read() or b""
        *lines, torn = content.split(b"\n")
        passed = (state.count, state.last) == (head or (0, _FIRST))
        for line in lines:
            self._take(line)
            passed = passed or (state.count, state.last) == head
        state.end += len(content) - len(torn)
        if not passed or (head is None and state.count > 1):
            raise _changed()
        if torn:  # never acknowledged: the head would know of it
            file.truncate(state.end)
        if head != (state.count, state.last) and state.count:  # a process ended between line and head
            self._keep_head()

    def _take(self, line: bytes) -> None:
        state = self._state
        try:
            entry = json.loads(line)
            if entry["number"] != state.count or entry["previous"] != state.last:
                raise ValueError
            self._enter(entry)
        except (ValueError, KeyError, TypeError, AttributeError, PrivacyError):
            raise _changed() from None
        state.count, state.last = state.count + 1, hashlib.sha256(line).hexdigest()

    def _enter(self, entry: dict[str, Any]) -> None:
        state = self._state
        kind = entry["entry"]
        if (kind == "opened") != (state.count == 0):
            raise ValueError
        if kind == "opened":
            if entry["schema_version"] != SCHEMA_VERSION:
                raise ValueError
            state.lifetime = Budget.from_json(entry["lifetime"])
        elif kind == "reserved":
            found = _reservation(entry)
            state.reservations[found.identity] = found
        elif kind == "sealed":
            sealed = state.reservations[entry["reservation"]].sealed
            assert isinstance(sealed, dict)
            sealed[int(entry["position"])] = str(entry["sha256"])
        else:
            raise ValueError

    def _append(self, file: IO[bytes], entry: dict[str, Any]) -> None:
        state = self._state
        full = {"schema_version": SCHEMA_VERSION, "number": state.count, "previous": state.last, **entry}
        line = json.dumps(full, sort_keys=True, allow_nan=False).encode()
        before = state.end
        try:
            written = 0
            while written < len(line) + 1:
                written += os.write(file.fileno(), (line + b"\n")[written:])
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
        self._take(line)
        state.end = before + len(line) + 1
        self._keep_head()

    def _head_line(self) -> tuple[int, str] | None:
        try:
            count, digest = self._head.read_text().split()
            return int(count), digest
        except FileNotFoundError:
            return None
        except ValueError:
            raise _changed() from None

    def _keep_head(self) -> None:
        partial = self._head.with_suffix(".partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(f"{self._state.count} {self._state.last}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._head)


def files(path: Path) -> tuple[Path, Path]:
    """A ledger's file and its head, which belong together."""
    return path, path.with_suffix(".head")


def _changed() -> PrivacyError:
    return PrivacyError(
        "The ledger was changed: a line was edited, removed or moved, or its head is missing. What was spent can "
        "no longer be known, so nothing more may be asked. Put back the ledger as it was written."
    )


def _mechanisms(reservations: Any) -> tuple[Mechanism | Selected, ...]:
    return tuple(one for reservation in reservations for one in reservation.mechanisms)


def _reserved(reservation: Reservation) -> dict[str, Any]:
    return {
        "entry": "reserved",
        "reservation": reservation.identity,
        "plan": reservation.plan.to_json(),
        "noise_multipliers": list(reservation.noise_multipliers),
        "budget": reservation.budget.to_json(),
        "recipe": reservation.recipe,
        "epsilon": reservation.epsilon,
        "accountants": list(reservation.accountants),
        "date": reservation.date,
    }


def _reservation(entry: dict[str, Any]) -> Reservation:
    return Reservation(
        identity=entry["reservation"],
        plan=PrivacyPlan.from_json(entry["plan"]),
        noise_multipliers=tuple(entry["noise_multipliers"]),
        budget=Budget.from_json(entry["budget"]),
        recipe=entry["recipe"],
        epsilon=entry["epsilon"],
        accountants=tuple(entry["accountants"]),
        date=entry.get("date", ""),
    )
