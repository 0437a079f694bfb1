"""Losses between logits and soft labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from medistill.core.task import TaskKind


def objective(kind: TaskKind, logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean loss over a batch.

    Cross-entropy :math:`-\sum_c y_c \log p_c` for one label an image, and binary cross-entropy per class for
    multilabel tasks.

    Args:
        kind: Kind of the task.
        logits: Shape ``(n, k)``.
        targets: Shape ``(n, k)``, probabilities.
    """
    if kind is TaskKind.MULTILABEL:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def probabilities(kind: TaskKind, logits: Tensor) -> Tensor:
    """Class probabilities of shape ``(n, k)``."""
    return logits.sigmoid() if kind is TaskKind.MULTILABEL else logits.softmax(1)
