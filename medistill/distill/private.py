"""Distilling under a privacy budget: what will be asked, with how much noise, what to expect; then doing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.distilled import Recipe
from medistill.core.guarantee import Budget, PrivacyPlan
from medistill.core.images import ImageSet
from medistill.core.protocols import Embed
from medistill.core.task import Task
from medistill.distill.moments import ask_moments, moments_plan
from medistill.distill.public_features import pink_noise
from medistill.distill.repeat_and_select import repeat_and_select
from medistill.distill.runner import (
    LOOKS,
    Distillation,
    make_distiller,
    make_recipe,
    resolve_method,
    run_recipe,
)
from medistill.distill.watch import Observer
from medistill.errors import ConfigError, DataError, PrivacyError
from medistill.privacy.accounting import epsilon_of
from medistill.privacy.calibration import Calibrated, calibrate, mechanisms_of
from medistill.privacy.curator import OpenCurator, PrivateCurator, assumed
from medistill.privacy.ledger import Ledger
from medistill.progress import Progress

#: Test AUROC of a ConvNet trained on a private release of PneumoniaMNIST (10 images per class, delta 1e-5): by
#: method, then epsilon, the lowest and the highest of the seeds measured.
MEASURED: Mapping[str, Mapping[float, tuple[float, float]]] = {
    "surrogate": {0.5: (0.915, 0.932), 1.0: (0.925, 0.934), 3.0: (0.925, 0.939), 8.0: (0.926, 0.934)},
}
_FEWEST = 100
_BEYOND = (
    "The guarantee is about the images, their labels and the recipe. Counts of patients, and the figures of an "
    "audit and an evaluation that stand beside them, are computed on the patients themselves and are not covered."
)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the noise will do to what is asked.

    Args:
        noise_to_signal: Length of the noise on a class sum over the largest length of that sum; ``inf`` where the
            classes cannot be seen through the noise.
        features: Features that stay below the limit of noise to signal, and are used.
    """

    noise_to_signal: float
    features: int


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """A private distillation that was not begun: what it will ask, and with how much noise.

    Args:
        recipe: What will be run; the first of the candidates, where the best of several runs is kept.
        why: Why this method, one sentence.
        task: What is diagnosed.
        image_shape: Shape of one image.
        budget: What may be spent.
        plan: Everything that will be asked.
        calibrated: Noise of every query, and the epsilon of all of them together.
        candidates: Recipes of which every run draws one, where the best of several runs is kept.
    """

    recipe: Recipe
    why: str
    task: Task
    image_shape: tuple[int, ...]
    budget: Budget
    plan: PrivacyPlan
    calibrated: Calibrated
    candidates: tuple[Recipe, ...] = ()

    def epsilons(self) -> tuple[float, ...]:
        """Epsilon of each entry of the plan on its own, at the budget's delta; they do not add up."""
        mechanisms = mechanisms_of(self.plan, self.calibrated.noise_multipliers)
        return tuple(epsilon_of((mechanism,), self.budget.delta).epsilon for mechanism in mechanisms)

    def expect(self, patients: int) -> Expectation | None:
        """What the noise will do if there are so many patients, as many of every class.

        Found by asking the method's own questions about made-up images; ``None`` for a method that asks others.

        Args:
            patients: An assumed number.
        """
        if self.plan.queries != moments_plan().queries:
            return None
        dimension = int(self.recipe.steps[0].settings["dimension"])
        try:
            found = ask_moments(_Rehearsal(self, patients), dimension=dimension, compute=Compute())
        except DataError:
            return Expectation(noise_to_signal=math.inf, features=0)
        return Expectation(noise_to_signal=found.signal, features=len(found.centre))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Everything that is taken as public or trusted."""
        return assumed(self.plan)

    @property
    def utility(self) -> str:
        """What students reached on other data with this method and about this epsilon, one sentence."""
        measured = MEASURED.get(self.recipe.method, {})
        if not measured:
            return f"Not known: {self.recipe.method} was not measured under differential privacy."
        nearest = min(measured, key=lambda epsilon: abs(math.log(epsilon / self.budget.epsilon)))
        low, high = measured[nearest]
        single = " The figures are of single runs, which have less noise." if self.plan.selects else ""
        return (
            f"On PneumoniaMNIST (10 images per class) students reached a test AUROC of {low:.3f} "
            f"to {high:.3f} at epsilon {nearest:g} and delta 1e-05. Fewer patients, rarer classes or subtler "
            f"findings give less.{single}"
        )


class _Rehearsal(OpenCurator):
    """Answers as a curator of made-up patients would, as many of every class, and says what the noise will be."""

    def __init__(self, prospect: Prospect, patients: int) -> None:
        task = prospect.task
        super().__init__(
            ImageSet(
                images=pink_noise(task.n_classes, prospect.image_shape, seed=0),
                targets=torch.eye(task.n_classes),
                patients=tuple(map(str, range(task.n_classes))),
                task=task,
            )
        )
        self._each, self._noise = patients / task.n_classes, prospect.calibrated.noise_multipliers

    def sum(self, embed: Embed, *, clip_norm: float = math.inf, sampling_rate: float = 1.0) -> Tensor:
        return super().sum(embed) * self._each

    def noise(self, position: int) -> float:
        return self._noise[position]


def most_patients(patients: int) -> int:
    """What is taken as public of a number of patients: the power of ten, at least 100, that it does not exceed."""
    return max(_FEWEST, int(10 ** len(str(max(patients - 1, 1)))))


def automatic_delta(patients: int) -> float:
    """1e-5, or less where a tenth of one over the public bound on the number of patients is less."""
    return min(1e-5, 1 / (10 * most_patients(patients)))


def foresee(
    task: Task,
    image_shape: tuple[int, ...],
    *,
    epsilon: float,
    delta: float | None = None,
    patients: int = _FEWEST,
    method: str = "auto",
    ipc: int = 10,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    expected_runs: float = 1.0,
    candidates: Sequence[Mapping[str, Mapping[str, Any]]] = (),
) -> Prospect:
    """Everything that can be known of a private distillation before a patient is touched.

    Args:
        task: What is diagnosed.
        image_shape: Shape of one image, ``(c, h, w)`` or ``(c, d, h, w)``.
        epsilon: What may be spent.
        delta: With it; chosen by the number of patients where not given.
        patients: Of this number only the next power of ten is used, which is taken as public.
        method: ``"auto"`` or the name of a distiller.
        ipc: Images per class.
        seed: Public seed.
        settings: Per distiller, settings that differ from the defaults.
        expected_runs: Above 1, a random number of runs is made, so many on average, and the one with the best
            noisy score on validation patients is kept; they pay for it in noise, not in epsilon.
        candidates: With it, settings of which every run draws one; beside ``settings``.

    Raises:
        PrivacyError: If the method needs patients' images themselves or samples them for one of several runs, the
            candidates do not ask the same, or the budget is out of range.
        ConfigError: If a name or setting is unknown.

    Example:
        >>> task = Task.single_label(("normal", "ill"))
        >>> foresee(task, (1, 64, 64), epsilon=3.0).recipe.method
        'surrogate'
    """
    chosen = resolve_method(method, task, ipc, image_shape=image_shape, private=True)
    if candidates and expected_runs <= 1:
        raise ConfigError(
            "Candidates are drawn by repeated runs: expected_runs (--expected-runs) must be above 1."
        )
    how: dict[str, Any] = {"method": method, "ipc": ipc, "seed": seed, "image_shape": image_shape, "private": True}
    recipes = [make_recipe(task, settings=_beside(settings, each), **how) for each in candidates or ({},)]
    plan, *others = (plan_of(recipe, task, image_shape) for recipe in recipes)
    if any(other != plan for other in others):
        raise PrivacyError(
            "The candidates do not ask the same of the patients, so no run could take the place of another. "
            "Leave out settings that change the questions or their number."
        )
    plan = replace(plan, expected_runs=expected_runs)
    assumptions = [_BEYOND]
    if delta is None:
        delta, most = automatic_delta(patients), most_patients(patients)
        assumptions.append(f"It is public that there are at most {most} patients; delta follows from that.")
    budget = Budget(epsilon=epsilon, delta=delta)
    return Prospect(
        recipe=recipes[0],
        why=chosen.why,
        task=task,
        image_shape=image_shape,
        budget=budget,
        plan=replace(plan, assumptions=(*plan.assumptions, *assumptions)),
        calibrated=calibrate(budget, plan),
        candidates=tuple(recipes) if plan.selects else (),
    )


def _beside(
    settings: Mapping[str, Mapping[str, Any]] | None, more: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Settings with others beside them, by distiller."""
    settings = settings or {}
    return {name: {**settings.get(name, {}), **more.get(name, {})} for name in {**settings, **more}}


def plan_of(recipe: Recipe, task: Task, image_shape: tuple[int, ...]) -> PrivacyPlan:
    """Everything a recipe will ask.

    Raises:
        PrivacyError: If it needs patients' images themselves, or has several steps.
    """
    plans = [
        make_distiller(step.distiller, step.settings).plan(task, image_shape, recipe.ipc) for step in recipe.steps
    ]
    if len(plans) > 1:
        raise PrivacyError(
            f"Under differential privacy a method is one distiller, got {recipe.method}. Take one of them."
        )
    return plans[0]


def distill_privately(
    images: ImageSet,
    prospect: Prospect,
    *,
    ledger: Ledger,
    sealed: Path | None = None,
    validation: ImageSet | None = None,
    folder: Path | None = None,
    compute: Compute | None = None,
    looks: int = LOOKS,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Distil as foreseen, and spend the budget.

    Args:
        images: The images distilled from.
        prospect: What :func:`foresee` found.
        ledger: The cohort's.
        sealed: Where noisy answers are kept: the same call there spends nothing again.
        validation: Other patients, by whom the best of several runs is chosen; looked at for nothing else.
        folder: Where checkpoints are kept.
        compute: Device, precision and workers; the CPU by default.
        looks: Times that the images are looked at as they form; no patient is.
        observer: Told of every look.
        progress: Shows how far it is.

    Returns:
        The distilled set, which states what is proved, and how its images formed.

    Raises:
        PrivacyError: If the ledger refuses, the kept answers are those of something else, or several runs have
            nobody to be judged by.

    Privacy:
        (epsilon, delta)-differentially private for each patient, as the prospect's budget says.
    """
    how: dict[str, Any] = {"folder": folder, "compute": compute, "looks": looks, "observer": observer}
    how |= {"progress": progress}
    asked: dict[str, Any] = {"budget": prospect.budget, "plan": prospect.plan, "ledger": ledger}
    if prospect.plan.selects:
        if validation is None or sealed is None:
            raise PrivacyError(
                "The best of several runs is chosen by validation patients, and answers need a folder; pass both."
            )
        return repeat_and_select(images, validation, prospect.candidates, sealed=sealed, **asked, **how)
    curator = PrivateCurator(images, store=sealed, recipe=prospect.recipe.fingerprint(), **asked)
    try:
        return run_recipe(prospect.recipe, curator, **how)
    finally:
        curator.close()
