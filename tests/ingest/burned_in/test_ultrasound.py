"""What lies outside ultrasound regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medistill.ingest.burned_in import outside_regions


def _region(top: object, left: object, bottom: object, right: object) -> Dataset:
    item = Dataset()
    item.RegionLocationMinY0, item.RegionLocationMinX0 = top, left
    item.RegionLocationMaxY1, item.RegionLocationMaxX1 = bottom, right
    return item


def _header(*items: Dataset) -> Dataset:
    dataset = Dataset()
    dataset.SequenceOfUltrasoundRegions = list(items)
    return dataset


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 29), st.integers(0, 19), st.integers(0, 29)), max_size=5)
)
def test_boxes_cover_exactly_what_no_region_covers(corners: list[tuple[int, int, int, int]]) -> None:
    inside = np.zeros((20, 30), bool)
    for top, left, bottom, right in corners:
        inside[top : bottom + 1, left : right + 1] = True
    usable = [c for c in corners if c[0] <= c[2] and c[1] <= c[3]]
    covered = np.zeros((20, 30), int)
    for top, left, bottom, right in outside_regions(_header(*(_region(*c) for c in corners)), 20, 30):
        covered[top:bottom, left:right] += 1
    assert np.array_equal(covered == 1, ~inside & bool(usable))
    assert covered.max() <= 1


@pytest.mark.parametrize(
    "header",
    [Dataset(), _header(), _header(Dataset()), _header(_region(5, 5, 2, 2)), _header(_region(20, 0, 25, 10))],
    ids=["no sequence", "empty", "no corners", "reversed", "beyond the image"],
)
def test_a_header_without_usable_region_covers_nothing(header: Dataset) -> None:
    assert outside_regions(header, 20, 30) == ()
