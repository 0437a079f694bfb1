"""DICOM series as volumes: slices of a folder, an archive or a medium, grouped by Series Instance UID."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset, silence
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.headers import Header, text
from medistill.ingest.intensity import (
    PERCENTILES,
    Policy,
    Presentation,
    Window,
    is_padding,
    is_small,
    modality,
    normalise,
    percentile_limits,
)
from medistill.ingest.reading import Item
from medistill.ingest.sources.archive import ArchiveSource, Member, is_archive
from medistill.ingest.sources.dicomdir import DicomdirSource, find_dicomdir
from medistill.ingest.sources.folder import FolderSource
from medistill.ingest.volumes import DecodedVolume, SliceGeometry, arrange, placed, read_geometry

_HEAD = 1 << 18
_META = 1024
_SERIES = Tag("SeriesInstanceUID")

Payload = Path | Member


@dataclass(frozen=True)
class SeriesSource:
    """Volumes of a folder, an archive or a medium with DICOMDIR: one item for each series.

    A first pass reads each header up to the Series Instance UID and keeps a digest of it. A file without one is an
    item of its own, so that it is refused with its code when it is read. A label table refers to a volume by its
    Series Instance UID in place of the SOP Instance UID, by its first file, or by patient.

    Args:
        path: A folder, an archive, a DICOMDIR, or a folder that holds one.
        straighten: Whether slices of a tilted gantry are set upright by interpolation instead of being refused.

    Raises:
        SourceError: When read, as the source of the files does.
    """

    path: Path
    straighten: bool = False
    keys: ClassVar[tuple[str, ...]] = ("sop", "file", "patient")

    @cached_property
    def files(self) -> FolderSource | ArchiveSource | DicomdirSource:
        """Where the slices come from."""
        path = Path(self.path)
        if path.is_file() and is_archive(path):
            return ArchiveSource(path)
        return DicomdirSource(path) if find_dicomdir(path) else FolderSource(path)

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        groups: dict[bytes, list[Item]] = {}
        for item in _references(self.files):
            series = b"" if item.refused else _series_digest(item.payload)
            groups.setdefault(series or b"alone %d" % item.ordinal, []).append(item)
        return tuple(_joined(ordinal, group) for ordinal, group in enumerate(groups.values()))

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    def __len__(self) -> int:
        """Number of series, and of files that belong to none."""
        return len(self._items)

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per series, in the order of their first files, with the places of all its files."""
        yield from self._items

    @property
    def decode(self) -> Callable[[Sequence[Payload], Policy], Iterator[DecodedVolume]]:
        """Reads one series."""
        return partial(decode_series, straighten=self.straighten)


def decode_series(
    payload: Sequence[Payload], policy: Policy, *, straighten: bool = False
) -> Iterator[DecodedVolume]:
    """Read the slices of one series as one volume.

    All slices get their grey levels by one rule: the window of the middle slice, or the percentiles of the whole
    volume. A slice that cannot be read refuses the volume with its code; a slice that is there twice counts once.

    Args:
        payload: Places of the files.
        policy: How grey levels are chosen.
        straighten: Whether slices of a tilted gantry are accepted.

    Yields:
        The volume.

    Raises:
        RejectedFile: As :func:`~medistill.ingest.frames.decode_dicom` and
            :func:`~medistill.ingest.volumes.arrange`; also ID_CONFLICT for several patients, DUP_SOP_DIFF, and
            COLOUR_MISMATCH for colour slices.
    """
    slices: list[_Slice] = []
    series = ""
    for place in sorted(payload, key=_reading_order):
        with silence():
            dataset = read_dataset(place if isinstance(place, Path) else place.read())
            series = series or text(dataset, "SeriesInstanceUID")
            for decoded in decode_dicom(dataset, policy):
                slices.append(_Slice(decoded=decoded, geometry=read_geometry(dataset, decoded.frame)))
    kept = _without_copies(slices)
    arrangement = arrange([piece.geometry for piece in kept], straighten=straighten)
    ordered = [kept[number].decoded for number in arrangement.order]
    header = _common_header(ordered, series)
    flags = _flags(ordered, policy, doubled=len(kept) < len(slices))
    slices.clear()
    kept.clear()
    volume = placed(_grey_levels(ordered, policy), arrangement)
    yield DecodedVolume(volume=volume, header=header, flags=(*flags, *volume.flags))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    decoded: Decoded = field(repr=False)
    geometry: SliceGeometry


def _references(source: FolderSource | ArchiveSource | DicomdirSource) -> Iterator[Item]:
    """Items whose payload is a place, not content."""
    return source.references() if isinstance(source, ArchiveSource) else source.items()


def _joined(ordinal: int, group: Sequence[Item]) -> Item:
    first = group[0]
    payload = None if first.refused else tuple(item.payload for item in group)
    return replace(first, ordinal=ordinal, payload=payload)


def _reading_order(place: Payload) -> tuple[str, int]:
    return (place.as_posix(), 0) if isinstance(place, Path) else ("", place.position)


def _series_digest(place: Payload) -> bytes:
    """Digest of the series a file belongs to; empty where its header does not say."""
    try:
        with silence():
            uid = text(_header_of(place), "SeriesInstanceUID")
    except Exception:
        return b""
    return hashlib.blake2b(uid.encode(), digest_size=16).digest() if uid else b""


def _header_of(place: Payload) -> Dataset:
    """Elements up to the Series Instance UID."""
    with place.open("rb") if isinstance(place, Path) else io.BytesIO(place.head(_HEAD)) as file:
        deflated = DeflatedExplicitVRLittleEndian.encode() in file.read(_META)
        file.seek(0)
        if not deflated:
            return read_partial(file, stop_when=_after_series, specific_tags=[_SERIES])
    return read_dataset(place if isinstance(place, Path) else place.read())  # inflates no more than allowed


def _after_series(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int(tag) > int(_SERIES)


def _without_copies(slices: Sequence[_Slice]) -> list[_Slice]:
    """Slices without repetitions of an image; another image under the same UID is an error."""
    known: dict[tuple[str, int], _Slice] = {}
    for number, piece in enumerate(slices):
        uid = piece.decoded.header.sop_uid or f"none {number}"
        first = known.setdefault((uid, piece.decoded.frame), piece)
        same = first.geometry == piece.geometry and np.array_equal(first.decoded.stored, piece.decoded.stored)
        if not same:
            raise RejectedFile("DUP_SOP_DIFF", "different slices have the same SOP Instance UID")
    return list(known.values())


def _common_header(ordered: Sequence[Decoded], series: str) -> Header:
    """Header of the first slice under the UID of the series, with every warning of any slice."""
    headers = [decoded.header for decoded in ordered]
    if len({header.patient_id.strip() for header in headers}) > 1:
        raise RejectedFile("ID_CONFLICT", "one series names several patients")
    return replace(
        headers[0],
        sop_uid=series or headers[0].sop_uid,
        burned_in=any(header.burned_in for header in headers),
        carries_text=any(header.carries_text for header in headers),
        diagnostic=all(header.diagnostic for header in headers),
        localiser=False,
        head=any(header.head for header in headers),
    )


def _grey_levels(ordered: list[Decoded], policy: Policy) -> NDArray[np.float32]:
    """Grey levels of all slices by the rule of the middle one, shape ``(d, h, w)``; empties the list."""
    rules = _rules(ordered)
    rule = rules[len(rules) // 2]
    if len({rule.inverted for rule in rules}) > 1:
        raise RejectedFile("GEOM_MIXED", "slices of different polarity")
    if _rescaled(rules):
        stored = np.stack([_rescale(decoded.stored, own) for decoded, own in zip(ordered, rules, strict=True)])
        nothing = (np.nan, np.nan)
        rule = replace(rule, slope=1.0, intercept=0.0, modality_lut=None, padding=nothing, bits_stored=0)
    else:
        stored = np.stack([decoded.stored for decoded in ordered])
    ordered.clear()
    rule, policy = _rule_of_volume(stored, rule, policy)
    grey = np.empty(stored.shape, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # padding of rescaled slices
        for number, plane in enumerate(stored):  # looking up the whole volume at once takes 8 bytes a voxel
            grey[number] = normalise(plane, rule, policy)
    return grey


def _rule_of_volume(stored: NDArray[Any], rule: Presentation, policy: Policy) -> tuple[Presentation, Policy]:
    """A rule that gives each slice alone the levels it has in the volume."""
    fixed = bool(rule.window or rule.voi_lut) if policy is Policy.VOI else False
    if fixed or (policy is not Policy.PERCENTILE and rule.bits_stored):
        return rule, policy
    if policy is Policy.PERCENTILE and is_small(stored):
        ends = _percentiles(stored, rule)
    else:
        kept = stored if rule.padding is None else stored[~is_padding(stored, rule.padding)]
        whole = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 0.0)
        ends = percentile_limits(kept) if policy is Policy.PERCENTILE else whole
    low, high = sorted(rule.slope * end + rule.intercept for end in ends)
    window = Window(center=(low + high) / 2, width=high - low, function="LINEAR_EXACT")
    if not high > low:
        window = Window(center=high + 1, width=1.0, function="LINEAR_EXACT")  # a constant volume is black
    return replace(rule, window=window, voi_lut=None), Policy.VOI


def _percentiles(stored: NDArray[Any], rule: Presentation) -> tuple[float, float]:
    """As :func:`percentile_limits` without padding, from a histogram: no copy of the volume is made."""
    limits = np.iinfo(stored.dtype)
    levels = np.arange(limits.min, limits.max + 1)
    counts = np.zeros(len(levels), dtype=np.int64)
    for plane in stored:
        counts += np.bincount((plane.astype(np.int32) - limits.min).ravel(), minlength=len(levels))
    if rule.padding is not None:
        counts[is_padding(levels, rule.padding)] = 0
    total = np.cumsum(counts)
    if not total[-1]:
        return 0.0, 0.0
    ranks = np.array(PERCENTILES) / 100 * (total[-1] - 1)
    below, above = (levels[np.searchsorted(total, end(ranks), side="right")] for end in (np.floor, np.ceil))
    low, high = below + (above - below) * (ranks - np.floor(ranks))
    return float(low), float(high)


def _rules(ordered: Sequence[Decoded]) -> list[Presentation]:
    rules = [decoded.presentation for decoded in ordered if decoded.presentation is not None]
    if len(rules) < len(ordered):
        raise RejectedFile("COLOUR_MISMATCH", "expected a volume of grey slices")
    return rules


def _rescaled(rules: Sequence[Presentation]) -> bool:
    """Whether one stored value means different things in different slices."""
    kinds = {(rule.slope, rule.intercept, rule.padding, rule.signed, rule.bits_stored) for rule in rules}
    return len(kinds) > 1 or any(rule.modality_lut for rule in rules)


def _rescale(stored: NDArray[Any], rule: Presentation) -> NDArray[np.float32]:
    """Values after the modality step; padding becomes NaN."""
    values = modality(stored.astype(np.float32), rule).astype(np.float32)
    if rule.padding is not None:
        values[is_padding(stored, rule.padding)] = np.nan
    return values


def _flags(ordered: Sequence[Decoded], policy: Policy, *, doubled: bool) -> tuple[str, ...]:
    rules = _rules(ordered)
    given = {
        "duplicate_slices": doubled,
        "rescaled_slices": _rescaled(rules),
        "one_window": policy is Policy.VOI and len({rule.window for rule in rules}) > 1,
    }
    own = dict.fromkeys(flag for decoded in ordered for flag in decoded.flags)
    return (*own, *(name for name, holds in given.items() if holds))
