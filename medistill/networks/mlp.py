"""A perceptron on pixels: the network without any knowledge of images."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.layers import Classifier, check_shape


class MLP(Classifier):
    """``depth`` layers of ``width`` units with ReLU; a linear layer.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        width: Units of every hidden layer.
        depth: Hidden layers.

    Raises:
        ConfigError: If the shape has other axes, or there is no hidden layer.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        channels, sides = check_shape("mlp", image_shape, smallest=1, volumes=True)
        if depth < 1:
            raise ConfigError(f"mlp: expected depth >= 1, got {depth}.")
        widths = (channels * math.prod(sides), *[width] * depth)
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.feature_count = width
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(width, task.n_classes)
