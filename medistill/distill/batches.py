"""Random real images by class."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from medistill.core.images import ImageSet


def class_batch(real: ImageSet, label: int, count: int, generator: Generator) -> Tensor:
    """Positions of ``count`` images that have a label, drawn with replacement, shape ``(count,)``."""
    members = (real.targets[:, label] > 0.5).nonzero().flatten()
    return members[torch.randint(len(members), (count,), generator=generator)]


def balanced_batch(real: ImageSet, per_class: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images and targets, equally many of every class, drawn with replacement."""
    drawn = [class_batch(real, label, per_class, generator) for label in range(real.task.n_classes)]
    index = torch.cat(drawn)
    return real.images[index], real.targets[index]
