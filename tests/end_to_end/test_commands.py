"""The verbs one after another through the command line, as a hospital and a receiver type them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner, Result

from medistill.cli import app
from medistill.core.cohort import Split
from medistill.evaluate.arms import ARMS
from medistill.ingest import load_cohort
from medistill.release.verify import load_release

QUICK = (
    *("--looks", "1"),
    *("--set", "distribution_matching.networks=2", "--set", "distribution_matching.iterations=10"),
    *("--set", "distribution_matching.width=8", "--set", "distribution_matching.rate=2e-2"),
    *("--set", "kernel_ridge.iterations=6", "--set", "kernel_ridge.pool=2", "--set", "kernel_ridge.width=8"),
    *("--set", "kernel_ridge.real_batch=30", "--set", "kernel_ridge.advance=2"),
)
REASON = "A phantom harms nobody."


@pytest.fixture(scope="module", autouse=True)
def one_thread(short_schedules: None) -> Iterator[None]:
    with threadpool_limits(1):
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["-q", *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hospital")


@pytest.fixture(scope="module")
def ran(place: Path) -> dict[str, Result]:
    """Result of each verb, in the order they were typed."""
    steps = {
        "phantom": [place / "phantom", "--patients", 80, "--size", 48, "--seed", 3],
        "ingest": [
            *(place / "phantom" / "dicom", "--labels", place / "phantom" / "labels.csv"),
            *("--out", place / "cohort", "--size", 16),
        ],
        "distill": [place / "cohort", "--out", place / "run", "--ipc", 1, "--size", 16, *QUICK],
        "audit": [place / "run", "--cohort", place / "cohort"],
        "evaluate": [place / "run", "--cohort", place / "cohort", "--seeds", 1],
        "release": [
            *(place / "run", "--cohort", place / "cohort", "--out", place / "release"),
            *("--licence", "CC0-1.0", "--force-with-reason", REASON),
        ],
        "verify": [place / "release"],
        "train": [place / "release", "--out", place / "model"],
    }
    return {verb: invoke(verb, *arguments) for verb, arguments in steps.items()}


def test_every_verb_ends_as_it_should(ran: dict[str, Result]) -> None:
    for verb, result in ran.items():
        assert result.exit_code in ((0, 3) if verb == "audit" else (0,)), f"{verb}: {result.output}"
        assert "Traceback" not in result.output


def test_the_phantom_says_what_it_made(ran: dict[str, Result], place: Path) -> None:
    files = [path for path in (place / "phantom" / "dicom").rglob("*") if path.is_file()]
    assert ran["phantom"].stdout.startswith(f"{len(files)} images of 80 patients")


def test_ingest_counts_every_split_and_keeps_the_key_outside(ran: dict[str, Result], place: Path) -> None:
    counts = load_cohort(place / "cohort").counts()
    lines = [line.split() for line in ran["ingest"].stdout.splitlines()]
    assert {line[0]: (int(line[1]), int(line[4])) for line in lines} == {
        name: (row["images"], row["patients"]) for name, row in counts.items()
    }
    assert sum(row["patients"] for row in counts.values()) == 80
    assert (place / "cohort.key").stat().st_mode & 0o777 == 0o600


def test_distill_leaves_a_set_and_no_checkpoint(ran: dict[str, Result], place: Path) -> None:
    assert ran["distill"].stdout.startswith("3 images of 16 px")
    assert not (place / "run" / "checkpoints").exists()
    recipe = json.loads((place / "run" / "distilled" / "recipe.json").read_text())["recipe"]
    assert recipe["steps"][0]["settings"]["rate"] == 0.02


def test_audit_prints_controls_and_its_verdict_decides_the_exit_code(ran: dict[str, Result], place: Path) -> None:
    audit = json.loads((place / "run" / "audit.json").read_text())
    verdict = audit["verdict"]
    assert ran["audit"].stdout.strip().endswith(f"Verdict: {verdict}")
    assert (ran["audit"].exit_code == 0) == (verdict == "PASS")
    made = {o["attack"]: [c["name"].split(":")[0] for c in o["controls"]] for o in audit["outcomes"]}
    # At 16 px and with few patients not every draw gives these three any power.
    further = sum(name in made for name in ("attribute_inference", "edited_copies", "reconstruction"))
    assert all(set(kinds) == {"positive", "negative"} for kinds in made.values())
    # Four attacks, copies of three kinds, and what had power.
    assert ran["audit"].stdout.count("positive: ") == 4 + 3 + further
    assert ran["audit"].stdout.count("negative: ") == 4 + 1 + further


def test_evaluate_compares_all_arms_on_both_splits(ran: dict[str, Result], place: Path) -> None:
    lines = ran["evaluate"].stdout.splitlines()
    rows = [line.split()[1:3] for line in lines if "images" in line]
    assert sorted(rows) == sorted([split, arm] for arm in ARMS for split in ("test", "holdout"))
    assert [line.split()[1:5] for line in lines[len(rows) :]] == [
        [split, "distilled", "-", "real"] for split in ("test", "holdout")
    ]
    assert (place / "run" / "diagnosis.json").exists()


def test_the_release_carries_reason_licence_and_verdict(ran: dict[str, Result], place: Path) -> None:
    card, page = (place / "release" / "card.json").read_text(), (place / "release" / "report.html").read_text()
    for text in (REASON, "CC0-1.0"):
        assert text in card
        assert text in page
    assert ran["verify"].stdout.startswith("Unchanged: ")
    assert len(load_release(place / "release")) == 3


def test_a_forced_release_needs_its_reason(ran: dict[str, Result], place: Path) -> None:
    result = invoke("release", place / "run", "--out", place / "second")
    assert (result.exit_code == 0) == (ran["audit"].exit_code == 0)
    assert (place / "second").exists() == (result.exit_code == 0)


def test_the_receiver_has_a_model(ran: dict[str, Result], place: Path) -> None:
    assert ran["train"].stdout == f"Model in {place / 'model'}\n"
    assert sorted(path.name for path in (place / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_no_verb_prints_a_patient(ran: dict[str, Result], place: Path) -> None:
    truth = json.loads((place / "phantom" / "ground_truth.json").read_text(encoding="utf-8"))
    names = {row["patient_id"] for row in truth["files"]} | {
        entry["value"] for row in truth["files"] for entry in row["identifiers"] if entry["where"] == "PatientName"
    }
    names |= set(load_cohort(place / "cohort").patients)
    assert len(names) >= 200
    printed = "".join(result.output for result in ran.values())
    assert not [name for name in names if name in printed]


def test_a_second_distillation_does_not_replace_the_first(ran: dict[str, Result], place: Path) -> None:
    before = (place / "run" / "distilled" / "images.safetensors").read_bytes()
    result = invoke("distill", place / "cohort", "--out", place / "run", "--ipc", 1, "--size", 16)
    assert result.exit_code == 2
    assert (place / "run" / "distilled" / "images.safetensors").read_bytes() == before


# -- data that is not DICOM yet ---------------------------------------------------------------------------------


def test_pictures_are_wrapped_as_dicom_and_ingested(tmp_path: Path) -> None:
    generator, rows = np.random.default_rng(0), ["file,patient_id,finding"]
    (tmp_path / "png").mkdir()
    for number in range(16):
        grey = generator.integers(0, 256, (24, 20), dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "png" / f"image{number}.png")
        rows.append(f"image{number}.png,patient{number // 2},{number // 2 % 2}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    wrapped = invoke(
        *("wrap", tmp_path / "png", "--table", tmp_path / "table.csv", "--label-column", "finding"),
        *("--label-name", "0=normal", "--label-name", "1=ill", "--out", tmp_path / "dicom"),
    )
    assert wrapped.exit_code == 0, wrapped.output
    assert wrapped.stdout.startswith("16 images of 8 patients")
    assert len(list((tmp_path / "dicom" / "images").rglob("*.dcm"))) == 16
    ingested = invoke(
        *("ingest", tmp_path / "dicom" / "images", "--labels", tmp_path / "dicom" / "labels.csv"),
        *("--out", tmp_path / "cohort", "--size", 32, "--burned-in", "allow"),
    )
    assert ingested.exit_code == 0, ingested.output
    cohort = load_cohort(tmp_path / "cohort")
    assert len(cohort) == 16
    assert len(cohort.patients) == 8
    assert set(cohort.task.class_names) == {"normal", "ill"}
    assert cohort.split(Split.TRAIN).images(16).images.shape[1:] == (1, 16, 16)


def test_a_bad_label_name_is_one_line(tmp_path: Path) -> None:
    result = invoke("wrap", tmp_path, "--label-name", "0", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: Expected --label-name VALUE=NAME, got '0'.\n"


def test_another_cohort_is_refused(ran: dict[str, Result], place: Path) -> None:
    assert ran["evaluate"].exit_code == 0
    phantom = place / "phantom"
    again = invoke(
        *("ingest", phantom / "dicom", "--labels", phantom / "labels.csv"),
        *("--out", place / "other", "--size", 16, "--burned-in", "allow"),
    )
    assert again.exit_code == 0
    for verb in ("audit", "evaluate"):
        result = invoke(verb, place / "run", "--cohort", place / "other")
        assert result.exit_code == 1
        assert "another cohort" in result.stderr


def test_the_report_says_how_the_release_was_made_and_never_where(ran: dict[str, Result], place: Path) -> None:
    commands = json.loads((place / "release" / "card.json").read_text())["commands"]
    assert [command.split()[1] for command in commands] == ["ingest", "distill", "audit", "evaluate", "release"]
    assert commands[0] == "medistill ingest SOURCE --out OUT --labels LABELS --size 16"
    assert "--ipc 1 --size 16 --looks 1 --set distribution_matching.networks=2 --set " in commands[1]
    assert commands[3] == "medistill evaluate RUN --cohort COHORT --seeds 1"
    assert "--licence CC0-1.0" in commands[4]
    page = (place / "release" / "report.html").read_text()
    assert commands[1] in page
    assert str(place) not in page
    assert REASON not in " ".join(commands)
