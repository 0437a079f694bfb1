"""What one patient adds to an answer: bounded, whatever the patient's images are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medistill.errors import PrivacyError

#: The grid that contributions lie on is at most this part of the clip norm.
GRID = 2.0**-24
_INSIDE = 1 - 1e-12


def check_clip_norm(clip_norm: float) -> None:
    """Refuse a clip norm that bounds nothing.

    Raises:
        PrivacyError: If it is not positive and finite.
    """
    if not (isinstance(clip_norm, int | float) and 1e-30 < clip_norm < 1e30):
        raise PrivacyError(
            f"A private answer needs a clip norm that is positive and finite, got {clip_norm!r}. "
            "Choose it from public knowledge, such as the length of rows of public images."
        )


def clipped(rows: Tensor, clip_norm: float) -> Tensor:
    """Rows whose l2 norm is at most ``clip_norm``, in double precision; directions are kept.

    A row with a value that is not finite becomes zero: the patient takes part, and adds nothing.

    Args:
        rows: One per patient, shape ``(n, d)``.
        clip_norm: Public bound.
    """
    rows, inside = rows.double(), clip_norm * _INSIDE
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if torch.isfinite(norms).all():  # squares that vanish belong to rows far shorter than any clip norm
        return rows * torch.where(norms > inside, inside / norms, 1.0)
    rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0.0)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    norms = largest * torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True)  # squares cannot overflow
    return torch.where(norms > inside, rows / norms * inside, rows)


def grid_step(clip_norm: float) -> float:
    """Width of the grid: a power of two, so that moving to it and back is exact."""
    return 2.0 ** math.floor(math.log2(clip_norm * GRID))


def on_grid(rows: Tensor, step: float) -> Tensor:
    """Whole multiples of ``step``, cut towards zero so that no row becomes longer; sums of them are exact.

    Args:
        rows: Shape ``(n, d)``, double precision.
        step: A power of two.
    """
    return torch.trunc(rows / step).to(torch.int64)
