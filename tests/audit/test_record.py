"""Somebody else's images read from a folder, audited and written down; bad tables and paths refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from medistill.audit import AuditPolicy, audit_images, read_pictures, write_audit
from medistill.core.reports import AuditReport, Verdict
from medistill.errors import DataError
from tests.conftest import blobs

TRAIN, HOLDOUT, REFERENCE = blobs(60, seed=1), blobs(40, seed=2, first=1000), blobs(30, seed=3, first=2000)
PARTS = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE}
SHAPE = (1, 16, 16)


def folder_of(images: torch.Tensor, rows: list[dict[str, str]], where: Path) -> tuple[Path, Path]:
    pictures = where / "pictures"
    pictures.mkdir()
    for number, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(pictures / f"{number}.png")
    table = where / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return pictures, table


def labelled(count: int) -> list[dict[str, str]]:
    names = TRAIN.task.class_names
    return [{"file": f"{number}.png", "label": names[number % 2]} for number in range(count)]


def test_pictures_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = read_pictures(*folder_of(TRAIN.images[:6], labelled(6), tmp_path), task=TRAIN.task, image_shape=SHAPE)
    assert found.images == pytest.approx(TRAIN.images[:6].numpy(), abs=0.5 / 255 + 1e-6)
    assert found.soft_labels.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 3
    assert found.ipc == 3


def test_larger_pictures_are_resized_and_probabilities_taken(tmp_path: Path) -> None:
    wide = blobs(2, size=40, seed=4).images
    first, second = TRAIN.task.class_names
    rows = [{"file": f"{number}.png", first: "0.25", second: "0.75"} for number in range(2)]
    found = read_pictures(*folder_of(wide, rows, tmp_path), task=TRAIN.task, image_shape=SHAPE)
    assert found.images.shape == (2, 1, 16, 16)
    assert found.soft_labels.tolist() == [[0.25, 0.75]] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": "0.png", "label": "unheard"}, "unknown label"),
        ({"file": "9.png", "label": "CLASS"}, "row 1 of the table cannot be read"),
        ({"file": "../table.csv", "label": "CLASS"}, "outside of the folder"),
        ({"picture": "0.png", "label": "CLASS"}, "column 'file'"),
        ({"file": "0.png"}, "column 'file'"),
    ],
)
def test_a_bad_table_is_refused(row: dict[str, str], message: str, tmp_path: Path) -> None:
    row = {key: TRAIN.task.class_names[0] if value == "CLASS" else value for key, value in row.items()}
    with pytest.raises(DataError, match=message):
        read_pictures(*folder_of(TRAIN.images[:1], [row], tmp_path), task=TRAIN.task, image_shape=SHAPE)


@pytest.mark.parametrize("values", [("0.5", "0.9"), ("-0.1", "1.1"), ("a", "b")])
def test_labels_that_are_no_probabilities_are_refused(values: tuple[str, str], tmp_path: Path) -> None:
    row = {"file": "0.png", **dict(zip(TRAIN.task.class_names, values, strict=True))}
    with pytest.raises(DataError, match="Row 1"):
        read_pictures(*folder_of(TRAIN.images[:1], [row], tmp_path), task=TRAIN.task, image_shape=SHAPE)


def test_what_is_written_is_what_was_found_and_the_page_loads_nothing(tmp_path: Path) -> None:
    release = read_pictures(
        *folder_of(TRAIN.images[:4], labelled(4), tmp_path), task=TRAIN.task, image_shape=SHAPE
    )
    policy = AuditPolicy(profile="quick", fewest_patients=20, epsilon_max=3.0)
    report = audit_images(release, **PARTS, policy=policy)
    write_audit(tmp_path, report, release, statement=None, **PARTS, version="1")
    assert report.verdict is Verdict.FAIL
    read = AuditReport.from_json(json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")))
    assert read == report
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "stays inside" in page
    assert "none is proved" in page
    assert page.count("<figure>") == 3 * 4
    assert "http" not in page.replace("http-equiv", "")
    assert not [patient for part in PARTS.values() for patient in part.unique_patients if patient in page]
    assert "copies of a training patient" in page
