"""Many images on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

from torch import Tensor

from medistill.errors import DataError
from medistill.report.png import encode, picture

_TILE = 96  #: smallest side a tile is drawn at, in pixels
_GAP = 6
_LINE = 16
_TITLE = 26


def contact_sheet(images: Tensor, *, columns: int, captions: Sequence[str] = ()) -> bytes:
    """Draw images in rows, each with a caption below it.

    Small images are enlarged by a whole factor without smoothing, so that every pixel stays visible.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)`` in ``[0, 1]``; of a volume
            :data:`medistill.report.png.MIDDLE_SLICES` are drawn.
        columns: Images per row.
        captions: One per image, or none at all. A caption wider than its image is cut.

    Returns:
        PNG bytes; the same arguments give the same bytes.

    Raises:
        DataError: If there is no image, ``columns`` is below 1, or the number of captions differs.
    """
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    if len(images) == 0 or columns < 1:
        raise DataError(f"Expected at least one image and one column, got {len(images)} and {columns}.")
    if captions and len(captions) != len(images):
        raise DataError(f"Expected {len(images)} captions or none, got {len(captions)}.")
    tiles = [picture(image) for image in images]
    factor = max(1, -(-_TILE // max(tiles[0].size)))
    width, height = tiles[0].width * factor, tiles[0].height * factor
    pitch = height + _GAP + (_LINE if captions else 0)
    rows = -(-len(tiles) // columns)
    used = min(columns, len(tiles))
    sheet = Image.new(tiles[0].mode, (used * (width + _GAP) + _GAP, rows * pitch + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, tile in enumerate(tiles):
        left, top = _GAP + (i % columns) * (width + _GAP), _GAP + (i // columns) * pitch
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            text = _fitting(captions[i], lambda line: draw.textlength(line, font=font) <= width)
            draw.text((left, top + height + 2), text, fill="black", font=font)
    return encode(sheet)


def _fitting(caption: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of a caption that fits, with an ellipsis where something was cut."""
    line = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in caption)
    if fits(line):
        return line
    while line and not fits(line + "..."):
        line = line[:-1]
    return line + "..."


def stacked_sheets(
    groups: Mapping[str, tuple[Tensor, Sequence[str]]], *, columns: int, heading: str = ""
) -> bytes:
    """Several contact sheets below one another, each under its title.

    Args:
        groups: Title to images of shape ``(n, c, h, w)`` in ``[0, 1]`` and their captions.
        columns: Images per row.
        heading: A line above them all.

    Returns:
        PNG bytes; the same arguments give the same bytes.

    Raises:
        DataError: As :func:`contact_sheet`, and where there is no group.
    """
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    if not groups:
        raise DataError("Expected at least one group of images, got none.")
    sheets = [
        Image.open(BytesIO(contact_sheet(images, columns=columns, captions=captions)))
        for images, captions in groups.values()
    ]
    width = max(sheet.width for sheet in sheets)
    start = _TITLE if heading else 0
    height = start + sum(sheet.height + _TITLE for sheet in sheets)
    whole = Image.new("RGB" if any(sheet.mode == "RGB" for sheet in sheets) else "L", (width, height), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)

    def write(text: str, top: int) -> None:
        fitting = _fitting(text, lambda line: draw.textlength(line, font=font) <= width - 2 * _GAP)
        draw.text((_GAP, top + 5), fitting, fill="black", font=font)

    write(heading, 0)
    for title, sheet in zip(groups, sheets, strict=True):
        write(title, start)
        whole.paste(sheet, (0, start + _TITLE))
        start += sheet.height + _TITLE
    return encode(whole)
