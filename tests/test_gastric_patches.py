"""The pipeline of patches by its command line, from DICOM to the table of patients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from medistill import DiagnosticReport
from medistill.core.distilled import Schedule
from medistill.distill import runner
from medistill.distill.schedule import choose_schedule
from tests.conftest import REPOSITORY
from tests.pipelines import Done, run_pipeline

CONFIG = REPOSITORY / "configs" / "gastric_patches.yaml"
SMALL = ("source.patients=30", "source.size=48", "ingest.size=48", "distill.size=16")


def run(*arguments: object) -> Done:
    return run_pipeline("gastric_patches", *arguments)


def _changes(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short schedule of training in place of the default and of the candidates."""
    short = Schedule(epochs=10, learning_rate=0.02)
    monkeypatch.setattr(runner, "DEFAULT_SCHEDULE", short)
    monkeypatch.setitem(choose_schedule.__kwdefaults__, "candidates", (short,))


@pytest.mark.usefixtures("quickly")
def test_from_dicom_to_a_diagnosis_of_patients(tmp_path: Path) -> None:
    out = tmp_path / "result"
    arguments = (CONFIG, "--out", out, "--stride", 16, "--quick", *_changes(*SMALL))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    report = DiagnosticReport.from_json(json.loads((out / "result.json").read_text(encoding="utf-8")))
    assert [arm.arm for arm in report.arms] == [
        "real", "auto", "auto_hard", "soft_label", "soft_label_hard", "random",
    ]  # fmt: skip
    assert report.class_names == ("no_gastritis", "gastritis", "outside")
    for arm in report.arms:
        assert (arm.images > 100) if arm.arm == "real" else (arm.images == 3)
        assert 8 <= arm.metrics["auroc"].n <= 16
        assert f"{arm.arm} " in done.stdout
    page = (out / "result.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    private = out.with_name("result-private")
    assert {path.name for path in private.iterdir()} == {"phantom", "cohort", "checkpoints"}
    if os.name == "posix":
        assert private.stat().st_mode & 0o077 == 0

    again = run(*arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("error: --out")
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_stride_with_gaps_is_exit_2(tmp_path: Path) -> None:
    done = run(CONFIG, "--out", tmp_path / "result", "--quick", "--stride", 97)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: Expected 1 <= stride <= patch, got stride 97")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "result").exists()


def test_help_shows_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "gastric_patches.py configs/gastric_patches.yaml --out runs/gastric" in done.stdout


@pytest.mark.long
@pytest.mark.usefixtures("quickly")
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    arguments = ("--stride", 16, "--quick", *_changes(*SMALL))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(CONFIG, "--out", first, *arguments).returncode == 0
    first.with_name("first-private").rename(second.with_name("second-private"))
    done = run(CONFIG, "--out", second, *arguments)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((out / "result.json").read_text(encoding="utf-8")) for out in (first, second))
    for arm in (*ours["arms"], *theirs["arms"]):
        arm.pop("cpu_seconds")
    assert ours == theirs
