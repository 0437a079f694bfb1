"""Residual networks (He et al. 2016) of any width, for plane images and volumes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.layers import Classifier, centred, check_shape, normalisation

_SMALL = 64  #: below this side the stem keeps the resolution
_BLOCKS = {10: 1, 18: 2}  #: residual blocks in each of the four stages, by depth


class ResNet(Classifier):
    """Four stages of residual blocks (two convolutions 3 wide), global average pooling, a linear layer.

    The stem is that of the paper (7 wide, stride 2, then max pooling); images below 64 px get one convolution
    3 wide that keeps the resolution, as is usual for 28 and 32 px.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        width: Channels of the first stage, doubled at every later one; 64 in the paper, and 16 is about 15 times
            faster.
        depth: 10 or 18 layers; ``0`` stands for 10.
        norm: See :func:`medistill.networks.layers.normalisation`; ``"batch"`` is for methods defined by it.

    Raises:
        ConfigError: If the depth or ``norm`` is unknown, or the images are below 8 px.

    References:
        He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385.
    """

    def __init__(
        self,
        task: Task,
        image_shape: tuple[int, ...],
        *,
        width: int = 16,
        depth: int = 0,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        if (depth or 10) not in _BLOCKS:
            raise ConfigError(f"Expected depth {' or '.join(map(str, _BLOCKS))} for a ResNet, got {depth}.")
        channels, sides = check_shape("resnet", image_shape, smallest=8, volumes=True)
        plane = len(sides) == 2
        self.stem = _stem(channels, width, norm, plane=plane, small=min(sides) < _SMALL)
        stages: list[nn.Module] = []
        before = width
        for stage in range(4):
            after = width << stage
            for block in range(_BLOCKS[depth or 10]):
                stride = 2 if stage and not block else 1
                stages.append(_Block(before, after, stride=stride, norm=norm, plane=plane))
                before = after
        self.stages = nn.Sequential(*stages)
        self.feature_count = before
        self.head = nn.Linear(before, task.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        """Embedding before the linear layer, shape ``(n, feature_count)``."""
        hidden: Tensor = self.stages(self.stem(centred(images)))
        return hidden.flatten(2).mean(2)


class ResNet18(ResNet):
    """The paper's network of 18 layers and 64 channels, with instance normalisation."""

    def __init__(self, task: Task, image_shape: tuple[int, ...]) -> None:
        super().__init__(task, image_shape, width=64, depth=18)


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution 1 wide where the shape changes."""

    def __init__(self, before: int, after: int, *, stride: int, norm: str, plane: bool) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride=stride, plane=plane)
        self.first_norm = normalisation(norm, after, plane=plane)
        self.second = _convolution(after, after, 3, stride=1, plane=plane)
        self.second_norm = normalisation(norm, after, plane=plane)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                _convolution(before, after, 1, stride=stride, plane=plane), normalisation(norm, after, plane=plane)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(hidden)))
        return F.relu(self.second_norm(self.second(inner)) + self.shortcut(hidden))


def _stem(channels: int, width: int, norm: str, *, plane: bool, small: bool) -> nn.Sequential:
    if small:
        convolution = _convolution(channels, width, 3, stride=1, plane=plane)
        return nn.Sequential(convolution, normalisation(norm, width, plane=plane), nn.ReLU())
    convolution = _convolution(channels, width, 7, stride=2, plane=plane)
    pool = nn.MaxPool2d if plane else nn.MaxPool3d
    return nn.Sequential(
        convolution, normalisation(norm, width, plane=plane), nn.ReLU(), pool(3, stride=2, padding=1)
    )


def _convolution(before: int, after: int, size: int, *, stride: int, plane: bool) -> nn.Module:
    kind = nn.Conv2d if plane else nn.Conv3d
    return kind(before, after, size, stride=stride, padding=size // 2, bias=False)
