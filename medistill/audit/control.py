"""The negative control: the release's own recipe on patients who are not attacked."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medistill.core.distilled import DistilledSet
from medistill.core.guarantee import EPSILON_RANGE, Budget
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator
from medistill.distill.private import plan_of
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import NAME, Ledger


@contextlib.contextmanager
def control_curator(distilled: DistilledSet, rest: ImageSet, seed: int, folder: Path | None) -> Iterator[Curator]:
    """Who answers for the negative control: with as much noise as for the release.

    Of a private release nothing is spent: the control is compared here and thrown away, so its noise only has to
    make it like the release, and protects nobody. Its ledger is thrown away with it; the cohort's is not touched.

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
    budget = Budget(epsilon=max(distilled.privacy.epsilon, EPSILON_RANGE[0]), delta=distilled.privacy.delta)
    work = hashlib.sha256(f"{distilled.fingerprint()} {seed}".encode()).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as throw_away:
        where = (folder or Path(throw_away)) / f"control-{work}"
        ledger = Ledger(where / NAME, lifetime=budget)
        curator = PrivateCurator(rest, budget=budget, plan=plan, ledger=ledger, store=where / "sealed")
        try:
            yield curator
        finally:
            curator.close()
