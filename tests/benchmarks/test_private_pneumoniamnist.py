"""Figures of the private distiller on PneumoniaMNIST: patient-level, delta 1e-5, ten images per class.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_private_pneumoniamnist.py -s``; 15 minutes on one core.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medistill.config import load_config
from medistill.core.cohort import Cohort
from medistill.core.compute import fresh
from medistill.core.guarantee import Budget
from medistill.core.protocols import Synthetic, Workbench
from medistill.cpu import keep_freed_memory
from medistill.distill.surrogate import Surrogate
from medistill.ingest import ingest
from medistill.ingest.splits import SplitFractions
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import PrivateCurator
from medistill.privacy.ledger import Ledger
from medistill.registry import SOURCES
from medistill.training.fit import fit, predict
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.benchmark
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def cohort(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    keep_freed_memory()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDISTILL_DATA", str(shared_data))
        config = load_config(REPOSITORY / "configs" / "pneumoniamnist.yaml")
    source = SOURCES.load(config.source.kind)(config.source.path)
    fractions = SplitFractions(train=0.75, validation=0.10, holdout=0.15, test=0.0)
    how = replace(config.ingest, burned_in="allow", fractions=fractions)  # 28 px hold no legible text
    out = tmp_path_factory.mktemp("private_pneumoniamnist") / "cohort"
    return ingest(source, out, key=bytes(32), labels=config.source.labels, config=how)


def _auroc(cohort: Cohort, release: Synthetic, seed: int) -> float:
    test = cohort.split("test").images(28)
    network, schedule = fresh(ConvNet, test.task, (1, 28, 28), seed), release.schedule
    assert schedule is not None
    images, labels = release.images, release.soft_labels
    fit(network, images, labels, kind=test.task.kind, schedule=schedule, seed=seed, views=release.views)
    return float(roc_auc_score(test.classes, predict(network, test.images, kind=test.task.kind)[:, 1]))


@pytest.mark.parametrize(("epsilon", "wanted"), [(1.0, 0.915), (3.0, 0.925), (8.0, 0.93)])
def test_auroc_at_a_patient_level_epsilon(cohort: Cohort, tmp_path: Path, epsilon: float, wanted: float) -> None:
    train, distiller = cohort.split("train").images(28), Surrogate()
    found, seconds = [], []
    for seed in SEEDS:
        began = time.process_time()
        budget = Budget(epsilon=epsilon, delta=1e-5)
        curator = PrivateCurator(
            train,
            budget=budget,
            plan=distiller.plan(train.task, (1, 28, 28), 10),
            ledger=Ledger(tmp_path / f"{seed}.jsonl", lifetime=budget),
        )
        release = distiller.distill(curator, ipc=10, seed=seed, start=None, bench=Workbench())
        seconds.append(time.process_time() - began)
        found.append(np.mean([_auroc(cohort, release, 100 * (seed + 1) + student) for student in range(3)]))
        assert curator.statement().epsilon <= epsilon
    print(f"epsilon {epsilon:g}: AUROC {np.mean(found):.4f} {np.round(found, 4)}, CPU s {np.round(seconds)}")
    assert max(seconds) < 600
    assert np.mean(found) >= wanted
