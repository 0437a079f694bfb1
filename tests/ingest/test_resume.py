"""Whatever stops an ingestion, running it again loses nothing and counts nothing twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medistill.core.cohort import Split
from medistill.errors import DataError, OutputError, SourceError
from medistill.ingest import IngestConfig, ingest
from medistill.ingest.intensity import Policy
from medistill.ingest.sources.folder import FolderSource, decode_dicom
from medistill.progress import Progress
from tests.ingest.conftest import KEY, Recorder, build_clinic, make_dicom, write_csv

Clinic = Callable[..., tuple[Path, Path]]
SMALL = IngestConfig(size=16, burned_in="allow")


class Interrupting(Progress):
    """Presses Ctrl-C after some items."""

    def __init__(self, after: int) -> None:
        self.after = after

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.after:
                raise KeyboardInterrupt
            yield item


class Counting(FolderSource):
    """Leaves a mark for every file that is decoded."""

    @property
    def decode(self) -> Any:
        return decode_and_count


def decode_and_count(path: Path, policy: Policy) -> Iterator[Any]:
    mark = path.parents[1] / "decoded"
    with mark.open("a") as file:
        file.write(f"{path.name}\n")
    yield from decode_dicom(path, policy)


def decoded(folder: Path) -> list[str]:
    mark = folder / "decoded"
    names = mark.read_text().split() if mark.exists() else []
    mark.unlink(missing_ok=True)
    return sorted(names)


def content(cohort: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cohort)): path.read_bytes() for path in cohort.rglob("*") if path.is_file()}


def run(scans: Path, labels: Path, out: Path, progress: Progress | None = None, **changes: Any) -> Any:
    config = IngestConfig(size=16, burned_in="allow", **changes)
    return ingest(Counting(scans), out, key=KEY, labels=labels, config=config, jobs=1, progress=progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """What an ingestion of a clinic writes that nothing stops."""

    @cache
    def written(patients: int) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("whole")
        scans, labels = build_clinic(folder, patients)
        run(scans, labels, folder / "cohort")
        return content(folder / "cohort")

    return written


def test_an_interrupted_run_goes_on_where_it_was(
    clinic: Clinic, tmp_path: Path, recorder: Recorder, whole: Callable[[int], dict[str, bytes]]
) -> None:
    scans, labels = clinic()
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(20))
    assert not (tmp_path / "cohort").exists()
    first = decoded(tmp_path)
    assert len(first) >= 20
    run(scans, labels, tmp_path / "cohort", recorder)
    again = decoded(tmp_path)
    assert len(again) == 32 - 21
    assert any("earlier run" in message for message in recorder.messages)
    assert content(tmp_path / "cohort") == whole(16)
    assert not (tmp_path / ".cohort.partial").exists()


def test_files_that_changed_vanished_or_came_meanwhile(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic(patients=20)
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(30))
    decoded(tmp_path)
    (scans / "000.dcm").unlink()
    pixels = np.full((16, 12), 99, dtype=np.uint8)
    make_dicom(scans / "001.dcm", pixels, PatientID="P0", StudyInstanceUID="1.2.4.1", SOPInstanceUID="1.2.3.1001")
    (scans / "00.dcm").write_text("comes first in the scan")
    cohort = run(scans, labels, tmp_path / "cohort")
    names = decoded(tmp_path)
    assert "000.dcm" not in names
    assert {"001.dcm", "00.dcm", "039.dcm"} <= set(names)
    assert len(names) <= 11
    run(scans, labels, tmp_path / "whole")
    assert content(tmp_path / "cohort") == content(tmp_path / "whole")
    assert (len(cohort), cohort.profile["counts"]["quarantine"]) == (39, {"NOT_DICOM": 1})


def test_a_mistake_in_the_labels_costs_no_second_reading(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    wrong = write_csv(tmp_path / "wrong.csv", [["SOPInstanceUID", "label"], ["1.2.3.9", "well"]])
    with pytest.raises(SourceError, match="32 NO_LABEL"):
        ingest(Counting(scans), tmp_path / "cohort", key=KEY, labels=wrong, config=SMALL, jobs=1)
    assert len(decoded(tmp_path)) == 32
    assert len(run(scans, labels, tmp_path / "cohort")) == 32
    assert decoded(tmp_path) == []


@pytest.mark.parametrize("change", [{"intensity": "none"}, {"fit": "crop"}])
def test_other_settings_begin_again(clinic: Clinic, tmp_path: Path, change: dict[str, Any]) -> None:
    scans, labels = clinic()
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(30))
    decoded(tmp_path)
    run(scans, labels, tmp_path / "cohort", **change)
    assert len(decoded(tmp_path)) == 32


@pytest.mark.parametrize("damage", ["journal", "spool", "both"])
def test_a_damaged_working_folder_is_not_trusted(
    clinic: Clinic, tmp_path: Path, damage: str, whole: Callable[[int], dict[str, bytes]]
) -> None:
    scans, labels = clinic()
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(30))
    partial = tmp_path / ".cohort.partial"
    if damage in ("journal", "both"):
        for file in partial.glob("journal.sqlite*"):
            file.write_bytes(b"not a database" * 100)
    if damage in ("spool", "both"):
        os.truncate(partial / "spool", 5 * 512 + 7)
    run(scans, labels, tmp_path / "cohort")
    assert content(tmp_path / "cohort") == whole(16)


def test_a_full_disk_throws_nothing_away(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    scans, labels = clinic()
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(20))
    decoded(tmp_path)

    def full(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("medistill.ingest.journal.Journal._open", full)
        with pytest.raises(OutputError, match="what was read is kept"):
            run(scans, labels, tmp_path / "cohort")
    run(scans, labels, tmp_path / "cohort", recorder)
    assert len(decoded(tmp_path)) < 20
    assert any("earlier run" in message for message in recorder.messages)


def test_what_an_array_file_says_of_an_image_may_be_corrected(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    config = IngestConfig(size=8, burned_in="allow")

    def read(patients: int) -> Any:
        owners = np.array([f"p{number % patients}" for number in range(60)])
        np.savez(tmp_path / "a.npz", images=images, label=np.arange(60) % 2, patient_id=owners)
        return ingest(tmp_path / "a.npz", tmp_path / "cohort", key=KEY, config=config, jobs=1)

    with pytest.raises(SourceError, match="Too few patients"):
        read(2)
    assert len(read(30).patients) == 30


def test_a_cohort_that_breaks_a_rule_is_not_published(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, labels = clinic()

    def shuffled(*_: object, **__: object) -> Iterator[str]:
        order = [Split.TRAIN, Split.TEST, Split.VALIDATION, Split.HOLDOUT]
        yield from (order[number % 4] for number in range(10_000))

    splits = shuffled()
    monkeypatch.setattr("medistill.ingest.resolve.Split", lambda _: next(splits))
    with pytest.raises(DataError, match="one split"):
        run(scans, labels, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


def test_a_run_killed_after_its_last_step_but_one_leaves_nothing(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()
    run(scans, labels, tmp_path / "cohort")
    partial = tmp_path / ".cohort.partial"
    partial.mkdir()
    (partial / "journal.sqlite").write_text("names of files")
    with pytest.raises(OutputError, match="not empty"):
        run(scans, labels, tmp_path / "cohort")
    assert not partial.exists()


def test_only_one_process_writes_a_cohort(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic()

    class Second(Progress):
        def track(self, items: Iterable[Any], description: str, **_: Any) -> Iterator[Any]:
            with pytest.raises(OutputError, match="Another process"):
                run(scans, labels, tmp_path / "cohort")
            yield from items

    run(scans, labels, tmp_path / "cohort", Second())
    assert len(content(tmp_path / "cohort")) == 3


# Begins an ingestion twice and kills it after so many seconds; the libraries are imported once, before both.
KILLING = """
import os, signal, sys, time
from pathlib import Path
from medistill.ingest import IngestConfig, ingest
import medistill.ingest.build, medistill.ingest.sources.folder
scans, labels, out, delay = sys.argv[1:]
for _ in range(2):
    child = os.fork()
    if not child:
        config = IngestConfig(size=16, burned_in="allow")
        ingest(scans, Path(out), key=bytes(range(32)), labels=Path(labels), config=config, jobs=2)
        os._exit(0)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if Path(out).exists():
        break
"""


@pytest.mark.parametrize("delay", [0.6, 0.9, 1.3])
def test_killed_at_any_moment(
    clinic: Clinic, tmp_path: Path, delay: float, whole: Callable[[int], dict[str, bytes]]
) -> None:
    scans, labels = clinic(patients=60)
    command = [sys.executable, "-c", KILLING, *map(str, (scans, labels, tmp_path / "cohort", delay))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=True)
    if not (tmp_path / "cohort").exists():
        ingest(scans, tmp_path / "cohort", key=KEY, labels=labels, config=SMALL, jobs=2)
    mine, other = content(tmp_path / "cohort"), dict(whole(60))
    assert mine.pop("profile.json").replace(b"FolderSource", b"Counting") == other.pop("profile.json")
    assert mine == other


def test_the_working_folder_holds_no_identifier(clinic: Clinic, tmp_path: Path) -> None:
    scans, labels = clinic(PatientName="Quokkasson", InstitutionName="Quokka Hill")
    with pytest.raises(KeyboardInterrupt):
        run(scans, labels, tmp_path / "cohort", Interrupting(30))
    partial = tmp_path / ".cohort.partial"
    assert partial.stat().st_mode & 0o077 == 0
    written = b"".join(path.read_bytes() for path in partial.iterdir())
    assert not any(word in written for word in (b"Quokka", b"1.2.3.1", b"1.2.4.", b".dcm"))
    with sqlite3.connect(partial / "journal.sqlite") as rows:
        assert rows.execute("select count(*) from image").fetchone()[0] >= 30
    rows.close()
