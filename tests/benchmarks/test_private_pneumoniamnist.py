"""Figures of the private distiller on PneumoniaMNIST: patient-level, delta 1e-5, ten images per class.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_private_pneumoniamnist.py -s``; 35 minutes on one core.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medistill.core.cohort import Cohort
from medistill.core.compute import fresh
from medistill.core.guarantee import Budget
from medistill.core.protocols import Synthetic, Workbench
from medistill.distill.surrogate import Surrogate
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import PrivateCurator
from medistill.privacy.ledger import Ledger
from medistill.training.fit import fit, predict

pytestmark = pytest.mark.benchmark
SEEDS = (0, 1, 2)


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
