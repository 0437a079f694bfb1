"""Work that crashes, hangs or eats memory costs itself and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medistill.errors import ConfigError, DataError
from medistill.ingest import isolation
from medistill.ingest.isolation import Limits, isolated

QUICK = Limits(seconds=1.0, memory_mb=256, recycle_after=10)


@pytest.fixture
def really_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading processes are started as they are anywhere but in tests, where they are forked."""
    monkeypatch.setattr(isolation, "subprocess", subprocess)


def behave(item: Any) -> Iterator[Any]:
    """Do what the item says."""
    if isinstance(item, bytes):
        yield len(item)
    elif isinstance(item, int):
        yield 2 * item
        yield 3 * item
    else:
        yield from BEHAVIOUR[item]()


def _segfault() -> Iterator[int]:
    yield ctypes.string_at(0)[0]


def _kill() -> Iterator[int]:
    yield os.kill(os.getpid(), signal.SIGKILL) or 0


def _leave() -> Iterator[int]:
    os._exit(0)
    yield 0


def _hang() -> Iterator[int]:
    time.sleep(60)
    yield 0


def _fail() -> Iterator[int]:
    raise RuntimeError("a text that could quote a value")
    yield 0


def _eat() -> Iterator[int]:
    yield len(bytearray(1 << 30))


def _begin_and_crash() -> Iterator[int]:
    yield 1
    yield ctypes.string_at(0)[0]


def _die_once() -> Iterator[int]:
    """Somebody else kills this process, the first time."""
    mark = Path(os.environ["MEDISTILL_TEST_MARK"])
    yield 1
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield 2


def _slow() -> Iterator[int]:
    for number in range(4):
        time.sleep(0.5)
        yield number


BEHAVIOUR = {
    "segfault": _segfault,
    "kill": _kill,
    "exit": _leave,
    "hang": _hang,
    "raise": _fail,
    "memory": _eat,
    "leak": _begin_and_crash,
    "die once": _die_once,
    "many": lambda: iter(range(1000)),
    "slow": _slow,
    "pid": lambda: iter([os.getpid()]),
    "parent": lambda: iter([os.getppid()]),
}


def collect(items: Any, **options: Any) -> tuple[dict[Any, list[Any]], dict[Any, str]]:
    """Results and failure by item, each ended once."""
    results: dict[Any, list[Any]] = {}
    failures: dict[Any, str] = {}
    for outcome in isolated(behave, items, **{"jobs": 2, "limits": QUICK, **options}):
        if outcome.again:
            results.pop(outcome.item, None)
        elif outcome.ended:
            assert outcome.item not in failures
            failures[outcome.item] = outcome.failure
        else:
            results.setdefault(outcome.item, []).append(outcome.result)
    return results, failures


@pytest.mark.usefixtures("really_started")
def test_every_item_ends_once_with_its_results_in_order() -> None:
    results, failures = collect(range(101), jobs=3)
    assert results == {number: [2 * number, 3 * number] for number in range(101)}
    assert failures == dict.fromkeys(range(101), "")


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ("segfault", "CODEC_CRASH"),
        ("kill", "CODEC_CRASH"),
        ("exit", "CODEC_CRASH"),
        ("raise", "CODEC_CRASH"),
        ("leak", "CODEC_CRASH"),
        ("hang", "TIMEOUT"),
        ("memory", "OOM_LIMIT"),
    ],
)
def test_a_bad_item_costs_itself_alone(item: str, code: str) -> None:
    results, failures = collect([1, item, 2, 3])
    assert failures == {1: "", item: code, 2: "", 3: ""}
    assert [results[number] for number in (1, 2, 3)] == [[2, 3], [4, 6], [6, 9]]


def test_a_child_that_somebody_kills_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDISTILL_TEST_MARK", str(tmp_path / "mark"))
    results, failures = collect([1, "die once", 2])
    assert (tmp_path / "mark").exists()
    assert failures == {1: "", "die once": "", 2: ""}
    assert results["die once"] == [1, 2]


@pytest.mark.usefixtures("really_started")
def test_a_killed_nursery_ends_the_work_with_an_error() -> None:
    def items() -> Iterator[Any]:
        yield "parent"
        yield from range(100_000)

    def work() -> None:
        for outcome in isolated(behave, items(), jobs=2, limits=QUICK):
            assert not outcome.failure
            if outcome.item == "parent" and outcome.result:
                os.kill(int(outcome.result), signal.SIGKILL)

    with pytest.raises(DataError, match="ended from outside"):
        work()


def test_a_slow_listener_is_no_time_out() -> None:
    for outcome in isolated(behave, range(6), jobs=3, limits=Limits(seconds=0.5)):
        time.sleep(0.3)
        assert not outcome.failure


def test_the_clock_begins_anew_with_each_result() -> None:
    results, failures = collect(["slow"])
    assert (results, failures) == ({"slow": [0, 1, 2, 3]}, {"slow": ""})


def test_large_items_and_many_results_pass() -> None:
    results, _ = collect([b"x" * 5_000_000, "many"], jobs=1)
    assert results[b"x" * 5_000_000] == [5_000_000]
    assert results["many"] == list(range(1000))


def test_children_are_replaced() -> None:
    pids = [
        outcome.result
        for outcome in isolated(behave, ["pid"] * 40, jobs=1, limits=QUICK)
        if outcome.result is not None
    ]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [10, 10, 10, 10]
    assert os.getpid() not in pids


def test_items_are_taken_as_children_become_free() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    ended = 0
    for outcome in isolated(behave, items(), jobs=2, limits=QUICK):
        ended += outcome.ended
        assert taken <= ended + 3


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _gone(pids: list[int]) -> bool:
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.usefixtures("really_started")
def test_children_end_when_nobody_listens_any_more() -> None:
    stream = isolated(behave, ["pid", "hang"], jobs=1, limits=QUICK)
    pid = next(outcome.result for outcome in stream)
    stream.close()
    assert _gone([pid])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            from medistill.ingest.isolation import isolated
            def work(item):
                yield os.getpid()
                yield os.getppid()
                time.sleep(60)
            for outcome in isolated(work, [0], jobs=1):
                print(outcome.result, flush=True)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as main:
        assert main.stdout is not None
        pids = [int(main.stdout.readline()) for _ in range(2)]
        assert all(_alive(pid) for pid in pids)
        main.kill()
    assert _gone(pids)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"seconds.*memory_mb"):
        Limits(seconds=0, memory_mb=-1)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="local, ray"):
        list(isolated(behave, [1], engine="abacus"))


@pytest.mark.long
def test_the_same_work_on_a_cluster_of_two_workers() -> None:
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        results, failures = collect([*range(100), "segfault", "hang"], engine="ray")
    finally:
        ray.shutdown()
    assert results == {number: [2 * number, 3 * number] for number in range(100)}
    assert {item: code for item, code in failures.items() if code} == {
        "segfault": "CODEC_CRASH",
        "hang": "TIMEOUT",
    }
