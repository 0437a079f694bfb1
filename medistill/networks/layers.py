"""What networks share: a head on features, the check of the shape, the scaling of pixels, normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from medistill.errors import ConfigError

_PLANE = 3  #: length of the shape of a plane image, ``(c, h, w)``
NORMS = ("instance", "group", "batch", "none")


class Classifier(nn.Module):
    """A linear ``head`` on features, which are those of ``body`` where a network says nothing else."""

    body: nn.Module
    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """Embedding before the last layer, shape ``(n, feature_count)``."""
        embedding: Tensor = self.body(centred(images))
        return embedding

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(n, k)`` for images in ``[0, 1]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def check_shape(
    network: str, image_shape: tuple[int, ...], *, smallest: int, volumes: bool
) -> tuple[int, tuple[int, ...]]:
    """Refuse images that a network cannot take.

    Args:
        network: Registered name, for the message.
        image_shape: ``(c, h, w)``, or ``(c, d, h, w)`` for volumes.
        smallest: Shortest side that the network can take.
        volumes: Whether it takes volumes.

    Returns:
        Channels and sides.

    Raises:
        ConfigError: If the shape has other axes or a side is too short.
    """
    expected = "(c, h, w) or (c, d, h, w)" if volumes else "(c, h, w)"
    if len(image_shape) not in (_PLANE, *((_PLANE + 1,) if volumes else ())) or min(image_shape) < 1:
        remedy = "" if volumes else " For volumes take convnet, lenet, mlp or vit."
        raise ConfigError(f"{network}: expected images of shape {expected}, got {tuple(image_shape)}.{remedy}")
    if min(image_shape[1:]) < smallest:
        raise ConfigError(
            f"{network}: expected sides of at least {smallest} px, got {min(image_shape[1:])}. "
            "Choose a larger image size, or another network."
        )
    return image_shape[0], tuple(image_shape[1:])


def centred(images: Tensor) -> Tensor:
    """Pixels in ``[0, 1]`` moved to about ``[-2, 2]``."""
    return (images - 0.5) / 0.25


def normalisation(norm: str, width: int, *, plane: bool = True) -> nn.Module:
    """A layer that normalises ``width`` channels.

    Args:
        norm: ``"instance"``, ``"group"`` (groups of 8 channels), ``"batch"`` or ``"none"``.
        width: Channels.
        plane: Whether images are plane.

    Raises:
        ConfigError: If ``norm`` is unknown.
    """
    if norm not in NORMS:
        raise ConfigError(f"Expected norm to be one of {', '.join(NORMS)}, got {norm!r}.")
    if norm == "batch":
        return nn.BatchNorm2d(width) if plane else nn.BatchNorm3d(width)
    if norm == "none":
        return nn.Identity()
    groups = width if norm == "instance" else next(n for n in range(max(1, width // 8), 0, -1) if width % n == 0)
    return nn.GroupNorm(groups, width)
