"""Why a file did not enter the cohort: one reason code and one plain sentence each.

A rejection names the file by its position in the scan; it never holds a path, a name or a value of a tag.

Example:
    >>> REASON_CODES["NO_LABEL"]
    'The label table has no row for this image.'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from medistill.errors import DataError

REASON_CODES: dict[str, str] = {
    "NOT_DICOM": "The file is not DICOM.",
    "NO_META": "The file looks like DICOM but has no file meta header.",
    "BAD_TS": "The transfer syntax is missing or unknown.",
    "NO_PIXELS": "The file describes an image but holds no pixel data.",
    "READ_ERROR": "The file could not be read from the disk.",
    "TRUNCATED": "The pixel data is shorter than the header says.",
    "EXCESS_BYTES": "The pixel data is longer than the header says.",
    "CODEC_UNSUPPORTED": "No decoder is available for this compression.",
    "CODEC_FAIL": "The decoder could not read the pixel data.",
    "CODEC_CRASH": "The decoder crashed on this file.",
    "TIMEOUT": "Reading the file took too long.",
    "OOM_LIMIT": "Reading the file needs too much memory.",
    "ZIP_LIMIT": "A compressed file expands beyond the limit.",
    "PATH_ESCAPE": "A link or an archive member points outside the source.",
    "NEST_LIMIT": "The header is nested too deeply.",
    "BAD_VR": "A header element has a malformed value.",
    "DIM_LIMIT": "The image is empty or too large.",
    "BITS_INCONSISTENT": "Bits allocated, bits stored and high bit contradict each other.",
    "COLOUR_MISMATCH": "The colour description contradicts the pixel data.",
    "BAD_WINDOW": "The display window is not usable.",
    "GEOM_GAP": "Slices are missing from the volume.",
    "GEOM_MIXED": "Slices of different size or orientation are mixed.",
    "DUP_SOP_SAME": "The same image was read before.",
    "DUP_SOP_DIFF": "Another image with the same SOP instance UID was read before.",
    "ID_MISSING": "The patient is not known.",
    "ID_CONFLICT": "The patient's records contradict each other, or are given for testing and for training.",
    "LOCALISER": "The image is a localiser.",
    "NON_IMAGE_SOP": "The file is no diagnostic image, for example a report, a plan or a segmentation.",
    "BURNED_IN": "Text is, or may be, burned into the pixels.",
    "HEAD_VOLUME": "A head volume that was not declared defaced.",
    "PHI_RESIDUAL": "Identifying text remained after de-identification.",
    "NET_PARTIAL": "The network transfer was not complete.",
    "IMAGE_FORMAT": "The image file is damaged or of an unknown format.",
    "NO_LABEL": "The label table has no row for this image.",
    "LABEL_CONFLICT": "The label table gives two labels for this image.",
}


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One file that stays out of the cohort.

    Args:
        ordinal: Position of the file in the scan, from 0.
        frame: Number of the image within the file from 1; 0 for the whole file.
        code: One of :data:`REASON_CODES`.
        detail: Form of what was found and expected; never a value of the file.

    Raises:
        DataError: If the code is unknown.
    """

    ordinal: int
    frame: int = 0
    code: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.code not in REASON_CODES:
            raise DataError("Expected one of the known reason codes; found another.")


def count_codes(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Number of rejections per reason code, most frequent first."""
    return dict(Counter(item.code for item in rejected).most_common())
