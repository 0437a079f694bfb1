"""The sweep over epsilon: every step, going on after an interruption, its own ledger, and figures by hand."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from threadpoolctl import threadpool_limits

from medistill.audit.policy import PROFILES
from medistill.core.distilled import Schedule
from medistill.distill import surrogate
from medistill.ingest import IngestConfig, SplitFractions, ingest
from medistill.privacy import Ledger
from medistill.registry import SOURCES
from tests.conftest import REPOSITORY, blobs
from tests.pipelines import Done, run_pipeline


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration over a small cohort."""
    folder, data = tmp_path_factory.mktemp("sweep"), blobs(patients=160, size=16)
    images = (data.images[:, 0].numpy() * 255).astype(np.uint8)
    label, patients = data.classes.numpy(), np.array(data.patients)
    np.savez(folder / "blobs.npz", images=images, label=label, patient_id=patients)
    fractions = SplitFractions(train=0.6, validation=0.1, holdout=0.2, test=0.1)
    config = IngestConfig(size=16, fractions=fractions, classes=("0", "1"), burned_in="allow")
    ingest(SOURCES.load("npz")(folder / "blobs.npz"), folder / "cohort", key=bytes(32), config=config)
    values = {"output": str(folder / "out"), "data": {"blobs": {"cohort": str(folder / "cohort"), "size": 16}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def finished(study: Path) -> Iterator[tuple[Path, Done]]:
    """A finished sweep and what it printed; it looks at the first attack of an audit only, so no other is made."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(surrogate, "SCHEDULE", Schedule(epochs=8, learning_rate=0.01))
        patch.setitem(PROFILES, "default", PROFILES["quick"])
        yield study.parent / "out", run_pipeline("epsilon_sweep", study, "--quick")


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "epsilon_sweep.csv").read_text().splitlines()))


def test_help_shows_an_example() -> None:
    done = run_pipeline("epsilon_sweep", "--help")
    assert done.returncode == 0
    assert "epsilon_sweep.py configs/epsilon_sweep.yaml --out runs/epsilon-sweep" in done.stdout


def test_a_table_a_record_and_a_plot(finished: tuple[Path, Done]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    table, record = rows(out), json.loads((out / "epsilon_sweep.json").read_text())
    assert [row["epsilon"] for row in table] == ["8.0", "inf"]
    assert [row["method"] for row in table] == ["surrogate"] * 2
    assert [{key: str(value) for key, value in row.items()} for row in record["rows"]] == table
    assert "owner may look at" in record["note"]
    assert "owner may look at" in done.stdout
    assert done.stdout.count("epsilon ") == 2
    with Image.open(out / "epsilon_sweep.png") as plot:
        assert plot.format == "PNG"


def test_rows_are_means_over_the_seeds(finished: tuple[Path, Done]) -> None:
    out, _ = finished
    cells = [json.loads(path.read_text())["cell"] for path in (out / "cells").glob("*.json")]
    assert len(cells) == 4
    for row in rows(out):
        own = [cell for cell in cells if str(cell["epsilon"]) == row["epsilon"]]
        assert sorted(cell["seed"] for cell in own) == [0, 1]
        for what in ("utility", "attack"):
            each = [cell[what]["value"] for cell in own]
            assert float(row[what]) == pytest.approx(sum(each) / 2, abs=1e-4)
            assert float(row[f"{what}_least"]) == pytest.approx(min(each), abs=1e-4)
            assert float(row[f"{what}_most"]) == pytest.approx(max(each), abs=1e-4)
            assert float(row[f"{what}_low"]) == pytest.approx(sum(cell[what]["low"] for cell in own) / 2, abs=1e-4)


def test_the_study_has_a_ledger_of_its_own(finished: tuple[Path, Done], study: Path) -> None:
    out, _ = finished
    ledger = Ledger(out / "ledger.jsonl")
    assert [round(one.epsilon, 3) for one in ledger.reservations()] == [8.0, 8.0]  # none for exact answers
    record = json.loads((out / "epsilon_sweep.json").read_text())
    spent = ledger.spent()
    assert spent is not None
    assert record["together"] == pytest.approx(spent.epsilon)
    assert 8.0 < spent.epsilon < 16.0
    assert not (study.parent / "cohort" / "ledger.jsonl").exists()


def test_an_interrupted_sweep_does_only_what_is_left(
    finished: tuple[Path, Done], study: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    first, *others = sorted((out / "cells").glob("*.json"), key=lambda path: path.read_text())
    before, kept = rows(out), {path: path.stat().st_mtime_ns for path in others}
    first.unlink()
    (out / "epsilon_sweep.csv").unlink()
    done = run_pipeline("epsilon_sweep", study, "--out", out, "--quick")
    assert done.returncode == 0, done.stderr
    assert rows(out) == before  # the sealed answers again
    assert kept == {path: path.stat().st_mtime_ns for path in others}
    assert len(Ledger(out / "ledger.jsonl").reservations()) == 2


@pytest.mark.parametrize(
    "values", [{"epsilon": [1]}, {"data": {}}, {"data": {"a": {"cohort": "x"}, "b": {"cohort": "y"}}}], ids=str
)
def test_a_bad_file_is_one_line_and_exit_2(values: dict[str, object], study: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **values}))
    done = run_pipeline("epsilon_sweep", tmp_path / "bad.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_shipped_file_names_every_epsilon() -> None:
    shipped = yaml.safe_load((REPOSITORY / "configs" / "epsilon_sweep.yaml").read_text())
    assert shipped["epsilons"] == [0.5, 1, 3, 8, math.inf]
    assert len(shipped["seeds"]) >= 3
