"""Parallel work, seeds, the settings of the process and the doctor."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from medistill import cpu, doctor
from medistill.parallel import cpu_count, parallel_map
from medistill.progress import TerminalProgress
from medistill.seeds import derive_seed


def _square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("jobs", [1, 2])
def test_parallel_map_keeps_the_order(jobs: int) -> None:
    assert list(parallel_map(_square, iter(range(20)), jobs=jobs)) == [n * n for n in range(20)]
    assert cpu_count() >= 1


def _fail(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="three"):
        list(parallel_map(_fail, range(10), jobs=2))


def test_named_seeds_differ_and_repeat() -> None:
    seeds = {derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", 1)}
    assert len(seeds) == 4
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_glibc_takes_the_advice_exactly_where_it_is_there() -> None:
    assert cpu.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_one_thread_also_where_torch_was_loaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cpu.use_one_thread()
    assert (os.environ["OMP_NUM_THREADS"], asked) == ("2", [])
    monkeypatch.delenv("OMP_NUM_THREADS")
    cpu.use_one_thread()
    assert (os.environ["OMP_NUM_THREADS"], asked) == ("1", [1])


def test_doctor_reports_a_mismatched_build(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(finding.ok for finding in doctor.diagnose())

    def broken(name: str) -> object:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = doctor._torchvision()
    assert not finding.ok
    assert "same index" in finding.remedy


def test_long_work_leaves_a_line_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("medistill.progress.time.monotonic", lambda: float(next(clock)))
    assert list(TerminalProgress().track(range(8), "reading", total=8)) == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "reading: 3 of 8, about 50 s left",
        "reading: 6 of 8, about 20 s left",
    ]
