"""A folder or ZIP archive of ordinary image files (PNG, JPEG, TIFF, BMP, WebP)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medistill.errors import RejectedFile, SourceError
from medistill.ingest.decode import MAX_PIXELS
from medistill.ingest.frames import Decoded
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item
from medistill.ingest.sources.folder import scan

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
MAX_BYTES = 1 << 28
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I"})


@dataclass(frozen=True)
class ImageFolderSource:
    """Images in one sub-folder per class, or in any layout with a label table keyed by ``file``.

    The class of an image is the folder that holds it. Levels are taken as they are, 8-bit or 16-bit; transparency
    is laid on black. Other files (tables, hidden files) are left alone.

    Args:
        path: Folder or ``.zip`` file. Archive members are read in memory and never unpacked.

    Raises:
        SourceError: When read, if there is no image.
    """

    path: Path
    keys: ClassVar[tuple[str, ...]] = ("file",)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        path = Path(self.path)
        if path.is_dir():
            names = list(scan(path))
        else:
            with _open_archive(path) as archive:
                names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
        chosen = tuple(name for name in names if _is_image_name(name))
        if not chosen:
            raise SourceError(
                f"The source holds no image. Expected files ending in {', '.join(sorted(EXTENSIONS))}."
            )
        return chosen

    @property
    def labelled(self) -> bool:
        """Whether every image lies in a sub-folder."""
        return all("/" in name for name in self._names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per image; the members of an archive are read one by one."""
        path = Path(self.path)
        if path.is_dir():
            for ordinal, name in enumerate(self._names):
                yield Item(ordinal=ordinal, name=name, payload=path / name, label=_folder_name(name))
            return
        with _open_archive(path) as archive:
            for ordinal, name in enumerate(self._names):
                yield Item(ordinal=ordinal, name=name, payload=_member(archive, name), label=_folder_name(name))

    @property
    def decode(self) -> Callable[[Path | bytes, Policy], Iterator[Decoded]]:
        """Reads one image file."""
        return decode_image


def decode_image(payload: Path | bytes, policy: Policy) -> Iterator[Decoded]:
    """Read one image file, from its path or its bytes.

    Raises:
        RejectedFile: IMAGE_FORMAT, DIM_LIMIT, READ_ERROR or ZIP_LIMIT.
    """
    stored, top = read_levels(payload)
    flags = ("colour",) if stored.ndim == 3 else ()
    yield Decoded(stored=stored, presentation=None, policy=policy, flags=flags, top=top)


def read_levels(payload: Path | bytes) -> tuple[NDArray[Any], float]:
    """Content of an image file and the value of full intensity.

    Returns:
        Grey levels in ``[0, 1]``, shape ``(h, w)``; or red, green and blue, shape ``(h, w, 3)``.

    Raises:
        RejectedFile: IMAGE_FORMAT, DIM_LIMIT, READ_ERROR or ZIP_LIMIT.
    """
    try:
        content = payload if isinstance(payload, bytes) else payload.read_bytes()
    except OSError:
        raise RejectedFile("READ_ERROR") from None
    if not content:
        raise RejectedFile("ZIP_LIMIT" if isinstance(payload, bytes) else "IMAGE_FORMAT", "no content was read")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise RejectedFile("DIM_LIMIT", f"expected at most {MAX_PIXELS} pixels")
            return _levels(ImageOps.exif_transpose(picture))
    except RejectedFile:
        raise
    except MemoryError:
        raise RejectedFile("OOM_LIMIT") from None
    except Image.DecompressionBombError:
        raise RejectedFile("DIM_LIMIT", f"expected at most {MAX_PIXELS} pixels") from None
    except Exception:
        raise RejectedFile("IMAGE_FORMAT") from None


def _levels(picture: Image.Image) -> tuple[NDArray[Any], float]:
    if picture.mode in _SIXTEEN_BIT:
        return np.asarray(picture).astype(np.float32) / np.float32(65535), 1.0
    if picture.mode == "F":
        raise RejectedFile("IMAGE_FORMAT", "floating point images have no fixed grey range")
    if picture.mode in {"L", "1"}:
        return np.asarray(picture.convert("L")).astype(np.float32) / np.float32(255), 1.0
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB")), 255.0


def _is_image_name(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in EXTENSIONS


def _folder_name(name: str) -> str:
    return PurePosixPath(name).parent.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        raise SourceError("The source is neither a folder nor a readable ZIP archive. Check the path.") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Content of a member; empty where it is too large, encrypted or damaged, which the decoder rejects."""
    try:
        with archive.open(name) as file:
            content = file.read(MAX_BYTES + 1)
    except Exception:  # zipfile, zlib, bz2 and lzma each have their own
        return b""
    return content if len(content) <= MAX_BYTES else b""
