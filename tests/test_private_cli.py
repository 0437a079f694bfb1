"""Differential privacy from the command line: what is foreseen, spent once, refused, and told."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner, Result

from medistill import workflow
from medistill.audit import AuditPolicy, audit
from medistill.cli import app
from medistill.config import RunConfig, parse_config
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.guarantee import Budget
from medistill.core.task import Task
from medistill.distill import (
    distill,
    distill_privately,
    foresee,
    make_recipe,
    private,
    run_recipe,
    runner,
    surrogate,
)
from medistill.distill.moments import ask_moments
from medistill.distill.schedule import choose_schedule
from medistill.errors import ConfigError, PrivacyError
from medistill.ingest import IngestConfig, SplitFractions, ingest, load_cohort
from medistill.privacy import Ledger, OpenCurator, PrivateCurator
from medistill.privacy.ledger import Reservation
from medistill.progress import Progress
from medistill.registry import SOURCES
from medistill.release.tensors import load_distilled
from tests.conftest import blobs

EPSILON = 20.0  # few patients need little noise; what is tested here does not depend on it
QUICK = {"iterations": 6, "made_up": 6, "drawing": 2, "dimension": 24, "width": 8, "checkpoint_every": 2}
SETTINGS = {"surrogate": QUICK}
FASTER = ("--method", "distribution_matching", "--set", "distribution_matching.iterations=2")
TASK = Task.single_label(("normal", "ill"))
RUN = [argument for name, value in QUICK.items() for argument in ("--set", f"surrogate.{name}={value}")]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spend(cohort: Path, out: Path, *arguments: object, epsilon: float = EPSILON) -> Result:
    """A quick private distillation by its command."""
    size = ("--ipc", 1, "--size", 16, "--epsilon", epsilon, "--lifetime", 50)
    return invoke("-q", "distill", cohort, "--out", out, *size, *arguments or RUN)


def refused(result: Result, *, code: int) -> str:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().split("\n")
    assert line.startswith("error: ")
    return line


def mu(epsilon: float, delta: float) -> float:
    """Of the Gaussian mechanism that just keeps to a budget, 1 over its noise multiplier: the closed form."""

    def excess(mu: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return float(brentq(excess, 1e-3, 30.0))


class Interrupted(Progress):
    """Stops after some steps, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for item in items:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield item


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("private"), blobs(patients=160, size=16)
    np.savez(
        folder / "blobs.npz",
        images=(data.images[:, 0].numpy() * 255).astype(np.uint8),
        label=data.classes.numpy(),
        patient_id=np.array(data.patients),
    )
    fractions = SplitFractions(train=0.7, validation=0.1, holdout=0.1, test=0.1)
    config = IngestConfig(size=16, fractions=fractions, classes=("0", "1"), burned_in="allow")
    ingest(SOURCES.load("npz")(folder / "blobs.npz"), folder / "cohort", key=bytes(32), config=config)
    return folder / "cohort"


@pytest.fixture
def cohort(made: Path, tmp_path: Path) -> Path:
    """A cohort of which nothing was spent."""
    return Path(shutil.copytree(made, tmp_path / "cohort"))


@pytest.fixture(scope="module", autouse=True)
def quick_students() -> Iterator[None]:
    """Train students for a short while, on one thread."""
    short = Schedule(epochs=8, learning_rate=0.01)
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(surrogate, "SCHEDULE", short)
        few = functools.partial(choose_schedule, candidates=(short, replace(short, epochs=12)), students=1)
        patch.setattr(runner, "choose_schedule", few)
        yield


# -- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "ledger"])
def test_help_shows_an_example(command: str) -> None:
    result = invoke("privacy", command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example: `?medistill privacy {command}\b", re.sub(r"\s+", " ", result.stdout))


@pytest.mark.parametrize(
    "arguments", [["privacy", "--help"], ["privacy", "plan", "--help"], ["distill", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['medistill', *{arguments!r}]\nfrom medistill.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- what is foreseen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patients", "most", "delta"),
    [(1, 100, 1e-5), (100, 100, 1e-5), (101, 1000, 1e-5), (10_000, 10_000, 1e-5), (10_001, 100_000, 1e-6)],
)
def test_delta_follows_from_the_next_power_of_ten(patients: int, most: int, delta: float) -> None:
    assert private.most_patients(patients) == most
    assert private.automatic_delta(patients) == pytest.approx(delta)
    seen = foresee(TASK, (1, 16, 16), epsilon=3.0, patients=patients)
    assert seen.budget.delta == pytest.approx(delta)
    assert any(f"at most {most} patients" in assumption for assumption in seen.assumptions)


def test_what_is_foreseen_is_within_the_budget_and_as_the_closed_form_says() -> None:
    seen = foresee(TASK, (1, 16, 16), epsilon=3.0, delta=1e-6)
    first, second = seen.calibrated.noise_multipliers
    assert 0.99 * 3.0 <= seen.calibrated.bound.epsilon <= 3.0
    assert 1 / first**2 + 1 / second**2 == pytest.approx(mu(3.0, 1e-6) ** 2, rel=1e-3)
    for sigma, epsilon in zip((first, second), seen.epsilons(), strict=True):
        assert mu(epsilon, 1e-6) == pytest.approx(1 / sigma, rel=1e-3)
    assert not any("delta" in assumption for assumption in seen.assumptions)


def test_expected_noise_is_that_of_the_real_thing(tmp_path: Path) -> None:
    seen = foresee(TASK, (1, 16, 16), epsilon=EPSILON, settings=SETTINGS)
    found = seen.expect(400)
    assert found is not None
    sigma, clip_norm = seen.calibrated.noise_multipliers[1], math.sqrt(1 + 1 + 0.25)
    assert found.noise_to_signal == pytest.approx(sigma * clip_norm * math.sqrt(24) / 200, rel=1e-6)
    assert found.features == 24
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=Budget(epsilon=50.0, delta=1e-5))
    data = blobs(patients=400, per_patient=1)
    curator = PrivateCurator(data, budget=seen.budget, plan=seen.plan, ledger=ledger)
    real = ask_moments(curator, dimension=24, compute=Compute())
    assert real.signal == pytest.approx(found.noise_to_signal, rel=0.15)
    few = foresee(TASK, (1, 16, 16), epsilon=1.0, settings=SETTINGS).expect(4)
    assert few is not None
    assert few.noise_to_signal == math.inf


def test_auto_chooses_by_the_size_of_the_task_and_says_why() -> None:
    small, large = (foresee(TASK, (1, 64, 64), epsilon=3.0, ipc=ipc) for ipc in (10, 600))
    assert small.recipe.method == "surrogate"
    assert "20 images are few enough" in small.why
    assert large.recipe.method == "distribution_matching"
    assert "takes long for 1200 images" in large.why
    assert foresee(TASK, (1, 16, 16), epsilon=3.0).recipe.steps[0].settings["formation"] == 1


@pytest.mark.parametrize("method", ["coreset", "kernel_ridge", "soft_label", "trajectory_matching"])
def test_methods_that_need_images_are_refused_before_anything(method: str) -> None:
    with pytest.raises(PrivacyError, match="needs patients' images themselves"):
        foresee(TASK, (1, 16, 16), epsilon=3.0, method=method)


def test_several_distillers_are_refused() -> None:
    with pytest.raises(PrivacyError, match="one distiller"):
        foresee(TASK, (1, 16, 16), epsilon=3.0, method="distribution_matching+surrogate")


def test_plan_shows_everything_and_touches_nothing(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\nsource: {{kind: folder, path: absent, labels: absent.csv}}\n"
        "ingest: {classes: [a, b, c]}\nprivacy: {epsilon: 3}\n"
    )
    result = invoke("privacy", "plan", config, "--patients", 300)
    assert result.exit_code == 0, result.output
    seen = foresee(Task.single_label(("a", "b", "c")), (1, 64, 64), epsilon=3.0)
    for sigma, epsilon in zip(seen.calibrated.noise_multipliers, seen.epsilons(), strict=True):
        assert re.search(rf" {sigma:.4g} +{epsilon:.3g}\n", result.stdout)
    expected = seen.expect(300)
    assert expected is not None
    assert f"with 300 patients, as many of every class: {expected.noise_to_signal:.2g} " in result.stdout
    assert "Expected utility: " in result.stdout
    assert all(f"  - {assumption}\n" in result.stdout for assumption in seen.plan.assumptions[:2])
    assert "at most 1000 patients" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_a_plan_needs_a_section_privacy(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("output: run\nsource: {kind: phantom}\n")
    assert "no section privacy" in refused(invoke("privacy", "plan", tmp_path / "my.yaml"), code=1)


def test_the_utility_sentence_says_where_its_figures_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "MEASURED", {"surrogate": {1.0: (0.5, 0.6), 8.0: (0.7, 0.8)}})
    near, far = (foresee(TASK, (1, 16, 16), epsilon=epsilon).utility for epsilon in (1.5, 6.0))
    assert "0.500 to 0.600 at epsilon 1 " in near
    assert "0.700 to 0.800 at epsilon 8 " in far
    assert "PneumoniaMNIST" in near
    other = foresee(TASK, (1, 16, 16), epsilon=3.0, method="distribution_matching")
    assert "was not measured" in other.utility


# -- what is spent ----------------------------------------------------------------------------------------------


def test_a_private_distillation_says_first_and_spends_once(cohort: Path, tmp_path: Path) -> None:
    result = spend(cohort, tmp_path / "run")
    assert result.exit_code == 0, result.output
    order = ["surrogate: ", "Epsilon 20 at delta 1e-05", "100 patients", "1000 patients", "Taken as public"]
    places = [result.stderr.index(words) for words in order]
    assert places == sorted(places)
    made = load_distilled(tmp_path / "run" / "distilled")
    assert 0.99 * EPSILON <= made.privacy.epsilon <= EPSILON
    assert (made.privacy.delta, made.privacy.unit) == (1e-5, "patient")
    assert any("at most 1000 patients" in assumption for assumption in made.privacy.assumptions)
    (one,) = Ledger(cohort / "ledger.jsonl").reservations()
    assert (one.recipe, len(one.sealed)) == (made.recipe.fingerprint(), 2)
    assert len(list((tmp_path / "run" / "sealed").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("after", [0, 4], ids=["between the queries", "while distilling"])
def test_an_interrupted_run_goes_on_and_spends_nothing_twice(
    after: int, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if after:
            patch.setattr("medistill.cli.distill.progress", lambda: Interrupted(after))
        else:
            seal = PrivateCurator.sum
            asked: list[int] = []

            def once(self: PrivateCurator, *arguments: Any, **more: Any) -> Any:
                if asked:
                    raise KeyboardInterrupt
                asked.append(1)
                return seal(self, *arguments, **more)

            patch.setattr(PrivateCurator, "sum", once)
        assert spend(cohort, out).exit_code == 130
    (begun,) = Ledger(cohort / "ledger.jsonl").reservations()
    assert len(begun.sealed) == (2 if after else 1)
    if after:
        shutil.copytree(out / "sealed", tmp_path / "other" / "sealed")
    assert spend(cohort, out).exit_code == 0
    if not after:
        shutil.copytree(out / "sealed", tmp_path / "other" / "sealed")
    assert spend(cohort, tmp_path / "other").exit_code == 0  # from the sealed answers, without a checkpoint
    (done,) = Ledger(cohort / "ledger.jsonl").reservations()
    assert done.identity == begun.identity
    assert begun.sealed.items() <= done.sealed.items()
    resumed, whole = (load_distilled(folder / "distilled") for folder in (out, tmp_path / "other"))
    assert resumed.fingerprint() == whole.fingerprint()


def two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    again = itertools.cycle([True, False])
    monkeypatch.setattr("medistill.privacy.curator.another_run", lambda *_, **__: next(again))


def test_the_best_of_several_runs_is_distilled_within_one_epsilon(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(monkeypatch)
    choices = [argument for value in (1, 4) for argument in ("--candidate", f"surrogate.sharpness={value}")]
    result = spend(cohort, tmp_path / "run", *RUN, "--expected-runs", 2, *choices)
    assert result.exit_code == 0, result.output
    assert "2 on average, each with settings from a list of 2" in result.stderr
    made = load_distilled(tmp_path / "run" / "distilled")
    assert made.recipe.steps[0].settings["sharpness"] in (1.0, 4.0)
    assert 0.99 * EPSILON <= made.privacy.epsilon <= EPSILON
    (one,) = Ledger(cohort / "ledger.jsonl").reservations()
    assert sorted(one.sealed) == list(range(6))
    told = invoke("privacy", "ledger", cohort).stdout
    assert "several runs" in told
    assert "Together: epsilon 20 of 50" in told
    with (tmp_path / "run" / "forming" / "looks.csv").open() as table:
        assert len(table.readlines()) == 1 + 5  # of the run that was kept
    attacked = audit_of(made, load_cohort(cohort))
    mechanism = next(one for one in attacked if one.attack == "mechanism")
    assert mechanism.findings["noise_multiplier"] == pytest.approx(min(one_run_noise(made)), rel=1e-5)


def one_run_noise(made: DistilledSet) -> list[float]:
    found = [re.search(r"noise multiplier ([0-9.e+-]+)", event) for event in made.privacy.event]
    return [float(match.group(1)) for match in found[:-1] if match]


def audit_of(made: DistilledSet, real: Any) -> tuple[Any, ...]:
    train, holdout, reference = (real.split(name).images(16) for name in ("train", "holdout", "validation"))
    policy = AuditPolicy(profile="quick")
    return audit(made, train=train, holdout=holdout, reference=reference, policy=policy, seed=0).outcomes


def test_the_lifetime_budget_ends_and_the_ledger_tells(cohort: Path, tmp_path: Path) -> None:
    assert invoke("privacy", "ledger", cohort).stdout == "Nothing was spent of 6 at delta 1e-05.\n"
    assert spend(cohort, tmp_path / "a", *FASTER).exit_code == 0
    assert spend(cohort, tmp_path / "b", "--seed", 1, *FASTER, epsilon=10).exit_code == 0
    other = invoke("-q", *_again(cohort, tmp_path / "c", lifetime=40))
    assert other.exit_code == 1
    assert "was opened for epsilon 50" in other.stderr
    over = spend(cohort, tmp_path / "c", "--seed", 2, *FASTER, epsilon=48)
    assert over.exit_code == 1
    assert "lifetime budget does not allow it" in over.stderr
    assert not (tmp_path / "c" / "distilled").exists()

    result = invoke("privacy", "ledger", cohort)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    recipes = [load_distilled(tmp_path / name / "distilled").recipe.fingerprint()[:12] for name in "ab"]
    assert [(row[1], row[2], row[3]) for row in rows[1:3]] == [
        (recipes[0], "20", "1e-05"),
        (recipes[1], "10", "1e-05"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row[0]) for row in rows[1:3])
    both = math.hypot(mu(20.0, 1e-5), mu(10.0, 1e-5))
    together = float(rows[3][2])
    assert mu(together, 1e-5) == pytest.approx(both, rel=0.01)
    left = float(re.findall(r"up to epsilon ([\d.]+)", result.stdout)[0])
    assert math.hypot(both, mu(left, 1e-5)) <= 1.005 * mu(50.0, 1e-5)
    assert math.hypot(both, mu(1.03 * left, 1e-5)) > mu(50.0, 1e-5)
    assert "together with 2 earlier" in over.stderr


def _again(cohort: Path, out: Path, *, lifetime: float) -> list[object]:
    return ["distill", cohort, "--out", out, "--size", 16, "--epsilon", 1, "--lifetime", lifetime]


def test_a_changed_ledger_is_refused(cohort: Path, tmp_path: Path) -> None:
    assert spend(cohort, tmp_path / "a", *FASTER).exit_code == 0
    lines = (cohort / "ledger.jsonl").read_text().splitlines(keepends=True)
    (cohort / "ledger.jsonl").write_text("".join(lines[:1]))
    assert "was changed" in refused(invoke("privacy", "ledger", cohort), code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--epsilon", "3", "--method", "kernel_ridge"], 1, "kernel_ridge needs patients' images themselves"),
        (["--epsilon", "3", "--method", "coreset"], 1, "needs patients' images themselves"),
        (["--epsilon", "3", "--patience", "2"], 1, "looking at validation patients"),
        (["--epsilon", "0"], 1, "Expected epsilon in"),
        (["--epsilon", "3", "--delta", "none"], 2, "Expected --delta auto or a number"),
        (["--epsilon", "3", "--delta", "0.5"], 1, "Expected delta in"),
        (["--delta", "1e-6"], 2, "say nothing without --epsilon"),
        (["--expected-runs", "3"], 2, "say nothing without --epsilon"),
        (["--epsilon", "3", "--candidate", "surrogate.sharpness=1"], 2, "(--expected-runs) must be above 1"),
        (["--epsilon", "3", "--expected-runs", "0.5"], 1, "Expected 1 to 100 runs"),
        (
            ["--epsilon", "3", "--expected-runs", "2", "--candidate", "sharpness=1"],
            2,
            "--candidate DISTILLER.NAME",
        ),
        (["--epsilon", "3", "--expected-runs", "2", "--method", "gradient_matching"], 1, "sampled"),
        (["--epsilon", "3", "--set", "kernel_ridge.iterations=3"], 2, "not part of surrogate"),
        (["--set", "surrogate.iterations=3"], 2, "not part of distribution_matching"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_private_is_one_line_and_spends_nothing(
    arguments: list[str], code: int, words: str, cohort: Path, tmp_path: Path
) -> None:
    line = refused(
        invoke("-q", "distill", cohort, "--out", tmp_path / "run", "--size", "16", *arguments), code=code
    )
    assert words in line
    assert not (tmp_path / "run").exists()
    assert not (cohort / "ledger.jsonl").exists()


def test_without_epsilon_nothing_is_different(cohort: Path, tmp_path: Path) -> None:
    quick = {
        "distribution_matching": {"networks": 1, "iterations": 3, "width": 8},
        "kernel_ridge": {"iterations": 3, "pool": 2, "width": 8, "real_batch": 20},
    }
    sets = [x for n, v in quick.items() for k, value in v.items() for x in ("--set", f"{n}.{k}={value}")]
    out = tmp_path / "run"
    result = invoke("-q", "distill", cohort, "--out", out, "--ipc", 1, "--size", 16, *sets)
    assert result.exit_code == 0, result.output
    real = load_cohort(cohort)
    train, validation = (real.split(name).images(16) for name in ("train", "validation"))
    direct = distill(OpenCurator(train), ipc=1, settings=quick, validation=validation).distilled
    made = load_distilled(out / "distilled")
    assert made.fingerprint() == direct.fingerprint()
    assert made.privacy.epsilon == math.inf
    assert not (cohort / "ledger.jsonl").exists()
    assert not (out / "sealed").exists()


def test_a_private_curator_lets_nothing_be_chosen_on_validation_patients(tmp_path: Path) -> None:
    data, seen = blobs(patients=60), foresee(TASK, (1, 16, 16), epsilon=EPSILON, settings=SETTINGS)
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=seen.budget)
    curator = PrivateCurator(data, budget=seen.budget, plan=seen.plan, ledger=ledger)
    for more in ({"validation": blobs(patients=8, first=100)}, {"patience": 1}):
        with pytest.raises(PrivacyError, match="validation patients"):
            run_recipe(seen.recipe, curator, **more)
    with pytest.raises(PrivacyError, match="images themselves"):
        run_recipe(make_recipe(TASK, method="kernel_ridge", ipc=1), curator, folder=tmp_path / "checkpoints")
    assert curator.statement().epsilon <= EPSILON
    assert not Ledger(tmp_path / "ledger.jsonl").reservations()[0].sealed


# -- the audit's control ----------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> DistilledSet:
    seen = foresee(TASK, (1, 16, 16), epsilon=EPSILON, ipc=2, settings=SETTINGS)
    train = replace(blobs(120, seed=1), task=TASK)
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=seen.budget)
    return distill_privately(train, seen, ledger=ledger).distilled


QUICK_AUDIT = AuditPolicy(profile="quick")


def test_the_control_of_an_audit_has_the_same_noise_and_spends_nothing(
    released: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Reservation] = []
    reserve = Ledger.reserve

    def noted(self: Ledger, reservation: Reservation, **more: Any) -> None:
        made.append(reservation)
        reserve(self, reservation, **more)

    monkeypatch.setattr(Ledger, "reserve", noted)
    train, holdout, reference = (
        replace(blobs(count, seed=seed, first=first), task=TASK)
        for count, seed, first in ((120, 1, 0), (30, 2, 1000), (20, 3, 2000))
    )
    before = (tmp_path / "ledger.jsonl").read_bytes()
    parts = {"train": train, "holdout": holdout, "reference": reference}
    report = audit(released, **parts, policy=QUICK_AUDIT, seed=5, folder=tmp_path / "checkpoints")
    assert report.release == released.fingerprint()
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    (control,) = made
    (spent,) = Ledger(tmp_path / "ledger.jsonl").reservations()
    assert control.noise_multipliers == pytest.approx(spent.noise_multipliers, rel=1e-6)
    again = audit(released, **parts, policy=QUICK_AUDIT, seed=5, folder=tmp_path / "checkpoints")
    of_release = slice(2)  # those after it draw noise anew from the operating system
    assert again.outcomes[of_release] == report.outcomes[of_release]  # the control is the same one
    assert len(made) == 1


# -- a whole run ------------------------------------------------------------------------------------------------


def config(out: Path, source: Path, **changes: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "output": str(out),
        "source": {"kind": "npz", "path": str(source / "blobs.npz")},
        "ingest": {
            "size": 16,
            "burned_in": "allow",
            "classes": ["0", "1"],
            "fractions": {"train": 0.7, "validation": 0.1, "holdout": 0.1, "test": 0.1},
        },
        "privacy": {"epsilon": EPSILON, "lifetime": 30},
        "distill": {"ipc": 1, "size": 16, "settings": SETTINGS},
        "audit": {"profile": "quick"},
        "evaluate": {"arms": ["distilled"], "seeds": 1, "real_epochs": 1, "draws": 100},
        "release": {"accept": ["PASS", "NOT_ESTIMABLE", "FAIL", "INVALID"]},
    }
    for section, inner in changes.items():
        values[section] = {**values.get(section, {}), **inner}
    return parse_config(values)


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private-run") / "run"
    workflow.run(config(folder, made.parent), jobs=1)
    return folder


def test_a_whole_run_ends_with_a_finite_epsilon(finished: Path, made: Path) -> None:
    card = json.loads((finished / "release" / "card.json").read_text())
    assert 0.99 * EPSILON <= card["privacy"]["statement"]["epsilon"] <= EPSILON
    assert "Differentially private for each patient" in (finished / "release" / "README.md").read_text()
    assert "not covered" in " ".join(card["privacy"]["statement"]["assumptions"])
    assert len(Ledger(finished / "cohort" / "ledger.jsonl").reservations()) == 1
    assert workflow.run(config(finished, made.parent), jobs=1).ran == ()


def test_a_run_that_ingests_again_does_not_forget_what_was_spent(
    finished: Path, made: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "stages" / "ingest.json").unlink()  # as where the source was changed
    assert "distill" not in workflow.run(config(run, made.parent), jobs=1).ran  # the same input digests
    (one,) = Ledger(run / "cohort" / "ledger.jsonl").reservations()
    assert one.sealed
    (run / "stages" / "ingest.json").unlink()
    (run / "cohort").rename(run / ".cohort-last")  # killed while cohorts were exchanged
    workflow.run(config(run, made.parent), jobs=1)
    assert Ledger(run / "cohort" / "ledger.jsonl").reservations()[0].identity == one.identity
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    with pytest.raises(PrivacyError, match="lifetime budget does not allow it"):
        workflow.run(config(run, made.parent, privacy={"epsilon": 28}), jobs=1)


def test_a_run_distilled_again_takes_up_the_sealed_answers(finished: Path, made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = load_distilled(run / "distilled").fingerprint()
    (run / "stages" / "distill.json").unlink()
    assert "distill" in workflow.run(config(run, made.parent), jobs=1).ran
    assert load_distilled(run / "distilled").fingerprint() == before
    assert len(Ledger(run / "cohort" / "ledger.jsonl").reservations()) == 1


def test_a_configuration_selects_within_its_epsilon(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(monkeypatch)
    choices = [{"surrogate": {"sharpness": 1}}, {"surrogate": {"sharpness": 4}}]
    private = {"expected_runs": 2, "candidates": choices}
    chosen = config(tmp_path / "run", made.parent, privacy=private)
    workflow.run(chosen, jobs=1)
    released = load_distilled(tmp_path / "run" / "distilled")
    assert isinstance(released.recipe.steps[0].settings["sharpness"], float)
    assert "2 on average" in released.privacy.event[-1]
    told = invoke("privacy", "ledger", tmp_path / "run" / "cohort").stdout
    assert "several runs" in told


def test_a_run_that_cannot_be_private_stops_before_ingestion(tmp_path: Path) -> None:
    impossible = config(tmp_path / "run", tmp_path, distill={"method": "soft_label", "settings": {}})
    with pytest.raises(PrivacyError, match="needs patients' images themselves"):
        workflow.run(impossible)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"patience": 1}}, "distill.patience: expected 0 with privacy"),
        ({"distill": {"settings": {"kernel_ridge": {}}}}, "distill.settings.kernel_ridge: not part of surrogate"),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon: "),
        ({"privacy": {"delta": "none"}}, "privacy.delta: "),
        ({"privacy": {"epsilons": 3}}, "privacy.epsilons: unknown. Did you mean 'epsilon'?"),
        ({"privacy": {"expected_runs": 0}}, "privacy.expected_runs: "),
        ({"privacy": {"candidates": [{"surrogate": {}}]}}, "privacy.expected_runs: expected above 1"),
        (
            {"privacy": {"expected_runs": 2, "candidates": [{"surrogate": {"sharp": 1}}]}},
            "privacy.candidates.0.surrogate.sharp: unknown. Did you mean 'sharpness'?",
        ),
        (
            {"privacy": {"expected_runs": 2, "candidates": [{"surrogate": {}}, {"kernel_ridge": {}}]}},
            "privacy.candidates.1.kernel_ridge: not part of surrogate",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_a_bad_privacy_section_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(tmp_path / "run", tmp_path, **changes)


def test_the_configuration_keeps_auto_when_written_and_read(tmp_path: Path) -> None:
    first = config(tmp_path / "run", tmp_path)
    values = json.loads(first.model_dump_json())
    assert values["privacy"]["delta"] == "auto"
    assert parse_config(values) == first


def test_the_shipped_configuration_can_be_foreseen() -> None:
    from medistill.config import load_config
    from tests.conftest import REPOSITORY

    shipped = load_config(REPOSITORY / "configs" / "phantom_private.yaml")
    seen = workflow.foresee_run(shipped, patients=480)
    expected = seen.expect(480)
    assert expected is not None
    assert expected.noise_to_signal < 0.8
    assert torch.isfinite(torch.tensor(seen.calibrated.bound.epsilon))
