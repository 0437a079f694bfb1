"""The ConvNet of the dataset distillation literature (Gidaris & Komodakis 2018; Zhao et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.task import Task
from medistill.errors import ConfigError


class ConvNet(nn.Module):
    """``depth`` blocks of 3x3 convolution, normalisation, ReLU and 2x2 average pooling, then a linear layer.

    Normalisation is per image (``instance``) or per group of channels, never across a batch: batch statistics
    tie patients together and cannot be made private.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)``.
        width: Channels of every block; 32 transfers to wider networks and is 8 times faster than 128.
        depth: Blocks; ``0`` chooses 3 for 28 and 32 px and one more for each doubling.
        norm: ``"instance"``, ``"group"`` (groups of 8 channels) or ``"none"``.

    Raises:
        ConfigError: If the image is too small for the depth or ``norm`` is unknown.
    """

    _pool: Tensor

    def __init__(
        self,
        task: Task,
        image_shape: tuple[int, ...],
        *,
        width: int = 32,
        depth: int = 0,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        channels, height, side = image_shape
        depth = depth or max(1, round(math.log2(min(height, side) / 28)) + 3)
        groups = {"instance": width, "group": max(1, width // 8), "none": 0}
        if norm not in groups:
            raise ConfigError(f"Expected norm 'instance', 'group' or 'none', got {norm!r}.")
        if min(height, side) >> depth < 1:
            raise ConfigError(f"Images of {height} px are too small for a ConvNet of depth {depth}.")
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels if block == 0 else width, width, 3, padding=1) for block in range(depth)
        )
        self.norms = nn.ModuleList(
            nn.GroupNorm(groups[norm], width) if groups[norm] else nn.Identity() for _ in range(depth)
        )
        # The same average as avg_pool2d; a depthwise convolution trains up to 1.5 times faster on a CPU.
        self.register_buffer("_pool", torch.full((width, 1, 2, 2), 0.25), persistent=False)
        self.feature_count = width * (height >> depth) * (side >> depth)
        self.head = nn.Linear(self.feature_count, task.n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Embedding before the linear layer, shape ``(n, feature_count)``."""
        hidden = (images - 0.5) / 0.25
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.relu(norm(convolution(hidden)))
            hidden = F.conv2d(hidden, self._pool, stride=2, groups=len(self._pool))
        return hidden.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(n, k)`` for images ``(n, c, h, w)`` in ``[0, 1]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def fresh(factory: type[nn.Module] | object, task: Task, image_shape: tuple[int, ...], seed: int) -> nn.Module:
    """A network initialised from a seed without touching the global random state of the caller.

    Args:
        factory: A :class:`medistill.core.protocols.NetworkFactory`.
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)``.
        seed: Public seed of the initial weights.
    """
    assert callable(factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = factory(task, image_shape)
    assert isinstance(network, nn.Module)
    return network
