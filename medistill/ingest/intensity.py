r"""From stored values to grey levels in ``[0, 1]``, where 0 is black.

The order of the steps (PS3.3 C.11.1, C.11.2, PS3.4 N.2): modality LUT or rescale → window → polarity → padding.
Every step acts on one pixel at a time, so images of at most 16 bits are looked up in a table of all possible
stored values; the result is the same as evaluating each pixel.

Policies:

* ``voi``: the VOI LUT or the first window of the header; without one, the full range of the stored bits.
* ``percentile``: from the 0.5 to the 99.5 percentile of this image, never of the cohort.
* ``none``: the full range of the stored bits, whatever the header says.

Floating point pixels have no stored bits: their full range is from the smallest to the largest value of the image.

Without lookup tables and sigmoids all steps together are one :class:`Ramp` on stored values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medistill.errors import RejectedFile

PERCENTILES = (0.5, 99.5)
_TABLE_FROM_PIXELS = 1 << 16
_CHUNK = 1 << 18  # bincount copies to 64 bits


class Policy(StrEnum):
    """How grey levels are chosen."""

    VOI = "voi"
    PERCENTILE = "percentile"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Lut:
    """A lookup table (PS3.3 C.11.1.1): values below the first and above the last entry take those entries.

    Args:
        first: Input value of the first entry.
        values: Output values.
        bits: Output bits; the output range is ``[0, 2**bits - 1]``.
    """

    first: int
    values: NDArray[np.float32]
    bits: int

    def apply(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Look values up."""
        index = np.clip(values - self.first, 0, len(self.values) - 1).astype(np.int64)
        found: NDArray[np.float32] = self.values[index]
        return found

    @property
    def top(self) -> float:
        """Largest value the output bits can hold."""
        return float(2**self.bits - 1)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A display window (PS3.3 C.11.2.1.2).

    Args:
        center: Window center.
        width: Window width; at least 1 for ``LINEAR``, above 0 otherwise.
        function: ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``.
    """

    center: float
    width: float
    function: str = "LINEAR"

    @property
    def usable(self) -> bool:
        """Whether the standard defines a result for this window."""
        if not np.isfinite([self.center, self.width]).all():
            return False
        if self.function == "LINEAR":
            return self.width >= 1
        return self.function in {"LINEAR_EXACT", "SIGMOID"} and self.width > 0

    @property
    def ends(self) -> tuple[float, float]:
        """Values that become black and white in a linear window."""
        middle, width = (
            (self.center - 0.5, self.width - 1) if self.function == "LINEAR" else (self.center, self.width)
        )
        return middle - width / 2, middle + width / 2

    def apply(self, values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Grey levels in ``[0, 1]``."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4.0 * (values - self.center) / self.width, -80, 80)
            curve: NDArray[np.floating[Any]] = 1.0 / (1.0 + np.exp(exponent))
            return curve
        low, high = self.ends
        if low == high:
            return (values > low).astype(values.dtype)
        return stretch(values, low, high)


@dataclass(frozen=True, kw_only=True, eq=False)
class Presentation:
    """What the header says about grey levels; holds nothing about the patient.

    Args:
        bits_stored: Bits of a stored value; 0 for floating point pixels.
        signed: Whether stored values are signed.
        slope: Rescale slope.
        intercept: Rescale intercept.
        modality_lut: Replaces slope and intercept.
        window: First usable window.
        voi_lut: Comes before the window.
        padding: Range of stored values that mean "no image", both ends included.
        inverted: Whether low values are shown white.
        invalid_window: A window was given that the standard does not define; it is treated as absent.
    """

    bits_stored: int
    signed: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: Lut | None = None
    window: Window | None = None
    voi_lut: Lut | None = None
    padding: tuple[float, float] | None = None
    inverted: bool = False
    invalid_window: bool = False

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest value the stored bits can hold."""
        if self.signed:
            return -(2 ** (self.bits_stored - 1)), 2 ** (self.bits_stored - 1) - 1
        return 0, 2**self.bits_stored - 1


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """All steps in one: ``clip((stored - black) / (white - black), 0, 1)``; inverted where white is below black.

    Args:
        black: Stored value that becomes 0.
        white: Stored value that becomes 1; differs from ``black``.
    """

    black: float
    white: float

    def apply(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Grey levels of stored values or their averages."""
        values = (stored - stored.dtype.type(self.black)) / stored.dtype.type(self.white - self.black)
        grey: NDArray[np.float32] = np.clip(values, 0, 1).astype(np.float32, copy=False)
        return grey


def find_ramp(stored: NDArray[Any], presentation: Presentation, policy: Policy) -> Ramp | None:
    """The ramp that equals :func:`normalise` outside of padding; nothing where there is no such ramp."""
    if presentation.modality_lut or not presentation.slope:
        return None
    if policy is Policy.VOI and (
        presentation.voi_lut or (presentation.window and presentation.window.function == "SIGMOID")
    ):
        return None
    low, high = _limits(stored, presentation, policy)
    if not high > low:
        return None
    ends = [(end - presentation.intercept) / presentation.slope for end in (low, high)]
    black, white = reversed(ends) if presentation.inverted else ends
    return Ramp(black=black, white=white)


def modality(values: NDArray[np.floating[Any]], presentation: Presentation) -> NDArray[np.floating[Any]]:
    """Modality LUT, or else slope and intercept (PS3.3 C.11.1)."""
    if presentation.modality_lut:
        return presentation.modality_lut.apply(values)
    kind = values.dtype.type
    rescaled: NDArray[np.floating[Any]] = values * kind(presentation.slope) + kind(presentation.intercept)
    return rescaled


def stretch(values: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.floating[Any]]:
    """Map ``[low, high]`` to ``[0, 1]`` and clip; everything becomes 0 where ``low == high``."""
    if not high > low:
        return np.zeros_like(values)
    kind = values.dtype.type
    ramp: NDArray[np.floating[Any]] = np.clip((values - kind(low)) / kind(high - low), 0, 1)
    return ramp


def normalise(
    stored: NDArray[Any], presentation: Presentation, policy: Policy = Policy.VOI
) -> NDArray[np.float32]:
    """All steps.

    Args:
        stored: Stored values of one grey image, any shape.
        presentation: The header's grey level description.
        policy: See the module docstring.

    Returns:
        float32 in ``[0, 1]``, same shape; 0 is black; padding is 0.

    Raises:
        RejectedFile: If a value that is not padding is not finite.
    """
    limits = _limits(stored, presentation, policy)
    if is_small(stored) and stored.size >= _TABLE_FROM_PIXELS:
        bits = 8 * stored.dtype.itemsize
        unsigned = np.arange(2**bits, dtype=np.dtype(f"u{bits // 8}"))
        table = _transfer(unsigned.view(stored.dtype.newbyteorder("=")), presentation, policy, limits)
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        return np.take(table, native.view(unsigned.dtype))
    return _transfer(stored, presentation, policy, limits)


def is_small(stored: NDArray[Any]) -> bool:
    """Whether there are at most 65536 different stored values."""
    return stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2


def is_padding(stored: NDArray[Any], padding: tuple[float, float]) -> NDArray[np.bool_]:
    """Pixels whose value means "no image"; a padding value NaN means every NaN."""
    if np.isnan(padding[0]):
        missing: NDArray[np.bool_] = np.isnan(stored)
        return missing
    inside: NDArray[np.bool_] = (stored >= padding[0]) & (stored <= padding[1])
    return inside


def percentile_limits(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """The percentiles between which an image is stretched; equal where there is no value."""
    if values.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def _transfer(
    stored: NDArray[Any], presentation: Presentation, policy: Policy, limits: tuple[float, float]
) -> NDArray[np.float32]:
    values = modality(_floating(stored), presentation)
    if policy is Policy.VOI and presentation.voi_lut:
        grey = stretch(presentation.voi_lut.apply(values), 0, presentation.voi_lut.top)
    elif policy is Policy.VOI and presentation.window:
        grey = presentation.window.apply(values)
    else:
        grey = stretch(values, *limits)
    if presentation.inverted:
        grey = 1 - grey
    if presentation.padding is not None:
        grey = np.where(is_padding(stored, presentation.padding), 0, grey)
    return grey.astype(np.float32, copy=False)


def _floating(stored: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """float32 where that holds every value exactly, else float64."""
    exact = is_small(stored) or stored.dtype.itemsize == 1 or stored.dtype == np.float32
    return stored.astype(np.float32 if exact else np.float64)


def _limits(stored: NDArray[Any], presentation: Presentation, policy: Policy) -> tuple[float, float]:
    """Values after the modality step that become black and white, before polarity."""
    floating = stored.dtype.kind == "f"
    if floating and not np.isfinite(_kept(stored, presentation)).all():
        raise RejectedFile("BITS_INCONSISTENT", "stored values are not finite")
    if policy is Policy.PERCENTILE:
        return _percentiles(stored, presentation)
    if policy is Policy.VOI and presentation.window:
        return presentation.window.ends
    if presentation.modality_lut:
        return 0.0, presentation.modality_lut.top
    ends: tuple[float, float] = presentation.stored_range if presentation.bits_stored else (0, 0)
    if floating:
        kept = _kept(stored, presentation)
        ends = (float(kept.min()), float(kept.max())) if kept.size else (0, 0)
    rescaled = [presentation.slope * end + presentation.intercept for end in ends]
    return min(rescaled), max(rescaled)


def _kept(stored: NDArray[Any], presentation: Presentation) -> NDArray[Any]:
    """Stored values without padding, flat where there is padding."""
    if presentation.padding is None:
        return stored
    return stored[~is_padding(stored, presentation.padding)]


def _percentiles(stored: NDArray[Any], presentation: Presentation) -> tuple[float, float]:
    """The limits of this image, without padding; for at most 16 bits from the histogram, with the same result."""
    if not is_small(stored):
        return percentile_limits(modality(_floating(_kept(stored, presentation)), presentation))
    levels, counts = _histogram(stored)
    if presentation.padding is not None:
        inside = ~is_padding(levels, presentation.padding)
        levels, counts = levels[inside], counts[inside]
    if not counts.size:
        return 0.0, 0.0
    values = modality(levels.astype(np.float64), presentation).astype(np.float64)
    order = np.argsort(values, kind="stable")
    values, below = values[order], np.cumsum(counts[order])
    positions = np.array(PERCENTILES) / 100 * (below[-1] - 1)
    ranks = np.floor(positions)
    places = [np.searchsorted(below, ranks + step, side="right") for step in (0, 1)]
    first, second = (values[place.clip(max=values.size - 1)] for place in places)
    low, high = first + (second - first) * (positions - ranks)
    return float(low), float(high)


def _histogram(stored: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Levels that occur and how often."""
    flat = np.ascontiguousarray(stored).reshape(-1)
    bits = 8 * stored.dtype.itemsize
    flat = flat.astype(stored.dtype.newbyteorder("="), copy=False).view(f"u{bits // 8}")
    counts = np.zeros(2**bits, dtype=np.int64)
    top = int(flat.max(initial=0)) + 1
    for start in range(0, flat.size, _CHUNK):
        counts[:top] += np.bincount(flat[start : start + _CHUNK], minlength=top)
    levels = np.flatnonzero(counts)
    present = counts[levels]
    if stored.dtype.kind == "i":
        levels = levels.astype(f"u{bits // 8}").view(f"i{bits // 8}").astype(np.int64)
    return levels, present
