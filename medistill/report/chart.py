"""Charts with intervals as SVG that takes its colours from the page, so that they follow a dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 14, 52
_COLOURS = 10
_APART = 13  #: least distance in pixels between the intervals of two points


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name and colour; ``joined`` by a line, or not."""

    name: str
    points: tuple[Point, ...]
    joined: bool = False


def colour(number: int) -> str:
    """Style class of a series: ten colours, then the same again with hollow dots."""
    hollow = " hollow" if number // _COLOURS % 2 else ""
    return f"c{number % _COLOURS}{hollow}"


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    categories: Sequence[tuple[float, str]] = (),
    log: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """Draw series of points with vertical intervals.

    Points that would lie on one another are drawn side by side.

    Args:
        series: What is drawn; the place in this list gives the colour.
        x_label: Below the horizontal axis.
        y_label: Beside the vertical axis.
        categories: Values and names of the horizontal axis where it has a few values only, equally spaced.
        log: Whether the horizontal axis is logarithmic.
        reference: Name and height of a dashed line across the chart.

    Returns:
        An ``<svg>`` element; the same arguments give the same text.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    heights = [value for point in points for value in (point.low, point.high)]
    heights += [reference[1]] if reference else []
    y_ticks = ticks(min(heights), max(heights))
    places = {value: float(i) for i, (value, _) in enumerate(categories)}
    xs = [_place(point.x, places, log=log) for point in points]
    if categories:
        low, high = -0.5, len(categories) - 0.5
    else:
        low, high = _widened(min(xs), max(xs), log=log)
    frame = _Frame(left=low, right=high, bottom=y_ticks[0], top=y_ticks[-1])
    marks = [(places[value], name) for value, name in categories] or _axis_marks(low, high, log=log)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}; the values stand in the table">',
        *_axes(frame, marks, y_ticks, x_label, y_label),
    ]
    if reference:
        y = frame.y(reference[1])
        parts.append(f'<path class="reference" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT + 5}" y="{y - 5}">{escape(reference[0])}</text>')
    moved = _dodged([frame.x(x) for x in xs])
    start = 0
    for number, one in enumerate(series):
        own = moved[start : start + len(one.points)]
        parts += _drawn(one, own, frame, number)
        start += len(one.points)
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, most: int = 8) -> tuple[float, ...]:
    """Round numbers that enclose a range, at most ``most`` of them.

    Example:
        >>> ticks(0.83, 0.96)
        (0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96)
    """
    span = max(high - low, 1e-6)
    exponent = math.floor(math.log10(span / (most - 1)))
    for step in (factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 2.5, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return tuple(round(i * step, 10) for i in range(first, max(last, first + 1) + 1))
    raise AssertionError("some step is wide enough")


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Values at the edges of the drawing."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _place(value: float, places: dict[float, float], *, log: bool) -> float:
    if places:
        return places[value]
    return math.log10(max(value, 1e-3)) if log else value


def _widened(low: float, high: float, *, log: bool) -> tuple[float, float]:
    margin = max(0.06 * (high - low), 0.1 if log else 1e-6)
    return low - margin, high + margin


def _axis_marks(low: float, high: float, *, log: bool) -> list[tuple[float, str]]:
    if not log:
        return [(value, f"{value:g}") for value in ticks(low, high) if low <= value <= high]
    steps = (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    marks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in steps]
    return [(math.log10(value), f"{value:g}") for value in marks if low <= math.log10(value) <= high]


def _axes(
    frame: _Frame, marks: Sequence[tuple[float, str]], y_ticks: Sequence[float], x_label: str, y_label: str
) -> list[str]:
    base, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for place, name in marks:
        x = frame.x(place)
        parts.append(f'<path class="grid" d="M{x} {base}v5"/>')
        parts.append(f'<text class="tick" x="{x}" y="{base + 19}" text-anchor="middle">{escape(name)}</text>')
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _dodged(xs: Sequence[float]) -> list[float]:
    """Horizontal places, groups of near ones spread around their middle."""
    order = sorted(range(len(xs)), key=lambda i: (xs[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and xs[i] - xs[groups[-1][0]] < _APART:
            groups[-1].append(i)
        else:
            groups.append([i])
    moved = list(xs)
    for group in groups:
        middle = sum(xs[i] for i in group) / len(group)
        for place, i in enumerate(sorted(group)):
            moved[i] = round(middle + (place - (len(group) - 1) / 2) * _APART, 1)
    return moved


def _drawn(one: Series, xs: Sequence[float], frame: _Frame, number: int) -> list[str]:
    places = [(x, frame.y(point.y)) for x, point in zip(xs, one.points, strict=True)]
    parts = [f'<g class="{colour(number)}">']
    if one.joined and len(places) > 1:
        parts.append(f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in places)}"/>')
    for (x, y), point in zip(places, one.points, strict=True):
        says = f"{one.name}: {point.y:.3f} [{point.low:.3f}, {point.high:.3f}] at {point.x:g}"
        parts.append(f'<path class="whisker" d="M{x} {frame.y(point.low)}V{frame.y(point.high)}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5"><title>{escape(says)}</title></circle>')
    return [*parts, "</g>"]
