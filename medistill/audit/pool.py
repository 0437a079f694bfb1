"""Who is attacked, and who stands beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medistill.core.images import ImageSet, joined
from medistill.errors import DataError

_FEWEST = 10


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Members and holdout patients together, and everybody else by role.

    Args:
        candidates: Images of all patients who are attacked: as many members as others.
        members: The members among them.
        rest: Images of training patients who are not attacked.
        train: Images of all patients that the release was made from.
        holdout: Images of patients that had no part in it.
        reference: Images of further patients.
    """

    candidates: ImageSet
    members: frozenset[str]
    rest: ImageSet
    train: ImageSet
    holdout: ImageSet
    reference: ImageSet


def require_patients(**parts: ImageSet) -> None:
    """Refuse parts that are too small for an audit, before hours are spent on what could not be audited.

    Args:
        parts: Images by split name.

    Raises:
        DataError: If a part has fewer than ten patients; says how many were found and needed.
    """
    problems = [
        f"{name} has {len(part.unique_patients)}"
        for name, part in parts.items()
        if len(part.unique_patients) < _FEWEST
    ]
    if problems:
        raise DataError(
            f"An audit needs at least {_FEWEST} patients in each part; {', '.join(problems)}. "
            "Ingest more patients or give the part a larger fraction."
        )


def draw_pool(train: ImageSet, holdout: ImageSet, reference: ImageSet, seed: int) -> Pool:
    """Draw the members who are attacked: as many as there are holdout patients, at most half of them all.

    Args:
        train: Images of all patients that the release was made from.
        holdout: Images of patients that had no part in it.
        reference: Images of further patients.
        seed: Public seed.

    Raises:
        DataError: If a part has fewer than ten patients.
    """
    require_patients(train=train, holdout=holdout, validation=reference)
    patients = train.unique_patients
    count = min(len(holdout.unique_patients), len(patients) // 2)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {patients[i] for i in order[:count]}
    return Pool(
        candidates=joined(train.of_patients(chosen), holdout),
        members=frozenset(chosen),
        rest=train.of_patients(set(patients) - chosen),
        train=train,
        holdout=holdout,
        reference=reference,
    )
