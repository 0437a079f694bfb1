"""Images as PNG bytes, for looking at; exact values stay in the tensors."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medistill.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

#: What :func:`picture` shows of a volume, for captions.
MIDDLE_SLICES = "the middle slices across its first, second and third axis, side by side"


def picture(image: Tensor) -> Image:
    """One image as an 8-bit picture.

    Args:
        image: Shape ``(c, h, w)`` or ``(c, d, h, w)`` in ``[0, 1]``. Three channels are shown as colour, any
            other number as the grey mean; of a volume :data:`MIDDLE_SLICES`.

    Returns:
        A Pillow image of mode ``L`` or ``RGB``.

    Raises:
        DataError: If the image has another number of axes.
    """
    from PIL import Image as pillow  # noqa: PLC0415, N813

    if image.ndim == 4:
        image = _middle_slices(image)
    if image.ndim != 3:
        raise DataError(f"Expected an image of shape (c, h, w) or (c, d, h, w), got {image.ndim} axes.")
    levels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    if len(levels) == 3:
        return pillow.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    grey = levels[0] if len(levels) == 1 else levels.float().mean(0).round().to(torch.uint8)
    return pillow.fromarray(grey.contiguous().numpy())


def _middle_slices(volume: Tensor) -> Tensor:
    """Three planes with a white line between them; the first axis, which runs from the feet, points up."""
    _, depth, height, width = volume.shape
    planes = [volume[:, depth // 2], volume[:, :, height // 2].flip(1), volume[:, :, :, width // 2].flip(1)]
    sheet = torch.ones(len(volume), max(depth, height), 2 * width + height + 2)
    left = 0
    for plane in planes:
        sheet[:, : plane.shape[1], left : left + plane.shape[2]] = plane
        left += plane.shape[2] + 1
    return sheet


def encode(drawn: Image) -> bytes:
    """A picture as PNG bytes without any metadata; the same picture gives the same bytes."""
    buffer = BytesIO()
    drawn.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """PNG bytes as a ``data:`` address, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture_source(image: Tensor) -> str:
    """An image of a release as the source of an ``<img>``, see :func:`picture`."""
    return data_uri(encode(picture(image)))
