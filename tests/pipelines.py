"""Pipelines by their command line, in this process: a new one would spend most of its time on importing torch."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "pipelines"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run_pipeline(name: str, *arguments: object) -> Done:
    """Run ``python pipelines/NAME.py ARGUMENTS``."""
    path, out, err, code = FOLDER / f"{name}.py", io.StringIO(), io.StringIO(), 0
    command = [str(path), *map(str, arguments)]
    plain = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
    with (
        patch("medistill.cpu.keep_freed_memory") as kept,  # this process is not the pipeline's own
        patch.object(sys, "argv", command),
        patch.dict(os.environ, plain),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    assert kept.called
    return Done(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
