"""What to ask an archive for, and what it says it holds: shared by DICOMweb and DIMSE.

An archive is asked for studies, for the series of each study and for the instances of each series (PS3.4 C.6.2,
PS3.18 10.6). Not every archive honours every key, so each answer is filtered again here; patterns with wildcards
are never sent. Only UIDs are kept, joined into one text per series.

Example:
    >>> Selection(date="2020-2021")
    Traceback (most recent call last):
    medistill.errors.ConfigError: Expected date as YYYYMMDD, YYYYMMDD-, -YYYYMMDD or YYYYMMDD-YYYYMMDD.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.frames import Decoded
from medistill.ingest.reading import Item

STUDY, SERIES, IMAGE = "STUDY", "SERIES", "IMAGE"
#: Keys whose values an archive is asked for, per level.
RETURNED = {
    STUDY: ("StudyInstanceUID", "StudyDate", "PatientID", "NumberOfStudyRelatedInstances"),
    SERIES: ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances"),
    IMAGE: ("SOPInstanceUID", "SOPClassUID"),
}
NO_STUDY = "a study that was asked for is not in the archive"
NO_SERIES = "a series that was asked for is not in the archive"
FEWER_LISTED = "the archive counts more instances than it lists"
OTHER_INSTANCE = "the archive sent another instance than the one asked for"
_UID = re.compile(r"[0-9.]{1,64}")
_DATE = re.compile(r"([0-9]{8})?(-)?([0-9]{8})?")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_LOUD = ("pydicom", "pynetdicom", "dicomweb_client", "retrying", "urllib3")

Row = Mapping[str, str]
#: Asks an archive: level and keys to match, to rows of the keys in :data:`RETURNED`.
Find = Callable[[str, Mapping[str, str]], Iterable[Row]]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which instances are wanted; criteria of different kinds must all hold.

    Args:
        studies: Study Instance UIDs; empty for any.
        series: Series Instance UIDs; empty for any.
        patients: Patient IDs, ``*`` and ``?`` allowed; empty for any.
        date: Study date as ``YYYYMMDD``, or a range ``YYYYMMDD-YYYYMMDD`` open on either side; empty for any.
        modalities: Modalities such as ``CR``; empty for any.

    Raises:
        ConfigError: If a UID or the date is malformed, or nothing is selected.
    """

    studies: Sequence[str] = ()
    series: Sequence[str] = ()
    patients: Sequence[str] = ()
    date: str = ""
    modalities: Sequence[str] = ()

    def __post_init__(self) -> None:
        lists = (self.studies, self.series, self.patients, self.modalities)
        date = _DATE.fullmatch(self.date)
        checks = (
            (not any(isinstance(value, str) for value in lists), "Expected lists; found a single text."),
            (all(map(is_uid, (*self.studies, *self.series))), "Expected UIDs of digits and dots, at most 64."),
            (
                date is not None and self.date != "-" and (date[2] is not None or date[3] is None),
                "Expected date as YYYYMMDD, YYYYMMDD-, -YYYYMMDD or YYYYMMDD-YYYYMMDD.",
            ),
            (
                bool(self.date or any(lists)),
                "Expected studies, series, patients, date or modalities, so that not the whole archive is read.",
            ),
        )
        problems = [message for holds, message in checks if not holds]
        if problems:
            raise ConfigError(" ".join(problems))

    @cached_property
    def _days(self) -> tuple[str, str]:
        first, dash, last = self.date.partition("-")
        return first or "00000000", (last or "99999999") if dash else first

    def wants_study(self, row: Row) -> bool:
        """Whether a study fits; one without a date does not fit a range of dates."""
        first, last = self._days
        return (
            (not self.studies or row.get("StudyInstanceUID", "") in self.studies)
            and (not self.date or first <= row.get("StudyDate", "").replace(".", "") <= last)
            and (not self.patients or any(fnmatchcase(row.get("PatientID", ""), p) for p in self.patients))
        )

    def wants_series(self, row: Row) -> bool:
        """Whether a series fits."""
        return (not self.series or row.get("SeriesInstanceUID", "") in self.series) and (
            not self.modalities or row.get("Modality", "") in self.modalities
        )

    def study_keys(self) -> Iterator[dict[str, str]]:
        """Keys of the queries for studies; their answers together hold every study that fits."""
        if self.studies:
            yield from ({"StudyInstanceUID": uid} for uid in self.studies)
            return
        dates = {"StudyDate": self.date} if self.date else {}
        sendable = self.patients and all(map(_PLAIN.fullmatch, self.patients))
        for patient in self.patients if sendable else ("",):
            for modality in self.modalities or ("",):
                keys = {**dates, "PatientID": patient, "ModalitiesInStudy": modality}
                yield {key: value for key, value in keys.items() if value}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Instances of one series and one SOP class, or a number of instances that cannot be named.

    Args:
        study: Study Instance UID.
        series: Series Instance UID, or empty.
        sop_class: SOP Class UID, or empty where the archive does not say.
        joined: SOP Instance UIDs, sorted, separated by spaces.
        missing: Number of instances that are promised and not listed.
        detail: Why they are missing.
    """

    study: str
    series: str = ""
    sop_class: str = ""
    joined: str = ""
    missing: int = 0
    detail: str = ""

    def __len__(self) -> int:
        """Number of candidates."""
        return self.missing + (self.joined.count(" ") + 1 if self.joined else 0)

    @property
    def names(self) -> list[str]:
        """SOP Instance UIDs."""
        return self.joined.split()

    def refusals(self, ordinal: int) -> Iterator[Item]:
        """One refused item for every instance that is missing."""
        for number in range(self.missing):
            name = f"{self.series or self.study} not listed {number}"
            yield refused_item(ordinal + number, name, self.detail)


def refused_item(ordinal: int, name: str, detail: str) -> Item:
    """An item that the network did not deliver."""
    return Item(ordinal=ordinal, name=name, payload=None, refused="NET_PARTIAL", refused_detail=detail)


def list_archive(find: Find, selection: Selection) -> tuple[Group, ...]:
    """What an archive holds of a selection, in a fixed order.

    Instances that a count promises (Number of Study or Series Related Instances) and no query lists are kept as
    missing, as are studies and series that were named and are not there.

    Args:
        find: Asks the archive.
        selection: What is wanted.

    Raises:
        SourceError: If the archive holds nothing that fits.
    """
    groups: list[Group] = []
    seen: set[str] = set()
    found = dict(_studies(find, selection, seen))
    for study, promised in sorted(found.items()):
        listed = list(_series(find, selection, study, seen))
        groups += listed
        absent = 0 if selection.series or selection.modalities else promised - sum(map(len, listed))
        if absent > 0:
            groups.append(Group(study=study, missing=absent, detail=FEWER_LISTED))
    if not groups:
        raise SourceError(
            "The archive holds no instance that fits the selection. Check studies, series, patients, date and "
            "modalities, and what this user may see."
        )
    groups += [Group(study=uid, missing=1, detail=NO_STUDY) for uid in sorted({*selection.studies} - seen)]
    absent_series = sorted({*selection.series} - seen)
    groups += [Group(study="", series=uid, missing=1, detail=NO_SERIES) for uid in absent_series]
    return tuple(groups)


def _studies(find: Find, selection: Selection, seen: set[str]) -> Iterator[tuple[str, int]]:
    """Studies that fit with the number of instances they promise, 0 where it is not known; fills ``seen``."""
    if selection.series and not (selection.studies or selection.patients or selection.date):
        for uid in selection.series:
            rows = find(SERIES, {"SeriesInstanceUID": uid, "StudyInstanceUID": ""})
            yield from ((row["StudyInstanceUID"], 0) for row in rows if is_uid(row.get("StudyInstanceUID", "")))
        return
    for keys in selection.study_keys():
        for row in find(STUDY, keys):
            seen.add(row.get("StudyInstanceUID", ""))
            if is_uid(row.get("StudyInstanceUID", "")) and selection.wants_study(row):
                yield row["StudyInstanceUID"], _count(row, "NumberOfStudyRelatedInstances")


def _series(find: Find, selection: Selection, study: str, seen: set[str]) -> Iterator[Group]:
    """Groups of one study; adds the series met to ``seen``."""
    counts = {}
    for row in find(SERIES, {"StudyInstanceUID": study}):
        uid = row.get("SeriesInstanceUID", "")
        seen.add(uid)
        if is_uid(uid) and selection.wants_series(row):
            counts[uid] = _count(row, "NumberOfSeriesRelatedInstances")
    for series, promised in sorted(counts.items()):
        classes: defaultdict[str, set[str]] = defaultdict(set)
        for row in find(IMAGE, {"StudyInstanceUID": study, "SeriesInstanceUID": series}):
            if is_uid(row.get("SOPInstanceUID", "")):
                sop_class = row.get("SOPClassUID", "")
                classes[sop_class if is_uid(sop_class) else ""].add(row["SOPInstanceUID"])
        for sop_class, names in sorted(classes.items()):
            yield Group(study=study, series=series, sop_class=sop_class, joined=" ".join(sorted(names)))
        absent = promised - sum(map(len, classes.values()))
        if absent > 0:
            yield Group(study=study, series=series, missing=absent, detail=FEWER_LISTED)


def is_uid(text: str) -> bool:
    """Whether a text can be sent as a UID; stricter rules are left to the archive."""
    return _UID.fullmatch(text) is not None


def _count(row: Row, key: str) -> int:
    """A count; what cannot be one of a study (over a million) counts as unknown."""
    value = row.get(key, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 7 else 0


def same_instance(images: Iterable[Decoded], sop_uid: str) -> Iterator[Decoded]:
    """Pass on images that belong to the instance asked for.

    Raises:
        RejectedFile: NET_PARTIAL if the archive sent another one.
    """
    for image in images:
        if image.header.sop_uid not in ("", sop_uid):
            raise RejectedFile("NET_PARTIAL", OTHER_INSTANCE)
        yield image


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off logs and warnings of the network libraries: they quote addresses, UIDs and header values."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
