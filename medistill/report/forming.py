"""The images as they form, kept in a run folder for whoever waits."""

from __future__ import annotations

import csv
from io import BytesIO, StringIO
from pathlib import Path

import torch

from medistill.distill.watch import Look
from medistill.report.contact_sheet import contact_sheet

_MOST_IMAGES = 10
_COLUMNS = ("distiller", "step", "steps", "validation_auroc")


class FormingSheet:
    """An observer that keeps a row of images per look, all rows on one sheet, and a table.

    ``sheet.png`` shows the rows from the first look to the last, ``looks.csv`` the validation AUROC of each. Both
    stay inside: with ``init="real"`` they show patients' images.

    Args:
        folder: Where they are written; rows of an interrupted run are taken up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, look: Look) -> None:
        """Add or replace the row of a look."""
        self._folder.mkdir(parents=True, exist_ok=True)
        shown = torch.linspace(0, len(look.images) - 1, min(len(look.images), _MOST_IMAGES)).round().long()
        auroc = "" if look.validation_auroc is None else f"{look.validation_auroc:.4f}"
        captions = [f"{look.step}/{look.steps}", f"AUROC {auroc}" if auroc else "", *[""] * _MOST_IMAGES]
        row = contact_sheet(look.images[shown], columns=len(shown), captions=captions[: len(shown)])
        rows = {(r["distiller"], int(r["step"])): r for r in self._table()}
        key = (look.distiller, look.step)
        rows[key] = dict(zip(_COLUMNS, (look.distiller, str(look.step), str(look.steps), auroc), strict=True))
        self._write(self._name(*key), row)
        text = StringIO()
        table = csv.DictWriter(text, _COLUMNS)
        table.writeheader()
        table.writerows(rows.values())
        self._write("looks.csv", text.getvalue().encode())
        self._write("sheet.png", self._stacked([self._folder / self._name(*known) for known in rows]))

    def _table(self) -> list[dict[str, str]]:
        path = self._folder / "looks.csv"
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []

    def _name(self, distiller: str, step: int) -> str:
        return f"{distiller}-{step:06d}.png"

    def _write(self, name: str, content: bytes) -> None:
        partial = self._folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(self._folder / name)

    def _stacked(self, rows: list[Path]) -> bytes:
        from PIL import Image  # noqa: PLC0415

        pictures = [Image.open(path).convert("RGB") for path in rows if path.exists()]
        size = (max(p.width for p in pictures), sum(p.height for p in pictures))
        sheet, top, content = Image.new("RGB", size, "white"), 0, BytesIO()
        for picture in pictures:
            sheet.paste(picture, (0, top))
            top += picture.height
        sheet.save(content, "PNG")
        return content.getvalue()
