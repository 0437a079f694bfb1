"""Figures on PneumoniaMNIST: distil from noise, train a fresh ConvNet, measure AUROC on the given test split.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_pneumoniamnist.py -s``; about 20 minutes on two cores.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medistill.config import load_config
from medistill.core.cohort import Cohort
from medistill.core.compute import fresh
from medistill.core.distilled import DistilledSet
from medistill.core.images import ImageSet
from medistill.cpu import keep_freed_memory
from medistill.distill import distill
from medistill.distill.start import random_images
from medistill.ingest import ingest
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
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
    out = tmp_path_factory.mktemp("pneumoniamnist") / "cohort"
    return ingest(source, out, key=bytes(32), labels=config.source.labels, config=config.ingest)


def _auroc(images: torch.Tensor, labels: torch.Tensor, release: DistilledSet, test: ImageSet, seed: int) -> float:
    network = fresh(ConvNet, test.task, (1, 28, 28), seed)
    fit(network, images, labels, kind=test.task.kind, schedule=release.schedule, seed=seed)
    return float(roc_auc_score(test.classes, predict(network, test.images, kind=test.task.kind)[:, 1]))


@pytest.mark.parametrize(("ipc", "wanted"), [(10, 0.935), (1, 0.87)])
def test_auroc_on_the_given_test_split(cohort: Cohort, ipc: int, wanted: float) -> None:
    train, test = cohort.split("train").images(28), cohort.split("test").images(28)
    validation = cohort.split("validation").images(28)
    distilled, random, seconds = [], [], []
    for seed in SEEDS:
        began = time.process_time()
        release = distill(OpenCurator(train), ipc=ipc, seed=seed, validation=validation).distilled
        seconds.append(time.process_time() - began)
        assert not release.recipe.starts_from_real
        real = random_images(train, ipc=ipc, seed=seed)
        for student in range(3):
            number = 100 * (seed + 1) + student
            distilled.append(_auroc(release.images, release.soft_labels, release, test, number))
            random.append(_auroc(real.images, real.targets, release, test, number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    per_seed = np.reshape(distilled, (len(SEEDS), 3)).mean(1)
    print(
        f"\nipc {ipc}: {len(train)} train images, test {len(test)}; AUROC distilled {np.mean(distilled):.4f} "
        f"(per seed {np.round(per_seed, 4).tolist()}), random real {np.mean(random):.4f}; "
        f"CPU s per distillation {np.round(seconds, 0).tolist()}; peak RSS {peak} MB"
    )
    assert np.mean(distilled) >= wanted
    assert max(seconds) <= 300
