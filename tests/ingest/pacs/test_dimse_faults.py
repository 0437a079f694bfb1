"""What can go wrong between us and an archive that speaks DIMSE."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medistill.errors import ConfigError, OutputError, RejectedFile, SourceError
from medistill.ingest.intensity import Policy
from medistill.ingest.reading import Item
from medistill.ingest.sources import dimse
from medistill.ingest.sources.dimse import DimseSource, Transient, decode_transient
from medistill.ingest.sources.pacs_query import quiet
from tests.ingest.conftest import make_dicom
from tests.ingest.pacs.archive import ROOT, Orthanc, Stored, _stored, free_port
from tests.ingest.pacs.conftest import Certificates
from tests.ingest.pacs.faults import PASS, Wire

pytest.importorskip("pynetdicom")
from tests.ingest.pacs.liar import Liar

# pynetdicom leaves the socket of a refused connection to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPRING = "20200101-20200331"


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture
def lies(tmp_path: Path) -> list[Stored]:
    files = []
    for number in range(20):
        names = {
            "StudyInstanceUID": "1.2.9",
            "SeriesInstanceUID": "1.2.9.1",
            "SOPInstanceUID": f"1.2.9.1.{number + 10}",
        }
        path = tmp_path / "liar" / f"{number}.dcm"
        pixels = np.full((8, 8), number, np.uint16)
        files.append(_stored(path, make_dicom(path, pixels, **names, StudyDate="20200101")))
    return files


@pytest.fixture
def liar(lies: list[Stored]) -> Iterator[Liar]:
    with Liar(lies) as server:
        yield server


def from_liar(liar: Liar, spool: Path, **options: object) -> DimseSource:
    defaults = {
        "port": liar.port,
        "studies": ["1.2.9"],
        "spool": spool,
        "pause": 0.01,
        "timeout": 5.0,
        "retries": 2,
    }
    return DimseSource("127.0.0.1", **{**defaults, **options})  # type: ignore[arg-type]


def from_orthanc(orthanc: Orthanc, spool: Path, **options: object) -> DimseSource:
    defaults = {
        "port": orthanc.dicom_port,
        "called_aet": "ORTHANC",
        "spool": spool,
        "timeout": 5.0,
        "date": SPRING,
    }
    return DimseSource("127.0.0.1", **{**defaults, **options})  # type: ignore[arg-type]


def arrived(items: list[Item]) -> set[str]:
    """Names of items whose files hold the right instance."""
    names = {item.name for item in items if isinstance(item.payload, Transient)}
    assert names == {
        pydicom.dcmread(item.payload.path).SOPInstanceUID for item in items if isinstance(item.payload, Transient)
    }
    return names


def refusals(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.refused, item.refused_detail) for item in items if item.refused]


def test_counts_that_promise_more_are_accounted_for(liar: Liar, spool: Path) -> None:
    liar.series_count, liar.study_count = 23, 25
    source = from_liar(liar, spool)
    items = list(source.items())
    assert [item.ordinal for item in items] == list(range(25)) == list(range(len(source)))
    assert len(arrived(items)) == 20
    assert refusals(items) == [("NET_PARTIAL", "the archive counts more instances than it lists")] * 5


@pytest.mark.parametrize("count", [0, 3, 10**8])
def test_counts_that_cannot_be_true_are_ignored(liar: Liar, spool: Path, count: int) -> None:
    liar.series_count = liar.study_count = count
    assert len(from_liar(liar, spool)) == 20


def test_fewer_than_listed_are_asked_for_again_then_refused(liar: Liar, spool: Path) -> None:
    liar.withheld = {"1.2.9.1.12", "1.2.9.1.29"}
    items = list(from_liar(liar, spool).items())
    assert len(items) == 20
    assert arrived(items) == {one.sop for one in liar.stored} - liar.withheld
    assert {item.name for item in items if item.refused} == liar.withheld
    assert refusals(items) == [("NET_PARTIAL", "the archive did not deliver the instance")] * 2
    asked = [name for names in liar.requests for name in names]
    assert all(asked.count(one.sop) == (3 if one.sop in liar.withheld else 1) for one in liar.stored)


def test_an_association_dropped_between_stores_resumes_with_what_is_missing(liar: Liar, spool: Path) -> None:
    liar.drops = [3, -1, 0]
    items = list(from_liar(liar, spool).items())
    assert [item.name for item in items] == [one.sop for one in liar.stored]
    assert arrived(items) == {one.sop for one in liar.stored}
    assert [len(names) for names in liar.requests[:8]] == [8, 1, 1, 1, 1, 1, 1, 8]


@pytest.mark.parametrize("cut", [0, 3000, 9000])
def test_a_wire_cut_in_the_middle_of_a_store_costs_nothing(
    orthanc: Orthanc, stored: list[Stored], spool: Path, cut: int
) -> None:
    with Wire(orthanc.dicom_port, PASS, cut) as wire:
        items = list(from_orthanc(orthanc, spool, port=wire.port, pause=0.01, date="20200115").items())
        assert wire.connections > 2
    assert arrived(items) == {s.sop for s in stored if s.date == "20200115"}


def test_an_archive_that_takes_no_lists_is_asked_one_by_one(liar: Liar, spool: Path) -> None:
    liar.single_only = True
    assert len(arrived(list(from_liar(liar, spool).items()))) == 20


def test_another_instance_than_asked_for_is_not_taken(liar: Liar, spool: Path) -> None:
    liar.swapped = {"1.2.9.1.14": "1.2.9.1.28"}
    items = list(from_liar(liar, spool).items())
    assert {item.name for item in items if item.refused} == {"1.2.9.1.14"}
    assert len(arrived(items)) == 19
    (folder,) = spool.iterdir()
    assert len(list(folder.iterdir())) == 19


def test_a_restart_while_pulling_is_waited_for(orthanc: Orthanc, stored: list[Stored], spool: Path) -> None:
    items = []
    for item in from_orthanc(orthanc, spool, pause=0.2).items():
        items.append(item)
        if len(items) == 2:
            orthanc.kill()
            restart = threading.Timer(0.5, orthanc.start)
            restart.start()
    restart.join()
    assert refusals(items) == []
    assert arrived(items) == {s.sop for s in stored if s.date <= "20200331"}


def test_a_run_after_an_outage_goes_on(orthanc: Orthanc, stored: list[Stored], spool: Path) -> None:
    everything = {"date": "20200101-20200531"}
    source, items = from_orthanc(orthanc, spool, pause=0.01, retries=2, **everything), []
    try:
        for item in source.items():
            items.append(item)
            if len(items) == 1:
                orthanc.kill()
    finally:
        orthanc.start()
    names = arrived(items)
    assert 0 < len(names) < len(items) == len(source) == 45
    assert {code for code, _ in refusals(items)} == {"NET_PARTIAL"}
    assert refusals(items)[-1][1] == "the archive could not be reached any more; run again to go on"
    for _ in range(5):  # a restarted archive may answer in part at first: the message says to run again
        rest = list(from_orthanc(orthanc, spool, timeout=30.0, **everything).items(known=names))
        if not refusals(rest):
            break
        print(refusals(rest))
        for item in rest:
            if isinstance(item.payload, Transient):
                item.payload.path.unlink()
        time.sleep(1.0)
    assert {item.name for item in rest if item.payload is None} == names
    assert arrived(rest) == {s.sop for s in stored if s.date <= "20200531"} - names


def test_no_more_files_wait_than_agreed(orthanc: Orthanc, spool: Path) -> None:
    source = from_orthanc(orthanc, spool, timeout=30.0, date="20200101-20201231")
    most = 0
    for number, item in enumerate(source.items()):
        if number < 8:
            time.sleep(0.1)
        (folder,) = spool.iterdir()
        most = max(most, len(list(folder.iterdir())))
        list(decode_transient(item.payload, Policy.NONE))
    assert 8 < most <= 16 + 8 + 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


def test_a_pull_that_is_given_up_leaves_nothing(orthanc: Orthanc, spool: Path) -> None:
    source = from_orthanc(orthanc, spool, date="20200101-20201231")
    items = source.items()
    first = next(items)
    items.close()
    first.payload.path.unlink()
    assert not any(thread.name == "medistill-dimse" for thread in threading.enumerate())
    (folder,) = spool.iterdir()
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_deleted(spool: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, alive = (spool / f"{dimse._PREFIX}{number}-x" for number in (ended.pid, os.getpid()))
    other = spool / f"medistill-pacs-elsewhere-{ended.pid}-x"
    for folder in (left, alive, other):
        folder.mkdir()
        (folder / "1").write_bytes(b"")
    own = DimseSource("127.0.0.1", studies=["1.2"], spool=spool)._folder
    assert {*spool.iterdir()} == {alive, other, own}


def test_a_damaged_data_set_is_refused_in_the_child_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "1"
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    with pytest.raises(RejectedFile):
        list(decode_transient(Transient(path=path, sop="1.2"), Policy.NONE))
    assert not path.exists()


def test_a_full_disk_ends_the_pull(liar: Liar, spool: Path) -> None:
    source = from_liar(liar, spool)
    shutil.rmtree(source._folder)
    with pytest.raises(OutputError, match="spool folder is full or cannot be written"):
        list(source.items())


def test_titles_that_are_refused_are_explained(orthanc: Orthanc, spool: Path) -> None:
    with pytest.raises(SourceError, match=r"does not know called_aet\. Set called_aet"):
        len(from_orthanc(orthanc, spool, called_aet="ELSEWHERE"))
    with pytest.raises(SourceError, match="archive refused") as caught:
        len(from_orthanc(orthanc, spool, calling_aet="STRANGER"))
    assert "STRANGER" not in str(caught.value)


def test_an_archive_without_c_get_is_explained(orthanc: Orthanc, spool: Path) -> None:
    with pytest.raises(SourceError, match=r"Nothing could be retrieved: the archive dropped.*'move'"):
        list(from_orthanc(orthanc, spool, calling_aet="NOGET", pause=0.01).items())


def test_an_archive_that_only_lists_is_explained(lies: list[Stored], spool: Path) -> None:
    with Liar(lies, retrieves=False) as liar:
        with pytest.raises(SourceError, match=r"does not offer C-GET\. Set method to 'move'"):
            list(from_liar(liar, spool).items())
        source = from_liar(liar, spool, method="move", move_port=free_port(), move_address="127.0.0.1")
        with pytest.raises(SourceError, match=r"refused the association.*allows C-MOVE.*set method to 'get'"):
            list(source.items())


def test_an_archive_that_is_not_there_is_explained(spool: Path) -> None:
    source = DimseSource("127.0.0.1", free_port(), studies=["1.2"], spool=spool, retries=1, pause=0.01)
    with pytest.raises(SourceError, match=r"could not be reached.*Check host, port, firewall"):
        len(source)


def test_a_server_that_speaks_something_else_is_explained(orthanc: Orthanc, spool: Path) -> None:
    with pytest.raises(SourceError, match="could not be reached, or dropped every association"):
        len(from_orthanc(orthanc, spool, port=orthanc.http_port, retries=1, pause=0.01, timeout=1.0))


def test_a_query_that_fails_is_explained(liar: Liar, spool: Path) -> None:
    liar.find_status = 0xA900
    with pytest.raises(SourceError, match=r"refused to list at level STUDY \(status 0xA900\)"):
        len(from_liar(liar, spool))


def test_an_unknown_destination_is_explained(liar: Liar, spool: Path) -> None:
    liar.move_status = 0xA801
    source = from_liar(liar, spool, method="move", move_port=free_port(), move_address="127.0.0.1")
    with pytest.raises(SourceError, match="does not know our title as a destination"):
        list(source.items())


def test_a_destination_that_the_archive_cannot_reach_is_a_rejection(orthanc: Orthanc, spool: Path) -> None:
    """The archive sends to the port that it knows, and nothing listens there."""
    options = {
        "method": "move",
        "move_port": free_port(),
        "move_address": "127.0.0.1",
        "retries": 1,
        "pause": 0.01,
    }
    items = list(from_orthanc(orthanc, spool, studies=[f"{ROOT}.1"], **options).items())
    assert (
        refusals(items)
        == [("NET_PARTIAL", "the archive did not deliver the instance; it may not reach move_port")] * 2
    )


def test_a_port_in_use_is_explained(liar: Liar, spool: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        source = from_liar(liar, spool, method="move", move_port=port, move_address="127.0.0.1")
        with pytest.raises(SourceError, match="Nothing can be received on move_port"):
            list(source.items())


def test_tls_with_certificates_on_both_sides(orthanc: Orthanc, certificates: Certificates, spool: Path) -> None:
    with Wire(orthanc.dicom_port, tls=certificates.server) as wire:
        files = {"ca_bundle": certificates.ca_bundle, "client_certificate": certificates.client_certificate}
        options = {"port": wire.port, "tls": True, "studies": [f"{ROOT}.1"], "retries": 0}
        assert len(arrived(list(from_orthanc(orthanc, spool, **options, **files).items()))) == 2
        for absent in files:
            with pytest.raises(SourceError, match=r"could not be reached.*TLS"):
                len(from_orthanc(orthanc, spool, **options, **{k: v for k, v in files.items() if k != absent}))


def test_uids_against_the_rules_are_sent_as_they_are(
    orthanc: Orthanc, spool: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leading zero is against PS3.5 9.1; warnings, errors here, would quote it."""
    names = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.9.01", "SOPInstanceUID": "1.2.9.01.001"}
    with quiet():
        make_dicom(tmp_path / "odd.dcm", np.ones((8, 8), np.uint8), **names)
    answer = json.loads(orthanc.request("/instances", (tmp_path / "odd.dcm").read_bytes()))
    try:
        with caplog.at_level(logging.DEBUG):
            (item,) = from_orthanc(orthanc, spool, date="", studies=["1.2.9"]).items()
            assert item.name == "1.2.9.01.001"
            assert len(list(decode_transient(item.payload, Policy.NONE))) == 1
    finally:
        orthanc.request(f"/instances/{answer['ID']}", method="DELETE")
    assert not [record for record in caplog.records if record.name.startswith("pynetdicom")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 0}, "Expected a host and a port"),
        ({"called_aet": "x" * 17}, "Expected titles of 1 to 16"),
        ({"calling_aet": "  "}, "Expected titles of 1 to 16"),
        ({"method": "push"}, "Expected method"),
        ({"method": "move"}, "Expected a move_port"),
        ({"method": "move", "move_port": 5, "tls": True}, "Expected method 'get' with tls"),
        ({"ca_bundle": Path("nowhere.pem")}, "only with tls.*does not exist"),
        ({"spool": Path("nowhere")}, "Expected a folder as spool"),
        ({"timeout": 0}, "Expected retries"),
        ({"studies": []}, "not the whole archive"),
    ],
)
def test_contradictions_are_found_before_anything_is_sent(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DimseSource("127.0.0.1", **{"studies": ["1.2.3"], **options})  # type: ignore[arg-type]
