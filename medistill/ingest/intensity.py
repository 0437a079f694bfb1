r"""From stored values to grey levels in ``[0, 1]``, where 0 is black.

The order of the steps (PS3.3 C.11.1, C.11.2, PS3.4 N.2): modality LUT or rescale → window → polarity → padding.
Every step acts on one pixel at a time, so images of at most 16 bits are looked up in a table of all possible
stored values; the result is the same as evaluating each pixel.

Policies:

* ``voi``: the VOI LUT or the first window of the header; without one, the full range of the stored bits.
* ``percentile``: from the 0.5 to the 99.5 percentile of this image, never of the cohort.
* ``none``: the full range of the stored bits, whatever the header says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from medistill.errors import RejectedFile

PERCENTILES = (0.5, 99.5)
_TABLE_FROM_PIXELS = 1 << 16


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

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Look values up."""
        index = np.clip(values - self.first, 0, len(self.values) - 1).astype(np.int64)
        return self.values[index]

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

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Grey levels in ``[0, 1]``."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4.0 * (values - np.float32(self.center)) / np.float32(self.width), -80, 80)
            curve: NDArray[np.float32] = (1.0 / (1.0 + np.exp(exponent))).astype(np.float32)
            return curve
        shift, width = (0.5, self.width - 1) if self.function == "LINEAR" else (0.0, self.width)
        offset = values - np.float32(self.center - shift)
        if width == 0:
            return (offset > 0).astype(np.float32)
        ramp: NDArray[np.float32] = np.clip(offset / np.float32(width) + np.float32(0.5), 0, 1)
        return ramp


@dataclass(frozen=True, kw_only=True, eq=False)
class Presentation:
    """What the header says about grey levels; holds nothing about the patient.

    Args:
        bits_stored: Bits of a stored value.
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
    padding: tuple[int, int] | None = None
    inverted: bool = False
    invalid_window: bool = False

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest value the stored bits can hold."""
        if self.signed:
            return -(2 ** (self.bits_stored - 1)), 2 ** (self.bits_stored - 1) - 1
        return 0, 2**self.bits_stored - 1

    @property
    def full_range(self) -> tuple[float, float]:
        """Range after the modality step."""
        if self.modality_lut:
            return 0.0, self.modality_lut.top
        ends = [self.slope * end + self.intercept for end in self.stored_range]
        return min(ends), max(ends)


def modality(values: NDArray[np.float32], presentation: Presentation) -> NDArray[np.float32]:
    """Modality LUT, or else slope and intercept (PS3.3 C.11.1)."""
    if presentation.modality_lut:
        return presentation.modality_lut.apply(values)
    return values * np.float32(presentation.slope) + np.float32(presentation.intercept)


def stretch(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Map ``[low, high]`` to ``[0, 1]`` and clip; everything becomes 0 where ``low == high``."""
    if not high > low:
        return np.zeros_like(values, dtype=np.float32)
    ramp: NDArray[np.float32] = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return ramp


def voi(values: NDArray[np.float32], presentation: Presentation) -> NDArray[np.float32]:
    """VOI LUT, else window, else the full range (PS3.3 C.11.2)."""
    if presentation.voi_lut:
        lut = presentation.voi_lut
        return stretch(lut.apply(values), 0, lut.top)
    if presentation.window:
        return presentation.window.apply(values)
    return stretch(values, *presentation.full_range)


def normalise(
    stored: NDArray[np.generic], presentation: Presentation, policy: Policy = Policy.VOI
) -> NDArray[np.float32]:
    """All steps.

    Args:
        stored: Stored values of one grey image, any shape.
        presentation: The header's grey level description.
        policy: See the module docstring.

    Returns:
        float32 in ``[0, 1]``, same shape; 0 is black; padding is 0.

    Raises:
        RejectedFile: If a value is not finite.
    """
    limits = _percentile_limits(stored, presentation) if policy is Policy.PERCENTILE else None
    small = stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2
    if small and stored.size >= _TABLE_FROM_PIXELS:
        bits = 8 * stored.dtype.itemsize
        unsigned = np.arange(2**bits, dtype=np.dtype(f"u{bits // 8}"))
        table = _transfer(unsigned.view(stored.dtype.newbyteorder("=")), presentation, policy, limits)
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        return np.take(table, native.view(unsigned.dtype))
    if not np.isfinite(stored.astype(np.float64)).all():
        raise RejectedFile("BITS_INCONSISTENT", "stored values are not finite")
    return _transfer(stored, presentation, policy, limits)


def _transfer(
    stored: NDArray[np.generic], presentation: Presentation, policy: Policy, limits: tuple[float, float] | None
) -> NDArray[np.float32]:
    values = modality(stored.astype(np.float32), presentation)
    if limits is not None:
        grey = stretch(values, *limits)
    elif policy is Policy.NONE:
        grey = stretch(values, *presentation.full_range)
    else:
        grey = voi(values, presentation)
    if presentation.inverted:
        grey = 1 - grey
    if presentation.padding is not None:
        grey = np.where(_is_padding(stored, presentation.padding), np.float32(0), grey)
    return grey.astype(np.float32, copy=False)


def _is_padding(stored: NDArray[np.generic], padding: tuple[int, int]) -> NDArray[np.bool_]:
    values = stored.astype(np.float64)
    return (values >= padding[0]) & (values <= padding[1])


def _percentile_limits(stored: NDArray[np.generic], presentation: Presentation) -> tuple[float, float]:
    """The limits of this image, without padding."""
    kept = stored
    if presentation.padding is not None:
        kept = stored[~_is_padding(stored, presentation.padding)]
    if kept.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(modality(kept.astype(np.float32), presentation), PERCENTILES)
    return float(low), float(high)
