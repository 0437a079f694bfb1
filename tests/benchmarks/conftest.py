"""The real cohort that several benchmarks measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill.config import load_config
from medistill.core.cohort import Cohort
from medistill.cpu import keep_freed_memory
from medistill.ingest import ingest
from medistill.ingest.splits import SplitFractions
from medistill.registry import SOURCES
from tests.conftest import REPOSITORY

#: Ingests PneumoniaMNIST as its configuration says, but for the settings given.
Ingested = Callable[..., Cohort]


@pytest.fixture(scope="module", autouse=True)
def nurseries() -> None:
    """Here reading processes are started as they are anywhere but in tests."""


@pytest.fixture(scope="module")
def pneumoniamnist(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    keep_freed_memory()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDISTILL_DATA", str(shared_data))
        config = load_config(REPOSITORY / "configs" / "pneumoniamnist.yaml")
    source = SOURCES.load(config.source.kind)(config.source.path)

    def ingested(**changed: Any) -> Cohort:
        out, how = tmp_path_factory.mktemp("pneumoniamnist") / "cohort", replace(config.ingest, **changed)
        return ingest(source, out, key=bytes(32), labels=config.source.labels, config=how)

    return ingested


@pytest.fixture(scope="module")
def cohort(pneumoniamnist: Ingested) -> Cohort:
    """Three quarters of the patients in train; the test split is the given one."""
    fractions = SplitFractions(train=0.75, validation=0.10, holdout=0.15, test=0.0)
    return pneumoniamnist(burned_in="allow", fractions=fractions)  # 28 px hold no legible text
