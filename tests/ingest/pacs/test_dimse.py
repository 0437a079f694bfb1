"""DIMSE against a real Orthanc."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest

from medistill.ingest.frames import decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import isolated
from medistill.ingest.reading import Item
from medistill.ingest.sources.dimse import DimseSource, decode_transient
from tests.ingest.pacs.archive import PATIENTS, ROOT, Orthanc, Stored
from tests.ingest.pacs.test_dicomweb import SELECTIONS


def source(orthanc: Orthanc, spool: Path, **options: object) -> DimseSource:
    defaults = {"port": orthanc.dicom_port, "called_aet": "ORTHANC", "spool": spool, "pause": 0.01, "timeout": 10}
    return DimseSource("127.0.0.1", **{**defaults, **options})  # type: ignore[arg-type]


def move(orthanc: Orthanc) -> dict[str, object]:
    return {"method": "move", "move_port": orthanc.move_port, "move_address": "127.0.0.1"}


def mean_of(item: Item) -> list[float]:
    """What a child process finds."""
    return [float(image.grey().mean()) for image in decode_transient(item.payload, Policy.NONE)]


@pytest.mark.parametrize("kind", SELECTIONS)
def test_selects_what_the_files_say(orthanc: Orthanc, stored: list[Stored], spool: Path, kind: str) -> None:
    options, fits = SELECTIONS[kind]
    expected = sorted(s.sop for s in stored if fits(s))
    chosen = source(orthanc, spool, **options)
    assert len(chosen) == len(expected)
    items = list(chosen.items(known=frozenset(expected)))
    assert sorted(item.name for item in items) == expected
    assert all(item.payload is None for item in items)


@pytest.mark.parametrize("method", ["get", "move"])
def test_retrieves_the_data_sets_of_the_files(
    orthanc: Orthanc, stored: list[Stored], spool: Path, method: str
) -> None:
    files = {s.sop: s.path for s in stored}
    options = move(orthanc) if method == "move" else {}
    chosen = source(orthanc, spool, studies=[f"{ROOT}.{PATIENTS + 1}", f"{ROOT}.3"], **options)
    count = 0
    for item in chosen.items():
        ours, theirs = pydicom.dcmread(item.payload.path), pydicom.dcmread(files[item.name])
        assert item.payload.path.stat().st_mode & 0o777 == 0o600
        assert ours.file_meta.TransferSyntaxUID == theirs.file_meta.TransferSyntaxUID
        differing = {element.keyword for element in theirs if ours.get(element.tag) != element}
        # the archive drops padding and may say OB for OW
        assert differing <= {"DataSetTrailingPadding", "PixelData"}
        assert ours.PixelData == theirs.PixelData
        count += 1
    assert count == len(chosen) == 15


def test_decoding_in_child_processes_gives_the_pixels_of_the_files(
    orthanc: Orthanc, stored: list[Stored], spool: Path
) -> None:
    files = {s.sop: s.path for s in stored}
    chosen = source(orthanc, spool, date="20200115-20200215")
    outcomes = list(isolated(mean_of, chosen.items(), jobs=2))
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
    found = {outcome.item.name: outcome.result for outcome in outcomes if not outcome.ended}
    assert len(found) == len(chosen) == 18
    for name, mean in found.items():
        (image,) = decode_dicom(files[name], Policy.NONE)
        assert mean == pytest.approx(float(image.grey().mean()))
    (folder,) = spool.iterdir()
    assert list(folder.iterdir()) == []
