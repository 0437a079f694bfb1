"""One image read: from a source's item to 16-bit pixels and a record without identifiers.

The reader runs in worker processes. Original identifiers exist only inside :meth:`Reader.__call__`; what it
returns holds pseudonyms, values from closed lists, and reason codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from medistill.errors import RejectedFile
from medistill.ingest.decode import silence
from medistill.ingest.geometry import Fit, fit_square
from medistill.ingest.headers import Header
from medistill.ingest.identity import Pseudonymiser, age_band, normalise
from medistill.ingest.intensity import Policy
from medistill.ingest.quarantine import Rejected


@dataclass(frozen=True, kw_only=True)
class Item:
    """One candidate of a source, not read yet.

    Args:
        ordinal: Position in the scan, from 0.
        name: Path inside the source; may identify a patient, so it is not shown.
        payload: What the source's ``decode`` needs: a path, bytes or an array.
        label: Class given by the source, or empty.
        split: Split given by the source, or empty.
        patient: Patient given by the source, or empty.
        index: Row inside the source, or empty.
    """

    ordinal: int
    name: str = field(repr=False)
    payload: Path | bytes | NDArray[Any] = field(repr=False)
    label: str = field(default="", repr=False)
    split: str = ""
    patient: str = field(default="", repr=False)
    index: str = ""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A decoded image before it is made square.

    Args:
        grey: Grey levels in ``[0, 1]``, shape ``(h, w)``.
        header: Identity and description; stays inside the reader.
        flags: Assumptions that were made, as fixed words.
    """

    grey: NDArray[np.float32] = field(repr=False)
    header: Header = field(default_factory=Header, repr=False)
    flags: tuple[str, ...] = ()


class Source(Protocol):
    """Where images come from. Adding one: a file in ``sources/`` and a line in the registry.

    ``keys`` names how rows of a label table can refer to an image, most specific first
    (``sop``, ``file``, ``index``, ``patient``); ``labelled`` says whether items carry a label.
    """

    keys: ClassVar[tuple[str, ...]]

    @property
    def labelled(self) -> bool:
        """Whether every item carries a label of its own."""

    def __len__(self) -> int:
        """Number of items."""

    def items(self) -> Iterator[Item]:
        """Candidates in a fixed order, without decoding them."""

    @property
    def decode(self) -> Callable[[Any, Policy], Decoded]:
        """Picklable function from a payload to an image; raises :class:`RejectedFile`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is known of one readable image; pseudonyms and closed lists only.

    Args:
        ordinal: Position in the scan.
        uid: Replacement UID.
        patient: Pseudonym, or empty where the source names no patient.
        bare_patient: Pseudonym of the same number without an issuer.
        own_patient: Pseudonym that only this image has, for sources without patients.
        keys: Keyed tokens that rows of a label table may match, most specific first.
        label: Class given by the source, or empty.
        given_test: Whether the source puts the image into the test split.
        birth: Keyed token of the birth date, to find contradictions.
        study: Pseudonym of the study, or empty.
        site: Pseudonym of the institution, or empty.
        modality: From a closed list, or empty.
        view: From a closed list, or empty.
        sex: From a closed list, or empty.
        age_band: From a closed list, or empty.
        pixel_key: Pseudonym of the pixels.
        flags: Assumptions that were made.
    """

    ordinal: int
    uid: str
    patient: str
    bare_patient: str
    own_patient: str
    keys: tuple[str, ...] = field(repr=False)
    label: str = field(default="", repr=False)
    given_test: bool = False
    birth: str = field(default="", repr=False)
    study: str = ""
    site: str = ""
    modality: str = ""
    view: str = ""
    sex: str = ""
    age_band: str = ""
    pixel_key: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Picklable function from an item to a record and its pixels, or a rejection.

    Args:
        decode: The source's decode function.
        keys: The source's ways to be referred to.
        pseudonymiser: Replaces identifiers.
        size: Side length of the stored square.
        fit: How oblong images become square.
        policy: How grey levels are chosen.
        allow_burned_in: Whether images marked as carrying text enter.
    """

    decode: Callable[[Any, Policy], Decoded]
    keys: tuple[str, ...]
    pseudonymiser: Pseudonymiser
    size: int
    fit: Fit
    policy: Policy
    allow_burned_in: bool = False

    def __call__(self, item: Item) -> tuple[Reading, NDArray[np.uint16]] | Rejected:
        """Read one item; never raises for a bad file."""
        try:
            with silence():
                decoded = self.decode(item.payload, self.policy)
            if decoded.header.burned_in and not self.allow_burned_in:
                raise RejectedFile("BURNED_IN")
            pixels = fit_square(decoded.grey, self.size, self.fit)
        except RejectedFile as rejection:
            return Rejected(ordinal=item.ordinal, code=rejection.code, detail=rejection.detail)
        except MemoryError:
            return Rejected(ordinal=item.ordinal, code="OOM_LIMIT")
        except RecursionError:
            return Rejected(ordinal=item.ordinal, code="NEST_LIMIT")
        except Exception:
            return Rejected(ordinal=item.ordinal, code="CODEC_CRASH", detail="unexpected error while reading")
        return self._record(item, decoded, pixels), pixels

    def _record(self, item: Item, decoded: Decoded, pixels: NDArray[np.uint16]) -> Reading:
        header, secret = decoded.header, self.pseudonymiser
        patient_id = header.patient_id or item.patient
        pixel_key = secret.pixels(pixels)
        own_name = header.sop_uid or f"item {item.name} {pixel_key}"
        return Reading(
            ordinal=item.ordinal,
            uid=secret.uid(own_name),
            own_patient=secret.token("own patient", own_name),
            patient=secret.patient(header.issuer, patient_id) if patient_id.strip() else "",
            bare_patient=secret.patient("", patient_id) if patient_id.strip() else "",
            keys=tuple(secret.token("key", key) for key in item_keys(self.keys, item, header)),
            label=item.label,
            given_test=item.split == "test",
            birth=secret.token("birth", header.birth_date) if header.birth_date else "",
            study=secret.study(header.study_uid) if header.study_uid else "",
            site=secret.site(header.institution) if header.institution else "",
            modality=header.modality,
            view=header.view,
            sex=header.sex,
            age_band=age_band(age=header.age, birth_date=header.birth_date, study_date=header.study_date),
            pixel_key=pixel_key,
            flags=decoded.flags,
        )


def table_key(kind: str, value: str, split: str = "") -> str:
    """Canonical text of a reference to an image, before it is replaced by a token.

    Args:
        kind: ``sop``, ``file``, ``index`` or ``patient``.
        value: The reference as written in a table or found in a source.
        split: Part of the reference for ``index``, where a source counts within splits.
    """
    if kind == "patient":
        return f"patient|{normalise(value)}"
    if kind == "file":
        return f"file|{PurePosixPath(value.strip().replace(chr(92), '/'))}"
    if kind == "index":
        return f"index|{split.strip().casefold()}|{value.strip()}"
    return f"{kind}|{value.strip()}"


def item_keys(kinds: tuple[str, ...], item: Item, header: Header) -> Iterator[str]:
    """References that a table may use for an image, most specific first."""
    if "sop" in kinds and header.sop_uid:
        yield table_key("sop", header.sop_uid)
    if "file" in kinds:
        path = PurePosixPath(item.name)
        for start in range(len(path.parts)):
            yield table_key("file", str(PurePosixPath(*path.parts[start:])))
        yield table_key("file", path.stem)
    if "index" in kinds:
        yield table_key("index", item.index, item.split)
        yield table_key("index", item.index)
    if "patient" in kinds and header.patient_id:
        yield table_key("patient", header.patient_id)
