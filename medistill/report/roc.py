"""ROC curves on logarithmic axes as SVG: what is found at few false alarms, which an AUROC averages away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from medistill.report.chart import colour

_SIDE, _LEFT, _TOP, _BASE = 360, 54, 12, 44
_DECADES = 3


def roc_chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw attacks' true-positive rates against false-positive rates, both from 0.001 to 1.

    Args:
        curves: Attack to pairs of false- and true-positive rate; the place gives the colour.

    Returns:
        An ``<svg>`` element with the diagonal of chance, or an empty text without curves.
    """
    drawn = {name: curve for name, curve in curves.items() if curve}
    if not drawn:
        return ""
    size = _SIDE - _LEFT - _TOP
    parts = [
        f'<svg viewBox="0 0 {_SIDE} {_SIDE - _TOP + _BASE - 20}" role="img" '
        'aria-label="True-positive rate against false-positive rate, both logarithmic; chance is the diagonal">'
    ]
    for power in range(-_DECADES, 1):
        x, y = _place(10.0**power, size), _TOP + size - _place(10.0**power, size)
        rate = f"{10.0**power:g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}h{size}M{_LEFT + x} {_TOP}v{size}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{rate}</text>')
        parts.append(
            f'<text class="tick" x="{_LEFT + x}" y="{_TOP + size + 17}" text-anchor="middle">{rate}</text>'
        )
    parts.append(f'<path class="reference" d="M{_LEFT} {_TOP + size}L{_LEFT + size} {_TOP}"/>')
    for number, (name, curve) in enumerate(drawn.items()):
        points = " L".join(
            f"{_LEFT + _place(fpr, size)} {round(_TOP + size - _place(tpr, size), 1)}" for fpr, tpr in curve
        )
        parts.append(f'<g class="{colour(number)}"><path class="line" d="M{points}">')
        parts.append(f"<title>{escape(name)}</title></path></g>")
    middle = _LEFT + size / 2
    parts.append(
        f'<text x="{middle}" y="{_TOP + size + 36}" text-anchor="middle">False alarms among non-members</text>'
        f'<text transform="translate(13 {_TOP + size / 2}) rotate(-90)" text-anchor="middle">Members found</text>'
    )
    return "".join([*parts, "</svg>"])


def _place(rate: float, size: float) -> float:
    return round(size * (1 + math.log10(max(rate, 10.0**-_DECADES)) / _DECADES), 1)
