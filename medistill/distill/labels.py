"""Soft labels as scores that a gradient may change freely."""

from __future__ import annotations

from torch import Tensor

from medistill.core.task import TaskKind

#: Labels of one image of a multilabel task that fit the clip norm of a private sum; rows with more are shortened.
MOST_LABELS = 3


def label_scores(soft_labels: Tensor, kind: TaskKind, *, confidence: float) -> Tensor:
    """Scores whose :func:`medistill.training.objectives.probabilities` are the labels, kept away from 0 and 1.

    Args:
        soft_labels: Shape ``(m, k)``.
        kind: Kind of the task.
        confidence: What a label of 1 becomes; what is left is shared by the other classes.

    Returns:
        Scores of the same shape.
    """
    multilabel = kind is TaskKind.MULTILABEL
    other = (1 - confidence) / (1 if multilabel else soft_labels.shape[1] - 1)
    labels = other + (confidence - other) * soft_labels
    return labels.logit() if multilabel else labels.log()
