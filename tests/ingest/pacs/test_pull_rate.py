"""How fast images of a usual size arrive, and how much memory that takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medistill.ingest.reading import Item
from medistill.ingest.sources.dicomweb import DicomWebSource, retrieve
from medistill.ingest.sources.dimse import DimseSource
from tests.ingest.conftest import make_dicom
from tests.ingest.pacs.archive import ROOT, USER, Orthanc

IMAGES = 120
STUDY = f"{ROOT}.5000"


@pytest.fixture
def filled(orthanc: Orthanc, tmp_path: Path) -> Iterator[Orthanc]:
    """The archive with a study of 2 MB films."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (1024, 1024)).astype(np.uint16)
    for number in range(IMAGES):
        path = tmp_path / "film.dcm"
        names = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": f"{STUDY}.{number // 40}"}
        pixels[0, 0] = number
        make_dicom(path, pixels, **names, SOPInstanceUID=f"{STUDY}.9.{number + 1}", StudyDate="20220101")
        orthanc.request("/instances", path.read_bytes())
    yield orthanc
    found = orthanc.request("/tools/lookup", STUDY.encode(), method="POST")
    identifier = found.decode().split('"ID" : "')[1].split('"')[0]
    orthanc.request(f"/studies/{identifier}", method="DELETE")


def resident() -> float:
    """Resident memory of this process in MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def take(item: Item) -> int:
    """Receive one instance and forget it."""
    if hasattr(item.payload, "path"):
        size = item.payload.path.stat().st_size
        item.payload.path.unlink()
        return int(size)
    return len(retrieve(item.payload))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dicomweb", "get", "move"])
def test_memory_stays_flat(filled: Orthanc, spool: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "dicomweb":
        source: DicomWebSource | DimseSource = DicomWebSource(filled.url, user=USER, studies=[STUDY])
    else:
        port = filled.move_port if kind == "move" else 0
        source = DimseSource(
            "127.0.0.1",
            filled.dicom_port,
            called_aet="ORTHANC",
            studies=[STUDY],
            spool=spool,
            method=kind,
            move_port=port,
            move_address="127.0.0.1",
        )
    assert len(source) == IMAGES
    levels = []
    wall, cpu = time.monotonic(), time.process_time()
    for item in source.items():
        assert take(item) > 2 << 20
        levels.append(resident())
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    with capsys.disabled():
        rates = f"{IMAGES / wall:.0f} images/s, {IMAGES / cpu:.0f} per CPU second"
        print(f"\n{kind}: {rates}; MB {levels[10]:.0f} to {max(levels):.0f}")
    assert len(levels) == IMAGES
    assert max(levels[30:]) - min(levels[10:30]) < 40
