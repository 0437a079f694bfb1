"""From a PACS to a cohort with the command of the README; an interrupted pull goes on where it stopped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medistill.cli import app
from medistill.errors import SourceError
from medistill.ingest import IngestConfig, ingest
from medistill.ingest.sources.dicomweb import DicomWebSource
from tests.ingest.conftest import KEY, write_csv
from tests.ingest.pacs.archive import USER, Orthanc, Stored
from tests.ingest.pacs.faults import PASS, Wire

CONFIG = IngestConfig(size=16, burned_in="allow")


@pytest.fixture
def labels(stored: list[Stored], tmp_path: Path) -> Path:
    rows = [("PatientID", "label")]
    rows += [(f"TEST{number:03d}", "sick" if number % 2 else "well") for number in range(30)]
    return write_csv(tmp_path / "labels.csv", rows)


def summary(cohort: Path) -> set[tuple[str, ...]]:
    """What must not depend on how images arrived."""
    with (cohort / "manifest.csv").open() as file:
        return {(row["uid"], row["patient"], row["split"], row["pixel_key"]) for row in csv.DictReader(file)}


@pytest.fixture
def expected(stored: list[Stored], labels: Path, tmp_path: Path) -> set[tuple[str, ...]]:
    folder = tmp_path / "files"
    folder.mkdir()
    for entry in stored:
        if entry.modality == "CR":
            (folder / entry.path.name).write_bytes(entry.path.read_bytes())
    ingest(folder, tmp_path / "from-files", key=KEY, labels=labels, config=CONFIG, jobs=1)
    return summary(tmp_path / "from-files")


@pytest.mark.parametrize("kind", ["dicomweb", "dimse"])
def test_the_command_reads_a_pacs(
    orthanc: Orthanc, labels: Path, expected: set[tuple[str, ...]], tmp_path: Path, spool: Path, kind: str
) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    address, connection = orthanc.url, [f"user={USER}"]
    if kind == "dimse":
        address, connection = f"dimse://ORTHANC@127.0.0.1:{orthanc.dicom_port}", [f"spool={spool}"]
    command = ["--quiet", "ingest", address, "--out", str(tmp_path / "cohort"), "--labels", str(labels)]
    command += ["--key", str(key), "--modality", "CR", "--size", "16", "--burned-in", "allow"]
    for entry in connection:
        command += ["--connect", entry]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert summary(tmp_path / "cohort") == expected


def test_a_broken_pull_says_so_and_goes_on(
    orthanc: Orthanc, labels: Path, expected: set[tuple[str, ...]], tmp_path: Path
) -> None:
    def pull(port: int, **options: Any) -> Any:
        source = DicomWebSource(
            f"http://127.0.0.1:{port}/dicom-web", user=USER, modalities=["CR"], retries=0, pause=0.01, **options
        )
        return ingest(source, tmp_path / "cohort", key=KEY, labels=labels, config=CONFIG, jobs=1)

    listing = 64  # connections are kept open, so few are made; the first ones list
    with Wire(orthanc.http_port, *[PASS] * listing) as whole:
        names = len(DicomWebSource(f"http://127.0.0.1:{whole.port}/dicom-web", user=USER, modalities=["CR"]))
        needed = whole.connections
    message = r"NET_PARTIAL: \d+ of \d+ promised.*run the same command again"
    with (
        Wire(orthanc.http_port, *[PASS] * needed, 40_000, *[0] * 500) as wire,
        pytest.raises(SourceError, match=message),
    ):
        pull(wire.port)
    assert not (tmp_path / "cohort").exists()
    with Wire(orthanc.http_port, *[PASS] * listing) as wire:
        cohort = pull(wire.port)
    assert len(cohort) == names
    assert summary(tmp_path / "cohort") == expected


def test_going_on_without_what_did_not_arrive_is_a_choice(orthanc: Orthanc, labels: Path, tmp_path: Path) -> None:
    with Wire(orthanc.http_port, *[PASS] * 64) as whole:
        len(DicomWebSource(f"http://127.0.0.1:{whole.port}/dicom-web", user=USER, modalities=["CR"]))
        needed = whole.connections
    config = IngestConfig(size=16, burned_in="allow", accept_partial=True)
    with Wire(orthanc.http_port, *[PASS] * needed, 120_000, *[0] * 500) as wire:
        source = DicomWebSource(
            f"http://127.0.0.1:{wire.port}/dicom-web", user=USER, modalities=["CR"], retries=0, pause=0.01
        )
        cohort = ingest(source, tmp_path / "cohort", key=KEY, labels=labels, config=config, jobs=1)
    counts = cohort.profile["counts"]
    assert counts["quarantine"]["NET_PARTIAL"] > 0
    assert counts["images"] + counts["quarantine"]["NET_PARTIAL"] == counts["files"]
