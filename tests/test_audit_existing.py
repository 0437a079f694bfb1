"""The audit of somebody else's images, by its command line: guilty ones fail, a bad table is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medistill.ingest import IngestConfig, SplitFractions, ingest, load_cohort
from medistill.registry import SOURCES
from tests.conftest import blobs
from tests.pipelines import run_pipeline


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("existing"), blobs(patients=240, size=16)
    images = (data.images[:, 0].numpy() * 255).astype(np.uint8)
    np.savez(folder / "blobs.npz", images=images, label=data.classes.numpy(), patient_id=np.array(data.patients))
    fractions = SplitFractions(train=0.5, validation=0.2, holdout=0.3, test=0.0)
    config = IngestConfig(size=16, fractions=fractions, classes=("0", "1"), burned_in="allow")
    ingest(SOURCES.load("npz")(folder / "blobs.npz"), folder / "cohort", key=bytes(32), config=config)
    return folder / "cohort"


def written(images: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "label"])
        for number, image in enumerate(images):
            Image.fromarray((image * 255).round().astype(np.uint8)).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", str(number % 2)])
    return folder


def test_a_folder_of_patients_images_fails(cohort: Path, tmp_path: Path) -> None:
    real = load_cohort(cohort).split("train").images(16).images[:20, 0].numpy()
    folder = written(real, tmp_path / "theirs")
    out = tmp_path / "audit"
    done = run_pipeline(
        "audit_existing", folder, folder / "labels.csv", "--cohort", cohort, "--size", 16, "--out", out,
        "--profile", "quick",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Verdict: FAIL" in done.stdout
    assert "20 of 20 released pictures are copies" in done.stdout
    assert "stays inside" in (out / "audit.html").read_text(encoding="utf-8")


def test_a_table_without_labels_is_refused_and_nothing_is_written(cohort: Path, tmp_path: Path) -> None:
    folder = written(np.zeros((2, 16, 16)), tmp_path / "theirs")
    (folder / "labels.csv").write_text("file\n0.png\n", encoding="utf-8")
    done = run_pipeline(
        "audit_existing", folder, folder / "labels.csv", "--cohort", cohort, "--size", 16,
        "--out", tmp_path / "audit",
    )  # fmt: skip
    assert done.returncode == 2
    assert "column 'file' and either 'label' or one column for every class" in done.stderr
    assert not (tmp_path / "audit").exists()
