"""Ingesting 1,000, 10,000 and 100,000 phantom files: time and memory of every process.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_ingest_scale.py -s``. Files are films of the phantom,
each with UIDs and grain of its own; two images a patient.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medistill.ingest import IngestConfig, ingest
from medistill.ingest.phantom import PhantomConfig, write_phantom

SIZES = (1_000, 10_000, 100_000)
FILMS = 200


def multiply(phantom: Path, out: Path, count: int) -> Path:
    """Many files from few films; returns their label table."""
    films = [pydicom.dcmread(path) for path in sorted((phantom / "dicom").rglob("*.dcm"))]
    films = [film for film in films if not film.file_meta.TransferSyntaxUID.is_encapsulated][:FILMS]
    generator = np.random.default_rng(0)
    with (out / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("SOPInstanceUID", "label"))
        for number in range(count):
            film, patient = films[number // 2 % len(films)], number // 2
            grain = generator.integers(0, 2, film.Rows * film.Columns, dtype=np.uint16)
            stored = np.frombuffer(film.PixelData, "<u2")[: grain.size] ^ grain
            copy = pydicom.Dataset(film)
            copy.file_meta = film.file_meta
            copy.PatientID, copy.PixelData = f"P{patient}", stored.tobytes()
            copy.StudyInstanceUID = f"1.2.3.4.{patient}"
            copy.SOPInstanceUID = f"1.2.3.5.{number}"
            where = out / "dicom" / f"{number // 1000:03d}"
            where.mkdir(parents=True, exist_ok=True)
            copy.save_as(where / f"{number:06d}.dcm")
            writer.writerow((copy.SOPInstanceUID, ("healthy", "ill")[patient % 2]))
    return out / "labels.csv"


class Watch(threading.Thread):
    """Largest resident memory of the main process, of one child, and of all together, in MB."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.main, self.child, self.total, self.stopped = root, 0, 0, 0, False

    def run(self) -> None:
        while not self.stopped:
            seen = {pid: _private_mb(pid) for pid in _family(self.root)}
            self.main = max(self.main, seen.get(self.root, 0))
            self.child = max([self.child, *(mb for pid, mb in seen.items() if pid != self.root)])
            self.total = max(self.total, sum(seen.values()))
            time.sleep(0.25)


def _family(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    family = [root]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _private_mb(pid: int) -> int:
    """Proportional set size: memory that processes share counts once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("Pss:")), 0)


SCRIPT = """
import sys
from pathlib import Path
from medistill.ingest import IngestConfig, ingest
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cohort = ingest(folder / "dicom", folder / "cohort", key=bytes(32), labels=folder / "labels.csv",
                    config=IngestConfig(size=64, ocr="never"), jobs=2)
    counts = cohort.profile["counts"]
    assert counts["files"] == len(cohort) + sum(counts["quarantine"].values()) == int(sys.argv[2]), counts
"""


@pytest.mark.benchmark
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_is_linear_and_memory_constant(tmp_path: Path) -> None:
    write_phantom(tmp_path / "phantom", PhantomConfig(patients=150, size=64))
    rows: dict[int, dict[str, Any]] = {}
    print(f"\n{'files':>8} {'s':>7} {'files/s':>8} {'main MB':>8} {'child MB':>9} {'all MB':>7}")
    for count in SIZES:
        folder = tmp_path / str(count)
        folder.mkdir()
        multiply(tmp_path / "phantom", folder, count)
        start = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with subprocess.Popen([sys.executable, "-c", SCRIPT, folder, str(count)], env=environment) as main:
            watch = Watch(main.pid)
            watch.start()
            assert main.wait() == 0
            watch.stopped = True
        seconds = time.monotonic() - start
        rows[count] = {"seconds": seconds, "main": watch.main, "child": watch.child, "total": watch.total}
        figures = f"{watch.main:>8} {watch.child:>9} {watch.total:>7}"
        print(f"{count:>8} {seconds:>7.1f} {count / seconds:>8.0f} {figures}", flush=True)
    small, large = rows[10_000], rows[100_000]
    assert large["seconds"] < 15 * small["seconds"]
    assert large["child"] < 300
    assert large["child"] < small["child"] + 30
    assert large["main"] < small["main"] + 250


@pytest.mark.benchmark
def test_random_read_of_one_image(tmp_path: Path) -> None:
    write_phantom(tmp_path / "phantom", PhantomConfig(patients=300, size=256))
    cohort = ingest(
        tmp_path / "phantom" / "dicom",
        tmp_path / "cohort",
        key=bytes(32),
        labels=tmp_path / "phantom" / "labels.csv",
        config=IngestConfig(size=256, ocr="never"),
    )
    places = np.random.default_rng(0).integers(0, len(cohort), 5000).tolist()
    for place in places[:100]:
        cohort.store.read([place])
    start = time.perf_counter()
    for place in places:
        cohort.store.read([place])
    each = (time.perf_counter() - start) / len(places) * 1e3
    print(f"\nrandom read of one 256 x 256 image: {each:.4f} ms")
    assert each < 0.05
