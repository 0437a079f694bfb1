"""Images distilled with a ConvNet must train other networks: PneumoniaMNIST, 10 images per class.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_cross_architecture.py -s``; 15 minutes on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medistill.core.compute import fresh
from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic
from medistill.distill import distill
from medistill.distill.schedule import CANDIDATES, choose_schedule
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.training.fit import fit, predict
from tests.benchmarks.conftest import Ingested

pytestmark = pytest.mark.benchmark
SEEDS = (0, 1, 2)
OTHERS = ("alexnet", "lenet", "resnet", "vit")
MOST_LOST = 0.03
#: What is tried where a network's own schedule is chosen on validation patients.
TRIED = (
    *CANDIDATES,
    *(Schedule(epochs=n, learning_rate=rate, optimizer="adam") for n in (100, 300) for rate in (1e-3, 3e-4)),
)


@dataclass(frozen=True, kw_only=True)
class _Made:
    release: DistilledSet
    validation: ImageSet
    test: ImageSet
    convnet: float


@pytest.fixture(scope="module")
def made(pneumoniamnist: Ingested) -> _Made:
    cohort = pneumoniamnist()
    train, validation, test = (cohort.split(name).images(28) for name in ("train", "validation", "test"))
    release = distill(OpenCurator(train), ipc=10, validation=validation).distilled
    aurocs = _aurocs("convnet", release, release.schedule, test)
    print(f"\nconvnet by {release.schedule}: {np.mean(aurocs):.4f} {np.round(aurocs, 4).tolist()}")
    return _Made(release=release, validation=validation, test=test, convnet=float(np.mean(aurocs)))


def _aurocs(name: str, release: DistilledSet, schedule: Schedule, test: ImageSet) -> list[float]:
    found = []
    for seed in SEEDS:
        network = fresh(NETWORKS.load(name), test.task, (1, 28, 28), 100 + seed)
        images, labels, kind = release.images, release.soft_labels, test.task.kind
        fit(network, images, labels, kind=kind, schedule=schedule, seed=seed, views=release.views)
        found.append(float(roc_auc_score(test.classes, predict(network, test.images, kind=test.task.kind)[:, 1])))
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_lose_little(made: _Made, name: str) -> None:
    release = made.release
    synthetic = Synthetic(
        images=release.images,
        soft_labels=release.soft_labels,
        hard_labels=release.hard_labels,
        views=release.views,
    )
    ranked = choose_schedule(
        synthetic,
        made.validation,
        network=NETWORKS.load(name),
        seed=0,
        candidates=TRIED,
        progress=Progress(),
    )
    schedules = {"the release's schedule": release.schedule, "its own schedule": ranked[0].schedule}
    lost = {}
    for what, schedule in schedules.items():
        aurocs = _aurocs(name, release, schedule, made.test)
        lost[what] = made.convnet - float(np.mean(aurocs))
        print(
            f"{name} by {what}, {schedule.optimizer} {schedule.learning_rate:g} x {schedule.epochs}: "
            f"{np.mean(aurocs):.4f} {np.round(aurocs, 4).tolist()}, {lost[what]:+.4f} lost"
        )
    assert lost["its own schedule"] <= MOST_LOST
