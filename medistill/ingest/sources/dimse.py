"""An archive that speaks DIMSE (PS3.4 annex C): C-FIND lists, C-GET or C-MOVE retrieves.

The main process never parses what is retrieved: a data set goes from the network into a file of a private folder,
as it came, and is read and deleted in a child process. A thread retrieves ahead, by a fixed number of instances.
"""

from __future__ import annotations

import atexit
import os
import platform
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from medistill.errors import ConfigError, MedistillError, OutputError, SourceError
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item
from medistill.ingest.sources.dimse_association import BATCH, Finder, Peer, Retriever
from medistill.ingest.sources.pacs_query import (
    Group,
    Selection,
    list_archive,
    quiet,
    refused_item,
    same_instance,
)

_PREFIX = f"medistill-pacs-{platform.node()}-"
_AHEAD = 16  # files that wait to be read


@dataclass(frozen=True, kw_only=True)
class Transient:
    """A file that is read once."""

    path: Path = field(repr=False)
    sop: str = field(repr=False)


@dataclass(frozen=True)
class DimseSource:
    """Instances of an archive that fit a selection.

    An instance that the archive does not deliver, or counts and does not list, is refused with NET_PARTIAL.

    Args:
        host: Host name or address of the archive.
        port: Its port.
        called_aet: Its application entity title.
        calling_aet: Our own title, which the archive must know.
        method: ``get`` retrieves over our own connection, ``move`` lets the archive connect to ``move_port``.
        move_port: Port on which instances are received; the archive must know it under ``calling_aet``.
        move_address: Address of the network interface for ``move_port``; empty for all.
        studies: See :class:`~medistill.ingest.sources.pacs_query.Selection`, as for the next four.
        series: Series Instance UIDs.
        patients: Patient IDs, ``*`` and ``?`` allowed.
        date: Study date or range of dates.
        modalities: Modalities.
        tls: Whether to encrypt; only with ``get``.
        ca_bundle: Certificates that the archive's certificate is checked against, instead of the public ones.
        client_certificate: Own certificate (PEM).
        client_key: Its key (PEM), where the certificate file does not hold it.
        retries: Further attempts for what was not delivered.
        pause: Seconds before the first further attempt after a lost association; doubles each time.
        timeout: Longest silence of the archive in seconds.
        spool: Folder in which the private folder is made; that of the system where not given.

    Raises:
        ConfigError: If an argument is malformed, or the extra ``pacs`` is not installed.
        SourceError: When read, if the archive cannot be asked, or holds nothing that fits.
    """

    host: str
    port: int = 104
    _: KW_ONLY
    called_aet: str = "ANY-SCP"
    calling_aet: str = "MEDISTILL"
    method: str = "get"
    move_port: int = 0
    move_address: str = ""
    studies: Sequence[str] = ()
    series: Sequence[str] = ()
    patients: Sequence[str] = ()
    date: str = ""
    modalities: Sequence[str] = ()
    tls: bool = False
    ca_bundle: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    retries: int = 5
    pause: float = 1.0
    timeout: float = 30.0
    spool: Path | None = None
    keys: ClassVar[tuple[str, ...]] = ("sop", "patient")
    local_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._peer.check()
        if self.spool is not None and not Path(self.spool).is_dir():
            raise ConfigError("Expected a folder as spool.")
        _ = self._selection

    @cached_property
    def _peer(self) -> Peer:
        return Peer(**{each.name: getattr(self, each.name) for each in fields(Peer)})

    @cached_property
    def _selection(self) -> Selection:
        return Selection(**{each.name: getattr(self, each.name) for each in fields(Selection)})

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        with quiet(), Finder(self._peer) as find:
            return list_archive(find, self._selection)

    @cached_property
    def _folder(self) -> Path:
        """Private folder for files in transit; goes at the end of the process."""
        _sweep(Path(self.spool or tempfile.gettempdir()))
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self.spool))
        except OSError:
            raise OutputError("The spool folder cannot be written. Name another one, or make room.") from None
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    @property
    def labelled(self) -> bool:
        """Never: labels of DICOM files come from a table."""
        return False

    def __len__(self) -> int:
        """Number of instances that the archive lists or promises."""
        return sum(map(len, self._groups))

    def items(self, known: Container[str] = ()) -> Iterator[Item]:
        """One item per instance, by study, series and instance UID; each can be decoded once."""
        groups, folder = self._groups, self._folder
        classes = {group.sop_class for group in groups} - {""}
        stop = threading.Event()
        ready: queue.Queue[Item | MedistillError | None] = queue.Queue(_AHEAD)

        def put(item: Item | MedistillError | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
            _discard(item)
            return None

        def retrieve() -> None:
            try:
                with Retriever(self._peer, classes, folder, stop) as retriever:
                    for item in _items(groups, known, retriever):
                        put(item)
                        if stop.is_set():
                            return
                put(None)
            except MedistillError as error:
                put(error)
            except Exception:
                put(SourceError("The archive sent something unexpected; the transfer ended. Run again to go on."))

        thread = threading.Thread(target=retrieve, name="medistill-dimse", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, MedistillError):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join(self.timeout)
            while not ready.empty():
                _discard(ready.get_nowait())

    @property
    def decode(self) -> Callable[[Transient, Policy], Iterator[Decoded]]:
        """Reads and deletes one retrieved file."""
        return decode_transient


def decode_transient(transient: Transient, policy: Policy) -> Iterator[Decoded]:
    """Read the frames of a retrieved file and delete it.

    Raises:
        RejectedFile: As :func:`~medistill.ingest.frames.decode_dicom`.
    """
    try:
        yield from same_instance(decode_dicom(transient.path, policy), transient.sop)
    finally:
        transient.path.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    """Delete our private folders of processes of this machine that were killed."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            if process.isdigit() and folder.lstat().st_uid == os.getuid():
                os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _discard(item: Item | MedistillError | None) -> None:
    """Delete the file of an item that nobody will read."""
    if isinstance(item, Item) and isinstance(item.payload, Transient):
        item.payload.path.unlink(missing_ok=True)


def _items(groups: Sequence[Group], known: Container[str], retriever: Retriever) -> Iterator[Item]:
    """Every candidate in order; those that are not known are retrieved batch by batch."""
    ordinal = 0
    for group in groups:
        names = group.names
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            new = [name for name in batch if name not in known]
            arrived, detail = retriever.fetch(group, new) if new else ({}, "")
            for name in batch:
                if name in arrived:
                    payload = Transient(path=arrived[name], sop=name)
                    yield Item(ordinal=ordinal, name=name, payload=payload)
                elif name in new:
                    yield refused_item(ordinal, name, detail)
                else:
                    yield Item(ordinal=ordinal, name=name, payload=None)
                ordinal += 1
        yield from group.refusals(ordinal)
        ordinal += group.missing
