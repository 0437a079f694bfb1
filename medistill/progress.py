"""Progress shown to a person: a bar with time left, silent where nobody looks.

Algorithms receive a :class:`Progress` and call :meth:`Progress.track`; they never print.

Example:
    >>> list(Progress().track(range(3), "counting"))
    [0, 1, 2]
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

_SECONDS_A_LINE = 30.0

Item = TypeVar("Item")


class Progress:
    """Silent progress; the base of what the command line shows."""

    def track(
        self, items: Iterable[Item], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Item]:
        """Yield the items while showing how many are done.

        Args:
            items: What to iterate over.
            description: Short present participle, for example ``"distilling"``.
            total: Number of items in all, including those ``completed`` before an interruption.
            completed: Items done in an earlier run.
        """
        yield from items

    def note(self, **values: float) -> None:
        """Show current figures (a loss, an AUROC) beside the bar."""

    def say(self, message: str) -> None:
        """One line for the user; never holds a patient's value, a source path or a name."""


class TerminalProgress(Progress):
    """Progress bars on a terminal; single lines where the output is not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console  # noqa: PLC0415

        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._figures = ""
        self._values: dict[str, float] = {}
        self._bar: object | None = None

    def track(
        self, items: Iterable[Item], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Item]:
        """Yield the items under a bar with time left; nested calls show only the outermost bar."""
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        if total is None and isinstance(items, Sized):
            total = len(items)
        if self._bar is not None:
            yield from items
            return
        self._figures, self._values = "", {}
        if not self._console.is_terminal:
            yield from self._lines(items, description, total, completed)
            return
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        try:
            with RichProgress(*columns, console=self._console) as bar:
                self._bar = bar
                task = bar.add_task(description, total=total, completed=completed, figures="")
                for item in items:
                    yield item
                    bar.update(task, advance=1, figures=self._figures)
        finally:
            self._bar = None

    def _lines(self, items: Iterable[Item], description: str, total: int | None, completed: int) -> Iterator[Item]:
        """A line now and then, for a log file."""
        begun = said = time.monotonic()
        for number, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - said < _SECONDS_A_LINE:
                continue
            said = now
            done, left = completed + number, ""
            if total:
                left = f" of {total}, about {(now - begun) / number * (total - done):.0f} s left"
            self.say(f"{description}: {done}{left}  {self._figures}".rstrip())

    def note(self, **values: float) -> None:
        """Show current figures beside the bar."""
        self._values |= values
        self._figures = "  ".join(f"{name} {value:.4g}" for name, value in self._values.items())

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False, soft_wrap=True)
