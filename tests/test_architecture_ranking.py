"""The pipeline that ranks architectures: every step, going on after an interruption, and its figures by hand."""

from __future__ import annotations

import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from scipy.stats import kendalltau, spearmanr

from medistill.ingest import IngestConfig, SplitFractions, ingest
from medistill.registry import SOURCES
from medistill.studies import rank_agreement
from tests.conftest import REPOSITORY, blobs

PIPELINE = REPOSITORY / "pipelines" / "architecture_ranking.py"


@pytest.fixture(scope="module")
def pipeline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_ranking", PIPELINE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("ranking"), blobs(patients=80, size=28)
    noise = 0.5 * torch.randn(data.images.shape, generator=torch.Generator().manual_seed(0))
    np.savez(
        folder / "blobs.npz",
        images=((data.images + noise).clamp(0, 1)[:, 0].numpy() * 255).astype(np.uint8),
        label=data.classes.numpy(),
        patient_id=np.array(data.patients),
    )
    fractions = SplitFractions(train=0.5, validation=0.2, holdout=0.1, test=0.2)
    config = IngestConfig(size=28, fractions=fractions, classes=("0", "1"), burned_in="allow")
    source = SOURCES.load("npz")(folder / "blobs.npz")
    ingest(source, folder / "cohort", key=bytes(32), config=config)
    return folder / "cohort"


def test_quick_ranks_and_goes_on_where_it_stopped(
    pipeline: ModuleType, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> list[str]:
        pipeline.main(cohort=cohort, out=tmp_path, size=28, ipc=2, coreset="herding", seeds=1, quick=True)
        return capsys.readouterr().out.splitlines()

    table = run()
    assert [line.split()[0] for line in table] == ["set", "real", "distilled", "random", "herding"]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(result["scores"]) == {"real", "distilled", "random", "herding"}
    names = list(result["scores"]["real"])
    assert len(names) == 5
    for tried in result["scores"].values():
        assert list(tried) == names
        assert all(0 <= auroc <= 1 for runs in tried.values() for row in runs for auroc in row[:2])
    assert result["compared"]["real"]["spearman"][0] == pytest.approx(1)
    for row in result["compared"].values():
        assert row["chosen"] in names
        assert row["regret"] >= 0
        assert row["spearman"][1] <= row["spearman"][2]
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")

    kept = tmp_path / "trainings.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 20
    kept.write_text("".join(lines[:13]) + lines[13][:40], encoding="utf-8")  # killed while writing
    assert len(run()) == len(table)
    resumed = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    now = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    assert now[:13] == lines[:13]
    assert len(now) == 20
    for name, tried in result["scores"].items():
        for network, runs in tried.items():
            assert resumed["scores"][name][network][0][:2] == runs[0][:2]


def test_agreement_is_that_of_the_definitions() -> None:
    real, few = [0.90, 0.80, 0.85, 0.70, 0.60], [0.70, 0.75, 0.60, 0.65, 0.50]
    tested = [0.88, 0.81, 0.90, 0.70, 0.66]
    scores = {
        "real": {f"n{i}": [[v, t, 10.0]] for i, (v, t) in enumerate(zip(real, tested, strict=True))},
        "distilled": {f"n{i}": [[v - 0.1, 0.5, 0.5], [v + 0.1, 0.5, 1.5]] for i, v in enumerate(few)},
    }
    found = rank_agreement(scores, "distilled")
    signs = [np.sign((real[i] - real[j]) * (few[i] - few[j])) for i, j in combinations(range(5), 2)]
    assert found["kendall"][0] == pytest.approx(np.mean(signs))
    gaps = np.argsort(np.argsort(real)) - np.argsort(np.argsort(few))
    assert found["spearman"][0] == pytest.approx(1 - 6 * (gaps**2).sum() / (5 * 24))
    assert found["kendall"][1] <= found["kendall"][0] <= found["kendall"][2]
    assert found["chosen"] == "n1"
    assert found["regret"] == pytest.approx(0.90 - 0.81)
    assert found["times_faster"] == pytest.approx(10)
    assert found["cpu_seconds"] == pytest.approx(5)


@pytest.mark.parametrize("seed", range(3))
def test_ties_count_as_in_scipy(seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(5, size=(2, 9)) / 5
    scores = {
        name: {f"n{i}": [[value, 0.5, 1.0]] for i, value in enumerate(row)}
        for name, row in zip(("real", "distilled"), drawn, strict=True)
    }
    found = rank_agreement(scores, "distilled")
    assert found["spearman"][0] == pytest.approx(spearmanr(*drawn).statistic)
    assert found["kendall"][0] == pytest.approx(kendalltau(*drawn).statistic)


def test_what_is_no_cohort_is_one_line_and_exit_2(
    pipeline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        pipeline.main(cohort=tmp_path, out=tmp_path / "out")
    assert stopped.value.exit_code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: Expected a cohort folder")
    assert len(shown.strip().splitlines()) == 1


def test_without_any_difference_there_is_no_interval() -> None:
    same = {f"n{i}": [[0.5, 0.5, 1.0]] for i in range(4)}
    with pytest.warns(RuntimeWarning, match="All-NaN"):
        found = rank_agreement({"real": same, "distilled": same}, "distilled")
    assert np.isnan(found["spearman"]).all()


def test_there_are_enough_architectures_to_rank(pipeline: ModuleType) -> None:
    assert len(pipeline.architectures(False)) >= 21
