"""Pipelines run by their command line, use public names only, and stay short."""

from __future__ import annotations

import ast
import os
from importlib import import_module
from pathlib import Path

import pytest

from medistill import PhantomConfig, verify_release, write_phantom
from tests.pipelines import FOLDER, Done, run_pipeline

PIPELINES = sorted(FOLDER.glob("*.py"))
HOSPITAL = FOLDER / "hospital_release.py"
VERBS = ("ingest", "distill", "audit", "evaluate", "release")
FURTHER = ("diagnose", "registry", "studies", "training")
PUBLIC = {"medistill", *(f"medistill.{name}" for name in (*VERBS, *FURTHER))}
QUICK = ("--ipc", "1", "--size", "16", "--quick")


def run(*arguments: object) -> Done:
    return run_pipeline("hospital_release", *arguments)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "phantom"
    write_phantom(folder, PhantomConfig(patients=80, size=48, images_per_patient=(1, 2), burned_in=0.02))
    return folder


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_a_pipeline_is_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, node.name


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_a_pipeline_uses_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "medistill"]
            assert set(names) <= PUBLIC
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "medistill":
            assert node.module in PUBLIC
            public = import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(public)


def test_the_five_verbs_are_called_in_order() -> None:
    tree = ast.parse(HOSPITAL.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    wanted = ("ingest", "distill", "audit", "evaluate", "check_gate", "write_release")
    found = sorted((call.lineno, call.func.id) for call in calls if call.func.id in wanted)  # type: ignore[attr-defined]
    assert tuple(name for _, name in found) == wanted


def test_help_shows_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "hospital_release.py DICOM --labels labels.csv --out runs/release --ipc 10" in done.stdout


@pytest.mark.usefixtures("short_schedules")
def test_a_small_cohort_is_stopped_at_the_gate_then_released_for_a_reason(phantom: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "release"
    private = out.with_name("release-private")
    private.mkdir(parents=True)
    (private / "cohort.key").write_bytes(bytes(range(32)))  # the same split at every call of this test
    (private / "cohort.key").chmod(0o600)
    arguments = (phantom / "dicom", "--labels", phantom / "labels.csv", "--out", out, *QUICK)

    stopped = run(*arguments)
    assert stopped.returncode == 3, stopped.stderr
    assert "error: The gate was not passed" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not out.exists()

    released = run(*arguments, "--force-with-reason", "a phantom hides nobody", "--licence", "CC0-1.0")
    assert released.returncode == 0, released.stderr
    assert released.stdout.startswith("Sealed ")
    assert "No formal privacy guarantee" in released.stdout
    assert verify_release(out).files >= 10
    assert "a phantom hides nobody" in (out / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in private.iterdir()} >= {"cohort", "cohort.key", "quarantine.csv"}
    assert (private / "cohort.key").read_bytes() == bytes(range(32))

    again = run(*arguments)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"dicom": "absent"}, id="no such folder"),
        pytest.param({"labels": "README.txt"}, id="labels that are no table"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(phantom: Path, tmp_path: Path, change: dict[str, str]) -> None:
    names = {"dicom": "dicom", "labels": "labels.csv", **change}
    out = tmp_path / "release"
    done = run(phantom / names["dicom"], "--labels", phantom / names["labels"], "--out", out, *QUICK)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
    if os.name == "posix":
        assert out.with_name("release-private").stat().st_mode & 0o077 == 0
