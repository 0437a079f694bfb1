"""An archive for the whole session."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ingest.pacs.archive import PASSWORD, Orthanc, Stored, require_orthanc, write_files


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Stored]:
    """Files, as they are in the archive."""
    return write_files(tmp_path_factory.mktemp("pacs-files"))


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory, stored: list[Stored]) -> Iterator[Orthanc]:
    """A filled archive."""
    pytest.importorskip("dicomweb_client")
    pytest.importorskip("pynetdicom")
    server = Orthanc(folder=tmp_path_factory.mktemp("orthanc"), program=require_orthanc())
    try:
        server.start()
        server.fill(stored)
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDISTILL_DICOMWEB_PASSWORD", PASSWORD)
    monkeypatch.delenv("MEDISTILL_DICOMWEB_TOKEN", raising=False)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where files in transit go."""
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class Certificates:
    """Files for a client, and a context for a server that asks for the client's certificate."""

    ca_bundle: Path
    client_certificate: Path
    server: ssl.SSLContext


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority that exists for this session."""
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.issue_cert("reader").private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return Certificates(ca_bundle=folder / "ca.pem", client_certificate=folder / "client.pem", server=context)
