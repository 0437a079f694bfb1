from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medistill.ingest.geometry import Fit, fit_square, quantise


def test_eight_bit_levels_survive() -> None:
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    assert quantise(levels).tolist() == [257 * level for level in range(256)]


@settings(deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(8, 24), fit=st.sampled_from(list(Fit))
)
def test_any_shape_becomes_square_and_constant_stays_constant(
    height: int, width: int, size: int, fit: Fit
) -> None:
    square = fit_square(np.full((height, width), 0.5, dtype=np.float32), size, fit)
    assert square.shape == (size, size)
    assert square.dtype == np.uint16
    inside = square[square > 0]
    assert np.abs(inside.astype(int) - 32768).max() <= 1
    if fit is not Fit.PAD:
        assert inside.size == size * size


def test_pad_keeps_aspect_and_centre() -> None:
    square = fit_square(np.ones((10, 20), dtype=np.float32), 20, Fit.PAD)
    assert (square[5:15] == 65535).all()
    assert square[:5].max() == square[15:].max() == 0


def test_crop_takes_the_centre() -> None:
    image = np.zeros((10, 30), dtype=np.float32)
    image[:, 10:20] = 1
    assert (fit_square(image, 10, Fit.CROP) == 65535).all()


@pytest.mark.parametrize("fit", list(Fit))
def test_shrinking_averages(fit: Fit) -> None:
    board = (np.indices((64, 64)).sum(0) % 2).astype(np.float32)
    square = fit_square(board, 8, fit).astype(float) / 65535
    assert np.abs(square - 0.5).max() < 0.02
