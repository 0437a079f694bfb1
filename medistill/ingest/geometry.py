"""Images of any size made square.

Resizing uses the triangle filter (``PIL.Image.BILINEAR``), widened when shrinking. It averages all source pixels,
so there is no aliasing, and never leaves the range of its input, so there is no ringing at sharp edges as with
Lanczos. :meth:`medistill.core.cohort.Cohort.images` uses the same filter later. An image that already has the
wanted size is not touched.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 65535


class Fit(StrEnum):
    """How an oblong image becomes square."""

    PAD = "pad"  #: whole image, aspect kept, black borders
    CROP = "crop"  #: centre, aspect kept
    STRETCH = "stretch"  #: whole image, aspect not kept


def fit_square(image: NDArray[np.float32], size: int, fit: Fit) -> NDArray[np.uint16]:
    """Resize to a square.

    Args:
        image: Grey levels in ``[0, 1]``, shape ``(h, w)``.
        size: Side length of the result.
        fit: What to do with an oblong image.

    Returns:
        Shape ``(size, size)``; 0 is black and 65535 is white.
    """
    if fit is Fit.CROP:
        image = _centre_square(image)
    height, width = image.shape
    longest = max(height, width)
    shape = (size, size)
    if fit is Fit.PAD:
        shape = max(1, round(size * height / longest)), max(1, round(size * width / longest))
    levels = quantise(_resize(image, shape))
    if shape == (size, size):
        return levels
    square = np.zeros((size, size), dtype=np.uint16)
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    square[top : top + shape[0], left : left + shape[1]] = levels
    return square


def quantise(image: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Grey levels in ``[0, 1]`` as 16-bit integers; an 8-bit level ``k`` becomes exactly ``257 k``."""
    levels: NDArray[np.uint16] = np.rint(np.clip(image, 0, 1) * np.float32(WHITE)).astype(np.uint16)
    return levels


def _centre_square(image: NDArray[np.float32]) -> NDArray[np.float32]:
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _resize(image: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    if image.shape == shape:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR), dtype=np.float32)
