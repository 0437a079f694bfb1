"""AlexNet for small images, as cross-architecture tables of dataset distillation use it."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from medistill.core.task import Task
from medistill.networks.layers import Classifier, check_shape, normalisation

_SIDE = 3  #: of the last feature maps; exactly what is left of 28 px


class AlexNet(Classifier):
    """Five convolutions with ReLU, pooled after the first, second and fifth; a linear layer.

    The feature maps are averaged to 3 wide, so that images of any size are taken; at 28 px this changes nothing.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)``.
        width: Channels of the first convolution; the others have 1.5, 2, 1.5 and 1.5 times as many. The literature
            takes 128; 32 is about 15 times faster.
        norm: ``"group"``, ``"instance"``, ``"batch"``, or ``"none"`` as in the literature.

    Raises:
        ConfigError: If the images are too small or volumes, or ``norm`` is unknown.

    References:
        Krizhevsky et al. 2012; in this small form Zhao et al. 2021 (gradient matching), arXiv:2006.05929.
    """

    def __init__(
        self, task: Task, image_shape: tuple[int, ...], *, width: int = 32, norm: str = "instance"
    ) -> None:
        super().__init__()
        channels, _ = check_shape("alexnet", image_shape, smallest=8, volumes=False)
        widths = (channels, width, width * 3 // 2, width * 2, width * 3 // 2, width * 3 // 2)
        layers: list[nn.Module] = []
        for block, (before, after) in enumerate(pairwise(widths)):
            side = 5 if block < 2 else 3
            layers += [nn.Conv2d(before, after, side, padding=side // 2), normalisation(norm, after), nn.ReLU()]
            if block in (0, 1, 4):
                layers.append(nn.MaxPool2d(2))
        self.feature_count = widths[-1] * _SIDE**2
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten())
        self.head = nn.Linear(self.feature_count, task.n_classes)
