"""Random real images by class."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from medistill.core.images import ImageSet
from medistill.core.task import TaskKind
from medistill.errors import DataError


def has_label(real: ImageSet, label: int) -> Tensor:
    """Which images have a label, shape ``(n,)``."""
    if real.task.kind is TaskKind.MULTILABEL:
        return real.targets[:, label] > 0.5
    return real.classes == label


def members(real: ImageSet, label: int) -> Tensor:
    """Positions of the images that have a label.

    Raises:
        DataError: If there are none.
    """
    found = has_label(real, label).nonzero().flatten()
    if not len(found):
        raise DataError(
            f"Class {real.task.class_names[label]!r} has no image among those to distil: expected at least one of "
            "every class. Leave the class out of the task, or split the patients again."
        )
    return found


def groups(real: ImageSet) -> list[Tensor]:
    """Positions of the images of every class, and last of those without any label, where there are such.

    Only in a multilabel task can an image have no label.

    Raises:
        DataError: If a class has no image.
    """
    found = [members(real, label) for label in range(real.task.n_classes)]
    if real.task.kind is TaskKind.MULTILABEL:
        without = (real.targets <= 0.5).all(1).nonzero().flatten()
        found += [without] if len(without) else []
    return found


def class_batch(real: ImageSet, label: int, count: int, generator: Generator) -> Tensor:
    """Positions of ``count`` images that have a label, drawn with replacement, shape ``(count,)``."""
    return _drawn(members(real, label), count, generator)


def balanced_batch(real: ImageSet, per_class: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images and targets, equally many of every class, drawn with replacement.

    In a multilabel task images without any label count as one more class: a network that never sees a healthy
    patient cannot know one.
    """
    index = torch.cat([_drawn(group, per_class, generator) for group in groups(real)])
    return real.images[index], real.targets[index]


def _drawn(positions: Tensor, count: int, generator: Generator) -> Tensor:
    return positions[torch.randint(len(positions), (count,), generator=generator)]
