"""One image read: from a source's item to 16-bit pixels and a record without identifiers.

The reader runs in worker processes. Original identifiers exist only inside :meth:`Reader.__call__`; what it
returns holds pseudonyms, values from closed lists, and reason codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medistill.errors import RejectedFile
from medistill.ingest.burned_in import Outcome as TextOutcome
from medistill.ingest.burned_in import Screen, TextPolicy
from medistill.ingest.decode import silence
from medistill.ingest.geometry import Fit
from medistill.ingest.headers import Header
from medistill.ingest.identity import Pseudonymiser, age_band, normalise
from medistill.ingest.intensity import Policy
from medistill.ingest.quarantine import Rejected

if TYPE_CHECKING:
    from medistill.ingest.frames import Decoded
    from medistill.ingest.volumes import DecodedVolume

    Picture: TypeAlias = Decoded | DecodedVolume

_BLOCK = 1 << 20
_UNSEEN = np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One candidate of a source, not read yet.

    Args:
        ordinal: Position in the scan, from 0.
        name: Path inside the source, or UID in an archive; unique in the source. It may identify a patient, so it
            is not shown.
        payload: What the source's ``decode`` needs: a path, bytes, an array or a reference of the source's own.
        label: Class given by the source, or empty.
        split: Split given by the source, or empty.
        patient: Patient given by the source, or empty.
        index: Row inside the source, or empty.
        refused: Reason code where the source itself knows that the item cannot be used, or empty.
        refused_detail: Fixed words that explain it.
    """

    ordinal: int
    name: str = field(repr=False)
    payload: Any = field(repr=False)
    label: str = field(default="", repr=False)
    split: str = ""
    patient: str = field(default="", repr=False)
    index: str = ""
    refused: str = ""
    refused_detail: str = ""


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

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """Candidates in a fixed order, without decoding them.

        Args:
            known: Names that an earlier, interrupted run has read. A source that would have to retrieve them again
                yields them without payload; for files, the hash of their content decides.
        """

    @property
    def decode(self) -> Callable[[Any, Policy], Iterator[Picture]]:
        """Picklable function from a payload to its images; raises :class:`RejectedFile`.

        It runs in a child process that may be killed.
        """


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is known of one readable image; pseudonyms and closed lists only.

    Args:
        ordinal: Position of its item in the scan.
        frame: Number within its item from 1; 0 where the item is one image.
        uid: Replacement UID.
        patient: Pseudonym, or empty where the source names no patient.
        bare_patient: Pseudonym of the same number without an issuer.
        own_patient: Pseudonym that only this item has, for sources without patients.
        folder: Pseudonym of the folder that holds the item, or empty.
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
    frame: int = 0
    uid: str
    patient: str
    bare_patient: str
    own_patient: str
    folder: str = ""
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
class Work:
    """An item with the content hash that an earlier run found, or empty."""

    item: Item
    expected: bytes = b""


@dataclass(frozen=True)
class Content:
    """Hash of an item's bytes (SHA-256); empty where the payload has no bytes to hash."""

    digest: bytes


@dataclass(frozen=True)
class Deferred:
    """An item whose pixels must be read for text, which is left to a later pass.

    Args:
        keys: Keyed tokens that rows of a label table may match, so that nothing is read that has no label.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)


#: What the reader gives for one item: its content hash first, then images and rejections.
Found = Content | Deferred | Rejected | tuple[Reading, NDArray[np.uint16]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Picklable function from an item to records and pixels, or rejections.

    Args:
        decode: The source's decode function.
        keys: The source's ways to be referred to.
        pseudonymiser: Replaces identifiers.
        size: Side length of the stored square or cube.
        fit: How oblong images become square.
        policy: How grey levels are chosen.
        colour: Whether red, green and blue are kept; otherwise a colour image becomes its luminance.
        screen: What to do about text in pixels.
        defaced: Whether volumes of heads may enter.
        deferring: Whether items whose text must be read by OCR are put off, so that this process need not hold the
            models, which are larger than everything else.
    """

    decode: Callable[[Any, Policy], Iterator[Picture]]
    keys: tuple[str, ...]
    pseudonymiser: Pseudonymiser
    size: int
    fit: Fit
    policy: Policy
    screen: Screen
    colour: bool = False
    defaced: bool = False
    deferring: bool = False

    def __call__(self, work: Work) -> Iterator[Found]:
        """Read one item; never raises for a bad file except when memory runs out.

        An item whose content is as expected ends after its :class:`Content`; one that comes without payload,
        because an earlier run has read it, ends at once.
        """
        item = work.item
        if item.payload is None and not item.refused:
            return
        try:
            if item.refused:
                raise RejectedFile(item.refused, item.refused_detail)
            digest = _with_description(content_digest(item.payload), item)
            yield Content(digest)
            if digest and digest == work.expected:
                return
            with silence():
                for decoded in self.decode(item.payload, self.policy):
                    found = self._image(item, decoded)
                    yield found
                    if isinstance(found, Deferred):
                        return
        except RejectedFile as rejection:
            yield Rejected(ordinal=item.ordinal, code=rejection.code, detail=rejection.detail)
        except RecursionError:
            yield Rejected(ordinal=item.ordinal, code="NEST_LIMIT")
        except MemoryError:
            raise
        except Exception:
            yield Rejected(ordinal=item.ordinal, code="CODEC_CRASH", detail="unexpected error while reading")

    def _image(self, item: Item, decoded: Picture) -> Found:
        """One image of an item; only images of files with several frames are turned away one by one."""
        try:
            self._check_kind(decoded.header)
            screened = self._screened(item, decoded)
            if screened is None:
                return Deferred(tuple(self._keys(item, decoded.header)))
            pixels = screened.colours(self.size, self.fit) if self.colour else screened.pixels(self.size, self.fit)
            if "text_masked" in screened.flags or "outside_masked" in screened.flags:
                _check_something_left(pixels)
        except RejectedFile as rejection:
            if not decoded.frame:
                raise
            return Rejected(
                ordinal=item.ordinal, frame=decoded.frame, code=rejection.code, detail=rejection.detail
            )
        return self._record(item, screened, pixels), pixels

    def _keys(self, item: Item, header: Header) -> Iterator[str]:
        """Tokens by which rows of a label table may mean an image."""
        return (self.pseudonymiser.token("key", key) for key in item_keys(self.keys, item, header))

    def _check_kind(self, header: Header) -> None:
        if not header.diagnostic:
            raise RejectedFile("NON_IMAGE_SOP")
        if header.localiser:
            raise RejectedFile("LOCALISER")
        if header.head and not self.defaced:
            raise RejectedFile("HEAD_VOLUME")

    def _screened(self, item: Item, decoded: Picture) -> Picture | None:
        """The image as it may enter, text blacked out where that is the policy; nothing if OCR must decide."""
        header, policy = decoded.header, self.screen.policy
        looked_at = decoded.grey() if policy is not TextPolicy.ALLOW else _UNSEEN
        token, expected = self._token(item, decoded), header.burned_in or header.carries_text
        screen = replace(self.screen, use_ocr=False) if self.deferring else self.screen
        verdict = screen.look(
            looked_at,
            declared=header.burned_in,
            risky=header.carries_text,
            token=token,
            outside=header.outside,
        )
        settled = policy is TextPolicy.ALLOW or (policy is TextPolicy.REJECT and expected)
        doubtful = verdict.outcome is not TextOutcome.CLEAR or self.screen.sampled(token)
        if self.deferring and self.screen.reads and doubtful and not settled:
            return None
        verdict.check()
        decoded = decoded.masked(verdict.boxes) if verdict.boxes else decoded
        return replace(decoded, flags=(*decoded.flags, *verdict.flags))

    def _token(self, item: Item, decoded: Picture) -> bytes:
        return self.pseudonymiser.digest("screen", f"{item.name} {decoded.frame}")

    def _record(self, item: Item, decoded: Picture, pixels: NDArray[np.uint16]) -> Reading:
        header, secret = decoded.header, self.pseudonymiser
        patient_id = header.patient_id or item.patient
        named = bool(patient_id.strip())
        pixel_key = secret.pixels(pixels)
        own_name = header.sop_uid or f"item {item.name} {pixel_key}"
        folder = str(PurePosixPath(item.name).parent)
        return Reading(
            ordinal=item.ordinal,
            frame=decoded.frame,
            uid=secret.uid(f"{own_name} frame {decoded.frame}" if decoded.frame else own_name),
            own_patient=secret.token("own patient", own_name),
            patient=secret.patient(header.issuer, patient_id) if named else "",
            bare_patient=secret.patient("", patient_id) if named else "",
            folder=secret.token("folder", folder) if folder != "." else "",
            keys=tuple(self._keys(item, header)),
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


def _with_description(digest: bytes, item: Item) -> bytes:
    """The hash of a payload together with what the source says of it, which can change by itself."""
    described = repr((item.label, item.split, item.patient, item.index))
    return hashlib.sha256(digest + described.encode("utf-8", "surrogateescape")).digest() if digest else b""


def _check_something_left(pixels: NDArray[np.uint16]) -> None:
    if pixels.min() == pixels.max():
        raise RejectedFile("BURNED_IN", "nothing of the image is left after masking")


def content_digest(payload: Any) -> bytes:
    """SHA-256 of what a payload holds.

    Args:
        payload: A path, bytes, an array, or a tuple of paths; anything else has no content of its own.

    Raises:
        RejectedFile: READ_ERROR if a file cannot be read.
    """
    paths = (payload,) if isinstance(payload, Path) else payload
    if isinstance(payload, bytes):
        return hashlib.sha256(payload).digest()
    if isinstance(payload, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(payload).data).digest()
    if not isinstance(paths, tuple) or not all(isinstance(path, Path) for path in paths):
        return b""
    content = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    content.update(block)
    except OSError:
        raise RejectedFile("READ_ERROR") from None
    return content.digest()


def table_key(kind: str, value: str, within: str = "") -> str:
    """Canonical text of a reference to an image, before it is replaced by a token.

    Args:
        kind: ``sop``, ``file``, ``index`` or ``patient``.
        value: The reference as written in a table or found in a source.
        within: Split for an ``index`` that counts within splits; issuer for a ``patient``.
    """
    if kind == "patient":
        return f"patient|{normalise(within)}|{normalise(value)}"
    if kind == "file":
        return f"file|{PurePosixPath(value.strip().replace(chr(92), '/'))}"
    if kind == "index":
        return f"index|{within.strip().casefold()}|{value.strip()}"
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
    if "patient" in kinds and (number := header.patient_id or item.patient):
        yield table_key("patient", number, header.issuer)
        yield table_key("patient", number)
