"""Gradients of single images, for clipping them patient by patient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medistill.core.protocols import Loss
from medistill.errors import PrivacyError
from medistill.privacy.layerwise import LayerGradients, Unsupported

#: Most images at a time, and most numbers that their gradients may take.
_CHUNK, _NUMBERS = 16, 1 << 25
_PROBES = 2


def check_independent(network: nn.Module) -> None:
    """Refuse layers that tie the images of a batch together or keep statistics of them.

    Raises:
        PrivacyError: If the network has batch normalisation, or normalisation with running statistics.
    """
    for layer in network.modules():
        batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if batch or getattr(layer, "track_running_stats", False):
            raise PrivacyError(
                f"{type(layer).__name__} ties the images of a batch together and keeps statistics of them, which "
                "no clipping bounds. Use norm='instance' or norm='group'."
            )


class ImageGradients:
    """Gradients of a network's trainable parameters, one flat row per image.

    Every image goes through the network alone (``vmap`` of ``grad``). Where taking a batch layer by layer gives
    the same rows on made-up images, which also shows that nothing ties images together, that is done: it is
    faster.

    Args:
        network: Nothing in it may tie images together.
        loss: One loss per image.
        image_shape: Shape of one image.

    Raises:
        PrivacyError: If the network ties images together.
    """

    def __init__(self, network: nn.Module, loss: Loss, image_shape: tuple[int, ...]) -> None:
        check_independent(network)
        self._network, self._loss = network, loss
        named = dict(network.named_parameters())
        self.trained = {name: value.detach() for name, value in named.items() if value.requires_grad}
        if not self.trained:
            raise PrivacyError("Expected a network with trainable parameters; there is nothing to differentiate.")
        self._fixed = {name: value.detach() for name, value in named.items() if not value.requires_grad}
        self._fixed |= dict(network.named_buffers())
        self._fast = self._layer_by_layer(image_shape)

    @property
    def numbers(self) -> int:
        """Length of a row."""
        return sum(value.numel() for value in self.trained.values())

    @property
    def chunk(self) -> int:
        """Images at a time that keep memory small."""
        return max(1, min(_CHUNK, _NUMBERS // self.numbers))

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Rows for images on the CPU, shape ``(n, numbers)``."""
        device = next(iter(self.trained.values())).device
        rows = self._fast or self._alone
        return rows(images.to(device), targets.to(device))

    @property
    def layer_by_layer(self) -> bool:
        """Whether the faster way is taken."""
        return self._fast is not None

    def _layer_by_layer(self, image_shape: tuple[int, ...]) -> LayerGradients | None:
        """The faster way, if it is one for this network."""
        sample = next(iter(self.trained.values()))
        images = torch.rand((_PROBES, *image_shape), generator=torch.Generator().manual_seed(0)).to(sample)
        try:
            fast = LayerGradients(self._network, self._loss, list(self.trained), {**self.trained, **self._fixed})
            with torch.no_grad():
                classes = self._network(images).shape[1]
            targets = torch.eye(classes)[torch.arange(_PROBES) % classes].to(sample)
            found, expected = fast(images, targets), self._alone(images, targets)
        except (Unsupported, RuntimeError):
            return None
        return fast if (found - expected).abs().max() <= 1e-3 * expected.abs().max() else None

    def _alone(self, images: Tensor, targets: Tensor) -> Tensor:
        per_image = vmap(grad(self._one), in_dims=(None, 0, 0), randomness="different")
        found: Mapping[str, Tensor] = per_image(self.trained, images, targets)
        return torch.cat([found[name].flatten(1) for name in self.trained], dim=1)

    def _one(self, trained: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(self._network, {**trained, **self._fixed}, (image[None],))
        return self._loss(logits, target[None]).sum()

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """A flat row as one tensor for each parameter, on its device."""
        parts = torch.split(row, [value.numel() for value in self.trained.values()])
        return {
            name: part.view_as(value).to(value)
            for (name, value), part in zip(self.trained.items(), parts, strict=True)
        }
