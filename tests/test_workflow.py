"""A whole run: what runs again and what does not, interruptions, the gate, and what never leaves the source."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

from medistill import workflow
from medistill.config import RunConfig, load_config, parse_config
from medistill.core.distilled import Schedule
from medistill.core.reports import AuditReport, Verdict
from medistill.distill import runner as distill_runner
from medistill.distill.schedule import choose_schedule
from medistill.errors import DataError, GateError, OutputError, SourceError
from medistill.progress import Progress
from medistill.release.verify import verify_release
from medistill.workflow import RunResult, run

STAGES = ("phantom", "ingest", "distill", "audit", "evaluate", "release")
EVERY_VERDICT = ["PASS", "NOT_ESTIMABLE", "FAIL", "INVALID"]
QUICK = (Schedule(epochs=3, learning_rate=0.01), Schedule(epochs=5, learning_rate=0.01))


def tiny(out: Path, **changes: dict[str, Any]) -> RunConfig:
    """A run of seconds on sixty phantom patients; changes are merged into its sections."""
    values: dict[str, Any] = {
        "output": str(out),
        "source": {"kind": "phantom", "patients": 60, "size": 48, "difficulty": 0.0},
        "ingest": {
            "size": 16,
            "ocr": "never",
            "classes": ["no_gastritis", "gastritis", "outside"],
            "fractions": {"train": 0.4, "validation": 0.2, "holdout": 0.2, "test": 0.2},
        },
        "distill": {
            "ipc": 1,
            "size": 16,
            "looks": 1,
            "settings": {
                "distribution_matching": {"networks": 2, "iterations": 10, "width": 8},
                "kernel_ridge": {"iterations": 4, "pool": 1, "width": 8, "real_batch": 30, "advance": 1},
            },
        },
        "audit": {"profile": "quick"},
        "evaluate": {"seeds": 2, "real_epochs": 2, "draws": 100, "arms": ["real", "random", "distilled"]},
        "release": {"accept": EVERY_VERDICT},
    }
    for section, inner in changes.items():
        values[section] = {**values.get(section, {}), **inner}
    return parse_config(values)


class _Listener(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run and everything it told the user."""

    folder: Path
    result: RunResult
    said: str


@pytest.fixture(scope="module", autouse=True)
def quick_schedules() -> Iterator[None]:
    """Compare two short schedules instead of three long ones, on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(choose_schedule, candidates=QUICK, students=1)
        patch.setattr(distill_runner, "choose_schedule", quick)
        with threadpool_limits(1):
            yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished run, never changed by a test."""
    folder = tmp_path_factory.mktemp("workflow") / "secret-ward"
    listener, streams = _Listener(), io.StringIO()
    with contextlib.redirect_stdout(streams), contextlib.redirect_stderr(streams):
        result = run(tiny(folder), progress=listener, jobs=1)
    return Finished(
        folder=folder, result=result, said="\n".join([*listener.lines, *result.lines, streams.getvalue()])
    )


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Anything that looks unfinished."""
    return [str(p) for p in folder.rglob("*") if p.name.startswith(".") or "partial" in p.name]


# -- what runs --------------------------------------------------------------------------------------------------


def test_a_first_run_runs_every_stage_and_seals_a_release(finished: Finished) -> None:
    assert finished.result.ran == STAGES
    verified = verify_release(finished.result.release)
    assert verified.verdict is not None
    assert finished.result.report.is_file()
    assert all(finished.result.lines)
    assert not leftovers(finished.folder)
    assert not (finished.folder / "checkpoints").exists()


def test_a_second_run_does_nothing_and_says_so(copy: Path) -> None:
    before, listener = contents(copy / "release"), _Listener()
    result = run(tiny(copy), progress=listener, jobs=1)
    assert result.ran == ()
    assert listener.lines == [f"{stage}: unchanged" for stage in STAGES]
    assert contents(copy / "release") == before


def test_the_resolved_configuration_can_be_run_again(copy: Path) -> None:
    config = load_config(copy / "run.yaml", [f"output={copy}"])
    assert config == tiny(copy)
    assert run(config, jobs=1).ran == ()


def test_the_order_of_accepted_verdicts_is_not_left_to_chance(tmp_path: Path) -> None:
    dumped = tiny(tmp_path).release.model_dump_json()
    assert json.loads(dumped)["accept"] == sorted(EVERY_VERDICT)


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"evaluate": {"seeds": 1}}, ("evaluate", "release")),
        ({"audit": {"alpha": 0.02}}, ("audit", "release")),
        ({"release": {"licence": "CC0-1.0"}}, ("release",)),
        ({"distill": {"ipc": 2}}, ("distill", "audit", "evaluate", "release")),
    ],
    ids=lambda value: next(iter(value)),
)
def test_only_stages_behind_a_change_run_again(
    copy: Path, change: dict[str, dict[str, Any]], rerun: tuple[str, ...]
) -> None:
    assert run(tiny(copy, **change), jobs=1).ran == rerun
    verify_release(copy / "release")
    assert run(tiny(copy, **change), jobs=1).ran == ()


def test_a_result_that_was_removed_is_made_again(copy: Path) -> None:
    before = contents(copy / "release")
    shutil.rmtree(copy / "release")
    assert run(tiny(copy), jobs=1).ran == ("release",)
    assert contents(copy / "release") == before


def test_two_fresh_runs_release_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    again = run(tiny(tmp_path / "elsewhere"), jobs=1)
    assert again.ran == STAGES
    assert contents(again.release) == contents(finished.result.release)


# -- interruptions ----------------------------------------------------------------------------------------------

INTERRUPTIONS = [
    ("phantom", "medistill.ingest.phantom.cohort._write_tables", {"source": {"seed": 1}}),
    ("ingest", "medistill.ingest.build._profile", {"ingest": {"seed": 1}}),
    ("distill", "medistill.workflow.save", {"distill": {"ipc": 2}}),
    ("audit", "medistill.audit.runner.measure_copies", {"audit": {"alpha": 0.02}}),
    ("evaluate", "medistill.evaluate.judge.Judge.judge", {"evaluate": {"seeds": 1}}),
    ("release", "medistill.release.folder.sync_folder", {"release": {"licence": "CC0-1.0"}}),
]


@pytest.mark.parametrize(("stage", "where", "change"), INTERRUPTIONS, ids=[row[0] for row in INTERRUPTIONS])
def test_an_interruption_keeps_finished_stages_and_the_next_run_completes(
    copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str, where: str, change: dict[str, dict[str, Any]]
) -> None:
    position = STAGES.index(stage)
    earlier = {name: (copy / "stages" / f"{name}.json").read_bytes() for name in STAGES[:position]}
    shutil.rmtree(copy / "release")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(copy, **change), jobs=1)
    assert {name: (copy / "stages" / f"{name}.json").read_bytes() for name in earlier} == earlier
    assert not (copy / "stages" / f"{stage}.json").exists()
    kept = ["..cohort-next.partial"] if stage == "ingest" else []  # what was read, for the next run
    assert sorted({part for path in leftovers(copy) for part in Path(path).parts if "partial" in part}) == kept
    assert not (copy / "release").exists()
    result = run(tiny(copy, **change), jobs=1)
    assert result.ran[0] == stage
    assert not set(result.ran) & set(earlier)
    verify_release(result.release)
    assert not leftovers(copy)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(copy / "release")
    monkeypatch.setattr("medistill.release.durable.os.fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        run(tiny(copy, release={"licence": "CC0-1.0"}), jobs=1)
    assert not leftovers(copy)
    assert contents(copy / "release") == before


# -- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty and holds no run"):
        run(tiny(tmp_path), jobs=1)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="expected a folder, found a file"):
        run(tiny(tmp_path / "run"), jobs=1)


def test_a_missing_source_is_named_without_its_path(tmp_path: Path) -> None:
    source = {"kind": "folder", "path": str(tmp_path / "Doe-Jane"), "labels": str(tmp_path / "labels.csv")}
    config = parse_config({"output": str(tmp_path / "run"), "source": source})
    with pytest.raises(SourceError) as caught:
        run(config, jobs=1)
    assert "Doe" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "run" / "cohort").exists()
    assert not (tmp_path / "run" / "stages").exists()


def test_too_few_patients_for_an_audit_are_refused_before_distilling(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least 10 patients in each part; .*holdout has [1-9]") as caught:
        run(tiny(tmp_path / "run", source={"patients": 30}), jobs=1)
    names = workflow.load_cohort(tmp_path / "run" / "cohort").patients
    assert not [name for name in names if name in str(caught.value)]
    assert not (tmp_path / "run" / "distilled").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- the gate ---------------------------------------------------------------------------------------------------


def concluding(verdict: Verdict) -> Callable[..., AuditReport]:
    """An audit that concludes what it is told."""

    def conclude(*args: Any, **kwargs: Any) -> AuditReport:
        report = AUDIT(*args, **kwargs)
        outcomes = tuple(replace(outcome, verdict=verdict) for outcome in report.outcomes)
        return replace(report, verdict=verdict, outcomes=outcomes)

    return conclude


AUDIT = workflow.audit


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INVALID])
def test_the_gate_stops_a_release_unless_a_reason_is_given(
    copy: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    shutil.rmtree(copy / "release")
    monkeypatch.setattr(workflow, "audit", concluding(verdict))
    strict: dict[str, Any] = {"audit": {"alpha": 0.03}}
    with pytest.raises(GateError, match=verdict.value) as caught:
        run(tiny(copy, release={"accept": ["PASS", "NOT_ESTIMABLE"]}, **strict), jobs=1)
    assert caught.value.exit_code == 3
    assert not (copy / "release").exists()
    assert not leftovers(copy)
    reason = "The ethics board agreed on the twelfth of May."
    forced = tiny(copy, release={"accept": ["PASS"], "force_with_reason": reason}, **strict)
    assert run(forced, jobs=1).ran == ("release",)
    verify_release(copy / "release")
    assert reason in (copy / "release" / "card.json").read_text()
    assert reason in (copy / "release" / "report.html").read_text()


# -- what never leaves ------------------------------------------------------------------------------------------

NAMING = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientAddress", "PatientTelephoneNumbers"),
    *("AccessionNumber", "ReferringPhysicianName", "PerformingPhysicianName", "InstitutionName"),
    *("DeviceSerialNumber", "RequestingPhysician", "SourceOfPreviousValues"),
)


def planted(folder: Path) -> set[str]:
    """Every naming value of the phantom: from headers, UIDs, paths."""
    found = set()
    for row in json.loads((folder / "phantom" / "ground_truth.json").read_text(encoding="utf-8"))["files"]:
        found |= {row["file"], row["sop_uid"], row["study_uid"], row["patient_id"]}
        for entry in row["identifiers"]:
            if entry["where"].rsplit(".", 1)[-1] in NAMING:
                found |= {entry["value"], entry["value"].split("^")[0], entry["value"].replace("^", " ")}
    return {value for value in found if len(value) >= 6}


def test_no_patient_and_no_path_is_in_any_result(finished: Finished) -> None:
    values = {value.encode() for value in planted(finished.folder)}
    values |= {str(finished.folder).encode(), b"secret-ward"}
    assert len(values) > 1000
    assert any(value in (finished.folder / "phantom" / "labels.csv").read_bytes() for value in values)
    places = ("cohort", "distilled", "release", "stages")
    texts = {
        f"{place}/{name}": text for place in places for name, text in contents(finished.folder / place).items()
    }
    texts |= {name: (finished.folder / name).read_bytes() for name in ("audit.json", "diagnosis.json")}
    texts["what was said"] = finished.said.encode()
    found = {name for name, text in texts.items() for value in values if value in text}
    assert not found
    assert b"ingest" in texts["what was said"]


def test_pseudonyms_stay_in_the_cohort(finished: Finished) -> None:
    names = {name.encode() for name in workflow.load_cohort(finished.folder / "cohort").patients}
    assert len(names) == 60
    for place in ("release", "distilled", "stages"):
        for name, text in contents(finished.folder / place).items():
            assert not [1 for value in names if value in text], name
