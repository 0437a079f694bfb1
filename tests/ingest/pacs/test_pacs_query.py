"""Selections and listings, against made-up archives and a naive filter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medistill.errors import ConfigError, SourceError
from medistill.ingest.sources.dicomweb import DicomWebSource
from medistill.ingest.sources.dimse import DimseSource
from medistill.ingest.sources.pacs_query import Group, Row, Selection, list_archive

DAYS = ("", "20191231", "20200101", "20200630", "20201231", "20210101")
PEOPLE = ("A1", "A2", "B1", "")
KINDS = ("CR", "DX", "SR", "")
INSTANCES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.sampled_from(["1.9.1", "1.9.2", ""])),
    max_size=20,
    unique_by=lambda row: row[:3],
)
SELECTIONS = st.builds(
    Selection,
    studies=st.lists(st.sampled_from(["1.1", "1.2", "1.7"]), max_size=2, unique=True),
    series=st.lists(st.sampled_from(["1.1.1", "1.2.2", "1.3.1", "1.8.1"]), max_size=2, unique=True),
    patients=st.lists(st.sampled_from(["A1", "A*", "?1", "C"]), max_size=2, unique=True),
    date=st.sampled_from(["20200101-20201231", "20200101-", "-20200630", "20200630"]),
    modalities=st.lists(st.sampled_from(KINDS[:3]), max_size=2, unique=True),
)


class Archive:
    """Instances by study, series and number; honours UIDs only, as the worst archive would."""

    def __init__(self, instances: list[tuple[int, int, int, str]], extra: int = 0) -> None:
        self.instances = instances
        self.extra = extra

    def attributes(self, study: int, series: int) -> dict[str, str]:
        return {
            "StudyInstanceUID": f"1.{study}",
            "SeriesInstanceUID": f"1.{study}.{series}",
            "StudyDate": DAYS[study],
            "PatientID": PEOPLE[study % 4],
            "Modality": KINDS[(study + series) % 4],
        }

    def __call__(self, level: str, keys: Mapping[str, str]) -> Iterable[Row]:
        rows: dict[str, dict[str, str]] = {}
        for study, series, number, sop_class in self.instances:
            row = self.attributes(study, series)
            row |= {"SOPInstanceUID": f"1.{study}.{series}.{number}", "SOPClassUID": sop_class}
            if any(row[key] != value for key, value in keys.items() if key.endswith("InstanceUID") and value):
                continue
            count = sum(one[:2] == (study, series) for one in self.instances) + self.extra
            row["NumberOfSeriesRelatedInstances"] = str(count)
            own = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}[level]
            rows[row[own]] = row
        return reversed(rows.values())


def naive(archive: Archive, selection: Selection) -> set[str]:
    """Instances that fit, one by one."""
    fitting = set()
    first, dash, last = selection.date.partition("-")
    for study, series, number, _ in archive.instances:
        row = archive.attributes(study, series)
        day = row["StudyDate"]
        begun, over = not first or day >= first, bool(last) and day > last
        if (
            (day != "" and begun and not over if dash else day == first)
            and (not selection.studies or row["StudyInstanceUID"] in selection.studies)
            and (not selection.series or row["SeriesInstanceUID"] in selection.series)
            and (not selection.modalities or row["Modality"] in selection.modalities)
            and (not selection.patients or any(fnmatchcase(row["PatientID"], p) for p in selection.patients))
        ):
            fitting.add(f"1.{study}.{series}.{number}")
    return fitting


def names(groups: Iterable[Group]) -> list[str]:
    return [name for group in groups for name in group.names]


@given(instances=INSTANCES, selection=SELECTIONS)
def test_a_listing_is_what_a_naive_filter_finds(
    instances: list[tuple[int, int, int, str]], selection: Selection
) -> None:
    archive = Archive(instances)
    expected = naive(archive, selection)
    if not expected:
        with pytest.raises(SourceError, match="holds no instance"):
            list_archive(archive, selection)
        return
    groups = list_archive(archive, selection)
    listed = names(groups)
    assert len(listed) == len(set(listed))
    assert set(listed) == expected
    assert groups == list_archive(Archive(instances[::-1]), selection)
    assert sum(map(len, groups)) == len(expected) + sum(group.missing for group in groups)


@given(instances=INSTANCES.filter(bool), extra=st.integers(1, 3))
def test_every_promised_instance_is_counted_once(instances: list[tuple[int, int, int, str]], extra: int) -> None:
    studies = sorted({f"1.{row[0]}" for row in instances})
    groups = list_archive(Archive(instances, extra), Selection(studies=[*studies, "1.99"]))
    series = {row[:2] for row in instances}
    assert sum(map(len, groups)) == len(instances) + extra * len(series) + 1
    refused = [item for group in groups for item in group.refusals(0)]
    assert len({item.name for item in refused}) == len(refused) == extra * len(series) + 1


def test_series_alone_find_their_studies() -> None:
    archive = Archive([(1, 1, 1, "1.9"), (2, 1, 1, "1.9"), (2, 2, 1, "1.9")])
    assert names(list_archive(archive, Selection(series=["1.2.2", "1.1.1"]))) == ["1.1.1.1", "1.2.2.1"]


@given(st.text(max_size=20))
def test_a_date_is_a_date_or_an_error(text: str) -> None:
    try:
        selection = Selection(studies=["1.2"], date=text)
    except ConfigError:
        return
    digits = text.replace("-", "")
    assert text == "" or (set(digits) <= set("0123456789") and len(digits) in (8, 16) and text.count("-") <= 1)
    assert selection.wants_study({"StudyInstanceUID": "1.2"}) == (text == "")


@pytest.mark.parametrize(("module", "kind"), [("dicomweb_client", DicomWebSource), ("pynetdicom", DimseSource)])
def test_an_absent_package_is_named_with_its_extra(
    module: str, kind: type[DicomWebSource] | type[DimseSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r'pip install "medistill\[pacs\]"'):
        kind("http://127.0.0.1", studies=["1.2"])
