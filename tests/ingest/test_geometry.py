from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medistill.ingest.geometry import Fit, block_means, fit_inside, fit_square, quantise, resize


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


def naive_means(image: np.ndarray, down: int, across: int) -> np.ndarray:
    return np.array(
        [
            [
                np.mean(image[top : top + down, left : left + across].astype(np.float64))
                for left in range(0, image.shape[1], across)
            ]
            for top in range(0, image.shape[0], down)
        ]
    )


@settings(deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    down=st.integers(1, 40),
    across=st.integers(1, 40),
    dtype=st.sampled_from(["u1", "i1", ">u2", "<i2", "f4"]),
    extreme=st.booleans(),
)
def test_block_means(height: int, width: int, down: int, across: int, dtype: str, extreme: bool) -> None:
    rng = np.random.default_rng(height * 100 + width)
    kind = np.dtype(dtype)
    low, high = (0, 1) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    levels = rng.random((height, width))
    image = np.where(levels < 0.5, low, high) if extreme else low + levels * (float(high) - low)
    image = image.astype(kind)
    expected = naive_means(image, down, across)
    found = block_means(image, down, across)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * max(abs(low), abs(high)))


def test_block_means_of_many_strips() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (1500, 1200)).astype(np.uint16)
    np.testing.assert_allclose(block_means(image, 7, 5), naive_means(image, 7, 5), rtol=1e-6)


class AtMost10:
    largest = 10

    def __call__(self, rows: np.ndarray, /) -> np.ndarray:
        return np.minimum(rows, 10)


def test_preparation_comes_before_averaging() -> None:
    image = np.array([[0, 100], [0, 100]], dtype=np.uint8)
    assert fit_inside(image, 1, Fit.STRETCH, AtMost10()).tolist() == [[5]]


@pytest.mark.parametrize(("length", "size"), [(100, 33), (511, 256), (512, 256), (700, 256), (90, 120)])
def test_a_ramp_stays_a_ramp(length: int, size: int) -> None:
    """The result covers exactly the area of the image: no shift, no change of scale."""
    ramp = np.broadcast_to((np.arange(length, dtype=np.float32) + 0.5) / length, (length, length))
    expected = (np.arange(size) + 0.5) / size
    found = resize(ramp, (size, size))
    inner = slice(3, -3)
    np.testing.assert_allclose(found[size // 2, inner], expected[inner], atol=0.6 / length)


@pytest.mark.parametrize("length", [130, 257, 300, 511, 1024])
def test_no_aliasing_and_no_ringing(length: int) -> None:
    """The finest grating disappears; a step stays within its range."""
    grating = np.tile(np.arange(length) % 2, (length, 1)).astype(np.float32)
    assert np.ptp(resize(grating, (64, 64))[:, 2:-2]) < 0.27
    step = np.tile(np.arange(length) > length / 3, (length, 1)).astype(np.float32)
    found = resize(step, (64, 64))
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    assert (np.diff(found, axis=1) >= -1e-6).all()


def test_the_wanted_size_is_not_touched() -> None:
    image = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    np.testing.assert_array_equal(fit_square(image, 32, Fit.PAD), quantise(image))
