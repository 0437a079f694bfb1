"""The command line: one verb after the other, ``medistill VERB --help`` for each.

Exit codes: 0 done, 1 failed, 2 usage or input, 3 gate not passed, 130 interrupted.
"""

from __future__ import annotations

import sys

from medistill.cli import about, diagnose, distill, ingest, privacy, receive, whole
from medistill.cli.app import app
from medistill.cpu import prepare_cpu

__all__ = ["about", "app", "diagnose", "distill", "ingest", "main", "privacy", "receive", "whole"]

_ORDER = (whole, ingest, distill, receive, diagnose, about)
app.registered_commands.sort(key=lambda command: [m.__name__ for m in _ORDER].index(command.callback.__module__))


def main() -> None:
    """Entry point of ``medistill`` and ``python -m medistill``."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    prepare_cpu()
    app()
