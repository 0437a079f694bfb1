"""Requests worked on in processes of their own, their answers kept as one file each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medistill.errors import MedistillError
from medistill.progress import Progress
from medistill.studies.records import keep_record

_CHILD = "from medistill.cpu import prepare_cpu; prepare_cpu(); from medistill.studies.cell import main; main()"
#: How a process ends that was stopped, by a key or by us; that is no answer.
_STOPPED = (-2, -15)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs requests in processes and keeps their answers.

    Args:
        out: Folder of the answers.
        jobs: Processes at a time.
        retry: Whether an answer that says FAILED is asked for again.
        progress: Shows how many are done.
    """

    out: Path
    jobs: int
    retry: bool
    progress: Progress

    def is_finished(self, kind: str, name: str) -> bool:
        """Whether an answer is there that counts."""
        if not self._path(kind, name).exists():
            return False
        return not self.retry or self.answer(kind, name)["status"] == "done"

    def answer(self, kind: str, name: str) -> dict[str, Any]:
        """A kept answer."""
        found: dict[str, Any] = json.loads(self._path(kind, name).read_text(encoding="utf-8"))
        return found

    def fail(self, kind: str, name: str, error: str) -> None:
        """Keep the answer that this cannot be done."""
        keep_record(self._path(kind, name), {"status": "failed", "error": error})

    def run(self, kind: str, requests: Mapping[str, Mapping[str, Any]], what: str, total: int = 0) -> None:
        """Run what has no answer yet, ``jobs`` at a time, under a bar."""
        todo = {name: request for name, request in requests.items() if not self.is_finished(kind, name)}
        total = total or len(requests)
        finished = self._finished(kind, todo)
        for name in self.progress.track(finished, what, total=total, completed=total - len(todo)):
            if not self._path(kind, name).exists():
                raise MedistillError("A process of the comparison was stopped. Run the same command again.")
            answer = self.answer(kind, name)
            if answer["status"] != "done":
                self.progress.say(f"FAILED {name}: {answer['error']}")

    def _finished(self, kind: str, todo: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        running: list[subprocess.Popen[str]] = []
        with ThreadPoolExecutor(max_workers=max(1, self.jobs)) as pool:
            waiting = {
                pool.submit(self._one, kind, name, request, running): name for name, request in todo.items()
            }
            try:
                for done in as_completed(waiting):
                    done.result()
                    yield waiting[done]
            finally:
                for future in waiting:
                    future.cancel()
                for process in list(running):
                    process.terminate()

    def _one(self, kind: str, name: str, request: Mapping[str, Any], running: list[subprocess.Popen[str]]) -> None:
        target = self._path(kind, name)
        asked = target.with_suffix(".request")
        keep_record(asked, request)
        target.unlink(missing_ok=True)
        command = [sys.executable, "-c", _CHILD, str(asked), str(target)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that CPU seconds are comparable
        process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        _, trouble = process.communicate()
        running.remove(process)
        asked.unlink(missing_ok=True)
        if not target.exists() and process.returncode not in _STOPPED:
            last = (trouble.strip().splitlines() or [""])[-1].split(":")[0]
            self.fail(kind, name, f"The process ended with code {process.returncode}. {last}".strip())

    def _path(self, kind: str, name: str) -> Path:
        return self.out / kind / f"{name}.json"
