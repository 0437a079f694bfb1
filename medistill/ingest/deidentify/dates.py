"""Dates and times that keep their distances and lose their place.

All dates of a patient move back by one secret number of days, between 100 and 150 years, so that a moved date
cannot be taken for a date of the source. Times of day are told from the start of the study, which becomes noon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from medistill.ingest.identity import Pseudonymiser

_NEAREST, _SPREAD = 36525, 18262
_DATE = re.compile(r"(\d{4})[.\-/]?(\d{2})[.\-/]?(\d{2})")
_TIME = re.compile(r"(\d{2}):?(\d{2})?:?(\d{2})?(?:\.(\d{1,6}))?")
_DATETIME = re.compile(r"(\d{8})(\d{2}(?:\d{2}){0,2}(?:\.\d{1,6})?)?(?:[+-]\d{4})?")
_DAY, _NOON = 86_400_000, 43_200_000


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """How dates and times of one study move.

    Args:
        days: Days that every date of the patient moves back.
        start: Start of the study in milliseconds of the day, or ``None`` where it is not known.
        start_day: Date of the study, or ``None``.
    """

    days: int
    start: int | None = None
    start_day: date | None = None

    def date(self, text: str) -> str | None:
        """Moved date as ``YYYYMMDD``; ``None`` for a malformed one."""
        day = parse_date(text)
        return None if day is None else _compact(day - timedelta(days=self.days))

    def time(self, text: str) -> str | None:
        """Time of day from the start of the study, which is noon; ``None`` where it cannot be told."""
        moment = _milliseconds(text)
        if moment is None or self.start is None:
            return None
        return _clock((moment - self.start + _NOON) % _DAY)

    def datetime(self, text: str, *, times: bool) -> str | None:
        """Moved date and time; only the date where times are not kept, or the start of the study is not known."""
        found = _DATETIME.fullmatch(text)
        day = parse_date(found[1]) if found else None
        if found is None or day is None:
            return None
        moment = _milliseconds(found[2] or "")
        if moment is None or not times or self.start is None or self.start_day is None:
            return _compact(day - timedelta(days=self.days))
        began = datetime.combine(self.start_day, datetime.min.time()) + timedelta(milliseconds=self.start)
        then = datetime.combine(day, datetime.min.time()) + timedelta(milliseconds=moment)
        noon = datetime.combine(self.start_day - timedelta(days=self.days), datetime.min.time()) + timedelta(
            hours=12
        )
        moved = noon + (then - began)
        return _compact(moved.date()) + _clock(
            (moved.hour * 3600 + moved.minute * 60 + moved.second) * 1000 + moved.microsecond // 1000
        )


def days_back(pseudonymiser: Pseudonymiser, patient: str) -> int:
    """Days that all dates of a patient move back; secret, and the same for all of the patient's files."""
    digest = pseudonymiser.digest("days", patient)
    return _NEAREST + int.from_bytes(digest[:8], "big") % _SPREAD


def start_of_study(study_date: str, times: tuple[str, ...]) -> tuple[int | None, date | None]:
    """First readable time in milliseconds, and the date of the study."""
    moments = (_milliseconds(text) for text in times)
    return next((moment for moment in moments if moment is not None), None), parse_date(study_date)


def parse_date(text: str) -> date | None:
    """A DICOM date, also in the form of ACR-NEMA (``YYYY.MM.DD``)."""
    found = _DATE.fullmatch(text)
    try:
        day = date(int(found[1]), int(found[2]), int(found[3])) if found else None
    except ValueError:
        return None
    return day if day is not None and day.year >= 1850 else None


def _compact(day: date) -> str:
    return f"{day.year:04d}{day.month:02d}{day.day:02d}"


def _milliseconds(text: str) -> int | None:
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    hour, minute, second = (int(part or 0) for part in found.group(1, 2, 3))
    if hour > 23 or minute > 59 or second > 60:
        return None
    return ((hour * 60 + minute) * 60 + second) * 1000 + int((found[4] or "0").ljust(3, "0")[:3])


def _clock(milliseconds: int) -> str:
    seconds, fraction = divmod(milliseconds, 1000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}{minute:02d}{second:02d}" + (f".{fraction:03d}" if fraction else "")
