"""Where lines of text may be burned into an image: a cheap test that runs on every image.

1. A top-hat (the image minus its morphological opening) keeps what is brighter than its surroundings and thinner
   than 8 pixels; the same on the inverted image keeps dark ink.
2. Half of the local maximum separates ink from the rest, so that faint and strong ink are cut out alike.
3. Connected ink becomes a glyph: its box, how often a row (or a column) crosses ink, and how far the ink fades
   outside its own border. Drawn ink ends within two pixels; ribs, vessels and noise do not.
4. Glyphs of like height and strength beside each other become a line, along rows or along columns (text turned by
   90 degrees), and a line is scored by its crossings, sharpness and straightness.

A quarter-size copy of large images is searched as well, for tall letters. One to three glyphs (side and view
markers) have too few crossings to count as a line. The weights are a logistic fit to lines drawn on real
radiographs, CT and MR images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

#: Rows and columns ``(top, left, bottom, right)``; bottom and right are not part of the box.
Box = tuple[int, int, int, int]

_Bytes = NDArray[np.uint8]
_Integers = NDArray[np.int64]
_Floats = NDArray[np.float64]

_WINDOW = 8  # ink is thinner than this
_TILE = 8
_FAINTEST = (16, 32, 64)  # of 255 grey levels from the darkest to the lightest pixel
_DENSEST = 0.04
_STRIP = 1 << 17  # bytes of one grey level image
_SMALLEST_SIDE = 16
_LARGEST_SIDE = 2048  # larger images are halved first
_COARSE = 4
_COARSE_FROM = 512
_APART = 1 << 20  # keeps what must not be joined out of reach of each other
_HEIGHTS = (5, 60)
_WIDEST = 12.0  # a small word whose letters touch is one glyph
_INK = (0.12, 0.85)  # part of its box that a glyph fills
_FADING = 0.4
_SHORTEST_LINE = 2.2
# score = weights · (1, log crossings, fading, thickness, log(length / crossings), across)
_WEIGHTS = np.array([1.9, 3.6, -6.7, -4.6, -1.5, -1.2])


def suspect_boxes(grey: NDArray[np.float32]) -> tuple[Box, ...]:
    """Boxes that look like lines of text of about four glyphs or more.

    Finds ink lighter or darker than its surroundings, along rows or columns with up to some 10 degrees of slope.
    Letters from 8 pixels of height count (16 pixels where a side is longer than 2048).

    Args:
        grey: Grey levels at full resolution, shape ``(h, w)``, finite.

    Returns:
        Boxes in pixels of ``grey``, from top to bottom; empty where there is none.
    """
    height, width = grey.shape
    low, high = float(grey.min(initial=np.inf)), float(grey.max(initial=-np.inf))
    if min(height, width) < _SMALLEST_SIDE or not high > low:
        return ()
    pixels = np.empty(grey.shape, np.uint8)
    for rows in _strips(height, width):
        pixels[rows] = (grey[rows] - np.float32(low)) * np.float32(255 / (high - low))
    found = [
        (scale * top, scale * left, min(scale * bottom, height), min(scale * right, width))
        for image, scale in _levels(pixels)
        for top, left, bottom, right in _line_boxes(image)
    ]
    return tuple(sorted(found))


def _strips(height: int, width: int) -> Iterator[slice]:
    """Rows of an image in pieces that stay in the processor's cache."""
    rows = max(_STRIP // width, 4 * _WINDOW)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _levels(pixels: _Bytes) -> Iterator[tuple[_Bytes, int]]:
    """The image, and smaller copies, with their scale."""
    scale = 2 if max(pixels.shape) > _LARGEST_SIDE else 1
    image = Image.fromarray(pixels)
    for factor in (scale,) if min(pixels.shape) < _COARSE_FROM else (scale, _COARSE * scale):
        reduced = pixels if factor == 1 else np.asarray(image.reduce(factor))
        yield reduced, factor


def _line_boxes(pixels: _Bytes) -> list[Box]:
    features, boxes = _lines(pixels)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in boxes[features @ _WEIGHTS > 0]]


def _lines(pixels: _Bytes) -> tuple[_Floats, _Integers]:
    """Features ``(n, 6)`` and boxes ``(n, 4)`` of chained glyphs."""
    glyphs = _glyphs(_top_hats(pixels))
    height = glyphs.high - glyphs.low
    width = glyphs.end - glyphs.start
    plausible = (height >= _HEIGHTS[0]) & (height <= _HEIGHTS[1]) & (width <= _WIDEST * height)
    plausible &= (glyphs.ink >= _INK[0]) & (glyphs.ink <= _INK[1] + 8 / (height * width))
    return _chains(glyphs.pick(np.flatnonzero(plausible)))


def _top_hats(pixels: _Bytes) -> _Bytes:
    """White and black top-hat, shape ``(2, h, w)``; sides are multiples of the tile, last row and column are 0."""
    height, width = pixels.shape
    hats = np.zeros((2, (height // _TILE + 1) * _TILE, (width // _TILE + 1) * _TILE), np.uint8)
    for rows in _strips(height, width):
        above = max(rows.start - _WINDOW + 1, 0)
        inner = slice(rows.start - above, rows.stop - above)
        strip = pixels[above : rows.stop + _WINDOW - 1]
        both = np.stack([strip, 255 - strip])
        np.subtract(both[:, inner], _opening(both)[:, inner], out=hats[:, rows, :width])
    return hats


def _opening(stack: _Bytes) -> _Bytes:
    """Grey opening with a square of the window's side."""
    _, height, width = stack.shape
    eroded = _slide(np.minimum, stack)
    padded = np.zeros((2, height + _WINDOW - 1, width + _WINDOW - 1), np.uint8)
    padded[:, _WINDOW - 1 : height, _WINDOW - 1 : width] = eroded
    return _slide(np.maximum, padded)


def _slide(extreme: np.ufunc, stack: _Bytes) -> _Bytes:
    """Minimum or maximum over every window that lies inside, along the last two axes."""
    reach = 1
    while reach < _WINDOW:
        stack = extreme(stack[:, :-reach], stack[:, reach:])
        stack = extreme(stack[:, :, :-reach], stack[:, :, reach:])
        reach *= 2
    return stack


def _ink(hats: _Bytes) -> NDArray[np.bool_]:
    """Pixels above half of the maximum of the nine tiles around them.

    Where texture makes too much ink, only contrast above a higher level counts.
    """
    _, height, width = hats.shape
    rows = hats.reshape(2, height // _TILE, _TILE, width)
    tiles = rows.max(axis=2)
    while tiles.shape[2] * _TILE > width:
        tiles = np.maximum(tiles[:, :, ::2], tiles[:, :, 1::2])
    around = np.pad(tiles, ((0, 0), (1, 1), (1, 1)))
    around = np.maximum(np.maximum(around[:, :-2], around[:, 1:-1]), around[:, 2:])
    around = np.maximum(np.maximum(around[:, :, :-2], around[:, :, 1:-1]), around[:, :, 2:])
    for faintest in _FAINTEST:
        limits = np.where(around < faintest, np.uint8(255), around // 2 + 4)
        ink = rows > np.repeat(limits, _TILE, axis=2)[:, :, None]
        if np.count_nonzero(ink) <= _DENSEST * ink.size:
            break
    return ink.reshape(hats.shape)


@dataclass(frozen=True, kw_only=True)
class _Glyphs:
    """Connected ink, read once along rows and once along columns; one entry per glyph and reading.

    ``start`` and ``end`` lie in the direction of reading and carry ``_APART`` times ``2 * across + dark``.
    """

    start: _Integers
    end: _Integers
    low: _Integers
    high: _Integers
    crossings: _Floats  # mean number of strokes met in the direction of reading
    strength: _Floats
    fading: _Floats  # ink left two pixels outside the border, relative to the strength
    ink: _Floats

    def pick(self, which: _Integers) -> _Glyphs:
        """Some of the glyphs."""
        return _Glyphs(**{name: values[which] for name, values in vars(self).items()})


def _glyphs(hats: _Bytes) -> _Glyphs:
    """All glyphs with a sharp border."""
    _, height, width = hats.shape
    flat, ink = hats.ravel(), _ink(hats).ravel()
    ink[0] = False
    first, last = (np.flatnonzero(ink[1:] != ink[:-1]) + 1).reshape(-1, 2).T  # the last column holds no ink
    count, label, above = _connect(first, last, width)
    runs, area = np.bincount(label, minlength=count), np.bincount(label, last - first, count)
    strength = np.bincount(label, flat[(first + last) // 2], count) / runs
    outside = np.minimum(flat[np.maximum(first - 2, 0)], flat[np.minimum(last + 1, flat.size - 1)])
    fading = np.bincount(label, outside, count) / (runs * strength)

    order = np.argsort(label, kind="stable")
    begin = np.cumsum(runs) - runs
    row, left = np.divmod(first[order], width)
    top, bottom = row[begin], row[begin + runs - 1] + 1
    west = np.minimum.reduceat(left, begin) if count else left
    east = np.maximum.reduceat(left + (last - first)[order], begin) if count else left
    tall, wide = bottom - top, east - west
    dark = (top >= height).astype(np.int64)
    top, bottom = top - dark * height, bottom - dark * height
    sharp = np.flatnonzero((fading <= _FADING) & (np.maximum(tall, wide) >= _HEIGHTS[0]))
    return _Glyphs(
        start=np.concatenate([west + _APART * dark, top + _APART * (2 + dark)]),
        end=np.concatenate([east + _APART * dark, bottom + _APART * (2 + dark)]),
        low=np.concatenate([top, west]),
        high=np.concatenate([bottom, east]),
        crossings=np.concatenate([runs / tall, (area - above) / wide]),
        strength=np.tile(strength, 2),
        fading=np.tile(fading, 2),
        ink=np.tile(area / (tall * wide), 2),
    ).pick(np.concatenate([sharp, sharp + count]))


def _connect(first: _Integers, last: _Integers, width: int) -> tuple[int, _Integers, _Integers]:
    """Components of runs that touch (8 neighbours): their number, the component of each run, and ink below ink.

    A pixel of ink that is not below another one starts a stroke met by its column.
    """
    below = np.searchsorted(last, first + width, "left"), np.searchsorted(first, last + width, "right")
    pairs = _Pairs.between(*below)
    count, label = pairs.groups()
    shared = np.minimum(last[pairs.one] + width, last[pairs.other])
    shared -= np.maximum(first[pairs.one] + width, first[pairs.other])
    return count, label, np.bincount(label[pairs.one], np.maximum(shared, 0), count).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Pairs of ``size`` things, ordered by the first."""

    size: int
    one: _Integers
    other: _Integers

    @classmethod
    def between(cls, low: _Integers, high: _Integers) -> _Pairs:
        """Every pair ``(i, j)`` with ``low[i] <= j < high[i]``."""
        counts = np.maximum(high - low, 0)
        one = np.repeat(np.arange(len(low)), counts)
        other = np.arange(len(one)) + np.repeat(low - np.cumsum(counts) + counts, counts)
        return cls(size=len(low), one=one, other=other)

    def pick(self, which: NDArray[np.bool_]) -> _Pairs:
        """Some of the pairs."""
        return _Pairs(size=self.size, one=self.one[which], other=self.other[which])

    def groups(self) -> tuple[int, _Integers]:
        """Number of connected groups and the group of each thing."""
        pointers = np.concatenate([[0], np.cumsum(np.bincount(self.one, minlength=self.size))]).astype(np.int32)
        links = (np.ones(len(self.one)), self.other.astype(np.int32), pointers)
        graph = csr_matrix(links, shape=(self.size, self.size))
        count, label = connected_components(graph, directed=False)
        return int(count), label.astype(np.int64)


def _chains(glyphs: _Glyphs) -> tuple[_Floats, _Integers]:
    """Features and boxes of glyphs that follow each other."""
    glyphs = glyphs.pick(np.argsort(glyphs.start, kind="stable"))
    height = glyphs.high - glyphs.low
    follows = np.arange(len(height)) + 1
    pairs = _Pairs.between(follows, np.searchsorted(glyphs.start, glyphs.end + 2 * height, "right"))
    count, label = pairs.pick(_neighbours(glyphs, pairs)).groups()

    members = np.bincount(label, minlength=count)
    mean_height = np.bincount(label, height, count) / members
    crossings = np.bincount(label, glyphs.crossings, count)
    weight = glyphs.crossings * height
    fading = np.bincount(label, glyphs.fading * weight, count) / np.bincount(label, weight, count)
    order = np.argsort(label, kind="stable")
    begin = np.cumsum(members) - members
    ends = [glyphs.start[order], glyphs.low[order], glyphs.end[order], glyphs.high[order]]
    if count:
        ends = [(np.minimum, np.maximum)[k // 2].reduceat(values, begin) for k, values in enumerate(ends)]
    start, low, end, high = ends
    group = start // _APART
    start, end, across = start - group * _APART, end - group * _APART, group >= 2
    length = (end - start) / mean_height
    features = [
        np.ones(count),
        np.log(crossings),
        fading,
        (high - low) / mean_height,
        np.log(length / crossings),
        across.astype(float),
    ]
    boxes = np.where(across, [start, low, end, high], [low, start, high, end])
    long = length >= _SHORTEST_LINE
    return np.stack(features, axis=1)[long], boxes.T[long]


def _neighbours(glyphs: _Glyphs, pairs: _Pairs) -> NDArray[np.bool_]:
    """Which pairs are of like height and strength, side by side, and not further apart than they are tall."""
    one, other = pairs.one, pairs.other
    height = glyphs.high - glyphs.low
    smaller, taller = np.minimum(height[one], height[other]), np.maximum(height[one], height[other])
    overlap = np.minimum(glyphs.high[one], glyphs.high[other]) - np.maximum(glyphs.low[one], glyphs.low[other])
    gap = glyphs.start[other] - glyphs.end[one]
    near: NDArray[np.bool_] = (overlap >= 0.5 * smaller) & (gap <= taller) & (gap >= -0.3 * smaller)
    near &= taller <= 2 * smaller
    weaker = np.minimum(glyphs.strength[one], glyphs.strength[other])
    return near & (np.maximum(glyphs.strength[one], glyphs.strength[other]) <= 2.5 * weaker)
