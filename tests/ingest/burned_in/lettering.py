"""Radiograph-like pictures and text drawn on pictures, with the place where it stands."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medistill.ingest.burned_in import Box

FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif")
LINES = ("DOE^JANE", "12/03/1960", "ST. MARY HOSPITAL", "ID 4711-0815", "Muster, Erika", "2021.11.04 13:45")
_CAPITAL = 0.73  # height of a capital letter per font size

Grey = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Ink:
    """How text is drawn; ``height`` of a capital in pixels, ``contrast`` against the mean of what is below."""

    text: str = "ID 4711-0815"
    height: int = 12
    contrast: float = 0.5
    font: str = "DejaVuSans"
    angle: float = 0.0


@functools.cache
def radiograph(seed: int, side: int = 256) -> Grey:
    """Smooth body with bands like ribs and film noise, between 0.1 and 0.9."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    body = np.exp(-(((x - 0.5) / 0.35) ** 4)) * (0.5 + 0.2 * y)
    ribs = 0.08 * np.sin(2 * np.pi * (9 * y + 3 * (x - 0.5) ** 2 + rng.random())) * body
    cloud = ndimage.gaussian_filter(rng.normal(0, 1, (side, side)), side / 24)
    image = 0.1 + body + ribs + 0.08 * cloud / cloud.std() * body + rng.normal(0, 0.01, (side, side))
    return np.clip(image, 0.05, 0.9).astype(np.float32)


def draw(image: Grey, ink: Ink, rng: np.random.Generator, where: Box | None = None) -> tuple[Grey, Box] | None:
    """Text at a random place (or at the upper left of ``where``); ``None`` where it does not fit.

    A negative contrast draws darker than the surroundings. Where there is no room the other sign is taken.
    """
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{ink.font}.ttf"
    font = ImageFont.truetype(str(file), max(6, round(ink.height / _CAPITAL)))
    left, top, right, bottom = font.getbbox(ink.text)
    canvas = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), ink.text, fill=255, font=font)
    if ink.angle:
        canvas = canvas.rotate(ink.angle, expand=True, resample=Image.Resampling.BICUBIC)
    cover = np.asarray(canvas, np.float32) / 255
    room = [have - need for have, need in zip(image.shape, cover.shape, strict=True)]
    if min(room) <= 4:
        return None
    y, x = (rng.integers(2, room[0] - 1), rng.integers(2, room[1] - 1)) if where is None else where[:2]
    place = (slice(y, y + cover.shape[0]), slice(x, x + cover.shape[1]))
    mean = float(image[place].mean())
    tone = mean + ink.contrast if 0 <= mean + ink.contrast <= 1 else float(np.clip(mean - ink.contrast, 0, 1))
    drawn = image.copy()
    drawn[place] = image[place] * (1 - cover) + tone * cover
    return drawn, (int(y), int(x), int(y) + cover.shape[0], int(x) + cover.shape[1])


def meets(boxes: tuple[Box, ...], place: Box) -> bool:
    """Whether a box lies mostly on a place."""
    for top, left, bottom, right in boxes:
        height = min(bottom, place[2]) - max(top, place[0])
        width = min(right, place[3]) - max(left, place[1])
        if height > 0 and width > 0 and height * width > 0.5 * (bottom - top) * (right - left):
            return True
    return False


def children(data: Path, number: int) -> Iterator[Grey]:
    """Some of the paediatric chest films, evenly spread."""
    with zipfile.ZipFile(data / "pediatric_cxr" / "images_224.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpeg"))
        for name in names[:: len(names) // number][:number]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                yield np.asarray(image.convert("L"), np.float32) / 255


def adults(data: Path, number: int) -> Iterator[Grey]:
    """Some of the adult chest films, evenly spread."""
    files = sorted((data / "covid_cxr" / "images").glob("*.png"))
    for file in files[:: len(files) // number][:number]:
        with Image.open(file) as image:
            yield np.asarray(image.convert("L"), np.float32) / 255
