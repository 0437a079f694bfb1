"""The negative control: the release's own recipe on patients who are not attacked, kept for the next audit."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from medistill import __version__
from medistill.audit.mechanism import stated_noise
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.guarantee import EPSILON_RANGE, Budget
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator
from medistill.distill.private import plan_of
from medistill.distill.runner import run_recipe
from medistill.errors import ReleaseError
from medistill.privacy.accounting import epsilon_of
from medistill.privacy.calibration import mechanisms_of
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import NAME, Ledger
from medistill.progress import Progress
from medistill.registry import DISTILLERS
from medistill.release.durable import output_errors, replace_durably
from medistill.release.tensors import RECIPE_FILE, load_distilled, save_distilled

_KEY_FILE = "key.json"
#: Controls kept beside each other; older ones are removed.
MOST_KEPT = 4
#: Packages whose code decides what a recipe makes of patients.
_DISTILLING = ("core", "distill", "networks", "privacy", "training", "seeds.py")


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How negative controls are made, and where they are found again.

    Args:
        seed: Public seed of the audit.
        compute: Device and precision.
        progress: Shows how far it is.
        folder: Where an interrupted control is taken up again.
        kept: Where finished ones are kept for further audits; they are made of patients and stay inside.
    """

    seed: int
    compute: Compute
    progress: Progress
    folder: Path | None = None
    kept: Path | None = None

    def of(self, distilled: DistilledSet, rest: ImageSet) -> DistilledSet:
        """The release's recipe on other patients: kept from an earlier audit, or distilled now.

        Args:
            distilled: The release.
            rest: Images of training patients who are not attacked.

        Raises:
            OutputError: If it cannot be kept.

        Privacy:
            Reads non-released data.
        """
        key = control_key(distilled, rest, self.compute)
        place = None if self.kept is None else self.kept / key[:16]
        found = None if place is None else self._find(place, key)
        if found is not None:
            self.progress.say("audit: the negative control is that of an earlier audit")
            return found
        self.progress.say("audit: distilling the negative control from patients who are not attacked")
        with control_curator(distilled, rest, self.seed, self.folder) as curator:
            done = run_recipe(
                distilled.recipe, curator, folder=self.folder, compute=self.compute, progress=self.progress
            )
        if place is not None:
            _keep(place, key, done.distilled)
        return done.distilled

    def _find(self, place: Path, key: str) -> DistilledSet | None:
        if not place.exists():
            return None
        try:
            found = load_distilled(place)
            if json.loads((place / _KEY_FILE).read_text(encoding="utf-8")) == _bound(place, key):
                return found
        except (ReleaseError, OSError, ValueError):
            pass
        self.progress.say("audit: the negative control that was kept is damaged or another one; it is made again")
        return None


def control_key(distilled: DistilledSet, rest: ImageSet, compute: Compute) -> str:
    """Digest of all that decides what the negative control is, hexadecimal.

    Recipe with its seed, claimed guarantee, images, labels and patients, the code, the device and its precision.

    Args:
        distilled: The release.
        rest: Images of patients who are not attacked.
        compute: Device and precision.
    """
    claim = distilled.privacy
    digest = hashlib.sha256(distilled.recipe.fingerprint().encode())
    digest.update(f"{claim.epsilon!r} {claim.delta!r} {rest.task!r} {tuple(rest.images.shape)}".encode())
    digest.update(f"{compute.device} {compute.mixed_precision} {compute.compile}".encode())
    for step in distilled.recipe.steps:  # a distiller of another package is not among the code below
        digest.update(Path(inspect.getfile(DISTILLERS.load(step.distiller))).read_bytes())
    digest.update(_code().encode())
    digest.update(rest.images.contiguous().numpy().data)
    digest.update(rest.targets.contiguous().numpy().data)
    digest.update("\n".join(rest.patients).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Digest of the code that distils; a version number alone would miss what changes between two of them."""
    digest, root = hashlib.sha256(f"{__version__} {torch.__version__}".encode()), Path(__file__).parents[1]
    for part in _DISTILLING:
        files = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py"))
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _bound(place: Path, key: str) -> dict[str, str]:
    """What ties the files of a kept control together: the recipe's file carries the digest of the images'."""
    return {"key": key, "recipe_sha256": hashlib.sha256((place / RECIPE_FILE).read_bytes()).hexdigest()}


def _keep(place: Path, key: str, control: DistilledSet) -> None:
    """Write a control; its key comes last, so that half of one is never taken for a whole."""
    with output_errors(place):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        (place / _KEY_FILE).unlink(missing_ok=True)
        save_distilled(place, control)
        replace_durably(place / _KEY_FILE, json.dumps(_bound(place, key)).encode())
        others = [other for other in place.parent.iterdir() if other != place and (other / _KEY_FILE).is_file()]
        others.sort(key=lambda other: other.stat().st_mtime)
        for old in others[: max(0, len(others) + 1 - MOST_KEPT)]:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def control_curator(distilled: DistilledSet, rest: ImageSet, seed: int, folder: Path | None) -> Iterator[Curator]:
    """Who answers for the negative control: with as much noise as for the release.

    Of a private release nothing is spent: the control is compared here and stays inside, so its noise only has to
    make it like the release, and protects nobody. Its ledger is thrown away; the cohort's is not touched.

    Args:
        distilled: The release.
        rest: Images of patients who are not attacked.
        seed: Public seed.
        folder: Where an interrupted control is taken up again.
    """
    if math.isinf(distilled.privacy.epsilon):
        yield OpenCurator(rest)
        return
    plan = plan_of(distilled.recipe, rest.task, tuple(rest.images.shape[1:]))
    claim = distilled.privacy
    epsilon = claim.epsilon
    if len(claim.event) > len(plan.queries):  # the best of several runs, of which the control is one
        epsilon = epsilon_of(mechanisms_of(plan, stated_noise(claim, plan)), claim.delta).epsilon
    budget = Budget(epsilon=max(epsilon, EPSILON_RANGE[0]), delta=claim.delta)
    work = hashlib.sha256(f"{distilled.fingerprint()} {seed}".encode()).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as throw_away:
        where = (folder or Path(throw_away)) / f"control-{work}"
        ledger = Ledger(where / NAME, lifetime=budget)
        curator = PrivateCurator(rest, budget=budget, plan=plan, ledger=ledger, store=where / "sealed")
        try:
            yield curator
        finally:
            curator.close()
