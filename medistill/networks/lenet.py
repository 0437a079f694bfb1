"""LeNet-5 with ReLU and maximum pooling, as cross-architecture tables of dataset distillation use it."""

from __future__ import annotations

import math

from torch import nn

from medistill.core.task import Task
from medistill.networks.layers import Classifier, check_shape

_SIDE = 5  #: of the last feature maps; exactly what is left of 28 px


class LeNet(Classifier):
    """Two blocks of convolution (5 wide), ReLU and pooling (2 wide), then layers of 120 and 84 units.

    The feature maps are averaged to 5 wide, so that images of any size are taken; at 28 px this changes nothing.
    There is no normalisation, as in the literature.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        width: Channels of the first block; the others keep their proportions.

    Raises:
        ConfigError: If the images are too small or have other axes.

    References:
        LeCun et al. 1998, Gradient-based learning applied to document recognition.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, width: int = 6) -> None:
        super().__init__()
        channels, sides = check_shape("lenet", image_shape, smallest=12, volumes=True)
        plane, second = len(sides) == 2, round(width * 16 / 6)
        convolution = nn.Conv2d if plane else nn.Conv3d
        pool = nn.MaxPool2d if plane else nn.MaxPool3d
        average = nn.AdaptiveAvgPool2d if plane else nn.AdaptiveAvgPool3d
        self.feature_count = 14 * width
        self.body = nn.Sequential(
            convolution(channels, width, 5, padding=2), nn.ReLU(), pool(2),
            convolution(width, second, 5), nn.ReLU(), pool(2),
            average(_SIDE), nn.Flatten(),
            nn.Linear(second * math.prod([_SIDE] * len(sides)), 20 * width), nn.ReLU(),
            nn.Linear(20 * width, self.feature_count), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.feature_count, task.n_classes)
