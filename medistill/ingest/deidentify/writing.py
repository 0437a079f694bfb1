"""Bytes of a DICOM file (PS3.10): empty preamble, explicit little endian, nothing after the last element.

What the rebuilding made is already bytes; it is joined here in a fraction of the time a general writer takes. A
data set that was changed since goes through pydicom's writer.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

_LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_UNDEFINED = 0xFFFFFFFF
_END_OF_SEQUENCE = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


class _NotPlainError(Exception):
    """An element that this module does not write."""


def encode(dataset: Dataset) -> bytes:
    """Bytes of a data set with its file meta information.

    Args:
        dataset: As :func:`medistill.ingest.deidentify.rebuild.rebuild` made it; may have been changed since.
    """
    try:
        meta, content = _elements(dataset.file_meta), _elements(dataset)
    except _NotPlainError:
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return b"".join((bytes(128), b"DICM", length, meta, content))


def _elements(dataset: Dataset) -> bytes:
    return b"".join(_element(dataset.get_item(tag)) for tag in sorted(dataset.keys()) if tag != 0x00020000)


def _element(element: DataElement | RawDataElement) -> bytes:
    tag, vr = element.tag, str(element.VR)
    value: Any = element.value
    if isinstance(element, DataElement) and vr == "SQ":
        value = b"".join(_item(item) for item in value)
    elif not isinstance(value, bytes) or not (isinstance(element, RawDataElement) or vr in _LONG_VRS):
        raise _NotPlainError
    if vr not in _LONG_VRS:
        if len(value) > 0xFFFE:
            raise _NotPlainError
        return b"".join((struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(value)), value))
    undefined = isinstance(element, DataElement) and element.is_undefined_length
    length = _UNDEFINED if undefined else len(value)
    head = struct.pack("<HH2sxxI", tag >> 16, tag & 0xFFFF, vr.encode(), length)
    return b"".join((head, value, _END_OF_SEQUENCE if undefined else b""))


def _item(item: Dataset) -> bytes:
    content = _elements(item)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
