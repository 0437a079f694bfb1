"""Runs side by side: figures are those of the runs' own records, and what cannot be compared is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from example_release import audit_report, diagnostic_report, distilled_set
from typer.testing import CliRunner

from medistill.cli import app
from medistill.core.reports import Verdict
from medistill.errors import DataError
from medistill.report.runs import RunRow, render_runs, run_row, warnings_of_runs
from medistill.workflow import save_run_distilled


def row(name: str = "ten", cohort: str = "a") -> RunRow:
    distilled = distilled_set()
    return run_row(name, cohort, distilled, audit_report(distilled, Verdict.PASS), diagnostic_report(distilled))


def test_a_row_holds_the_first_network_on_the_test_split() -> None:
    found, report = row(), diagnostic_report(distilled_set())
    of_test = [arm for arm in report.arms if arm.split == "test" and arm.network == found.network]
    assert found.split == "test"
    assert found.auroc == {arm.arm: arm.metrics["auroc"] for arm in of_test}
    assert found.verdict == "PASS"


def test_the_page_shows_every_figure_with_its_interval_and_loads_nothing() -> None:
    first, second = row(), row("one")
    page = render_runs([first, second])
    for one in (first, second):
        assert one.name in page
        for estimate in one.auroc.values():
            assert f"{estimate.value:.3f}" in page
            assert f"[{estimate.low:.3f}, {estimate.high:.3f}]" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<circle") == len(first.auroc) + len(second.auroc)


def test_different_patients_and_networks_are_said() -> None:
    assert warnings_of_runs([row(), row("one")]) == ()
    assert "different patients" in warnings_of_runs([row(), row("one", cohort="b")])[0]
    assert "different networks" in warnings_of_runs([row(), replace(row(), network="vit")])[0]


def test_names_are_escaped_and_no_run_is_refused() -> None:
    assert "<script>" not in render_runs([row("<script>")])
    with pytest.raises(DataError, match="at least one run"):
        render_runs([])


def test_the_command_writes_a_page_and_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    save_run_distilled(tmp_path / "run", distilled_set(), {})
    arguments = ["compare", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "not evaluated" in done.stdout
    assert "not audited" in (tmp_path / "page.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert refused.exit_code == 1
    assert "holds no distilled set" in refused.output
