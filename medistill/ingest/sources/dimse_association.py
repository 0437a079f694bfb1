"""Associations with an archive: one that asks (C-FIND), one that retrieves (C-GET, C-MOVE; PS3.4 annex C).

What is retrieved is written to files as it came; no data set but answers to queries is parsed here.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medistill.errors import ConfigError, OutputError, SourceError
from medistill.ingest.sources.pacs_query import RETURNED, Group, Row

if TYPE_CHECKING:
    from pynetdicom import AE
    from pynetdicom.association import Association
    from pynetdicom.events import Event
    from pynetdicom.presentation import PresentationContext

NOT_DELIVERED = "the archive did not deliver the instance"
NOT_SENT = f"{NOT_DELIVERED}; it may not reach move_port"
UNREACHABLE = "the archive could not be reached any more; run again to go on"
DROPPED = "the archive dropped the association at every attempt; run again to go on"
REFUSED = "the archive refused the association"
NO_CLASS = "the archive does not say of which kind the instance is"
_AHEAD = 16  # files that wait to be read
BATCH = 8  # instances per request
_CLASSES = 2  # SOP classes per association: 128 contexts at most, one per class and transfer syntax
_PDU = 1 << 17  # bytes; the most that dcmtk takes
_FIND, _MOVE, _GET = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 2, 3))  # study root (PS3.4 C.6.2)
_PENDING = (0xFF00, 0xFF01)
_STORED, _NOT_STORED, _DISK_FULL, _NOT_ASKED_FOR = 0x0000, 0xC000, 0xA700, 0x0124
_UNKNOWN_DESTINATION = 0xA801
_TRANSIENT = 2  # result of an association that may be asked for again (PS3.8 9.3.4)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How to reach an archive; see :class:`~medistill.ingest.sources.dimse.DimseSource`."""

    host: str
    port: int
    called_aet: str
    calling_aet: str
    method: str
    move_port: int
    move_address: str
    tls: bool
    ca_bundle: Path | None
    client_certificate: Path | None
    client_key: Path | None
    retries: int
    pause: float
    timeout: float

    def check(self) -> None:
        """Look for contradictions before anything is sent.

        Raises:
            ConfigError: All problems at once, or that the extra ``pacs`` is not installed.
        """
        _require_pynetdicom()
        files = (self.ca_bundle, self.client_certificate, self.client_key)
        checks = (
            (bool(self.host.strip()) and 0 < self.port < 65536, "Expected a host and a port from 1 to 65535."),
            (all(map(_is_title, (self.called_aet, self.calling_aet))), "Expected titles of 1 to 16 characters."),
            (self.method in ("get", "move"), "Expected method 'get' or 'move'."),
            (self.method != "move" or 0 < self.move_port < 65536, "Expected a move_port for method 'move'."),
            (not (self.tls and self.method == "move"), "Expected method 'get' with tls."),
            (self.tls or not any(files), "Expected certificates only with tls."),
            (
                all(file is None or Path(file).is_file() for file in files),
                "Expected files in ca_bundle, client_certificate and client_key; at least one does not exist.",
            ),
            (min(self.retries, self.pause) >= 0 < self.timeout, "Expected retries, pause >= 0 and timeout > 0."),
        )
        problems = [message for holds, message in checks if not holds]
        if problems:
            raise ConfigError(" ".join(problems))


class Caller:
    """Opens associations for one purpose, and explains why one cannot be opened."""

    def __init__(self, peer: Peer) -> None:
        from pynetdicom import AE, evt  # noqa: PLC0415

        _silence()
        self.peer = peer
        self.entity: AE = AE(ae_title=peer.calling_aet)
        self.entity.connection_timeout = self.entity.acse_timeout = self.entity.dimse_timeout = peer.timeout
        self.entity.network_timeout = peer.timeout
        self.entity.maximum_pdu_size = _PDU
        self._association: Association | None = None
        moments = (evt.EVT_CONN_OPEN, evt.EVT_DATA_RECV, evt.EVT_DATA_SENT)
        self.handlers: list[Any] = [(moment, _send_at_once) for moment in moments]
        self.refusal, self.passing = "", False

    def open(self, contexts: Sequence[PresentationContext], **options: Any) -> Association | None:
        """An association, or nothing; then ``refusal`` says why if the archive was there to refuse."""
        self.close()
        self.refusal, self.passing = "", False
        peer = self.peer
        try:
            association = self.entity.associate(
                peer.host,
                peer.port,
                list(contexts),
                ae_title=peer.called_aet,
                max_pdu=_PDU,
                evt_handlers=self.handlers,
                tls_args=(_tls_context(peer), peer.host) if peer.tls else None,
                **options,
            )
        except (OSError, RuntimeError):
            return None
        self.refusal = _refusal(association)
        self.passing = getattr(association.acceptor.primitive, "result", 0) == _TRANSIENT
        self._association = association if association.is_established else None
        return self._association

    @property
    def association(self) -> Association | None:
        """The open association, if there is one."""
        established = self._association is not None and self._association.is_established
        return self._association if established else None

    def close(self) -> None:
        """End the association politely, or at once if it is lost."""
        if self.association is not None:
            self.association.release()
        self._association = None


class Finder(Caller):
    """Asks by C-FIND in the study root model."""

    def __enter__(self) -> Finder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, level: str, keys: Mapping[str, str]) -> list[Row]:
        """Rows of one query; see :data:`~medistill.ingest.sources.pacs_query.Find`."""
        status = 0
        for attempt in range(self.peer.retries + 1):
            time.sleep(self.peer.pause * 2 ** (attempt - 1) if attempt else 0)
            if self.association is None and not self._connect():
                continue
            rows, status = self._ask(level, keys)
            if status == 0:
                return rows
            if status > 0:
                break
        if status > 0:
            raise SourceError(
                f"The archive refused to list at level {level} (status 0x{status:04X}). Check that it allows "
                "queries in the study root model; for series without studies, name the studies too."
            )
        raise SourceError(
            self.refusal
            or "The archive could not be reached, or dropped every association. Check host, port, firewall, TLS "
            "and the archive; then run again."
        )

    def _connect(self) -> bool:
        from pynetdicom import build_context  # noqa: PLC0415

        association = self.open([build_context(_FIND)])
        if self.refusal and not self.passing:
            raise SourceError(self.refusal)
        return association is not None

    def _ask(self, level: str, keys: Mapping[str, str]) -> tuple[list[Row], int]:
        """Rows and final status; -1 if the association was lost."""
        assert self.association is not None
        wanted = {**dict.fromkeys(RETURNED[level], ""), **keys}
        rows: list[Row] = []
        for status, answer in self.association.send_c_find(_identifier(level, wanted), _FIND):
            if "Status" not in status:
                return [], -1
            if status.Status not in _PENDING:
                return rows, int(status.Status)
            if answer is not None:
                rows.append(_row(answer, wanted))
        return [], -1


class Retriever(Caller):
    """Retrieves instances into files, and asks again for what did not arrive."""

    def __init__(self, peer: Peer, classes: Iterable[str], folder: Path, stop: threading.Event) -> None:
        from pynetdicom import evt  # noqa: PLC0415

        super().__init__(peer)
        self.handlers.append((evt.EVT_C_STORE, self._store))
        self._all_classes, self._folder, self._stop = tuple(sorted(classes)), folder, stop
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._arrived: dict[str, Path] = {}
        self._disk_full = self._gone = self._began = False
        self._classes: tuple[str, ...] = ()
        self._open_server = ExitStack()

    def __enter__(self) -> Retriever:
        if self.peer.method == "move":
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop.is_set() and self.association is not None:
            self.association.abort()
        self.close()
        self._open_server.close()

    def fetch(self, group: Group, names: Sequence[str]) -> tuple[dict[str, Path], str]:
        """Retrieve some instances of a group.

        Returns:
            Files of the instances that arrived, and why the others did not.

        Raises:
            SourceError: If the archive does not serve requests of this kind at all.
            OutputError: If the files cannot be written.
        """
        if not group.sop_class and self.peer.method == "get":
            return {}, NO_CLASS
        with self._lock:
            self._wanted, self._arrived = set(names), {}
        trouble = ""
        for attempt in range(1 if self._gone else self.peer.retries + 1):
            if trouble and self._stop.wait(self.peer.pause * 2 ** (attempt - 1)):
                break
            trouble = self._attempt(group, BATCH if attempt == 0 else 1)
            if self._disk_full:
                raise OutputError("The spool folder is full or cannot be written. Make room, or name another one.")
            if not self._wanted or self._stop.is_set():
                break
        self._gone = bool(trouble)
        self._began = self._began or bool(self._arrived) or not trouble
        if not self._began and not self._stop.is_set():
            raise SourceError(
                f"Nothing could be retrieved: {trouble}. Check that the archive allows "
                f"C-{self.peer.method.upper()} to our title; otherwise set method to '{self._other_method}'."
            )
        with self._lock:
            self._wanted = set()
            return self._arrived, trouble or (NOT_DELIVERED if self.peer.method == "get" else NOT_SENT)

    @property
    def _other_method(self) -> str:
        return "move" if self.peer.method == "get" else "get"

    def _attempt(self, group: Group, size: int) -> str:
        """Ask once for everything that is wanted; returns how the archive was lost meanwhile, if it was."""
        with self._lock:
            names = sorted(self._wanted)
        for start in range(0, len(names), size):
            if self.association is None or (self.peer.method == "get" and group.sop_class not in self._classes):
                self._connect(group.sop_class)
            if self.association is None:
                return REFUSED if self.refusal else UNREACHABLE
            if self._request(group, names[start : start + size]) < 0:
                return DROPPED
        return ""

    def _connect(self, sop_class: str) -> None:
        from pynetdicom import build_context, build_role  # noqa: PLC0415

        if self.peer.method == "move":
            self.open([build_context(_MOVE)])
            return
        position = self._all_classes.index(sop_class) // _CLASSES * _CLASSES
        self._classes = self._all_classes[position : position + _CLASSES]
        self.open(
            [
                build_context(_GET),
                *(build_context(uid, syntax) for uid in self._classes for syntax in _transfer_syntaxes()),
            ],
            ext_neg=[build_role(uid, scp_role=True) for uid in self._classes],
        )

    def _request(self, group: Group, names: Sequence[str]) -> int:
        """Send one request and wait for its end; returns the final status, or -1 if the association was lost."""
        association = self.association
        assert association is not None
        uids = {"StudyInstanceUID": group.study, "SeriesInstanceUID": group.series, "SOPInstanceUID": list(names)}
        identifier = _identifier("IMAGE", uids)
        try:
            if self.peer.method == "get":
                answers = association.send_c_get(identifier, _GET)
            else:
                answers = association.send_c_move(identifier, self.peer.calling_aet, _MOVE)
            final = [int(status.Status) if "Status" in status else -1 for status, _ in answers][-1]
        except (ValueError, RuntimeError):  # no such presentation context was accepted, or the association is lost
            if not association.is_established:
                return -1
            raise SourceError(
                f"The archive does not offer C-{self.peer.method.upper()}. Set method to '{self._other_method}', "
                "or use DICOMweb."
            ) from None
        if final == _UNKNOWN_DESTINATION:
            raise SourceError(
                "The archive does not know our title as a destination (status 0xA801). Have it registered with "
                "the address of this machine and move_port, or set method to 'get'."
            )
        return final

    def _listen(self) -> None:
        """Receive what the archive sends in answer to C-MOVE."""
        from pynetdicom import AllStoragePresentationContexts, build_context  # noqa: PLC0415

        peer = self.peer
        standard = (str(context.abstract_syntax) for context in AllStoragePresentationContexts)
        self.entity.require_called_aet = True
        try:
            server = self.entity.start_server(
                (peer.move_address, peer.move_port),
                block=False,
                evt_handlers=self.handlers,
                contexts=[build_context(uid, _transfer_syntaxes()) for uid in {*standard, *self._all_classes}],
            )
        except OSError:
            raise SourceError(
                "Nothing can be received on move_port: it is in use, or not allowed. Name another port, and have "
                "the archive send there."
            ) from None
        assert server is not None
        self._open_server.callback(server.shutdown)

    def _store(self, event: Event) -> int:
        """Write one data set to a file, undecoded; returns a status (PS3.4 table B.2-1)."""
        name = str(getattr(event.request, "AffectedSOPInstanceUID", ""))
        with self._lock:
            if name in self._arrived:
                return _STORED
            if name not in self._wanted or self._stop.is_set():
                return _NOT_ASKED_FOR
            try:
                content = event.encoded_dataset()
            except Exception:
                return _NOT_STORED
            path = self._write(content)
            if path is None:
                return _DISK_FULL
            self._arrived[name] = path
            self._wanted.discard(name)
        return _STORED

    def _write(self, content: bytes) -> Path | None:
        """A new file that only we may read; nothing if there is no room."""
        path = None
        try:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            path = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        except OSError:
            self._disk_full = True
            if path is not None:
                path.unlink(missing_ok=True)
            return None
        return path


def _send_at_once(event: Event) -> None:
    """Hold back neither small packets nor acknowledgements: each side waits 40 ms for the other's otherwise."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_QUICKACK"):
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _identifier(level: str, values: Mapping[str, Any]) -> Dataset:
    """Keys of a request; UIDs are sent as the archive gave them, valid or not."""
    identifier = Dataset()
    for keyword, value in {"QueryRetrieveLevel": level, **values}.items():
        tag = Tag(keyword)
        identifier.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=IGNORE))
    return identifier


def _row(answer: Any, keywords: Mapping[str, Any]) -> Row:
    """Elements of a C-FIND answer as text; what is malformed is left out."""
    row = {}
    for keyword in keywords:
        try:
            row[keyword] = str(answer.get(keyword) or "").strip()
        except Exception:  # noqa: S112 - pydicom converts on access and may raise anything
            continue
    return row


def _refusal(association: Association) -> str:
    """Why an archive that answered did not accept an association (PS3.8 9.3.4); empty if it did not answer."""
    if association.is_established or not (association.is_rejected or association.rejected_contexts):
        return ""
    reasons = {
        (1, 3): "it does not know calling_aet. Have our title and address registered there",
        (1, 7): "it does not know called_aet. Set called_aet to the title of the archive",
        (3, 1): "it is too busy. Try again later",
        (3, 2): "it has too many associations. Try again later",
    }
    answer = association.acceptor.primitive
    source, diagnostic = getattr(answer, "result_source", 0), getattr(answer, "diagnostic", 0)
    other = "it accepts no such service from us. Check called_aet and its permissions"
    return f"The archive refused the association: {reasons.get((source, diagnostic), other)}."


def _transfer_syntaxes() -> list[str]:
    """Every transfer syntax in which an archive may hold an image; not those that refer to another place."""
    from pynetdicom import ALL_TRANSFER_SYNTAXES  # noqa: PLC0415

    elsewhere = ("1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.204")
    live = ("1.2.840.10008.1.2.4.205", "1.2.840.10008.1.2.7")
    return [uid for uid in ALL_TRANSFER_SYNTAXES if not uid.startswith((*elsewhere, *live))]


def _tls_context(peer: Peer) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=peer.ca_bundle)
        if peer.client_certificate is not None:
            context.load_cert_chain(peer.client_certificate, peer.client_key)
    except (OSError, ValueError):
        raise ConfigError("A certificate or key cannot be read. Expected PEM files without passphrase.") from None
    return context


def _is_title(title: str) -> bool:
    """Whether a text is an application entity title (PS3.5 6.2)."""
    return 0 < len(title.strip()) <= 16 and title.isascii() and title.isprintable() and "\\" not in title


def _require_pynetdicom() -> None:
    try:
        import pynetdicom  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError('DIMSE needs another package. Install it with: pip install "medistill[pacs]"') from None


def _silence() -> None:
    """Switch off logs and warnings that quote values, for good: threads of pynetdicom give them at any time."""
    for name in ("pydicom", "pynetdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=name)
