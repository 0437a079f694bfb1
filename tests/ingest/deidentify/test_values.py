"""Single values: numbers, dates and times, and tables that look like text."""

from __future__ import annotations

import struct
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import Tag

from medistill.ingest.deidentify.dates import Calendar, days_back, parse_date, start_of_study
from medistill.ingest.deidentify.textlike import text_like
from medistill.ingest.deidentify.values import encode_numbers, numbers, texts


def raw(vr: str, value: bytes, *, little: bool = True) -> RawDataElement:
    return RawDataElement(Tag(0x00181111), vr, len(value), value, 0, False, little)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.sampled_from(["DS", "IS", "US", "FD", "UL", "LO", "UN"]), st.booleans())
def test_any_bytes_read_as_numbers_or_as_nothing(value, vr, little) -> None:
    found = numbers(raw(vr, value, little=little), "DS")
    assert found is None or all(np.isfinite(found))


@settings(max_examples=200, deadline=None)
@given(st.floats(-99999, 99999))
def test_decimal_strings_are_short_and_near(value) -> None:
    encoded = encode_numbers([value], "DS", 12)
    assert len(encoded) <= 16
    assert len(encoded) % 2 == 0
    assert float(encoded) == pytest.approx(value, rel=1e-6, abs=1e-12)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=6), st.booleans())
def test_binary_numbers_agree_with_struct(values, little) -> None:
    packed = struct.pack(f"{'<' if little else '>'}{len(values)}h", *values)
    assert numbers(raw("SS", packed, little=little), "SS") == values
    assert encode_numbers(values, "SS") == struct.pack(f"<{len(values)}h", *values)


@pytest.mark.parametrize(
    "text", [b"1_0", b"nan", b"inf", b"0x10", b"1e999", b"12a", "１２".encode(), b"--1", b"1 2"]
)
def test_other_spellings_are_no_numbers(text) -> None:
    assert numbers(raw("DS", text), "DS") is None


def test_large_numbers_keep_five_digits() -> None:
    assert encode_numbers([83719254], "IS") == b"83719000"
    assert encode_numbers([370000000], "DS") == b"370000000 "
    assert encode_numbers([70000], "US") is None


def test_texts_of_parsed_elements() -> None:
    assert texts(DataElement(0x00080008, "CS", ["A", "B"])) == ["A", "B"]
    assert texts(raw("CS", b"A\\B ")) == ["A", "B"]
    assert texts(raw("CS", b"  \0")) == []


def test_dates_keep_their_distance() -> None:
    calendar = Calendar(days=40000)
    first, second = calendar.date("20170228"), calendar.date("2017.03.02")
    assert (date.fromisoformat(second) - date.fromisoformat(first)).days == 2
    assert date(2017, 2, 28) - timedelta(days=40000) == date.fromisoformat(first)


@pytest.mark.parametrize("text", ["2017061", "20170230", "00010101", "SMITH", "20170615x", "", "99999999"])
def test_no_dates(text) -> None:
    assert parse_date(text) is None
    assert Calendar(days=40000).date(text) is None
    assert Calendar(days=40000).datetime(text, times=True) is None


def test_times_are_told_from_the_start_of_the_study() -> None:
    start, day = start_of_study("20170615", ("", "081500"))
    calendar = Calendar(days=40000, start=start, start_day=day)
    assert calendar.time("081500") == "120000"
    assert calendar.time("0816") == "120100"
    assert calendar.time("081500.25") == "120000.250"
    assert calendar.time("071500.123456") == "110000.123"
    assert calendar.datetime("20170616081501", times=True) == calendar.date("20170616") + "120001"
    assert calendar.datetime("20170616081501+0200", times=False) == calendar.date("20170616")
    for bad in ("483719", "126000", "x", "99", "081500,5"):
        assert calendar.time(bad) is None
    assert Calendar(days=1).time("081500") is None


def test_patients_move_by_secret_days(secret) -> None:
    days = {days_back(secret, str(patient)) for patient in range(50)}
    assert len(days) > 45
    assert min(days) >= 36525
    assert days_back(secret, "1") == days_back(secret, "1") != days_back(type(secret)(bytes(32)), "1")


def test_ramps_are_no_text() -> None:
    for step in (1, 16, 17, 257, 256):
        table = (np.arange(256) * step).astype("<u2")
        assert not text_like(table.tobytes()), step
    assert not text_like(np.arange(256, dtype=np.uint8).tobytes())


@pytest.mark.parametrize("text", [b"Quorvexity", b"SMITH", b"83719254", b"DOE^JANE"])
def test_names_are_text(text) -> None:
    assert text_like(bytes(20) + text + bytes(20))
    assert text_like(bytes(20) + text.decode().encode("utf-16-le") + bytes(20))
