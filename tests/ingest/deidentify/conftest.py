"""What the tests of de-identification share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from medistill.ingest.decode import silence
from medistill.ingest.deidentify import Profile, default_profile
from medistill.ingest.identity import Pseudonymiser
from tests.ingest.conftest import KEY


@pytest.fixture(scope="session")
def secret() -> Pseudonymiser:
    return Pseudonymiser(KEY)


@pytest.fixture(scope="session")
def profile() -> Profile:
    return default_profile()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Planted files break rules on purpose, and pydicom would warn of each."""
    with silence():
        yield
