"""What can go wrong between us and a DICOMweb server."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medistill.errors import ConfigError, RejectedFile, SourceError
from medistill.ingest.intensity import Policy
from medistill.ingest.sources import dicomweb
from medistill.ingest.sources.dicomweb import DicomWebSource, Reference, decode_reference, only_part, retrieve
from tests.ingest.pacs.archive import PASSWORD, ROOT, USER, Orthanc, Stored, free_port
from tests.ingest.pacs.conftest import Certificates
from tests.ingest.pacs.faults import PASS, Gateway, Wire

pytest.importorskip("dicomweb_client")

STUDY = f"{ROOT}.3"
TOKEN = "token-0815-geheim"


def through(port: int, **options: object) -> DicomWebSource:
    defaults = {"studies": [STUDY], "pause": 0.01, "timeout": 5.0}
    return DicomWebSource(f"http://127.0.0.1:{port}/dicom-web", **{**defaults, **options})  # type: ignore[arg-type]


def references(source: DicomWebSource) -> list[Reference]:
    return [item.payload for item in source.items()]


def test_a_broken_transfer_is_repeated(orthanc: Orthanc, stored: list[Stored]) -> None:
    files = {s.sop: s.path for s in stored}
    with Wire(orthanc.http_port, PASS, 900, 0) as wire:
        first, *others = references(through(wire.port, user=USER))
        assert retrieve(first) == files[first.sop].read_bytes()
        assert wire.connections == 4
        assert [retrieve(other) for other in others] == [files[other.sop].read_bytes() for other in others]
        assert wire.connections == 4  # one connection serves many instances


def test_a_wire_that_keeps_breaking_costs_the_instance_only(orthanc: Orthanc, stored: list[Stored]) -> None:
    with Wire(orthanc.http_port, PASS, 700, 700, 700, 0) as wire:
        first, second, third, _ = references(through(wire.port, user=USER, retries=2))
        with pytest.raises(RejectedFile) as caught:
            list(decode_reference(first, Policy.NONE))
        assert caught.value.code == "NET_PARTIAL"
        assert caught.value.detail == "the connection was refused or lost, after 3 attempts"
        with pytest.raises(RejectedFile, match="after 1 attempt"):  # no patience until one arrives
            retrieve(second)
        assert retrieve(third)
        wire.cuts.append(PASS)
        assert retrieve(first)


@pytest.mark.parametrize(
    ("statuses", "attempts"),
    [((503, 429), 3), ((500,), 2), ((502, 504, 408), 4)],
    ids=["busy", "fault", "gateway"],
)
def test_passing_statuses_are_waited_for(orthanc: Orthanc, statuses: tuple[int, ...], attempts: int) -> None:
    with Gateway(orthanc.http_port, statuses=statuses) as gateway:
        gateway.only = "/instances/"
        first = references(through(gateway.port))[0]
        gateway.requests.clear()
        assert retrieve(first)[128:132] == b"DICM"
        assert len(gateway.requests) == attempts


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (503, 3), (404, 1), (403, 1)])
def test_lasting_statuses_become_a_rejection(orthanc: Orthanc, status: int, attempts: int) -> None:
    with Gateway(orthanc.http_port, statuses=(status,) * 20) as gateway:
        gateway.only = "/instances/"
        first = references(through(gateway.port, retries=2))[0]
        with pytest.raises(RejectedFile) as caught:
            retrieve(first)
    plural = "s" if attempts > 1 else ""
    assert caught.value.args == ("NET_PARTIAL", f"HTTP {status} after {attempts} attempt{plural}")


def test_listing_survives_passing_faults(orthanc: Orthanc, caplog: pytest.LogCaptureFixture) -> None:
    with Gateway(orthanc.http_port, statuses=(503, 500, 429)) as gateway:
        assert len(through(gateway.port)) == 4
    for cut in (40, 120, 300):  # within the header of the answer, and within its body
        with Wire(orthanc.http_port, cut, 0) as wire:
            assert len(through(wire.port, user=USER)) == 4
            assert wire.connections == 3
    assert not caplog.records  # addresses and UIDs stay out of logs


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"user": "stranger"}, "/dicom-web", r"refused the credentials \(HTTP 401\)"),
        ({"user": USER}, "/nothing", r"Expected a DICOMweb service at the url.*HTTP 404"),
    ],
    ids=["stranger", "wrong path"],
)
def test_what_a_server_refuses_is_explained(
    orthanc: Orthanc, options: dict[str, str], path: str, words: str
) -> None:
    source = DicomWebSource(orthanc.url.replace("/dicom-web", path), studies=[STUDY], **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=words) as caught:
        len(source)
    assert not any(secret in str(caught.value) for secret in (PASSWORD, "stranger", STUDY, "127.0.0.1"))
    assert caught.value.__suppress_context__


def test_a_server_that_is_not_there_is_explained() -> None:
    with pytest.raises(SourceError, match=r"refused or lost, after 3 attempts.*Check url, network, server"):
        len(through(free_port(), retries=2))


def test_a_server_that_never_answers_is_left_before_the_child_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts end where the next could outlast the patience, here 2.5 instead of 58 seconds."""
    monkeypatch.setattr(dicomweb, "_PATIENCE", 2.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = through(silent.getsockname()[1], timeout=1.0)
        begin = time.monotonic()
        with pytest.raises(SourceError, match="no answer in time after 2 attempts"):
            len(source)
    assert 1.9 < time.monotonic() - begin < 2.6


def test_an_answer_that_is_no_dicom_is_explained(orthanc: Orthanc) -> None:
    with Gateway(orthanc.http_port) as gateway:
        gateway.alter = lambda _, body: b"<html>login</html>"
        with pytest.raises(SourceError, match="the answer was cut off or not DICOM"):
            len(through(gateway.port, retries=0))
        gateway.alter = lambda _, body: b'{"0020000D": 5}, [[7]]'
        with pytest.raises(SourceError, match="the answer was cut off or not DICOM"):
            len(through(gateway.port, retries=0))
        rows = [7, {"0020000D": 5, "00080020": {"Value": [{}]}}, {"0020000D": {"Value": ["../x"]}}]
        gateway.alter = lambda _, body: json.dumps(rows).encode()
        with pytest.raises(SourceError, match="holds no instance"):
            len(through(gateway.port, retries=0))


def test_promised_but_not_listed_is_accounted_for(orthanc: Orthanc) -> None:
    def exaggerate(path: str, body: bytes) -> bytes:
        rows = json.loads(body)
        for row in rows:
            for tag in ("00201209", "00201208"):
                if tag in row:
                    row[tag]["Value"] = [row[tag]["Value"][0] + (2 if tag == "00201209" else 5)]
        return json.dumps(rows).encode()

    with Gateway(orthanc.http_port) as gateway:
        gateway.alter = exaggerate
        source = through(gateway.port)
        items = list(source.items())
    refused = [item for item in items if item.refused]
    assert len(items) == len(source) == 4 + 5
    assert [item.ordinal for item in items] == list(range(9))
    assert len({item.name for item in items}) == 9
    assert [(item.refused, item.refused_detail) for item in refused] == [
        ("NET_PARTIAL", "the archive counts more instances than it lists")
    ] * 5


def test_another_instance_than_asked_for_is_turned_away(orthanc: Orthanc) -> None:
    with Gateway(orthanc.http_port) as gateway:
        first, second, *_ = references(through(gateway.port))
        gateway.rewrite = lambda path: path.replace(first.sop, second.sop)
        with pytest.raises(RejectedFile, match="another instance than the one asked for"):
            list(decode_reference(first, Policy.NONE))
        assert list(decode_reference(second, Policy.NONE))


def test_a_token_and_a_client_certificate_open_the_door(
    orthanc: Orthanc, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"ca_bundle": certificates.ca_bundle, "client_certificate": certificates.client_certificate}
    with Gateway(orthanc.http_port, token=TOKEN, tls=certificates.server) as gateway:
        url = f"https://127.0.0.1:{gateway.port}/dicom-web"

        def source(**options: object) -> DicomWebSource:
            return DicomWebSource(url, studies=[STUDY], retries=0, **options)  # type: ignore[arg-type]

        monkeypatch.setenv("MEDISTILL_DICOMWEB_TOKEN", TOKEN)
        items = list(source(**files).items())
        assert retrieve(items[0].payload)[128:132] == b"DICM"
        assert all(
            secret not in pickle.dumps(items) + repr(items).encode() for secret in (TOKEN.encode(), b"geheim")
        )
        with pytest.raises(SourceError, match="TLS was refused"):
            len(source(client_certificate=certificates.client_certificate))
        with pytest.raises(SourceError, match=r"TLS was refused|lost.*certificates on both sides"):
            len(source(ca_bundle=certificates.ca_bundle))  # the server may just hang up
        monkeypatch.delenv("MEDISTILL_DICOMWEB_TOKEN")
        with pytest.raises(SourceError, match="HTTP 401"):
            len(source(**files))
        (tmp_path / "token").write_text(TOKEN + "\n")
        assert len(source(**files, token_file=tmp_path / "token")) == 4


def test_a_restart_while_pulling_is_waited_for(orthanc: Orthanc, stored: list[Stored]) -> None:
    files = {s.sop: s.path for s in stored}
    source = DicomWebSource(orthanc.url, user=USER, date="20200101-20200331", pause=0.3)
    done, pulled = set(), {}
    for item in source.items():
        if len(done) == 5:
            orthanc.kill()
            threading.Timer(0.5, orthanc.start).start()
        pulled[item.name] = retrieve(item.payload)
        done.add(item.name)
    assert pulled == {s.sop: files[s.sop].read_bytes() for s in stored if s.date <= "20200331"}


def code_of(reference: Reference) -> str:
    try:
        retrieve(reference)
    except RejectedFile as rejection:
        return rejection.code
    return ""


def test_a_run_after_an_outage_goes_on(orthanc: Orthanc, stored: list[Stored]) -> None:
    source = DicomWebSource(orthanc.url, user=USER, date="20200101-20200331", pause=0.01, retries=2)
    codes = {}
    try:
        for item in source.items():
            codes[item.name] = code_of(item.payload)
            if len(codes) == 5:
                orthanc.kill()
    finally:
        orthanc.start()
    assert list(codes.values()) == [""] * 5 + ["NET_PARTIAL"] * (len(source) - 5)
    known = {name for name, code in codes.items() if not code}
    rest = [item for item in DicomWebSource(orthanc.url, user=USER, date="20200101-20200331").items(known)]
    assert {item.name for item in rest if item.payload is None} == known
    assert [code_of(item.payload) for item in rest if item.payload is not None] == [""] * (len(source) - 5)


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("http://user:geheim@127.0.0.1/", {}, "without user, password"),
        ("ftp://127.0.0.1", {}, "Expected url as http"),
        ("http://127.0.0.1:99999", {}, "Expected url as http"),
        ("http://pacs.example", {"user": USER}, "travel unencrypted"),
        ("https://pacs.example", {"ca_bundle": Path("nowhere.pem")}, "at least one does not exist"),
        ("https://pacs.example", {"token_file": Path("nowhere")}, "file with a secret cannot be read"),
        ("https://pacs.example", {"studies": ["1.2/../3"]}, "Expected UIDs"),
        ("https://pacs.example", {"studies": "1.2.3"}, "Expected lists"),
        ("https://pacs.example", {"studies": []}, "not the whole archive"),
        ("https://pacs.example", {"date": "2020"}, "Expected date as"),
        ("https://pacs.example", {"date": "2020010120200102"}, "Expected date as"),
        ("https://pacs.example", {"date": "-"}, "Expected date as"),
        ("https://pacs.example", {"retries": -1}, "Expected retries"),
    ],
)
def test_contradictions_are_found_before_anything_is_sent(
    url: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        DicomWebSource(url, **{"studies": ["1.2.3"], **options})  # type: ignore[arg-type]
    assert "geheim" not in str(caught.value)


def test_a_user_needs_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDISTILL_DICOMWEB_PASSWORD")
    with pytest.raises(ConfigError, match="Expected a password for the user in MEDISTILL_DICOMWEB_PASSWORD"):
        DicomWebSource("https://pacs.example", user=USER, studies=["1.2"])
    monkeypatch.setenv("MEDISTILL_DICOMWEB_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="Expected a token or a user; found both"):
        DicomWebSource("https://pacs.example", user=USER, studies=["1.2"])


BOUNDARY = st.from_regex(r"[A-Za-z0-9'()+_,./:=?-]{1,40}", fullmatch=True)


@given(
    content=st.binary(max_size=100),
    boundary=BOUNDARY,
    preamble=st.sampled_from([b"", b"\r\n", b"note\r\n"]),
    share=st.floats(0, 1),
)
def test_a_part_comes_out_as_it_went_in_and_is_never_shortened(
    content: bytes, boundary: str, preamble: bytes, share: float
) -> None:
    delimiter = b"--" + boundary.encode()
    if b"\r\n" + delimiter in content:
        return
    body = preamble + delimiter + b"\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" + delimiter
    kind = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
    assert only_part(kind, body + b"--\r\n") == content
    for cut in (int(share * len(body)), len(body), len(body) + 1):
        with pytest.raises(ValueError, match="cut off"):
            only_part(kind, (body + b"--")[:cut])
    with pytest.raises(ValueError, match="expected one part"):
        only_part(kind, body + b"\r\n\r\n" + content + b"\r\n" + delimiter + b"--")


@given(kind=st.text(max_size=60), body=st.binary(max_size=100))
def test_arbitrary_answers_raise_nothing_else(kind: str, body: bytes) -> None:
    try:
        part = only_part(kind, body)
    except ValueError:
        return
    assert part in body


def test_a_bare_file_is_accepted() -> None:
    assert only_part("application/dicom", b"DICM") == b"DICM"
    with pytest.raises(ValueError, match="expected multipart"):
        only_part("text/html", b"<html>")
