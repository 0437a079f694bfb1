"""The images as they form: kept in a run folder for whoever waits, and for the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path

import torch

from medistill.core.distilled import DistilledSet
from medistill.distill.watch import Look, eight_bit, pack_looks, shown_images, unpack_looks
from medistill.report.contact_sheet import contact_sheet

MOMENTS_FILE = "moments.safetensors"
_COLUMNS = ("distiller", "step", "steps", "cpu_seconds", "validation_auroc")
_LEVELS = 255


class FormingSheet:
    """An observer that keeps the looks of one distillation, replacing those of an earlier one.

    ``sheet.png`` shows a row of images per look, ``looks.csv`` CPU seconds and validation AUROC of each, and
    ``moments.safetensors`` is for :func:`load_moments`. All stay inside: with ``init="real"`` they show patients'
    images.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looks: list[Look] = []

    def __call__(self, look: Look) -> None:
        """Add a look."""
        self._looks.append(look)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write("looks.csv", _table(self._looks))
        self._write("sheet.png", _stacked([_row(one) for one in self._looks]))
        self._write(MOMENTS_FILE, _packed(self._looks))

    def _write(self, name: str, content: bytes) -> None:
        partial = self._folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(self._folder / name)


def load_moments(folder: Path, distilled: DistilledSet) -> tuple[Look, ...]:
    """What a :class:`FormingSheet` kept of how a distilled set formed.

    Args:
        folder: Of the sheet.
        distilled: What the images became.

    Returns:
        Looks up to the one that shows the images of ``distilled``; none where no look does, for then they were
        kept of another distillation.
    """
    from safetensors import safe_open  # noqa: PLC0415

    path = folder / MOMENTS_FILE
    if not path.exists():
        return ()
    with safe_open(path, "pt") as kept:
        names = json.loads(kept.metadata()["distillers"])
        looks = unpack_looks({name: kept.get_tensor(name) for name in kept.keys()}, names)  # noqa: SIM118
    became = eight_bit(distilled.images[shown_images(distilled.hard_labels)])
    ends = [place for place, look in enumerate(looks, start=1) if torch.equal(look.pictures, became)]
    return looks[: ends[-1]] if ends else ()


def _packed(looks: Sequence[Look]) -> bytes:
    from safetensors.torch import save  # noqa: PLC0415

    content: bytes = save(pack_looks(looks), {"distillers": json.dumps([look.distiller for look in looks])})
    return content


def _auroc(look: Look) -> str:
    return "" if look.validation_auroc is None else f"{look.validation_auroc:.4f}"


def _table(looks: Sequence[Look]) -> bytes:
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = [(look.distiller, look.step, look.steps, f"{look.cpu_seconds:.1f}", _auroc(look)) for look in looks]
    table.writerows([_COLUMNS, *rows])
    return text.getvalue().encode()


def _row(look: Look) -> bytes:
    auroc = _auroc(look)
    said = (f"{look.step}/{look.steps}", f"AUROC {auroc}" if auroc else "", f"{look.cpu_seconds:.0f} CPU s")
    shown = len(look.pictures)
    captions = [*said, *[""] * shown][:shown]
    return contact_sheet(look.pictures.float() / _LEVELS, columns=shown, captions=captions)


def _stacked(rows: list[bytes]) -> bytes:
    from PIL import Image  # noqa: PLC0415

    pictures = [Image.open(BytesIO(row)).convert("RGB") for row in rows]
    size = (max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    sheet, top, content = Image.new("RGB", size, "white"), 0, BytesIO()
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    sheet.save(content, "PNG")
    return content.getvalue()
