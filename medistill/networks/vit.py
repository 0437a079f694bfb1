"""A small vision transformer."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.networks.layers import Classifier, centred, check_shape, normalisation


class ViT(Classifier):
    """Patches, embedded with their position, through ``depth`` transformer blocks; their mean; a linear layer.

    As in compact transformers for few images: patches are embedded by convolutions instead of one matrix,
    positions are sines, there is no class token and no dropout, and layers are normalised first. Attention is
    written out, so that it can be differentiated twice. Patches are 4 px wide at 28 px and twice as wide for each
    doubling.

    Args:
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` for plane images, ``(c, d, h, w)`` for volumes.
        width: Length of a patch's embedding, a multiple of ``heads``.
        depth: Transformer blocks.
        heads: Attention heads.
        stem: How patches are embedded: ``"convolution"`` (blocks of convolution, normalisation within the image,
            ReLU and average pooling) or ``"patch"`` (one matrix, as in the first vision transformer; on twenty
            images it learns little).

    Raises:
        ConfigError: If the shape has other axes, or settings do not fit each other.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929; Hassani et al. 2021 (compact transformers), arXiv:2104.05704.
    """

    _positions: Tensor

    def __init__(
        self,
        task: Task,
        image_shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        stem: str = "convolution",
    ) -> None:
        super().__init__()
        channels, sides = check_shape("vit", image_shape, smallest=8, volumes=True)
        if width < 2 * len(sides) or width % heads:
            raise ConfigError(f"vit: expected a width that heads ({heads}) divide, got {width}.")
        halvings = max(1, round(math.log2(min(sides) / 8)))
        self.embed = _stem(stem, channels, width, halvings, plane=len(sides) == 2)
        grid = tuple(side >> halvings for side in sides)
        self.register_buffer("_positions", _positions(grid, width), persistent=False)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.feature_count = width
        self.head = nn.Linear(width, task.n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Mean over the patches before the linear layer, shape ``(n, feature_count)``."""
        tokens = self.embed(centred(images)).flatten(2).transpose(1, 2) + self._positions
        embedding: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return embedding


def _stem(stem: str, channels: int, width: int, halvings: int, *, plane: bool) -> nn.Module:
    convolution = nn.Conv2d if plane else nn.Conv3d
    if stem == "patch":
        return convolution(channels, width, 1 << halvings, stride=1 << halvings)
    if stem != "convolution":
        raise ConfigError(f"vit: expected stem 'convolution' or 'patch', got {stem!r}.")
    pool = nn.AvgPool2d if plane else nn.AvgPool3d
    widths = [channels, *[width // 2] * (halvings - 1), width]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [convolution(before, after, 3, padding=1), normalisation("instance", after), nn.ReLU(), pool(2)]
    return nn.Sequential(*layers)


class _Block(nn.Module):
    """Attention between patches, then a perceptron on each; both on normalised input, added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        n, count, width = tokens.shape
        rows = self.queries_keys_values(self.norm1(tokens)).view(n, count, 3, self.heads, width // self.heads)
        queries, keys, values = rows.permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
        tokens = tokens + self.out((weights @ values).transpose(1, 2).reshape(n, count, width))
        summed: Tensor = tokens + self.perceptron(self.norm2(tokens))
        return summed


def _positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Sines and cosines of every axis of the grid, shape ``(patches, width)``."""
    each = width // (2 * len(grid))
    frequencies = 1e4 ** -(torch.arange(each) / each)
    axes = torch.meshgrid(*(torch.arange(count).float() for count in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return F.pad(waves, (0, width - waves.shape[1]))
