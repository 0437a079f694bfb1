"""Images of any size made square.

Shrinking an axis from ``n`` to ``m`` pixels takes two steps. First, blocks of ``n // m`` pixels are averaged; a
last, incomplete block is the average of what it holds. Then the triangle filter (``PIL.Image.BILINEAR``) resamples
the rest, by less than a factor of two, over exactly the area of the image. Every source pixel counts, so there is
little aliasing; and no result leaves the range of its input, so there is no ringing at sharp edges as with
Lanczos. Sums of integers are exact. :meth:`medistill.core.cohort.Cohort.images` uses the triangle filter later. An
image that already has the wanted size is not touched.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 65535
_STRIP = 1 << 17  # pixels


class Prepare(Protocol):
    """From a few rows of an image to unsigned integers that are averaged instead, same shape."""

    @property
    def largest(self) -> int:
        """No result is above this."""

    def __call__(self, rows: NDArray[Any], /) -> NDArray[Any]:
        """Values to average."""


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
    return on_square(quantise(fit_inside(image, size, fit)), size)


def fit_inside(image: NDArray[Any], size: int, fit: Fit, prepare: Prepare | None = None) -> NDArray[np.float32]:
    """Resize values of any range so that they fill a square or, with ``PAD``, its middle.

    Args:
        image: Shape ``(h, w)``, numbers that float32 can hold.
        size: Side length of the square.
        fit: What to do with an oblong image.
        prepare: Applied to the pixels before they are averaged, a few rows at a time.

    Returns:
        Averages of the input, neither side longer than ``size``.
    """
    if fit is Fit.CROP:
        image = _centre_square(image)
    shape = (size, size)
    if fit is Fit.PAD:
        height, width = image.shape
        longest = max(height, width)
        shape = max(1, round(size * height / longest)), max(1, round(size * width / longest))
    return resize(image, shape, prepare)


def on_square(levels: NDArray[np.uint16], size: int) -> NDArray[np.uint16]:
    """Put an image in the middle of a black square."""
    height, width = levels.shape
    if levels.shape == (size, size):
        return levels
    square = np.zeros((size, size), dtype=np.uint16)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = levels
    return square


def quantise(image: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Grey levels in ``[0, 1]`` as 16-bit integers; an 8-bit level ``k`` becomes exactly ``257 k``."""
    levels: NDArray[np.uint16] = np.rint(np.clip(image, 0, 1) * np.float32(WHITE)).astype(np.uint16)
    return levels


def resize(image: NDArray[Any], shape: tuple[int, int], prepare: Prepare | None = None) -> NDArray[np.float32]:
    """Averages of an image at another size, see the module docstring; ``prepare`` as for :func:`fit_inside`."""
    height, width = image.shape
    down, across = max(1, height // shape[0]), max(1, width // shape[1])
    reduced = block_means(image, down, across, prepare)
    if (height, width) == (shape[0] * down, shape[1] * across):
        return reduced
    area = (0.0, 0.0, width / across, height / down)
    picture = Image.fromarray(np.ascontiguousarray(reduced, dtype=np.float32))
    return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=area), dtype=np.float32)


def block_means(
    image: NDArray[Any], down: int, across: int, prepare: Prepare | None = None
) -> NDArray[np.float32]:
    """Averages of blocks of ``down x across`` pixels; the last blocks may be smaller.

    Sums are taken in a type that holds them: for integers of at most 16 bits the averages are exact up to one
    rounding to float32. The image is worked on in strips of rows that stay in the processor's cache.
    """
    height, width = image.shape
    means = np.empty((-(-height // down), -(-width // across)), dtype=np.float32)
    columns = _block_sizes(width, across)
    blocks = max(1, _STRIP // (down * width))
    for first in range(0, len(means), blocks):
        strip = image[first * down : (first + blocks) * down]
        strip = prepare(strip) if prepare else strip
        rows = _block_sizes(strip.shape[0], down)
        largest = prepare.largest if prepare else None
        sums = _sum_columns(_sum_rows(strip, down, largest), across)
        np.divide(sums, rows[:, None] * columns, out=means[first : first + blocks], casting="same_kind")
    return means


def _sum_rows(image: NDArray[Any], count: int, largest: int | None) -> NDArray[Any]:
    """Sums of ``count`` neighbouring rows."""
    if count == 1:
        return image
    kind = _sum_type(image, count, largest)
    height, width = image.shape
    whole = height // count
    sums: NDArray[Any] = image[: whole * count].reshape(whole, count, width).sum(axis=1, dtype=kind)
    if whole * count == height:
        return sums
    return np.concatenate([sums, image[whole * count :].sum(axis=0, dtype=kind, keepdims=True)])


def _sum_columns(image: NDArray[Any], count: int) -> NDArray[np.floating[Any]]:
    """Sums of ``count`` neighbouring columns, by a product with ones, the fastest way here."""
    narrow = image.dtype == np.float32 or (image.dtype.itemsize <= 2 and count <= 256)
    values: NDArray[Any] = image.astype(np.float32 if narrow else np.float64, copy=False)
    if count == 1:
        return values
    whole = values.shape[1] // count
    ones = np.ones(count, dtype=values.dtype)
    sums: NDArray[np.floating[Any]] = (
        np.ascontiguousarray(values[:, : whole * count]).reshape(len(values) * whole, count) @ ones
    ).reshape(len(values), whole)
    if whole * count == values.shape[1]:
        return sums
    return np.concatenate([sums, values[:, whole * count :].sum(axis=1, keepdims=True)], axis=1)


def _sum_type(image: NDArray[Any], count: int, largest: int | None) -> np.dtype[Any]:
    """A type that holds sums of ``count`` values: the own one where the values are small enough, the fast case."""
    if image.dtype.kind == "f":
        return image.dtype
    if image.dtype.itemsize > 2:
        return np.dtype(np.float64)
    limit = np.iinfo(image.dtype.newbyteorder("="))
    own = (int(image.max()) if largest is None else largest) * count <= limit.max
    own = own and (limit.min == 0 or int(image.min()) * count >= limit.min)
    return image.dtype.newbyteorder("=") if own else np.dtype(np.int32)


def _block_sizes(length: int, count: int) -> NDArray[np.float32]:
    sizes = np.full(-(-length // count), count, dtype=np.float32)
    sizes[-1] = length - (len(sizes) - 1) * count
    return sizes


def _centre_square(image: NDArray[Any]) -> NDArray[Any]:
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
