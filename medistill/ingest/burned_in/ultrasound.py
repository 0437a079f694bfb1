"""What lies outside the image regions of an ultrasound file: patient banner, clock, scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from medistill.ingest.burned_in.detector import Box

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def outside_regions(dataset: Dataset, height: int, width: int) -> tuple[Box, ...]:
    """Boxes that cover everything outside the regions of SequenceOfUltrasoundRegions (PS3.3 C.8.5.5).

    A region that passes the edge of the image ends there, as many devices count one row or column too far. A
    region whose corners are missing or reversed, or that begins outside, is left out, so more is covered.

    Args:
        dataset: Header of the file.
        height: Rows of a frame.
        width: Columns of a frame.

    Returns:
        Boxes that do not overlap; empty where the header names no usable region.
    """
    try:
        items = list(dataset.get("SequenceOfUltrasoundRegions") or ())
    except Exception:  # a malformed sequence names no region
        return ()
    regions = [region for item in items if (region := _region(item, height, width)) is not None]
    return _complement(regions, height, width) if regions else ()


def _region(item: Any, height: int, width: int) -> Box | None:
    names = ("RegionLocationMinY0", "RegionLocationMinX0", "RegionLocationMaxY1", "RegionLocationMaxX1")
    try:
        top, left, bottom, right = (int(item.get(name)) for name in names)
    except Exception:  # absent or malformed
        return None
    if not (0 <= top <= bottom and top < height and 0 <= left <= right and left < width):
        return None
    return top, left, min(bottom + 1, height), min(right + 1, width)


def _complement(regions: Sequence[Box], height: int, width: int) -> tuple[Box, ...]:
    """Cut the image into bands where no region begins or ends, and keep the gaps of each band."""
    edges = sorted({0, height, *(region[0] for region in regions), *(region[2] for region in regions)})
    gaps: list[Box] = []
    for top, bottom in pairwise(edges):
        reached = 0
        for left, right in sorted((r[1], r[3]) for r in regions if r[0] <= top < r[2]):
            if left > reached:
                gaps.append((top, reached, bottom, left))
            reached = max(reached, right)
        if reached < width:
            gaps.append((top, reached, bottom, width))
    return tuple(gaps)
