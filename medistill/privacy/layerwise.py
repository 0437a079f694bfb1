r"""Gradients of single images from one forward and one backward pass of a whole batch, layer by layer.

The gradient of a weight is a product of what comes into its layer and of the gradient of what comes out. Both are
there for every image, so only the products are taken image by image; the gradients summed over the batch, which
automatic differentiation would add, are never computed. Convolutions are taken as one matrix product for each
position of their window: fewer bytes than unfolding the window, which is what Opacus does.

Networks of other layers take the general way of :mod:`medistill.privacy.gradients`.

References:
    Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from medistill.core.protocols import Loss

_FEW_CHANNELS = 8  # with fewer, unfolding the window is faster


class Unsupported(Exception):  # noqa: N818 - an outcome: the general way is taken
    """The network has layers of other kinds, or uses one twice."""


class LayerGradients:
    """Per-image gradients of a network of plane convolutions, linear layers and group normalisation.

    Args:
        network: Nothing in it may tie images together.
        loss: One loss per image.
        trained: Names of the parameters to differentiate.
        values: All parameters and buffers, detached.

    Raises:
        Unsupported: If a parameter is in another kind of layer.
    """

    def __init__(self, network: nn.Module, loss: Loss, trained: list[str], values: Mapping[str, Tensor]) -> None:
        self._network, self._loss, self._trained, self._values = network, loss, trained, dict(values)
        self._layers: dict[nn.Module, str] = {}
        for prefix, layer in network.named_modules():
            if any(f"{prefix}.{own}".lstrip(".") in trained for own, _ in layer.named_parameters(recurse=False)):
                if not _supported(layer):
                    raise Unsupported
                self._layers[layer] = f"{prefix}.".lstrip(".")

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Rows for images, shape ``(n, numbers)``.

        Raises:
            Unsupported: If a layer is used more than once, or not at all.
        """
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            if layer in seen:
                raise Unsupported
            if not output.requires_grad:
                output.requires_grad_()
            seen[layer] = (inputs[0].detach(), output)

        hooks = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            with torch.enable_grad():
                losses = self._loss(functional_call(self._network, self._values, (images,)), targets)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) < len(self._layers):
            raise Unsupported
        coming_out = torch.autograd.grad(losses.sum(), [output for _, output in seen.values()])
        found: dict[str, Tensor] = {}
        for (layer, (coming_in, _)), gradient in zip(seen.items(), coming_out, strict=True):
            found.update(_rows(layer, self._layers[layer], coming_in, gradient))
        return torch.cat([found[name].flatten(1) for name in self._trained], dim=1)


def _supported(layer: nn.Module) -> bool:
    """Whether the products of a layer are known; a subclass may do something else."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, nn.GroupNorm)


def _rows(layer: nn.Module, name: str, coming_in: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, nn.Conv2d):
        bias = gradient.flatten(2).sum(2)
        return {f"{name}weight": _convolution(layer, coming_in, gradient), f"{name}bias": bias}
    if isinstance(layer, nn.GroupNorm):
        normed = F.group_norm(coming_in, layer.num_groups, eps=layer.eps)
        places = (len(gradient), layer.num_channels, -1)
        weight, bias = (gradient * normed).reshape(places).sum(2), gradient.reshape(places).sum(2)
        return {f"{name}weight": weight, f"{name}bias": bias}
    of_tokens, into = (part.reshape(len(part), -1, part.shape[-1]) for part in (gradient, coming_in))
    return {f"{name}weight": of_tokens.transpose(1, 2) @ into, f"{name}bias": of_tokens.sum(1)}


def _convolution(layer: nn.Conv2d, images: Tensor, gradient: Tensor) -> Tensor:
    """Shape ``(n, channels out, channels in, rows, columns)``."""
    (high, wide), (top, left) = layer.kernel_size, (int(layer.padding[0]), int(layer.padding[1]))
    shape = (len(images), layer.out_channels, layer.in_channels, high, wide)
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1)
    if not plain or layer.in_channels < _FEW_CHANNELS:
        places = F.unfold(images, (high, wide), layer.dilation, (top, left), layer.stride)
        return (gradient.flatten(2) @ places.transpose(1, 2)).view(shape)
    # With the gradient padded to the same row length, moving the window by one is an offset in flat memory.
    side, down = images.shape[-1] + 2 * left, gradient.shape[-2]
    moved = F.pad(gradient, (0, side - gradient.shape[-1])).flatten(2)
    flat = F.pad(images, (left, left, top, top + 1)).flatten(2)
    found = images.new_empty(len(images), high, wide, layer.out_channels, layer.in_channels)
    for i in range(high):
        for j in range(wide):
            first = i * side + j
            found[:, i, j] = moved @ flat[:, :, first : first + down * side].transpose(1, 2)
    return found.permute(0, 3, 4, 1, 2)
