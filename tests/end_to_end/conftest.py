"""Whole runs, with nothing in the place of anything but the length of trainings."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def nurseries() -> None:
    """Here reading processes are started as they are anywhere but in tests."""
