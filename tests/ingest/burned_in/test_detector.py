"""The cheap detector: recall and false alarms with limits, and its steps against naive versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medistill.ingest.burned_in import detector, suspect_boxes
from tests.ingest.burned_in.lettering import FONTS, LINES, Grey, Ink, adults, children, draw, meets, radiograph


def _recall(
    images: list[Grey], *, heights: tuple[int, ...], contrasts: tuple[float, ...], angle: float = 0
) -> float:
    rng = np.random.default_rng(0)
    found = []
    for number, image in enumerate(images):
        for sign in (1, -1):
            ink = Ink(
                text=str(rng.choice(LINES)),
                height=int(rng.choice(heights)),
                contrast=sign * float(rng.choice(contrasts)),
                font=FONTS[number % len(FONTS)],
                angle=angle,
            )
            if (drawn := draw(image, ink, rng)) is not None:
                found.append(meets(suspect_boxes(drawn[0]), drawn[1]))
    assert len(found) >= len(images) // 3
    return float(np.mean(found))


@pytest.mark.parametrize("angle", [0, 90, 180, 270, 3, -3])
def test_light_and_dark_lines_are_found_at_every_quarter_turn_and_slope(angle: float) -> None:
    images = [radiograph(seed) for seed in range(40)]
    assert _recall(images, heights=(10, 12, 16, 24), contrasts=(0.3, 0.5), angle=angle) >= 0.9


def test_small_and_faint_lines_are_mostly_found() -> None:
    images = [radiograph(seed) for seed in range(60)]
    assert _recall(images, heights=(8, 9), contrasts=(0.3, 0.5)) >= 0.8
    assert _recall(images, heights=(12, 16), contrasts=(0.15,)) >= 0.7


def test_tall_letters_are_found_in_large_images() -> None:
    images = [radiograph(seed, side=768) for seed in range(4)]
    assert _recall(images, heights=(60, 80), contrasts=(0.4,)) >= 0.75
    large = np.kron(radiograph(5, side=512), np.ones((5, 5), np.float32))
    drawn = draw(large, Ink(height=36, contrast=0.4), np.random.default_rng(1))
    assert drawn is not None
    assert meets(suspect_boxes(drawn[0]), drawn[1])


def test_pictures_without_text_raise_no_alarm() -> None:
    assert sum(bool(suspect_boxes(radiograph(seed))) for seed in range(60)) <= 1


@pytest.mark.parametrize("marker", ["L", "R", "PA", "AP", "RT"])
def test_markers_are_no_lines(marker: str) -> None:
    rng = np.random.default_rng(0)
    alarms = []
    for seed in range(20):
        ink = Ink(text=marker, height=int(rng.choice([12, 18, 26])), contrast=0.5, font=FONTS[seed % len(FONTS)])
        if (drawn := draw(radiograph(seed), ink, rng)) is not None:
            alarms.append(bool(suspect_boxes(drawn[0])))
    assert len(alarms) >= 10
    assert np.mean(alarms) <= 0.1


@pytest.mark.parametrize(
    ("films", "wanted"), [(children, 0.9), (adults, 0.9)], ids=["paediatric chest films", "adult chest films"]
)
def test_recall_on_real_films(
    shared_data: Path, films: Callable[[Path, int], Iterator[Grey]], wanted: float
) -> None:
    images = list(films(shared_data, 80))
    assert _recall(images, heights=(10, 12, 16), contrasts=(0.4, 0.6)) >= wanted


@pytest.mark.parametrize(
    ("films", "limit"), [(children, 0.06), (adults, 0.16)], ids=["paediatric chest films", "adult chest films"]
)
def test_alarms_on_real_films_are_rare(
    shared_data: Path, films: Callable[[Path, int], Iterator[Grey]], limit: float
) -> None:
    """Nearly all alarms are real text (clock, kV, AP ERECT), so the limits lie above their share."""
    alarms = [bool(suspect_boxes(image)) for image in films(shared_data, 150)]
    assert np.mean(alarms) <= limit


def test_a_line_on_black_beside_a_bright_body_is_found_where_the_range_is_narrow() -> None:
    drawn = draw(radiograph(1), Ink(contrast=0.4), np.random.default_rng(3))
    assert drawn is not None
    narrow = (0.5 + 0.02 * drawn[0]).astype(np.float32)
    assert meets(suspect_boxes(narrow), drawn[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (16, 400), (400, 16), (17, 17)])
def test_empty_and_tiny_images_have_no_text(shape: tuple[int, int]) -> None:
    assert suspect_boxes(np.zeros(shape, np.float32)) == ()
    assert suspect_boxes(np.full(shape, 0.5, np.float32)) == ()
    half = np.zeros(shape, np.float32)
    half[: shape[0] // 2] = 1
    assert suspect_boxes(half) == ()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    levels=st.integers(2, 256),
)
def test_boxes_lie_inside_any_image(seed: int, height: int, width: int, levels: int) -> None:
    noise = np.random.default_rng(seed).integers(0, levels, (height, width)).astype(np.float32) / levels
    for top, left, bottom, right in suspect_boxes(noise):
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width


def test_top_hat_equals_its_definition() -> None:
    """The largest minimum over all 8 by 8 squares that hold a pixel and lie inside the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 26), dtype=np.uint8)
    for image, hat in zip((pixels, 255 - pixels), detector._top_hats(pixels), strict=True):
        opened = np.zeros_like(image)
        for y in range(21 - 7):
            for x in range(26 - 7):
                square = (slice(y, y + 8), slice(x, x + 8))
                opened[square] = np.maximum(opened[square], image[square].min())
        assert np.array_equal(hat[:21, :26], image - opened)
        assert not hat[21:].any()
        assert not hat[:, 26:].any()


def test_light_and_dark_ink_at_opposite_edges_stay_apart() -> None:
    """Rows 0 to 63 of both polarities lie behind each other in memory."""
    pixels = np.full((64, 64), 128, np.uint8)
    pixels[56:, 20:24], pixels[:8, 20:24] = 255, 0
    glyphs = detector._glyphs(detector._top_hats(pixels))
    assert sorted(zip(glyphs.low.tolist(), glyphs.high.tolist(), strict=True)) == [
        (0, 8),
        (20, 24),
        (20, 24),
        (56, 64),
    ]


def test_strips_do_not_show() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 64), dtype=np.uint8)
    hats = detector._top_hats(pixels)
    for top in (2010, 2040, 2060):
        piece = detector._top_hats(pixels[top - 20 : top + 20])
        assert np.array_equal(hats[:, top - 10 : top + 10, :64], piece[:, 10:30, :64])


@settings(max_examples=50, deadline=None)
@given(ink=arrays(bool, (13, 17)))
def test_components_equal_those_of_an_image_labelled_pixel_by_pixel(ink: np.ndarray) -> None:
    ink[:, -1] = False
    ink[0, 0] = False
    flat = ink.ravel()
    first, last = (np.flatnonzero(flat[1:] != flat[:-1]) + 1).reshape(-1, 2).T
    count, label, above = detector._connect(first, last, ink.shape[1])
    expected, expected_count = ndimage.label(ink, np.ones((3, 3)))
    assert count == expected_count
    names = expected.ravel()[first]
    pairs = {(int(mine), int(theirs)) for mine, theirs in zip(label, names, strict=True)}
    assert len(pairs) == count
    below_ink = ink[1:] & ink[:-1]
    for mine, theirs in pairs:
        assert above[mine] == (below_ink & (expected[1:] == theirs)).sum()
