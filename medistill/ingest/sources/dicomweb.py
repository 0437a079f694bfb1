"""An archive that speaks DICOMweb (PS3.18): QIDO-RS lists, WADO-RS retrieves, one request per instance.

The main process lists UIDs only. An instance is retrieved and decoded in a child process, so that no byte of an
image from the network is read anywhere else.

Secrets come from files or the environment: a bearer token from ``token_file`` or ``MEDISTILL_DICOMWEB_TOKEN``, a
password for ``user`` from ``password_file`` or ``MEDISTILL_DICOMWEB_PASSWORD``.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from email.message import Message
from functools import cached_property, lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item
from medistill.ingest.sources.pacs_query import (
    IMAGE,
    RETURNED,
    SERIES,
    STUDY,
    Group,
    Row,
    Selection,
    list_archive,
    quiet,
    same_instance,
)

if TYPE_CHECKING:
    import requests
    from dicomweb_client import DICOMwebClient

Answer = TypeVar("Answer")

TOKEN, PASSWORD = "MEDISTILL_DICOMWEB_TOKEN", "MEDISTILL_DICOMWEB_PASSWORD"
#: Without this, an archive converts what it sends, or fails where it cannot (PS3.18 8.7.3.5.2).
ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_OUTAGE = _AGAIN - {500}
_PATIENCE = 58.0  # a child process is killed after 60 seconds without a result
_PAGE = 1000
_KEYWORD_OF = {
    "0020000D": "StudyInstanceUID",
    "0020000E": "SeriesInstanceUID",
    "00080018": "SOPInstanceUID",
    "00080016": "SOPClassUID",
    "00080020": "StudyDate",
    "00080060": "Modality",
    "00100020": "PatientID",
    "00201208": "NumberOfStudyRelatedInstances",
    "00201209": "NumberOfSeriesRelatedInstances",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """How to reach a server; holds no secret, so that it may travel to other processes.

    Args:
        url: Address of the service, such as ``https://pacs.example/dicom-web``.
        user: User name for basic authentication, or empty.
        password_file: File with the password.
        token_file: File with a bearer token.
        ca_bundle: Certificates that the server's certificate is checked against, instead of the public ones.
        client_certificate: Own certificate (PEM).
        client_key: Its key (PEM, without passphrase), where the certificate file does not hold it.
        allow_http: Whether credentials may be sent without encryption to another machine.
        retries: Further attempts after a lost connection or a status 408, 429 or 5xx.
        pause: Seconds before the first further attempt; doubles each time.
        timeout: Longest silence of the server in seconds.
    """

    url: str
    user: str = ""
    password_file: Path | None = None
    token_file: Path | None = None
    ca_bundle: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    allow_http: bool = False
    retries: int = 5
    pause: float = 1.0
    timeout: float = 20.0

    def secret(self, variable: str, file: Path | None) -> str:
        """A secret from its file or the environment; empty where there is neither.

        Raises:
            ConfigError: If the file cannot be read.
        """
        if file is None:
            return os.environ.get(variable, "").strip()
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError("A file with a secret cannot be read. Check token_file and password_file.") from None

    def check(self) -> None:
        """Look for contradictions before anything is sent.

        Raises:
            ConfigError: All problems at once.
        """
        address = _split(self.url)
        token, password = self.secret(TOKEN, self.token_file), self.secret(PASSWORD, self.password_file)
        encrypted = address is not None and (address[0] == "https" or _is_local(address[1]))
        files = (self.ca_bundle, self.client_certificate, self.client_key)
        checks = (
            (
                address is not None,
                "Expected url as http:// or https:// with a host, and without user, password, ? or #; credentials "
                f"belong into {TOKEN}, user and {PASSWORD}, or files.",
            ),
            (
                encrypted or self.allow_http or not (token or self.user),
                "Credentials would travel unencrypted. Use https, or set allow_http.",
            ),
            (not (token and self.user), "Expected a token or a user; found both."),
            (bool(password) or not self.user, f"Expected a password for the user in {PASSWORD} or password_file."),
            (
                all(file is None or Path(file).is_file() for file in files),
                "Expected files in ca_bundle, client_certificate and client_key; at least one does not exist.",
            ),
            (min(self.retries, self.pause) >= 0 < self.timeout, "Expected retries, pause >= 0 and timeout > 0."),
        )
        problems = [message for holds, message in checks if not holds]
        if problems:
            raise ConfigError(" ".join(problems))

    def session(self) -> requests.Session:
        """A session with credentials; proxies and passwords of the environment are not used."""
        session: requests.Session = _require("requests").Session()
        session.trust_env = False
        session.headers["Accept-Encoding"] = "identity"  # gzip makes pixels hardly smaller and much slower
        if self.ca_bundle is not None:
            session.verify = str(self.ca_bundle)
        if self.client_certificate is not None:
            key = self.client_key and str(self.client_key)
            session.cert = (str(self.client_certificate), key) if key else str(self.client_certificate)
        token = self.secret(TOKEN, self.token_file)
        if self.user:
            password = self.secret(PASSWORD, self.password_file)
            session.auth = (self.user.encode(), password.encode())  # type: ignore[assignment] # not only Latin-1
        elif token:
            session.headers["Authorization"] = f"Bearer {token}"
        return session


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One instance on a server."""

    server: Server
    study: str
    series: str
    sop: str

    @property
    def url(self) -> str:
        """Where it is retrieved (PS3.18 10.4)."""
        base = self.server.url.rstrip("/")
        return f"{base}/studies/{self.study}/series/{self.series}/instances/{self.sop}"

    def read(self) -> bytes:
        """See :func:`retrieve`."""
        return retrieve(self)


@dataclass(frozen=True)
class DicomWebSource:
    """Instances of an archive that fit a selection.

    An instance that cannot be retrieved, or is promised by a count and not listed, is refused with NET_PARTIAL.

    Args:
        url: See :class:`Server`, as for all arguments from ``user`` on.
        studies: See :class:`~medistill.ingest.sources.pacs_query.Selection`, as for the next four.
        series: Series Instance UIDs.
        patients: Patient IDs, ``*`` and ``?`` allowed.
        date: Study date or range of dates.
        modalities: Modalities.

    Raises:
        ConfigError: If an argument is malformed, or the extra ``pacs`` is not installed.
        SourceError: When read, if the server cannot be asked, or holds nothing that fits.
    """

    url: str
    _: KW_ONLY
    studies: Sequence[str] = ()
    series: Sequence[str] = ()
    patients: Sequence[str] = ()
    date: str = ""
    modalities: Sequence[str] = ()
    user: str = ""
    password_file: Path | None = None
    token_file: Path | None = None
    ca_bundle: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    allow_http: bool = False
    retries: int = 5
    pause: float = 1.0
    timeout: float = 20.0
    keys: ClassVar[tuple[str, ...]] = ("sop", "patient")

    def __post_init__(self) -> None:
        _require("dicomweb_client")
        self._server.check()
        _ = self._selection

    @cached_property
    def _server(self) -> Server:
        return Server(**{field.name: getattr(self, field.name) for field in fields(Server)})

    @cached_property
    def _selection(self) -> Selection:
        return Selection(**{field.name: getattr(self, field.name) for field in fields(Selection)})

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        with quiet():
            return list_archive(_Finder(self._server), self._selection)

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    def __len__(self) -> int:
        """Number of instances that the server lists or promises."""
        return sum(map(len, self._groups))

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per instance, by study, series and instance UID."""
        ordinal = 0
        for group in self._groups:
            for sop in group.names:
                reference = Reference(server=self._server, study=group.study, series=group.series, sop=sop)
                yield Item(ordinal=ordinal, name=sop, payload=None if sop in known else reference)
                ordinal += 1
            yield from group.refusals(ordinal)
            ordinal += group.missing

    @property
    def decode(self) -> Callable[[Reference, Policy], Iterator[Decoded]]:
        """Retrieves and reads one instance."""
        return decode_reference


def decode_reference(reference: Reference, policy: Policy) -> Iterator[Decoded]:
    """Retrieve one instance and read its frames.

    Raises:
        RejectedFile: NET_PARTIAL if it cannot be retrieved whole, or as
            :func:`~medistill.ingest.frames.decode_dicom`.
    """
    with quiet():
        content = retrieve(reference)
    yield from same_instance(decode_dicom(content, policy), reference.sop)


def retrieve(reference: Reference) -> bytes:
    """The DICOM file of one instance, in the transfer syntax in which the server keeps it.

    After an outage that outlasted all attempts, the next instances are tried once each until one arrives.

    Raises:
        RejectedFile: NET_PARTIAL.
    """
    server = reference.server
    link = _link(server, os.getpid())  # connections must not be shared with a parent process

    def ask() -> bytes:
        response = link.session.get(reference.url, headers={"Accept": ACCEPT}, timeout=server.timeout)
        response.raise_for_status()
        return only_part(response.headers.get("Content-Type", ""), response.content)

    try:
        content = _persist(ask, server, retries=0 if link.lost else server.retries)
    except _Trouble as trouble:
        link.lost = trouble.outage
        raise RejectedFile("NET_PARTIAL", str(trouble)) from None
    link.lost = False
    return content


def only_part(content_type: str, body: bytes) -> bytes:
    """Content of the one part of a multipart message (RFC 2046); a bare file is returned as it is.

    Args:
        content_type: Value of the header ``Content-Type``.
        body: The whole message.

    Raises:
        ValueError: If the message is cut off, or has not exactly one part.
    """
    header = Message()
    header["Content-Type"] = content_type
    if header.get_content_type() == "application/dicom":
        return body
    boundary = header.get_param("boundary")
    if header.get_content_maintype() != "multipart" or not isinstance(boundary, str) or not boundary:
        raise ValueError("expected multipart/related with a boundary")
    delimiter = b"--" + boundary.encode("latin-1", "replace")
    opening = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    head_end = body.find(b"\r\n\r\n", opening)
    end = body.find(b"\r\n" + delimiter, head_end + 2)
    if not body.startswith(delimiter, opening) or min(head_end, end) < 0:
        raise ValueError("the message is cut off")
    if not body.startswith(b"--", end + 2 + len(delimiter)):
        raise ValueError("expected one part, or the message is cut off")
    return body[head_end + 4 : end]


class _Finder:
    """Asks a server by QIDO-RS (PS3.18 10.6), page by page."""

    def __init__(self, server: Server) -> None:
        self._server = server
        client = _require("dicomweb_client").DICOMwebClient(
            server.url.rstrip("/"),
            session=server.session(),
            timeout=server.timeout,
            permissive_uid=True,
            callback=_refuse_cut_header,
        )
        client.set_http_retry_params(retry=False)  # lost connections need retries, too: see _persist
        self._client: DICOMwebClient = client

    def __call__(self, level: str, keys: Mapping[str, str]) -> Iterator[Row]:
        own = {STUDY: "StudyInstanceUID", SERIES: "SeriesInstanceUID", IMAGE: "SOPInstanceUID"}[level]
        seen: set[str] = set()
        offset = 0
        while True:
            try:
                page = _persist(lambda: self._page(level, keys, offset), self._server, self._server.retries)  # noqa: B023
            except _Trouble as trouble:
                raise SourceError(trouble.advice()) from None
            offset += len(page)
            fresh = [row for row in page if row.get(own, "") not in seen]
            seen.update(row.get(own, "") for row in fresh)
            yield from fresh
            if not fresh:  # the end, or a server that ignores the offset
                return

    def _page(self, level: str, keys: Mapping[str, str], offset: int) -> list[Row]:
        filters = {key: value for key, value in keys.items() if value}
        wanted: dict[str, Any] = {"limit": _PAGE, "offset": offset, "fields": RETURNED[level]}
        study = filters.pop("StudyInstanceUID", None) if level != STUDY else None
        if level == STUDY:
            rows = self._client.search_for_studies(search_filters=filters, **wanted)
        elif level == SERIES:
            rows = self._client.search_for_series(study, search_filters=filters, **wanted)
        else:
            series = filters.pop("SeriesInstanceUID", None)
            rows = self._client.search_for_instances(study, series, search_filters=filters, **wanted)
        if not isinstance(rows, list):
            raise ValueError("expected a list")
        return [_row(row) for row in rows]


def _refuse_cut_header(response: requests.Response, *_: Any, **__: Any) -> None:
    """A connection that breaks within the header looks like an empty list to the libraries."""
    framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
    if response.status_code == 200 and not framed and not response.content:
        raise ValueError("the header is cut off")


def _row(answer: Any) -> Row:
    """Known keys of one row of DICOM JSON (PS3.18 F.2) as text; what is malformed is left out."""
    row = {}
    for tag, element in answer.items() if isinstance(answer, dict) else ():
        values = element.get("Value") if isinstance(element, dict) else None
        if tag in _KEYWORD_OF and isinstance(values, list) and values and isinstance(values[0], (str, int)):
            row[_KEYWORD_OF[tag]] = str(values[0]).strip()
    return row


class _Link:
    """Connection of this process to a server, kept from one instance to the next."""

    def __init__(self, server: Server) -> None:
        self.session = server.session()
        self.lost = False


@lru_cache(maxsize=4)
def _link(server: Server, process: int) -> _Link:
    return _Link(server)


class _Trouble(Exception):  # noqa: N818 - either a RejectedFile or a SourceError in the end
    """Why a request failed, in fixed words and with the HTTP status at most."""

    def __init__(self, words: str, *, status: int = 0, again: bool = False, outage: bool = False) -> None:
        super().__init__(words)
        self.status, self.again, self.outage = status, again, outage

    def advice(self) -> str:
        """What was found, what was expected, and a remedy."""
        if self.status in (401, 403):
            return (
                f"The DICOMweb server refused the credentials (HTTP {self.status}). Set {TOKEN}, or user and "
                f"{PASSWORD}, or client_certificate to what the server expects."
            )
        if self.status in (404, 405, 410):
            return (
                f"Expected a DICOMweb service at the url; the server has none there (HTTP {self.status}). Check "
                "the path, often /dicom-web or /dcm4chee-arc/aets/NAME/rs."
            )
        return (
            f"The DICOMweb server could not be asked: {self}. Check url, network, server, and for https the "
            "certificates on both sides; then run again."
        )


def _persist(call: Callable[[], Answer], server: Server, retries: int) -> Answer:
    """Call until it works, waiting longer each time; gives up before a child would be killed."""
    deadline = time.monotonic() + _PATIENCE
    for attempt in range(retries + 1):
        try:
            return call()
        except (OSError, ValueError, RecursionError) as error:  # those of requests are OSError
            trouble = _explain(error, attempt + 1)
        pause = server.pause * 2**attempt * (1.0 if trouble.outage else 0.1)
        if not trouble.again or attempt == retries or time.monotonic() + pause + server.timeout > deadline:
            break
        time.sleep(pause)
    raise trouble


def _explain(error: Exception, attempts: int) -> _Trouble:
    requests = _require("requests")
    tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
    if isinstance(error, requests.HTTPError):
        status = int(error.response.status_code)
        return _Trouble(
            f"HTTP {status} after {tried}", status=status, again=status in _AGAIN, outage=status in _OUTAGE
        )
    if _is_tls(error):
        return _Trouble(
            "TLS was refused; the server's certificate must be trusted by ca_bundle, and the server may expect "
            "client_certificate"
        )
    if isinstance(error, requests.Timeout):
        return _Trouble(f"no answer in time after {tried}", again=True, outage=True)
    if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        return _Trouble(f"the connection was refused or lost, after {tried}", again=True, outage=True)
    return _Trouble(f"the answer was cut off or not DICOM, after {tried}", again=True)


def _is_tls(error: BaseException | None) -> bool:
    """Whether the TLS handshake failed, however often the exception was wrapped."""
    while error is not None:
        inner = [argument for argument in (error, *error.args) if isinstance(argument, ssl.SSLError)]
        if any(not isinstance(found, ssl.SSLEOFError) for found in inner):
            return True
        error = error.__context__
    return False


def _split(url: str) -> tuple[str, str] | None:
    """Scheme and host, or nothing where the url holds what it should not."""
    try:
        parts = urlsplit(url)
        strange = parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc
        assert parts.port is None or parts.port > 0
    except (ValueError, AssertionError):
        return None
    if strange or parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.scheme, parts.hostname


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require(module: str) -> Any:
    from importlib import import_module  # noqa: PLC0415

    try:
        return import_module(module)
    except ImportError:
        message = 'DICOMweb needs another package. Install it with: pip install "medistill[pacs]"'
        raise ConfigError(message) from None
