"""What every registered distiller must do; a new one is picked up from the registry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill.core.distilled import Recipe, Schedule
from medistill.distill import distill, make_recipe, run_recipe, runner
from medistill.distill.runner import make_distiller
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from medistill.registry import DISTILLERS
from tests.conftest import blobs

#: Settings that make each distiller quick on the small made-up images.
QUICK: dict[str, dict[str, Any]] = {
    "coreset": {},
    "dataset_distillation": {"iterations": 8, "steps": 2, "epochs": 1, "batch_per_class": 4, "width": 8},
    "distribution_matching": {"iterations": 30, "networks": 3, "width": 8},
    "gradient_matching": {"iterations": 8, "outer": 2, "inner": 1, "batch_per_class": 4, "width": 8},
    "kernel_ridge": {"iterations": 8, "pool": 2, "uses": 2, "advance": 2, "max_age": 4, "width": 8},
    "soft_label": {"iterations": 8, "unroll": 2, "batch_per_class": 4, "width": 8},
    "sre2l": {"teacher": "convnet", "width": 8, "epochs": 2, "iterations": 10, "views": 4},
    "surrogate": {"iterations": 8, "made_up": 6, "drawing": 3, "dimension": 24, "width": 8},
    "trajectory_matching": {
        "iterations": 8,
        "experts": 2,
        "epochs": 2,
        "expert_span": 1,
        "student_steps": 2,
        "width": 8,
    },
}
for _settings in QUICK.values():
    if _settings:
        _settings["checkpoint_every"] = 3
NAMES = DISTILLERS.names()


class _Interrupt(Progress):
    """Stops after some steps, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self._left = after

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            yield item


class _CountSteps(Progress):
    def __init__(self) -> None:
        self.steps = 0

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for item in items:
            self.steps += 1
            yield item


def _quick(name: str) -> dict[str, dict[str, Any]]:
    return {name: QUICK[name]}


@pytest.mark.parametrize("name", NAMES)
def test_result_is_a_valid_release(name: str) -> None:
    data = blobs(patients=18, classes=3)
    distilled = distill(OpenCurator(data), method=name, ipc=2, settings=_quick(name)).distilled
    assert distilled.images.shape == (6, 1, 16, 16)
    assert distilled.hard_labels.tolist() == sorted(distilled.hard_labels.tolist())
    assert distilled.privacy.reason


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_other_seed_other_bits(name: str) -> None:
    data = blobs(patients=18)

    def images(seed: int) -> torch.Tensor:
        run = distill(OpenCurator(data), method=name, ipc=1, seed=seed, settings=_quick(name))
        return run.distilled.images

    first = images(1)
    assert torch.equal(first, images(1))
    assert not torch.equal(first, images(2))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "coreset"])
def test_interrupted_run_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    curator = OpenCurator(blobs(patients=18))
    recipe = make_recipe(curator.task, method=name, ipc=1, seed=3, settings=_quick(name))
    whole_steps, resumed_steps = _CountSteps(), _CountSteps()
    whole = run_recipe(recipe, curator, progress=whole_steps).distilled
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, curator, folder=tmp_path, progress=_Interrupt(whole_steps.steps - 5))
    resumed = run_recipe(recipe, curator, folder=tmp_path, progress=resumed_steps).distilled
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.soft_labels, resumed.soft_labels)
    assert resumed_steps.steps < whole_steps.steps


@pytest.mark.parametrize("name", NAMES)
def test_recipe_round_trips_and_rebuilds_the_distiller(name: str) -> None:
    recipe = make_recipe(blobs(patients=4).task, method=name, ipc=1, settings=_quick(name))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    step = again.steps[0]
    distiller: Any = make_distiller(step.distiller, step.settings)
    assert asdict(distiller) == dict(step.settings)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"coreset", "surrogate"}])
def test_noise_start_touches_no_real_pixel(name: str) -> None:
    recipe = make_recipe(blobs(patients=4).task, method=name, ipc=1)
    assert not recipe.starts_from_real
    real = make_recipe(blobs(patients=4).task, method=name, ipc=1, settings={name: {"init": "real"}})
    assert real.starts_from_real


@pytest.mark.parametrize("name", NAMES)
def test_unknown_setting_names_the_nearest(name: str) -> None:
    field = next(iter(QUICK[name]), "")
    with pytest.raises(ConfigError, match=f"Did you mean '{field}'" if field else "unknown"):
        make_distiller(name, {f"{field}x": 1})


def test_checkpoint_of_other_data_is_not_taken_up(tmp_path: Path) -> None:
    first, second = OpenCurator(blobs(patients=18, seed=0)), OpenCurator(blobs(patients=18, seed=1))
    recipe = make_recipe(first.task, method="soft_label", ipc=1, settings=_quick("soft_label"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, first, folder=tmp_path, progress=_Interrupt(5))
    clean = run_recipe(recipe, second).distilled
    assert torch.equal(run_recipe(recipe, second, folder=tmp_path).distilled.images, clean.images)


def test_schedule_is_chosen_on_validation_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(Schedule(epochs=epochs, learning_rate=0.01) for epochs in (2, 3, 5))
    monkeypatch.setattr(runner, "choose_schedule", partial(runner.choose_schedule, candidates=few))
    data, validation = blobs(patients=18), blobs(patients=4, seed=5, first=100)
    narrow = partial(ConvNet, width=8)
    made = distill(OpenCurator(data), method="coreset", ipc=1, validation=validation, network=narrow).distilled
    chosen = made.schedule
    assert chosen in few


def test_ipc_beyond_the_class_is_refused_by_name_of_the_class() -> None:
    with pytest.raises(DataError, match="class0"):
        distill(OpenCurator(blobs(patients=4)), method="coreset", ipc=50)
