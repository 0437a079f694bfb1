"""Stopping a distillation that has diverged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from medistill.errors import DataError


def check_finite(parts: Iterable[Tensor], *, distiller: str, step: int, remedy: str) -> None:
    """Refuse to go on from numbers that are not finite, before they spoil what was learned and kept.

    Args:
        parts: Loss and gradients of one step.
        distiller: Registered name, for the message.
        step: Number of the step.
        remedy: Which settings to change, and how.

    Raises:
        DataError: If a number is not finite.
    """
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise DataError(
            f"{distiller} diverged at step {step}: expected a finite loss and gradients, found others. {remedy}"
        )
