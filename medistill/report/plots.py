"""Dots and intervals on a track, as percentages: drawn at any width, in any colour scheme, and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medistill.core.reports import Estimate


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range a group of tracks shares.

    Args:
        low: Value at the left end.
        high: Value at the right end.
        ticks: Values that are written below the tracks.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def position(self, value: float) -> float:
        """Where a value lies, in percent of the width; values outside are moved to the nearer end."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


@dataclass(frozen=True, kw_only=True)
class Track:
    """One dot with its interval.

    Args:
        dot: Position of the estimate in percent.
        left: Where the interval begins, in percent.
        width: How wide the interval is, in percent.
    """

    dot: float
    left: float
    width: float


def auroc_axis(estimates: Sequence[Estimate]) -> Axis:
    """An axis for AUROCs: 0.5 to 1, from the next lower tenth where an interval reaches below chance."""
    lowest = min((e.low for e in estimates if math.isfinite(e.value)), default=0.5)
    tenths = max(0, min(5, math.floor(lowest * 10 + 1e-9)))
    return Axis(low=tenths / 10, high=1.0, ticks=tuple(tick / 10 for tick in range(tenths, 11)))


def full_axis() -> Axis:
    """The whole range of an AUROC, chance in the middle."""
    return Axis(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0))


def track(estimate: Estimate, axis: Axis) -> Track:
    """Place an estimate and its interval on an axis."""
    left, right = axis.position(estimate.low), axis.position(estimate.high)
    return Track(dot=axis.position(estimate.value), left=left, width=round(right - left, 2))


def place(estimate: Estimate | None, axis: Axis) -> Track | None:
    """As :func:`track`; nothing where nothing could be estimated."""
    return None if estimate is None or not math.isfinite(estimate.value) else track(estimate, axis)


def outline(heights: Sequence[float], *, top: float) -> str:
    """A histogram as the path of an SVG of ``len(heights)`` by 100 units, closed along its base.

    Args:
        heights: One per bin, not negative.
        top: Height that fills the drawing; higher bins are cut there.

    Example:
        >>> outline([0.5, 1.0], top=1.0)
        'M0 100V50H1V0H2V100Z'
    """
    if top <= 0:
        return f"M0 100H{len(heights)}Z"
    steps = (f"V{round(100 * (1 - min(1.0, height / top)), 1):g}H{i + 1}" for i, height in enumerate(heights))
    return f"M0 100{''.join(steps)}V100Z"
