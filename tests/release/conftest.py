"""Lets the tests of ``report`` and ``release`` share one set of made-up records."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
