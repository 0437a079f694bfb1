"""Random convolutional features under a linear layer that is solved, not trained: a diagnosis in a second."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.networks.layers import Classifier, check_shape


class RidgeConvNet(Classifier):
    r"""Several ConvNets that stay as they were drawn, side by side, and one linear layer on all their features.

    :func:`medistill.training.fit.fit` sees ``ridge`` and solves the linear layer by ridge regression instead of
    descending along gradients: one pass over the images, whatever their schedule. These are the predictors that
    ``kernel_ridge`` distils images for; random features by Rahimi & Recht, with convolutions.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        members: ConvNets; more than four change little.
        width: Channels of every block of each.
        depth: Blocks, see :class:`medistill.networks.convnet.ConvNet`.
        ridge: Penalty :math:`\lambda` relative to the mean square of the features.

    Raises:
        ConfigError: If the image is too small, or ``members`` or ``ridge`` is not above 0.

    References:
        Rahimi A., Recht B. Random Features for Large-Scale Kernel Machines. NeurIPS 2007.
    """

    def __init__(
        self,
        task: Task,
        image_shape: tuple[int, ...],
        *,
        members: int = 4,
        width: int = 32,
        depth: int = 0,
        ridge: float = 1e-2,
    ) -> None:
        super().__init__()
        check_shape("ridge_convnet", image_shape, smallest=8, volumes=True)
        if members < 1 or ridge <= 0:
            raise ConfigError(f"ridge_convnet: expected members >= 1 and ridge > 0, got {members} and {ridge}.")
        self.ridge = ridge
        made = [ConvNet(task, image_shape, width=width, depth=depth) for _ in range(members)]
        self.feature_count = sum(member.feature_count for member in made)
        for member in made:
            del member.head
        self.members = nn.ModuleList(made)
        self.head = nn.Linear(self.feature_count, task.n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Embeddings of all members side by side, shape ``(n, feature_count)``."""
        return torch.cat([cast(ConvNet, member).features(images) for member in self.members], dim=1)
