"""Repeat and select: which run is kept, by what score, and that the others leave no trace in the release."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import Compute
from medistill.core.distilled import Recipe, Schedule
from medistill.core.guarantee import Budget
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.distill import Distillation, Prospect, distill_privately, foresee, surrogate
from medistill.distill import repeat_and_select as selecting
from medistill.distill.repeat_and_select import closeness, fingerprint_of, repeat_and_select
from medistill.distill.watch import Look
from medistill.errors import ConfigError, DataError, PrivacyError
from medistill.privacy import Ledger, PrivateCurator
from medistill.privacy import curator as curators
from tests.conftest import blobs

EPSILON = 20.0
TASK = Task.single_label(("normal", "ill"))
SHAPE = (1, 16, 16)
QUICK = {"iterations": 4, "made_up": 6, "drawing": 2, "dimension": 24, "width": 8, "checkpoint_every": 2}
SHORT = Schedule(epochs=8, learning_rate=0.01)


@pytest.fixture(autouse=True)
def short_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "SCHEDULE", SHORT)


def parts() -> tuple[ImageSet, ImageSet]:
    train, validation = blobs(60, seed=1), blobs(40, seed=2, first=1000)
    return replace(train, task=TASK), replace(validation, task=TASK)


def prospect(*candidates: dict[str, Any], runs: float = 3.0) -> Prospect:
    each = [{"surrogate": settings} for settings in candidates]
    settings = {"surrogate": QUICK}
    return foresee(TASK, SHAPE, epsilon=EPSILON, ipc=1, settings=settings, expected_runs=runs, candidates=each)


def ledger(folder: Path) -> Ledger:
    return Ledger(folder / "ledger.jsonl", lifetime=Budget(epsilon=50.0, delta=1e-5))


def of_runs(monkeypatch: pytest.MonkeyPatch, *runs: tuple[int, int]) -> None:
    """Let these be the runs that are drawn."""
    again = itertools.cycle([True] * (len(runs) - 1) + [False])
    monkeypatch.setattr(curators, "another_run", lambda *_, **__: next(again))
    ends = iter([number for run in runs for number in run])
    monkeypatch.setattr(curators, "drawn", lambda *_, **__: next(ends))


def select(seen: Prospect, where: Path, **more: Any) -> Distillation:
    train, validation = parts()
    return distill_privately(
        train, seen, ledger=ledger(where), sealed=where / "sealed", validation=validation, **more
    )


# -- the score --------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Predicts by the first two pixels of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return 4 * images.flatten(1)[:, :2]


@pytest.mark.parametrize("multilabel", [False, True])
def test_closeness_is_one_half_less_half_the_brier_score(multilabel: bool) -> None:
    task = Task.multilabel(("mass", "effusion")) if multilabel else TASK
    images = torch.rand((9, *SHAPE), generator=torch.Generator().manual_seed(0))
    targets = torch.eye(2)[torch.arange(9) % 2] if not multilabel else torch.tensor([[1.0, 1.0]] * 9)
    rows = closeness(Fixed(), images, targets, task=task, compute=Compute())
    for row, image, target in zip(rows, images, targets, strict=True):
        a, b = (4 * image.flatten()[:2]).tolist()
        if multilabel:
            found = [1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))]
            expected = [0.5 - sum((p - y) ** 2 for p, y in zip(found, target.tolist(), strict=True)) / 2, 0.25]
        else:
            p = math.exp(a) / (math.exp(a) + math.exp(b))
            missed = (1 - p) ** 2 if target[0] else p**2
            pair = [0.5 - missed, 0.25]
            expected = [*pair, 0.0, 0.0] if target[0] else [0.0, 0.0, *pair]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(rows.norm(dim=1).max()) <= math.sqrt(5 / 16) + 1e-9


def test_the_score_is_the_mean_over_classes_and_noise_does_not_shift_it(tmp_path: Path) -> None:
    """Against a naive loop, with the noise switched off."""
    train, validation = parts()
    validation = validation.select([i for i in range(len(validation)) if i % 5 or validation.targets[i, 0] > 0.5])
    seen = prospect()
    own = PrivateCurator(
        train,
        budget=seen.budget,
        plan=seen.plan,
        ledger=ledger(tmp_path),
        store=tmp_path / "sealed",
        _entropy=lambda count: b"\xff" * count,
    )
    made = selecting.run_recipe(seen.recipe, own, looks=0).distilled
    kept: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting, "closeness", lambda network, *rest, **more: _noted(kept, network, *rest, **more))
        score = selecting.noisy_score(own, made, validation, Compute())
    rows = closeness(kept[0], validation.images, validation.targets, task=TASK, compute=Compute())
    by_patient: dict[str, list[Tensor]] = {}
    for row, patient in zip(rows, validation.patients, strict=True):
        by_patient.setdefault(patient, []).append(row)
    total = torch.stack([torch.stack(own).mean(0) for own in by_patient.values()]).sum(0).view(2, 2)
    assert score == pytest.approx(float((total[:, 0] / (4 * total[:, 1])).mean()), abs=1e-5)


def _noted(kept: list[nn.Module], network: nn.Module, *rest: Any, **more: Any) -> Tensor:
    kept.append(network)
    return closeness(network, *rest, **more)


# -- the runs ---------------------------------------------------------------------------------------------------


def scored(monkeypatch: pytest.MonkeyPatch, score: Callable[[Recipe], float]) -> list[Recipe]:
    """Let a score be a function of the recipe, still asking for the noisy one."""
    asked: list[Recipe] = []
    true = selecting.noisy_score

    def of_recipe(curator: PrivateCurator, distilled: Any, *rest: Any) -> float:
        true(curator, distilled, *rest)
        asked.append(distilled.recipe)
        return score(distilled.recipe)

    monkeypatch.setattr(selecting, "noisy_score", of_recipe)
    return asked


def test_the_run_with_the_best_score_is_kept_and_the_others_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, looks = prospect({"sharpness": 1.0}, {"sharpness": 4.0}), list[Look]()
    of_runs(monkeypatch, (0, 11), (1, 22), (1, 33))
    asked = scored(monkeypatch, lambda recipe: -abs(recipe.seed - 21))
    done = select(seen, tmp_path, looks=2, observer=looks.append)
    made = done.distilled
    assert torch.equal(done.snapshots["surrogate"], made.images)
    assert [recipe.seed for recipe in asked] == [11, 22, 33]
    assert [recipe.steps[0].settings["sharpness"] for recipe in asked] == [1.0, 4.0, 4.0]
    assert made.recipe == asked[1]
    assert [look.step for look in looks] == [2, 4]  # of one run, though three were looked at
    assert torch.equal(looks[-1].pictures.flatten(1)[0], (made.images[0].flatten() * 255).round().to(torch.uint8))
    assert made.privacy.epsilon == pytest.approx(EPSILON, rel=1e-3)
    assert "3 on average" in made.privacy.event[-1]
    (reservation,) = ledger(tmp_path).reservations()
    assert reservation.recipe == fingerprint_of(seen.candidates)
    assert sorted(reservation.sealed) == list(range(9))


def test_a_good_candidate_is_found_by_the_noisy_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students of labels without content cannot win where noise is small."""
    monkeypatch.setattr(surrogate, "SCHEDULE", replace(SHORT, epochs=60))
    seen = prospect({"sharpness": 1e-4}, {"sharpness": 4.0})
    of_runs(monkeypatch, (0, 1), (1, 2), (0, 3), (0, 4))
    assert select(seen, tmp_path).distilled.recipe.steps[0].settings["sharpness"] == 4.0


def test_an_interrupted_selection_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = prospect()
    of_runs(monkeypatch, (0, 11), (0, 22), (0, 33))
    true, left = selecting.noisy_score, [2]

    def stopping(*arguments: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(selecting, "noisy_score", stopping)
        with pytest.raises(KeyboardInterrupt):
            select(seen, tmp_path, folder=tmp_path / "checkpoints")
    (begun,) = ledger(tmp_path).reservations()
    assert sorted(begun.sealed) == [0, 1, 2, 3, 4, 5, 6, 7]
    first = select(seen, tmp_path, folder=tmp_path / "checkpoints").distilled
    again = select(seen, tmp_path, folder=tmp_path / "checkpoints").distilled
    assert first.fingerprint() == again.fingerprint()
    (done,) = ledger(tmp_path).reservations()
    assert done.identity == begun.identity
    assert begun.sealed.items() <= done.sealed.items()
    assert sorted(done.sealed) == list(range(9))


def failing(monkeypatch: pytest.MonkeyPatch, seeds: set[int]) -> None:
    true = selecting.run_recipe

    def run(recipe: Recipe, *arguments: Any, **more: Any) -> Distillation:
        made = true(recipe, *arguments, **more)  # so that answers are sealed
        if recipe.seed in seeds:
            raise DataError("Class 'ill' has no patient.")
        return made

    monkeypatch.setattr(selecting, "run_recipe", run)


def test_a_run_whose_noise_hides_a_class_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_runs(monkeypatch, (0, 1), (0, 2), (0, 3))
    failing(monkeypatch, {1, 3})
    made = select(prospect(), tmp_path).distilled
    assert made.recipe.seed == 2
    assert select(prospect(), tmp_path).distilled.fingerprint() == made.fingerprint()  # also when it goes on
    (reservation,) = ledger(tmp_path).reservations()
    assert sorted(reservation.sealed) == [0, 1, 3, 4, 5, 6, 7]


def test_if_the_noise_hides_a_class_in_every_run_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_runs(monkeypatch, (0, 1), (0, 2))
    failing(monkeypatch, {1, 2})
    with pytest.raises(DataError, match="no patient"):
        select(prospect(), tmp_path)


def test_nothing_of_validation_patients_reaches_the_release_but_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same scores, other validation patients give the same release to the last bit."""
    train, validation = parts()
    seen, made = prospect(), []
    entropy = functools.partial(_same_bytes, itertools.count)
    for number, other in enumerate((validation, replace(validation, images=1 - validation.images))):
        of_runs(monkeypatch, (0, 5), (0, 6))
        scored(monkeypatch, lambda recipe: recipe.seed)
        folder = tmp_path / str(number)
        result = repeat_and_select(
            train,
            other,
            seen.candidates,
            sealed=folder / "sealed",
            budget=seen.budget,
            plan=seen.plan,
            ledger=ledger(folder),
            looks=0,
            _entropy=entropy(),
        )
        made.append(result.distilled.fingerprint())
        monkeypatch.undo()
        monkeypatch.setattr(surrogate, "SCHEDULE", SHORT)
    assert made[0] == made[1]


def _same_bytes(counter: Callable[[], Iterator[int]]) -> Callable[[int], bytes]:
    numbers = counter()
    return lambda count: hashlib.shake_256(str(next(numbers)).encode()).digest(count)


# -- what is refused --------------------------------------------------------------------------------------------


def test_candidates_that_ask_something_else_are_refused() -> None:
    each = [{"gradient_matching": {"iterations": n}} for n in (3, 4)]
    with pytest.raises(PrivacyError, match=r"do not ask the same"):
        foresee(TASK, SHAPE, epsilon=3.0, method="gradient_matching", expected_runs=2.0, candidates=each)


def test_a_method_that_samples_patients_is_refused() -> None:
    with pytest.raises(PrivacyError, match="sampled"):
        foresee(TASK, SHAPE, epsilon=3.0, method="gradient_matching", expected_runs=2.0)


def test_candidates_without_repeated_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 1"):
        prospect({"sharpness": 1.0}, runs=1.0)


def test_nobody_to_judge_by_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    train, _ = parts()
    with pytest.raises(PrivacyError, match="pass both"):
        distill_privately(train, prospect(), ledger=ledger(tmp_path), sealed=tmp_path / "sealed")
    with pytest.raises(PrivacyError, match="among those distilled from"):
        distill_privately(train, prospect(), ledger=ledger(tmp_path), sealed=tmp_path / "sealed", validation=train)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_student_that_diverged_has_the_lowest_score() -> None:
    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] * math.nan

    images, targets = torch.rand(4, *SHAPE), torch.eye(2)[torch.arange(4) % 2]
    rows = closeness(Diverged(), images, targets, task=TASK, compute=Compute())
    assert rows.view(4, 2, 2)[:, :, 0].sum(1).tolist() == [-0.5] * 4


def test_what_is_foreseen_tells_what_selecting_takes_as_public() -> None:
    plain, choosing = prospect(runs=1.0), prospect({"sharpness": 1.0}, {"sharpness": 4.0})
    assert choosing.calibrated.noise_multipliers[0] > plain.calibrated.noise_multipliers[0]
    assert plain.candidates == ()
    assert len(choosing.candidates) == 2
    assert any("nothing is chosen on validation patients." in one for one in plain.assumptions)
    assert any("best noisy score" in one for one in choosing.assumptions)
    assert any("number of runs" in one for one in choosing.assumptions)
