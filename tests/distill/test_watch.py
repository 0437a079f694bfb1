"""Looking at the images as they form, and stopping early on validation patients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.distilled import Schedule
from medistill.core.protocols import Synthetic, Workbench
from medistill.distill import distill, runner, watch
from medistill.distill.watch import Look, ValidationWatch
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from tests.conftest import blobs
from tests.contracts.test_distillers import QUICK


class _Kept:
    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.state

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)


def _numbered(step: int) -> Synthetic:
    labels = torch.eye(2)
    return Synthetic(
        images=torch.full((2, 1, 4, 4), step / 1000), soft_labels=labels, hard_labels=labels.argmax(1)
    )


def _watch(kept: _Kept, patience: int, seen: list[Look] | None = None) -> ValidationWatch:
    return ValidationWatch(
        distiller="made_up",
        validation=blobs(patients=6),
        network=ConvNet,
        seed=0,
        looks=10,
        patience=patience,
        compute=Compute(),
        kept=kept,
        progress=Progress(),
        observer=None if seen is None else seen.append,
    )


def _aurocs(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    def auroc(self: Any, synthetic: Synthetic) -> float:
        return values[round(float(synthetic.images[0, 0, 0, 0]) * 1000)]

    monkeypatch.setattr(watch.ValidationWatch, "_auroc", auroc)


def test_it_looks_at_equal_distances_and_after_the_last_step() -> None:
    seen: list[Look] = []
    looking = _watch(_Kept(), 0, seen)
    looking.validation = None
    for step in range(1, 38):
        assert not looking(step, 37, lambda step=step: _numbered(step))
    assert [look.step for look in seen] == [4, 8, 12, 15, 19, 23, 26, 30, 34, 37]
    assert all(look.validation_auroc is None for look in seen)


def test_patience_stops_and_gives_the_best_look_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _aurocs(monkeypatch, {10: 0.6, 20: 0.8, 30: 0.7, 40: 0.79, 50: 0.9})
    looking, stopped_at = _watch(_Kept(), 2), 0
    for step in range(1, 101):
        if looking(step, 100, lambda step=step: _numbered(step)):
            stopped_at = step
            break
    assert stopped_at == 40
    assert torch.equal(looking.best(_numbered(40)).images, _numbered(20).images)


def test_an_interrupted_watch_goes_on_from_what_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _aurocs(monkeypatch, {10: 0.6, 20: 0.8, 30: 0.7, 40: 0.79})
    kept = _Kept()
    first = _watch(kept, 2)
    for step in range(1, 35):
        assert not first(step, 100, lambda step=step: _numbered(step))
    second = _watch(kept, 2)
    assert not second(30, 100, lambda: _numbered(30))  # a step done again after the last checkpoint counts once
    assert second(40, 100, lambda: _numbered(40))
    assert torch.equal(_watch(kept, 2).best(_numbered(40)).images, _numbered(20).images)


def test_without_patience_the_last_images_are_the_result() -> None:
    looking = _watch(_Kept(), 0)
    assert looking.best(_numbered(7)).images[0, 0, 0, 0] == pytest.approx(0.007)


def test_the_bench_ends_the_loop_when_the_watch_says_so() -> None:
    bench = Workbench(watch=lambda step, steps, current: step == 5)
    done = list(bench.steps(2, 100, "made up", every=10, state=lambda step: {}, current=lambda: _numbered(0)))
    assert done == [2, 3, 4]


def test_looking_changes_no_bit_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (Schedule(epochs=2, learning_rate=0.01),)
    monkeypatch.setattr(runner, "choose_schedule", partial(runner.choose_schedule, candidates=few))
    data, validation, seen = blobs(patients=18), blobs(patients=4, seed=5, first=100), []
    settings = {"distribution_matching": QUICK["distribution_matching"]}
    method = "distribution_matching"
    looked = distill(
        OpenCurator(data),
        method=method,
        ipc=1,
        settings=settings,
        validation=validation,
        network=partial(ConvNet, width=8),
        observer=seen.append,
    )
    blind = distill(OpenCurator(data), method=method, ipc=1, settings=settings)
    assert torch.equal(looked.distilled.images, blind.distilled.images)
    assert [look.step for look in seen] == [6, 12, 18, 24, 30]
    assert all(look.validation_auroc is not None and 0 <= look.validation_auroc <= 1 for look in seen)
