"""Searches of a release's pictures that some images give no power to; those then count as not tested."""

from __future__ import annotations

from medistill.audit.attack import Exposed
from medistill.audit.edited_copies import search_edited
from medistill.audit.policy import RECONSTRUCTING
from medistill.audit.pool import Pool
from medistill.audit.reconstruction import NAME, search_portraits
from medistill.core.compute import Compute
from medistill.core.reports import AttackOutcome
from medistill.errors import DataError

Found = tuple[list[AttackOutcome], dict[str, str]]


def search_further(
    release: Exposed,
    control: Exposed,
    *,
    control_name: str,
    pool: Pool,
    profile: str,
    seed: int,
    compute: Compute,
) -> Found:
    """Search for edited copies, and for patients in all pictures of a class together.

    Args:
        release: What is audited.
        control: A release of patients of whom none is a candidate.
        control_name: What that is, in words.
        pool: Who is attacked, and who stands beside them.
        profile: Of the audit's policy.
        seed: Public seed.
        compute: Device of networks.

    Returns:
        What the searches found, and by name why the others say nothing.
    """
    found, unable = _edited(release, control, control_name, pool, seed)
    if profile not in RECONSTRUCTING:
        return found, {**unable, NAME: f"the profile {profile} does not try it"}
    try:
        portraits = search_portraits(
            release, control, control_name=control_name, pool=pool, seed=seed, compute=compute
        )
    except DataError as error:
        return found, {**unable, NAME: str(error)}
    known = portraits.controls[0]
    if not known.passed:
        why = "too few patients, or too much alike, to recognise one even where pictures are made of nobody else"
        return found, {**unable, NAME: f"{why} ({known.observed})"}
    return [*found, portraits], unable


def _edited(release: Exposed, control: Exposed, control_name: str, pool: Pool, seed: int) -> Found:
    edits = search_edited(release, control, control_name=control_name, pool=pool, seed=seed)
    failed = [control for control in edits.controls if not control.passed]
    if not failed:
        return [edits], {}
    known = failed[0].name.partition(": ")[2]
    why = f"such edits cannot be recognised on these images ({known}: {failed[0].observed})"
    return [], {edits.attack: why}
