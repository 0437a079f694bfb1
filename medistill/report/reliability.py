"""Predicted probability against what was so: bins large enough to be shown, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from medistill.report.disclosure import Bin

_SIDE, _LEFT, _TOP, _BASE = 150, 40, 10, 40
_SMALLEST, _LARGEST = 3.0, 12.0


def reliability_chart(bins: Sequence[Bin], *, label: str) -> str:
    """A square in which a calibrated network's dots lie on the diagonal; the larger a dot, the more predictions.

    Args:
        bins: What is drawn.
        label: What is read aloud in place of the picture, with the numbers.

    Returns:
        An ``<svg>`` element that takes its colours from the page; the same arguments give the same text.
    """
    size = f"{_LEFT + _SIDE + _TOP} {_TOP + _SIDE + _BASE}"
    places = [(_x(one.predicted), _y(one.observed), one) for one in bins]
    line = " L".join(f"{x} {y}" for x, y, _ in places)
    dots = (
        f'<circle cx="{x}" cy="{y}" r="{_radius(one.share)}"><title>{escape(spoken(one))}</title></circle>'
        for x, y, one in places
    )
    return "".join(
        [
            f'<svg class="reliability" viewBox="0 0 {size}" role="img" aria-label="{escape(label)}">',
            *_axes(),
            f'<path class="ideal" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>',
            f'<path class="line" d="M{line}"/>' if places else "",
            *dots,
            "</svg>",
        ]
    )


def spoken(one: Bin) -> str:
    """A bin in words."""
    return f"predicted {one.predicted:.2f}, observed {one.observed:.2f}, {100 * one.share:.0f} % of predictions"


def _axes() -> Iterator[str]:
    for value in (0, 0.5, 1):
        yield f'<path class="grid" d="M{_x(0)} {_y(value)}H{_x(1)}M{_x(value)} {_y(0)}V{_y(1)}"/>'
        yield f'<text x="{_x(0) - 5}" y="{_y(value) + 4}" text-anchor="end">{value:g}</text>'
        yield f'<text x="{_x(value)}" y="{_y(0) + 15}" text-anchor="middle">{value:g}</text>'
    yield f'<text x="{_x(0.5)}" y="{_y(0) + 32}" text-anchor="middle">predicted</text>'
    yield f'<text transform="translate(12 {_y(0.5)}) rotate(-90)" text-anchor="middle">observed</text>'


def _x(value: float) -> float:
    return round(_LEFT + _SIDE * value, 1)


def _y(value: float) -> float:
    return round(_TOP + _SIDE * (1 - value), 1)


def _radius(share: float) -> float:
    """Area in proportion to the share, but never so small that it cannot be seen."""
    return round(max(_SMALLEST, _LARGEST * math.sqrt(share)), 1)
