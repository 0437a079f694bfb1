"""DICOMweb against a real Orthanc."""

from __future__ import annotations

import urllib.error
import urllib.request

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000

from medistill.errors import SourceError
from medistill.ingest.frames import decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import isolated
from medistill.ingest.reading import Item
from medistill.ingest.sources import dicomweb
from medistill.ingest.sources.dicomweb import DicomWebSource, decode_reference, retrieve
from tests.ingest.pacs.archive import PATIENTS, ROOT, USER, Orthanc, Stored
from tests.ingest.pacs.faults import Gateway

SELECTIONS = {
    "study": ({"studies": [f"{ROOT}.3"]}, lambda s: s.study == f"{ROOT}.3"),
    "series": ({"series": [f"{ROOT}.5.2"]}, lambda s: s.series == f"{ROOT}.5.2"),
    "study and series": (
        {"studies": [f"{ROOT}.5"], "series": [f"{ROOT}.5.1"]},
        lambda s: s.series == f"{ROOT}.5.1",
    ),
    "date": ({"date": "20200315-20200515"}, lambda s: "20200315" <= s.date <= "20200515"),
    "day": ({"date": "20200315"}, lambda s: s.date == "20200315"),
    "open date": ({"date": "20200916-"}, lambda s: s.date >= "20200916"),
    "modality": ({"modalities": ["DX", "NM"]}, lambda s: s.modality in ("DX", "NM")),
    "date and modality": (
        {"date": "-20200630", "modalities": ["DX"]},
        lambda s: s.modality == "DX" and s.date <= "20200630",
    ),
    "patient": ({"patients": ["TEST004"]}, lambda s: s.patient == "TEST004"),
    "wildcard": ({"patients": ["TEST00*"]}, lambda s: s.patient.startswith("TEST00")),
    "everything": ({"date": "19000101-"}, lambda s: True),
}
SYNTAX_STUDY = f"{ROOT}.{PATIENTS + 1}"


def source(orthanc: Orthanc, **options: object) -> DicomWebSource:
    return DicomWebSource(orthanc.url, **{"user": USER, "pause": 0.01, **options})  # type: ignore[arg-type]


def mean_of(item: Item) -> list[float]:
    """What a child process finds."""
    return [float(image.grey().mean()) for image in decode_reference(item.payload, Policy.NONE)]


@pytest.mark.parametrize("kind", SELECTIONS)
def test_selects_what_the_files_say(orthanc: Orthanc, stored: list[Stored], kind: str) -> None:
    options, fits = SELECTIONS[kind]
    expected = sorted((s.study, s.series, s.sop) for s in stored if fits(s))
    chosen = source(orthanc, **options)
    assert len(chosen) == len(expected) > 0
    items = list(chosen.items())
    references = [(item.payload.study, item.payload.series, item.payload.sop) for item in items]
    assert sorted(references) == expected
    assert [item.name for item in items] == [sop for _, _, sop in references]
    assert [item.ordinal for item in items] == list(range(len(expected)))


def test_bytes_are_those_of_the_files_in_every_transfer_syntax(orthanc: Orthanc, stored: list[Stored]) -> None:
    files = {s.sop: s.path for s in stored}
    items = list(source(orthanc, studies=[SYNTAX_STUDY, f"{ROOT}.1"]).items())
    assert len(items) == 13
    for item in items:
        assert retrieve(item.payload) == files[item.name].read_bytes()


def test_decoding_in_child_processes_gives_the_pixels_of_the_files(orthanc: Orthanc, stored: list[Stored]) -> None:
    files = {s.sop: s.path for s in stored}
    chosen = source(orthanc, date="20200115-20200215")
    outcomes = list(isolated(mean_of, chosen.items(), jobs=2))
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
    found = {outcome.item.name: outcome.result for outcome in outcomes if not outcome.ended}
    assert len(found) == len(chosen) == 18
    for name, mean in found.items():
        (image,) = decode_dicom(files[name], Policy.NONE)
        assert mean == pytest.approx(float(image.grey().mean()))
    assert np.std(list(found.values())) > 0


def test_without_a_transfer_syntax_the_archive_fails_on_jpeg_2000(orthanc: Orthanc, stored: list[Stored]) -> None:
    """The reason for the header that is sent."""
    files = {s.sop: s.path for s in stored}
    (reference,) = [
        item.payload
        for item in source(orthanc, studies=[SYNTAX_STUDY]).items()
        if pydicom.dcmread(files[item.name]).file_meta.TransferSyntaxUID == JPEG2000
    ]
    with Gateway(orthanc.http_port) as gateway:
        path = reference.url.split(str(orthanc.http_port))[1]
        request = urllib.request.Request(f"http://127.0.0.1:{gateway.port}{path}")
        request.add_header("Accept", 'multipart/related; type="application/dicom"')
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
        caught.value.close()
    assert caught.value.code == 500
    assert retrieve(reference)[128:132] == b"DICM"


@pytest.mark.parametrize("page", [1, 4, 7])
def test_pages_together_are_the_whole_list(
    orthanc: Orthanc, stored: list[Stored], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "_PAGE", page)
    expected = {s.sop for s in stored if s.date <= "20200331"}
    assert {item.name for item in source(orthanc, date="-20200331").items()} == expected


def test_a_server_that_ignores_the_offset_is_asked_only_once_more(
    orthanc: Orthanc, stored: list[Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gateway(orthanc.http_port) as gateway:
        gateway.rewrite = lambda path: "&".join(part for part in path.split("&") if not part.startswith("offset"))
        chosen = DicomWebSource(f"http://127.0.0.1:{gateway.port}/dicom-web", studies=[SYNTAX_STUDY])
        assert {item.name for item in chosen.items()} == {s.sop for s in stored if s.study == SYNTAX_STUDY}
        assert len(gateway.requests) == 2 * (1 + 1 + 3)


def test_known_instances_come_without_payload(orthanc: Orthanc) -> None:
    chosen = source(orthanc, studies=[f"{ROOT}.3"])
    first = next(chosen.items()).name
    assert [item.payload is None for item in chosen.items(known={first})] == [True, False, False, False]


def test_what_was_named_and_is_absent_is_accounted_for(orthanc: Orthanc) -> None:
    chosen = source(orthanc, studies=[f"{ROOT}.3", "1.2.3.4"])
    items = list(chosen.items())
    assert len(items) == len(chosen) == 5
    assert (items[-1].refused, items[-1].refused_detail) == (
        "NET_PARTIAL",
        "a study that was asked for is not in the archive",
    )
    chosen = source(orthanc, series=[f"{ROOT}.5.2", f"{ROOT}.5.9"])
    assert [item.refused for item in chosen.items()] == ["", "NET_PARTIAL"]


def test_nothing_found_is_an_error(orthanc: Orthanc) -> None:
    with pytest.raises(SourceError, match="holds no instance that fits the selection"):
        len(source(orthanc, date="19500101"))
