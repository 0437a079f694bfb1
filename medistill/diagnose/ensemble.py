"""Several networks that give one calibrated answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medistill.core.task import Task, TaskKind
from medistill.networks.layers import Classifier
from medistill.registry import NETWORKS
from medistill.training.objectives import probabilities


class Ensemble(nn.Module):
    r"""The mean of calibrated probabilities, :math:`\frac1n \sum_i \sigma(z_i / T)`, as one network.

    :math:`z_i` are the logits of a member, :math:`T` the temperature, :math:`\sigma` the softmax, or the sigmoid
    of each class for a multilabel task.

    Args:
        members: Trained networks of one kind.
        kind: Kind of the task.
        temperature: Divides the logits; above 1 it makes answers less certain.
    """

    def __init__(self, members: Sequence[Classifier], *, kind: TaskKind, temperature: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.kind, self.temperature = kind, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Calibrated probabilities of shape ``(n, k)`` for images in ``[0, 1]``."""
        answers = [probabilities(self.kind, member(images) / self.temperature) for member in self.members]
        return torch.stack(answers).mean(0)


def empty_ensemble(
    *,
    network: str,
    kind: str,
    class_names: Sequence[str],
    image_shape: Sequence[int],
    students: int = 1,
    temperature: float = 1.0,
) -> Ensemble:
    """An ensemble from plain values, its weights still to be loaded; what a MONAI bundle names as its network.

    Args:
        network: Registered network name.
        kind: Kind of the task.
        class_names: Names of the classes.
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)``.
        students: Number of members.
        temperature: See :class:`Ensemble`.

    Raises:
        ConfigError: If the network is unknown or cannot take the shape.
        DataError: If the classes do not fit the kind.
    """
    task = Task(kind=TaskKind(kind), class_names=tuple(class_names))
    factory = NETWORKS.load(network)
    with torch.random.fork_rng(devices=[]):
        members = [factory(task, tuple(image_shape)) for _ in range(students)]
    return Ensemble(members, kind=task.kind, temperature=temperature).eval()
