"""Negative controls that are kept: the same figures without distilling again, and never of other work."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill.audit import AuditPolicy, audit, control
from medistill.audit.control import Controls, control_key
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.guarantee import Budget
from medistill.core.reports import AuditReport
from medistill.distill import distill
from medistill.distill.surrogate import Surrogate
from medistill.errors import OutputError
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import Ledger
from medistill.progress import Progress
from medistill.release.tensors import IMAGES_FILE, RECIPE_FILE
from tests.conftest import blobs

TRAIN, HOLDOUT, REFERENCE = blobs(60, seed=1), blobs(30, seed=2, first=1000), blobs(30, seed=3, first=2000)
PARTS = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE}
POLICY = AuditPolicy(profile="quick", fewest_patients=20)
SETTINGS = {"distribution_matching": {"networks": 2, "iterations": 12, "width": 8}}


@dataclass
class Told(Progress):
    """Remembers what was said."""

    lines: list[str] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.lines.append(message)

    def remade(self) -> list[str]:
        return [line for line in self.lines if "made again" in line]


@pytest.fixture(scope="module")
def release() -> DistilledSet:
    return made(seed=6)


def made(seed: int) -> DistilledSet:
    curator = OpenCurator(TRAIN)
    return distill(curator, method="distribution_matching", ipc=1, seed=seed, settings=SETTINGS).distilled


@pytest.fixture
def distilled_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one recipe with every control that is distilled."""
    found: list[str] = []
    original = control.run_recipe

    def watch(recipe: Any, *given: Any, **options: Any) -> Any:
        found.append(recipe.fingerprint())
        return original(recipe, *given, **options)

    monkeypatch.setattr(control, "run_recipe", watch)
    return found


def examined(
    release: DistilledSet, kept: Path | None, progress: Progress | None = None, **more: Any
) -> AuditReport:
    given = {"seed": 5, "policy": POLICY, **PARTS, **more}
    return audit(release, controls=kept, progress=progress, **given)


def of(release: DistilledSet, kept: Path, progress: Progress | None = None, seed: int = 5) -> DistilledSet:
    """The control alone, as an audit gets it."""
    found = Controls(seed=seed, compute=Compute(), progress=progress or Progress(), kept=kept)
    return found.of(release, TRAIN)


def same(first: DistilledSet, second: DistilledSet) -> bool:
    tensors = ("images", "soft_labels", "hard_labels")
    told = (first.schedule, first.recipe, first.privacy) == (second.schedule, second.recipe, second.privacy)
    return told and all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)


def the_kept(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_a_second_audit_distils_nothing_and_finds_the_same(
    release: DistilledSet, tmp_path: Path, distilled_again: list[str]
) -> None:
    alone = examined(release, None)
    first, told = examined(release, tmp_path / "controls"), Told()
    assert len(distilled_again) == 2
    second = examined(release, tmp_path / "controls", told)
    assert len(distilled_again) == 2
    assert alone == first == second
    assert [line for line in told.lines if "earlier audit" in line]
    assert not told.remade()


def test_what_is_kept_is_closed_to_others_and_loads_as_tensors(release: DistilledSet, tmp_path: Path) -> None:
    of(release, tmp_path)
    found = the_kept(tmp_path)
    assert stat.S_IMODE(found.stat().st_mode) & 0o077 == 0
    assert {file.name for file in found.iterdir()} == {IMAGES_FILE, RECIPE_FILE, "key.json"}
    text = "".join(file.read_text(encoding="utf-8") for file in found.glob("*.json"))
    assert not [patient for patient in TRAIN.unique_patients if patient in text]


@pytest.mark.parametrize("harm", ["torn images", "no key", "odd key", "another's", "changed recipe"])
def test_a_broken_or_foreign_control_is_made_again_and_said_in_one_line(
    harm: str, release: DistilledSet, tmp_path: Path, distilled_again: list[str]
) -> None:
    first = of(release, tmp_path)
    found = the_kept(tmp_path)
    if harm == "torn images":
        (found / IMAGES_FILE).write_bytes((found / IMAGES_FILE).read_bytes()[:-7])
    elif harm == "no key":
        (found / "key.json").unlink()
    elif harm == "odd key":
        (found / "key.json").write_bytes(b"\xff{")
    elif harm == "changed recipe":
        changed = json.loads((found / RECIPE_FILE).read_text(encoding="utf-8"))
        changed["schedule"]["epochs"] += 1
        (found / RECIPE_FILE).write_text(json.dumps(changed), encoding="utf-8")
    else:
        of(made(seed=7), tmp_path / "other")
        shutil.rmtree(found)
        the_kept(tmp_path / "other").rename(found)
        (tmp_path / "other").rmdir()
    before, told = len(distilled_again), Told()
    assert same(of(release, tmp_path, told), first)
    assert len(distilled_again) == before + 1
    assert len(told.remade()) == 1
    assert same(of(release, tmp_path), first)
    assert len(distilled_again) == before + 1


def test_the_key_follows_from_everything_that_decides_a_control(
    release: DistilledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Compute()
    key = control_key(release, TRAIN, compute)
    assert control_key(release, blobs(60, seed=1), compute) == key
    pixels = TRAIN.images.clone()
    pixels[3, 0, 2, 2] = 1 - pixels[3, 0, 2, 2]
    private = replace(release.privacy, epsilon=1.0, reason="", accountants=("PLD",), event="one sum")
    others = [
        (release, replace(TRAIN, images=pixels), compute),
        (release, replace(TRAIN, targets=TRAIN.targets.flip(1)), compute),
        (release, replace(TRAIN, patients=TRAIN.patients[::-1]), compute),
        (release, TRAIN, replace(compute, mixed_precision=True)),
        (replace(release, recipe=replace(release.recipe, seed=8)), TRAIN, compute),
        (replace(release, recipe=replace(release.recipe, version="0")), TRAIN, compute),
        (replace(release, privacy=private), TRAIN, compute),
    ]
    keys = {control_key(*given) for given in others}
    assert len(keys) == len(others)
    assert key not in keys
    monkeypatch.setattr(control, "_code", lambda: "of tomorrow")
    assert control_key(release, TRAIN, compute) not in {key, *keys}


def test_another_seed_attacks_others_and_has_a_control_of_its_own(
    release: DistilledSet, tmp_path: Path, distilled_again: list[str]
) -> None:
    for seed in (5, 6, 5):
        examined(release, tmp_path, seed=seed)
    assert len(distilled_again) == 2


def test_a_second_release_has_a_control_of_its_own(
    release: DistilledSet, tmp_path: Path, distilled_again: list[str]
) -> None:
    other = made(seed=7)
    examined(release, tmp_path)
    examined(release, tmp_path, others=(other,))
    assert distilled_again == [release.recipe.fingerprint(), other.recipe.fingerprint()]


def test_the_noisy_control_of_a_private_release_is_kept_as_well(
    tmp_path: Path, distilled_again: list[str]
) -> None:
    budget = Budget(epsilon=40.0, delta=1e-5)
    settings = {"iterations": 4, "made_up": 6, "drawing": 2, "dimension": 24, "width": 8}
    distiller = Surrogate(**settings)  # type: ignore[arg-type]
    plan, ledger = distiller.plan(TRAIN.task, (1, 16, 16), 1), Ledger(tmp_path / "ledger.jsonl", lifetime=budget)
    curator = PrivateCurator(TRAIN, budget=budget, plan=plan, ledger=ledger)
    release = distill(curator, method="surrogate", ipc=1, seed=1, settings={"surrogate": settings}).distilled
    spent = (tmp_path / "ledger.jsonl").read_bytes()
    first, second = (of(release, tmp_path / "controls") for _ in range(2))
    assert same(first, second)
    assert len(distilled_again) == 1
    assert (tmp_path / "ledger.jsonl").read_bytes() == spent


@pytest.mark.parametrize("most", [1, 2])
def test_the_newest_controls_are_kept_and_older_ones_removed(
    most: int, release: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distilled_again: list[str]
) -> None:
    monkeypatch.setattr(control, "MOST_KEPT", most)
    (tmp_path / "not a control").mkdir()
    releases = [replace(release, recipe=replace(release.recipe, seed=seed)) for seed in range(3)]
    for number, one in enumerate(releases):
        of(one, tmp_path)
        for place in tmp_path.iterdir():  # a moment passes
            os.utime(place, (place.stat().st_atime, place.stat().st_mtime - 10))
        assert len(list(tmp_path.glob("*/key.json"))) == min(number + 1, most)
    of(releases[-1], tmp_path)
    assert len(distilled_again) == 3
    assert (tmp_path / "not a control").is_dir()


def test_a_control_that_cannot_be_kept_is_said(release: DistilledSet, tmp_path: Path) -> None:
    (tmp_path / "controls").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError):
        examined(release, tmp_path / "controls")
