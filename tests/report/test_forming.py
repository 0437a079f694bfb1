"""The sheet of the images as they form."""

from __future__ import annotations

import csv
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from medistill.distill.watch import Look
from medistill.report.forming import FormingSheet


def _look(step: int, auroc: float | None) -> Look:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return Look(distiller="made_up", step=step, steps=30, images=images, validation_auroc=auroc)


def test_rows_are_stacked_and_survive_an_interruption(tmp_path: Path) -> None:
    FormingSheet(tmp_path)(_look(10, 0.75))
    one = Image.open(BytesIO((tmp_path / "sheet.png").read_bytes()))
    again = FormingSheet(tmp_path)
    again(_look(20, None))
    again(_look(10, 0.75))  # done once more after the checkpoint
    two = Image.open(BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert (two.width, two.height) == (one.width, 2 * one.height)
    rows = list(csv.DictReader((tmp_path / "looks.csv").read_text().splitlines()))
    assert [(row["step"], row["validation_auroc"]) for row in rows] == [("10", "0.7500"), ("20", "")]
    assert not list(tmp_path.glob(".*"))
