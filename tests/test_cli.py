"""The command line: help, exit codes, one clear line for what goes wrong, and never a patient in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from medistill import __version__, registry
from medistill.cli import app
from medistill.cli.app import noted_commands, remember_command
from medistill.core.distilled import Schedule
from medistill.core.reports import Verdict
from medistill.errors import GateError, MedistillError
from medistill.release.folder import write_release
from medistill.workflow import save_run_distilled, write_text
from tests.report.example_release import audit_report, distilled_set

COMMANDS = (
    *("demo", "run", "phantom", "wrap", "ingest", "inspect", "deidentify"),
    *("train", "predict", "export", "keygen"),
    *("distill", "audit", "evaluate", "release", "compare", "verify", "list", "doctor", "version"),
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *, code: int = 2) -> str:
    """The one line on stderr of a command that refuses."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().split("\n")
    assert line.startswith("error: ")
    return line


def process(*arguments: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medistill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=ENVIRONMENT, check=False)


# -- help -------------------------------------------------------------------------------------------------------


def test_the_commands_are_those_tested_here() -> None:
    listed = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert listed == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_the_command(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", result.stdout))
    assert re.search(rf"Example: `?medistill {command}\b", text)


def test_help_and_no_arguments_name_every_command() -> None:
    for arguments, code in ((["--help"], 0), ([], 2)):
        result = invoke(*arguments)
        assert result.exit_code == code
        assert all(command in result.output for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import runpy, sys\n"
        "sys.argv = ['medistill', '--help']\n"
        "try:\n    runpy.run_module('medistill', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'pydicom', 'monai', 'matplotlib', 'pydantic', 'numpy', 'sklearn', 'scipy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False
    )
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    assert "distill" in done.stdout


# -- exit codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["destill"],
        ["ingest"],
        ["ingest", "a", "--out", "b", "--kind", "folders"],
        ["distill", "a", "--out", "b", "--ipc", "0"],
        ["phantom", "a", "--size", "32"],
        ["list", "patients"],
        ["run", "a", "--sett", "b=c"],
    ],
    ids=" ".join,
)
def test_a_usage_error_exits_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.output


def test_the_process_returns_the_exit_code(tmp_path: Path) -> None:
    done = process("verify", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: Not a release: [^\n]*\n", done.stderr)
    assert process("destill").returncode == 2


@pytest.mark.parametrize("kind", ["folder", "image_folder", "npz"])
def test_a_missing_source_is_one_line_without_its_path(kind: str, tmp_path: Path) -> None:
    result = invoke("-q", "ingest", tmp_path / "Doe-Jane", "--kind", kind, "--out", tmp_path / "cohort")
    line = refused(result)
    assert "Doe" not in line
    assert str(tmp_path) not in line
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_images_are_one_line_without_their_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "Doe^Jane.dcm").write_bytes(b"no DICOM at all")
    (tmp_path / "labels.csv").write_text("file,label\nDoe^Jane.dcm,ill\n")
    out = tmp_path / "cohort"
    line = refused(invoke("-q", "ingest", source, "--labels", tmp_path / "labels.csv", "--out", out))
    assert "None of 1 files can be used" in line
    assert "Doe" not in line
    assert not out.exists()
    kept = tmp_path / ".cohort.partial"  # for the next try; names stand only in the hospital's own journal
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("command", ["distill", "audit", "evaluate"])
def test_a_folder_that_is_no_cohort_is_one_line(command: str, tmp_path: Path) -> None:
    save_run_distilled(tmp_path / "run", distilled_set(), {})
    arguments = {
        "distill": ["distill", tmp_path / "Doe-Jane", "--out", tmp_path / "new"],
        "audit": ["audit", tmp_path / "run", "--cohort", tmp_path / "Doe-Jane"],
        "evaluate": ["evaluate", tmp_path / "run", "--cohort", tmp_path / "Doe-Jane"],
    }
    line = refused(invoke("-q", *arguments[command]))
    assert "Expected a cohort folder" in line
    assert "Doe" not in line


@pytest.mark.parametrize("command", ["audit", "evaluate", "release"])
def test_a_folder_without_a_distilled_set_is_one_line(command: str, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "out"] if command == "release" else ["--cohort", tmp_path / "cohort"]
    refused(invoke("-q", command, tmp_path / "run", *options), code=1)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_one_line_and_stays_as_it_was(tmp_path: Path, sealed: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.tex").write_text("years of work")
    images = tmp_path / "images" / "class"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(next((sealed / "images").iterdir()).read_bytes())
    commands = (
        ["phantom", kept, "--patients", "1"],
        ["wrap", images.parent, "--out", kept],
        ["ingest", images.parent, "--kind", "image_folder", "--out", kept],
        ["train", sealed, "--out", kept],
        ["demo", "--out", kept],
    )
    for command in commands:
        line = refused(invoke("-q", *command))
        assert "empty" in line, command
    assert [path.name for path in kept.iterdir()] == ["thesis.tex"]


def test_a_bad_configuration_lists_its_problems(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("output: run\nsource: {kind: phantom}\ndistill: {ipcs: 3}\nseeed: 1\n")
    result = invoke("run", tmp_path / "my.yaml")
    assert result.exit_code == 2
    assert result.stderr.split("\n")[:3] == [
        "error: 2 problems in my.yaml:",
        "  distill.ipcs: unknown. Did you mean 'ipc'?",
        "  seeed: unknown. Did you mean 'seed'?",
    ]


def test_a_dry_run_checks_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"output: {tmp_path / 'run'}\nsource: {{kind: phantom}}\n")
    result = invoke("run", tmp_path / "my.yaml", "--dry-run", "--set", "distill.ipc=1")
    assert (result.exit_code, result.stdout) == (0, "The configuration is valid.\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("kernel_ridge", "Expected --set DISTILLER.NAME=VALUE"),
        ("kernel_ridge.iteration=3", "Did you mean 'iterations'?"),
        ("kernel_ridge.iterations=many", "valid integer"),
        ("kernel_ridge.iterations=[1", "not valid YAML"),
    ],
)
def test_a_bad_setting_of_distill_is_one_line(setting: str, words: str, tmp_path: Path, cohort: Path) -> None:
    result = invoke("-q", "distill", cohort, "--out", tmp_path / "new", "--set", setting)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.fixture
def cohort(monkeypatch: pytest.MonkeyPatch) -> str:
    """A cohort that need not exist, for commands that fail before they read its pixels."""
    from types import SimpleNamespace

    images = SimpleNamespace(images=lambda _: None, task=None)
    stand_in = SimpleNamespace(task=distilled_set().task, split=lambda _: images)
    monkeypatch.setattr("medistill.cli.distill.open_cohort", lambda _: stand_in)
    monkeypatch.setattr("medistill.privacy.curator.OpenCurator", lambda _: None)
    return "cohort"


# -- what goes wrong inside -------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


WRITE = "medistill.ingest.phantom.write_phantom"


def test_an_unexpected_error_says_where_and_never_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WRITE, raising(ValueError("PatientName Doe^Jane is odd")))
    line = refused(invoke("phantom", tmp_path / "out"), code=1)
    assert re.search(r"unexpected ValueError in medistill\.cli\.whole line \d+", line)
    assert "--debug" in line
    assert "Doe" not in line


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WRITE, raising(ValueError("PatientName Doe^Jane is odd")))
    result = invoke("--debug", "phantom", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    assert "Doe" not in invoke("phantom", tmp_path / "out").output


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/ward/Doe^Jane"), 2, "the disk is full"),
        (PermissionError(13, "Permission denied", "/ward/Doe^Jane"), 2, "may not be read or written"),
        (OSError(5, "Input/output error", "/ward/Doe^Jane"), 1, "unexpected OSError"),
        (GateError("The gate was not passed."), 3, "error: The gate was not passed."),
        (MedistillError("Plain."), 1, "error: Plain."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_kind_of_trouble_has_its_exit_code(
    error: BaseException, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WRITE, raising(error))
    result = invoke("phantom", tmp_path / "out")
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Doe" not in result.output


@pytest.mark.skipif(os.name != "posix", reason="process groups are those of POSIX")
def test_ctrl_c_ends_the_processes_leaves_nothing_and_exits_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medistill", "phantom", str(tmp_path / "out"), "--patients", "5000"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial*/dicom/*/*/*")):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().split("\n")[-1].startswith("interrupted: ")
    assert list(tmp_path.iterdir()) == []


def test_a_noted_command_holds_settings_and_nothing_that_could_name_a_patient(tmp_path: Path) -> None:
    app_of_one = typer.Typer(add_completion=False)

    @app_of_one.command()
    def ingest(
        context: typer.Context,
        source: str,
        out: Path,
        size: int = 256,
        date: str = "",
        study: list[str] | None = None,
        classes: str = "",
    ) -> None:
        remember_command(context, out)

    asked = [
        "ward/DOE^JANE",
        str(tmp_path),
        "--size",
        "64",
        "--date",
        "20240229",
        "--study",
        "1.2.3",
        "--study",
        "4.5",
    ]
    result = CliRunner().invoke(app_of_one, [*asked, "--classes", "healthy,ill"])
    assert result.exit_code == 0, result.output
    (line,) = noted_commands(tmp_path)
    assert line.split()[2:] == [
        *("SOURCE", "OUT", "--size", "64", "--date", "DATE", "--study", "STUDY", "--study", "STUDY"),
        *("--classes", "healthy,ill"),
    ]
    assert not re.search("DOE|2024|1[.]2", line)


# -- small commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("distillers", registry.DISTILLERS.names()),
        ("attacks", registry.ATTACKS.names()),
        ("networks", registry.NETWORKS.names()),
        ("sources", registry.SOURCES.names()),
    ],
)
def test_list_prints_registered_names(what: str, names: list[str]) -> None:
    result = invoke("list", what)
    assert (result.exit_code, result.stdout.split()) == (0, names)
    assert names


def test_doctor_finds_this_installation_well() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "torch and torchvision: same build" in result.stdout
    assert "PROBLEM" not in result.stdout


def test_doctor_says_how_to_mend_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medistill.doctor._REQUIRED", ("torch", "no-such-library"))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "PROBLEM no-such-library: not installed" in result.stdout
    assert "pip install no-such-library" in result.stdout


def test_version_is_printed() -> None:
    assert invoke("version").stdout == f"{__version__}\n"


# -- audit, release, verify -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", list(Verdict))
def test_audit_exits_3_unless_it_passes(verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distilled = distilled_set()
    save_run_distilled(tmp_path / "run", distilled, {})
    monkeypatch.setattr("medistill.audit.audit", lambda *_, **__: audit_report(distilled, verdict))
    from types import SimpleNamespace

    monkeypatch.setattr("medistill.audit.record.closest_pairs", lambda *_, **__: ())
    images = SimpleNamespace(images=lambda _: None, attributes=dict)
    monkeypatch.setattr("medistill.cli.distill.open_cohort", lambda _: SimpleNamespace(split=lambda _: images))
    result = invoke("audit", tmp_path / "run", "--cohort", "cohort")
    assert result.exit_code == (0 if verdict is Verdict.PASS else 3), result.output
    assert result.stdout.strip().endswith(f"Verdict: {verdict.value}")
    assert "release of all real images" in result.stdout
    assert (tmp_path / "run" / "audit.json").exists()
    assert (tmp_path / "run" / "audit.html").exists()


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INVALID, Verdict.NOT_ESTIMABLE])
def test_release_stops_at_the_gate_with_3(verdict: Verdict, tmp_path: Path) -> None:
    import json

    distilled = distilled_set()
    save_run_distilled(tmp_path / "run", distilled, {})
    write_text(tmp_path / "run" / "audit.json", json.dumps(audit_report(distilled, verdict).to_json()))
    result = invoke("release", tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert f"The gate was not passed: {verdict.value}" in result.stderr
    assert not (tmp_path / "out").exists()
    forced = invoke("release", tmp_path / "run", "--out", tmp_path / "out", "--force-with-reason", "For a test.")
    assert forced.exit_code == 0, forced.output
    assert invoke("verify", tmp_path / "out").exit_code == 0


def test_an_unaudited_set_is_not_released(tmp_path: Path) -> None:
    save_run_distilled(tmp_path / "run", distilled_set(), {})
    line = refused(invoke("release", tmp_path / "run", "--out", tmp_path / "out"), code=3)
    assert "not audited" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    distilled = replace(distilled_set(ipc=2), schedule=Schedule(epochs=2, learning_rate=0.01))
    return write_release(
        tmp_path / "sealed",
        distilled=distilled,
        audit=audit_report(distilled),
        diagnosis=None,
        cohort=None,
        snapshots=None,
        commands=(),
    )


def test_verify_prints_what_the_release_states(sealed: Path) -> None:
    result = invoke("verify", sealed)
    assert result.exit_code == 0
    assert result.stdout.startswith("Unchanged: ")
    assert "Audit verdict: PASS" in result.stdout


@pytest.mark.parametrize("name", ["images.safetensors", "card.json", "report.html", "SHA256SUMS"])
def test_verify_refuses_one_changed_byte_with_1(name: str, sealed: Path) -> None:
    content = bytearray((sealed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (sealed / name).write_bytes(bytes(content))
    result = invoke("verify", sealed)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "not as it was sealed" in result.stderr
