"""Larger networks of MONAI and torchvision, from random weights and without anything that ties patients together.

Batch normalisation is replaced by group normalisation, and dropout is off: it would draw from the global random
state, and the same seed would not give the same bits. Images below 64 px are enlarged, because these networks
halve the sides five times.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.layers import Classifier, centred, check_shape, normalisation

_SMALLEST = 64


class _Adapted(Classifier):
    """A foreign body with a linear layer of ours."""

    def __init__(self, task: Task, body: nn.Module, feature_count: int) -> None:
        super().__init__()
        self.body, self.feature_count = body, feature_count
        self.head = nn.Linear(feature_count, task.n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Embedding before the linear layer, shape ``(n, feature_count)``."""
        embedding: Tensor = self.body(centred(_enlarged(images)))
        return embedding


class DenseNet(_Adapted):
    """DenseNet-121 of MONAI, the usual network for chest radiographs; also for volumes.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        norm: ``"group"`` (8 groups), or ``"batch"`` as in the literature.

    References:
        Huang et al. 2017, arXiv:1608.06993; Rajpurkar et al. 2017 (CheXNet), arXiv:1711.05225.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, norm: str = "group") -> None:
        from monai.networks.nets.densenet import DenseNet121  # noqa: PLC0415 - takes seconds to import

        channels, sides = check_shape("densenet121", image_shape, smallest=8, volumes=True)
        layers = {"group": ("group", {"num_groups": 8}), "batch": "batch"}
        if norm not in layers:
            raise ConfigError(f"densenet121: expected norm 'group' or 'batch', got {norm!r}.")
        network: Any = DenseNet121(
            spatial_dims=len(sides), in_channels=channels, out_channels=task.n_classes, norm=layers[norm]
        )
        count = network.class_layers.out.in_features
        super().__init__(task, nn.Sequential(network.features, *list(network.class_layers)[:-1]), count)


class EfficientNet(_Adapted):
    """EfficientNet-B0 of torchvision.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` with one or three channels.
        norm: ``"group"`` (groups of 8 channels) or ``"batch"`` as in the literature.

    References:
        Tan & Le 2019, arXiv:1905.11946.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, norm: str = "group") -> None:
        from torchvision.models import efficientnet_b0  # noqa: PLC0415 - takes seconds to import

        layer = partial(normalisation, norm)
        network = efficientnet_b0(norm_layer=layer, dropout=0.0, stochastic_depth_prob=0.0)
        super().__init__(task, _of_torchvision("efficientnet", network, image_shape), 1280)


class MobileNet(_Adapted):
    """MobileNet-V3 small of torchvision, for devices without much memory.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` with one or three channels.
        norm: ``"group"`` (groups of 8 channels) or ``"batch"`` as in the literature.

    References:
        Howard et al. 2019, arXiv:1905.02244.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, norm: str = "group") -> None:
        from torchvision.models import mobilenet_v3_small  # noqa: PLC0415 - takes seconds to import

        network = mobilenet_v3_small(norm_layer=partial(normalisation, norm), dropout=0.0)
        super().__init__(task, _of_torchvision("mobilenet", network, image_shape), 576)


def _of_torchvision(name: str, network: Any, image_shape: tuple[int, ...]) -> nn.Module:
    """Convolutions and pooling; grey images become three equal channels."""
    channels, _ = check_shape(name, image_shape, smallest=8, volumes=False)
    if channels not in (1, 3):
        raise ConfigError(f"{name}: expected images of 1 or 3 channels, got {channels}.")
    return nn.Sequential(_ThreeChannels(), network.features, network.avgpool, nn.Flatten())


class _ThreeChannels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)


def _enlarged(images: Tensor) -> Tensor:
    """Images whose shortest side is at least 64 px."""
    sides = images.shape[2:]
    if min(sides) >= _SMALLEST:
        return images
    size = [math.ceil(side * _SMALLEST / min(sides)) for side in sides]
    mode = "bilinear" if len(sides) == 2 else "trilinear"
    return F.interpolate(images, size=size, mode=mode, align_corners=False)
