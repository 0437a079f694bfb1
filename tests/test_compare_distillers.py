"""The comparison of distillers: budgets, cells in processes of their own, resuming, and the table."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.distill.schedule import CANDIDATES
from medistill.errors import ConfigError
from medistill.evaluate.metrics import METRICS
from medistill.ingest import IngestConfig, SplitFractions, ingest, load_cohort
from medistill.progress import Progress
from medistill.report.chart import Point, Series, chart, ticks
from medistill.studies import processes
from medistill.studies.budget import FIRST_ITERATIONS, Cost, fit_cost, probe, share_budget
from medistill.studies.cell import budgeted, error_line, main, nearest
from medistill.studies.comparison import ComparisonConfig, compare, estimate_seconds, plan_cells
from medistill.studies.contest import Cell, Contestant
from medistill.studies.continual import ContinualConfig
from medistill.studies.sections import cohort_of, read_study
from tests.conftest import REPOSITORY, blobs, pseudonym
from tests.pipelines import run_pipeline

QUICK = {"distribution_matching": {"networks": 1, "iterations": 4}}


def write_npz(path: Path) -> Path:
    """Two classes of 60 patients that can be told apart."""
    made = blobs(60, per_patient=1, size=16, seed=3)
    images = (made.images[:, 0].numpy() * 255).astype(np.uint8)
    patients = np.array([f"p{i}" for i in range(len(images))])
    np.savez(path, images=images, labels=made.classes.numpy().astype(str), patient_id=patients)
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    fractions = SplitFractions(train=0.4, validation=0.2, holdout=0.2, test=0.2)
    config = IngestConfig(size=16, burned_in="allow", fractions=fractions)
    ingest(write_npz(folder / "tiny.npz"), folder / "cohort", key=bytes(32), config=config, jobs=1)
    return folder / "cohort"


def small(**changes: object) -> ComparisonConfig:
    values = {
        "methods": [{"method": "distribution_matching", "label": "dm", "settings": QUICK}],
        "ipc": [1],
        "students": 1,
        "draws": 100,
        "real_epochs": 1,
    }
    return ComparisonConfig.from_values({**values, **changes})


# -- the arithmetic of budgets -----------------------------------------------------------------------------------


def test_the_line_through_two_runs_is_exact() -> None:
    cost = fit_cost((3, 10 + 3 * 0.25), (43, 10 + 43 * 0.25))
    assert cost.fixed == pytest.approx(10)
    assert cost.per_step == pytest.approx(0.25)
    assert cost.seconds(100) == pytest.approx(35)
    assert fit_cost((43, 20.75), (3, 10.75)) == cost


def test_no_line_through_runs_that_do_not_grow() -> None:
    with pytest.raises(ConfigError, match="could not be told"):
        fit_cost((3, 2.0), (9, 2.0))


def test_a_fixed_cost_is_never_negative() -> None:
    assert fit_cost((1, 0.5), (2, 2.0)).fixed == 0


def test_one_distiller_gets_what_its_fixed_cost_leaves() -> None:
    assert share_budget({"a": Cost(fixed=20, per_step=0.3)}, 120) == {"a": 333}


def test_a_chain_shares_what_all_fixed_costs_leave() -> None:
    costs = {"a": Cost(fixed=10, per_step=0.5), "b": Cost(fixed=30, per_step=2.0)}
    found = share_budget(costs, 120, {"a": 1, "b": 3})
    assert found == {"a": 40, "b": 30}
    assert sum(costs[name].seconds(count) for name, count in found.items()) == pytest.approx(120)


def test_a_budget_below_the_fixed_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"before the first iteration 30\.0 s are spent"):
        share_budget({"a": Cost(fixed=30, per_step=1)}, 30)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_probe_finds_the_cost_of_a_known_loop() -> None:
    def run(iterations: int, progress: Progress) -> None:
        burn(0.2)
        for _ in progress.track(range(iterations), "burning", total=iterations):
            burn(0.02)

    cost, runs = probe(run, budget=2)
    assert cost.per_step == pytest.approx(0.02, rel=0.3)
    assert cost.fixed == pytest.approx(0.2, abs=0.15)
    assert runs[0][0] == FIRST_ITERATIONS
    assert runs[1][1] - runs[0][1] == pytest.approx(0.5, rel=0.4)


def test_a_probe_looks_past_expensive_first_iterations() -> None:
    """Ridge regression fills its pool of networks in the first eight: ten times as long as all that follow."""

    def run(iterations: int, progress: Progress) -> None:
        for step in progress.track(range(iterations), "burning", total=iterations):
            burn(0.1 if step < 8 else 0.01)

    cost, runs = probe(run, budget=20)
    assert cost.per_step == pytest.approx(0.01, rel=0.3)
    assert cost.fixed == pytest.approx(8 * 0.09, abs=0.2)
    assert runs[0][0] > 8


def test_resolved_iterations_join_the_settings() -> None:
    request = {
        "settings": {"a": {"rate": 1.0}},
        "share": {},
        "budget_seconds": 10.0,
        "costs": {"a": {"fixed": 0.0, "per_step": 1.0}, "b": {"fixed": 2.0, "per_step": 2.0}},
    }
    assert budgeted(request) == {"a": {"rate": 1.0, "iterations": 4}, "b": {"iterations": 2}}


def test_a_method_may_keep_its_own_iterations(tmp_path: Path) -> None:
    both = [Contestant(method="kernel_ridge", label=f"own {own}", own_iterations=own) for own in (True, False)]
    kept, timed = (
        Cell(data="d", cohort=tmp_path, size=16, contestant=one, ipc=1, seed=0, digest="0") for one in both
    )
    config = ComparisonConfig(methods=tuple(both), budget_seconds=5.0)
    assert not kept.probes(config)
    assert kept.request(config)["budget_seconds"] is None
    assert list(timed.probes(config)) == ["kernel_ridge"]


# -- the configuration -------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        small(methods=["distribution_matchin", "random", "random"], networks=["convne"], students=0)
    message = str(caught.value)
    for part in ("Did you mean 'distribution_matching'", "Did you mean 'convnet'", "label of its own", "students"):
        assert part in message


def test_an_unknown_key_has_its_path() -> None:
    with pytest.raises(ConfigError, match="seed"):
        small(seed=3)
    with pytest.raises(ConfigError, match=r"methods\.0\.label_"):
        small(methods=[{"method": "random", "label_": "x"}])


def test_cells_and_their_names(cohort: Path) -> None:
    config = small(methods=["random", "real"], ipc=[1, 2], seeds=[0, 1])
    cells = plan_cells(config, {"tiny": (cohort, 16)})
    assert [(c.contestant.method, c.ipc, c.seed) for c in cells] == [
        *(("random", ipc, seed) for ipc in (1, 2) for seed in (0, 1)),
        ("real", 0, 0),
        ("real", 0, 1),
    ]
    names = {cell.name(config) for cell in cells}
    assert len(names) == 6
    more = small(methods=["random", "real"], ipc=[1, 2], seeds=[0, 1], students=2)
    assert not names & {cell.name(more) for cell in cells}


# -- the leak check ----------------------------------------------------------------------------------------------


def test_nearest_images_against_a_plain_loop() -> None:
    train, held_out = blobs(20, per_patient=1, size=16), blobs(10, per_patient=1, size=16, seed=5, first=100)
    released = torch.cat([train.images[:2], torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))])
    found = nearest(released, train, held_out)

    def best(image: torch.Tensor, pool: torch.Tensor) -> float:
        return max(float(np.corrcoef(image.flatten(), other.flatten())[0, 1]) for other in pool)

    assert found["train_all"] == pytest.approx(np.mean([best(i, train.images) for i in released]), abs=1e-5)
    assert found["held_out"] == pytest.approx(np.mean([best(i, held_out.images) for i in released]), abs=1e-5)
    assert found["pool"] == 10
    assert found["gap"] > 0.02  # two of four images are copies


def test_volumes_are_compared_at_sixteen_pixels() -> None:
    volumes = torch.rand(6, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    task = Task.single_label(("0", "1"))
    pool = ImageSet(
        images=volumes[:4], targets=torch.eye(2).repeat(2, 1), patients=tuple(map(pseudonym, range(4))), task=task
    )
    small = volumes.reshape(6, 16, 2, 16, 2, 16, 2).mean((2, 4, 6)).flatten(1).numpy()
    found = nearest(volumes[4:], pool, pool.select([0, 1]))
    best = [max(np.corrcoef(small[i], small[j])[0, 1] for j in range(4)) for i in (4, 5)]
    assert found["train_all"] == pytest.approx(np.mean(best), abs=1e-5)


# -- cells, resuming, the table ----------------------------------------------------------------------------------


# Stands for a cell: seed 0 and 1 succeed, seed 2 fails, and the file FAILING makes all fail. Starts without torch.
STAND_IN = """
import json, sys, time, pathlib
import numpy as np
from safetensors.numpy import save_file
request, target = json.loads(open(sys.argv[1]).read()), pathlib.Path(sys.argv[2])
seed = request["seed"]
if seed == 2:
    answer = {"status": "failed", "error": "seed 2 fails"}
else:
    time.sleep(SLEEP if seed else 0)
    names = NAMES
    drawn = np.random.default_rng(seed).random((len(names), 100))
    tensors = {f"draws/convnet/{p}/{k}": drawn for p in ("chosen", "common") for k in ("soft", "hard")}
    images = np.zeros((2, 1, 16, 16), dtype=np.float32)
    save_file({**tensors, "images": images}, target.with_suffix(".safetensors"))
    arm = {"metrics": {name: 0.5 + 0.25 * seed for name in names}, "cpu_seconds": 1.0}
    arms = {f"{p}/{k}": arm for p in ("chosen", "common") for k in ("soft", "hard")}
    answer = {
        "status": "done", "distill_cpu_seconds": 10.0 + seed, "cpu_seconds": 20.0, "start_rss_mb": 400,
        "distill_peak_rss_mb": 500 + seed, "recipe": None, "from_real": False, "patients": 12, "peak_rss_mb": 600,
        "nearest": {"train": 0.8, "held_out": 0.7 + 0.1 * seed, "gap": 0.1 - 0.1 * seed, "train_all": 0.9},
        "networks": {"convnet": {"schedule": {"optimizer": "sgd", "epochs": 40}, "arms": arms}},
    }
target.write_text(json.dumps(answer))
""".replace("NAMES", repr(METRICS))


class StopAfterOne(Progress):
    """Somebody presses a key when the first cell is done."""

    def track(self, items, description, *, total=None, completed=0):  # type: ignore[no-untyped-def]
        for item in items:
            yield item
            if description == "comparing":
                raise KeyboardInterrupt


def test_interrupted_resumed_and_the_table_is_the_mean_of_its_cells(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = small(seeds=[0, 1]), {"tiny": (cohort, 16)}
    monkeypatch.setattr(processes, "_CHILD", STAND_IN.replace("SLEEP", "60"))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compare(config, data, tmp_path, jobs=2, progress=StopAfterOne())
    assert time.monotonic() - began < 40  # the second cell was stopped, not waited for
    finished = list((tmp_path / "cells").glob("*.json"))
    assert len(finished) == 1
    assert not (tmp_path / "comparison.html").exists()
    before = finished[0].stat().st_mtime_ns

    monkeypatch.setattr(processes, "_CHILD", STAND_IN.replace("SLEEP", "0"))
    row = compare(config, data, tmp_path).rows[0]
    assert finished[0].stat().st_mtime_ns == before
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2

    line = next(csv.DictReader((tmp_path / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    auroc = row.estimate()
    assert auroc is not None
    assert auroc.value == float(line["auroc_chosen_soft"]) == 0.625  # of .5 and .75
    assert float(line["auroc_chosen_soft_sd"]) == pytest.approx(0.25 / 2**0.5, abs=1e-4)
    drawn = [np.random.default_rng(seed).random((len(METRICS), 100)) for seed in (0, 1)]
    place = METRICS.index("balanced_accuracy")
    low, high = np.percentile((drawn[0][place] + drawn[1][place]) / 2, [2.5, 97.5])
    assert float(line["balanced_accuracy_common_hard_low"]) == pytest.approx(low, abs=1e-4)
    assert float(line["balanced_accuracy_common_hard_high"]) == pytest.approx(high, abs=1e-4)
    assert (row.cpu_seconds, row.peak_rss_mb) == (10.5, 501)
    assert row.nearest["gap"] == pytest.approx(0.05)


def test_a_failed_cell_is_told_kept_and_tried_again_on_request_only(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = small(seeds=[0, 2]), {"tiny": (cohort, 16)}
    monkeypatch.setattr(processes, "_CHILD", STAND_IN)
    row = compare(config, data, tmp_path).rows[0]
    assert (row.seeds, row.failed, row.error) == (1, 1, "seed 2 fails")
    assert "1 FAILED" in (tmp_path / "comparison.html").read_text(encoding="utf-8")

    monkeypatch.setattr(processes, "_CHILD", "import os; os._exit(7)")
    assert compare(config, data, tmp_path).rows[0].error == "seed 2 fails"  # not run again
    row = compare(config, data, tmp_path, retry=True).rows[0]
    assert (row.seeds, row.failed, row.error) == (1, 1, "The process ended with code 7.")

    compare(small(seeds=[2]), data, tmp_path / "all failed")
    page = (tmp_path / "all failed" / "comparison.html").read_text(encoding="utf-8")
    assert "FAILED: The process ended with code 7." in page
    table = list(
        csv.DictReader((tmp_path / "all failed" / "comparison.csv").read_text(encoding="utf-8").splitlines())
    )
    assert (table[0]["status"], table[0]["cpu_seconds"]) == ("FAILED", "")
    text = (tmp_path / "all failed" / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["cpu_seconds"] is None


def test_an_impossible_request_is_answered_with_its_error(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(methods=["random"], ipc=[500])  # more than there are
    request = plan_cells(config, {"tiny": (cohort, 16)})[0].request(config)
    (tmp_path / "request").write_text(
        json.dumps({**request, "cohort": str(cohort), "costs": {}}), encoding="utf-8"
    )
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "request"), str(tmp_path / "answer.json")])
    main()
    answer = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert answer["status"] == "failed"
    assert "ipc=500 needs at least 500" in answer["error"]


def test_errors_of_others_show_no_path() -> None:
    assert error_line(FileNotFoundError(2, "No such file", "/x/secret.npz")) == "FileNotFoundError: No such file"
    assert error_line(ValueError("cannot read /x/secret.npz")) == "ValueError"
    with pytest.raises(KeyError) as caught:
        budgeted({"settings": {}})
    assert re.fullmatch(r"KeyError in cell, line \d+", error_line(caught.value))


# The process of a cell with short trainings of students.
SHORT = """
from medistill.core.distilled import Schedule
from medistill.distill.schedule import choose_schedule
from medistill.studies import cell
choose_schedule.__kwdefaults__["candidates"] = (Schedule(epochs=5, learning_rate=0.01),)
cell.COMMON_SCHEDULE = Schedule(epochs=6, learning_rate=0.01)
cell.main()
"""


def test_the_pipeline_by_its_command_line(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CHILD", SHORT)
    out = tmp_path / "out"
    values = {
        "output": str(out),
        "data": {"tiny": {"cohort": str(cohort), "size": 16}},
        "methods": [{"method": "distribution_matching", "settings": {"distribution_matching": {"networks": 1}}}],
        "ipc": [1],
        "students": 1,
        "draws": 100,
        "budget_seconds": 1.0,
    }
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run_pipeline("compare_distillers", config)
    assert done.returncode == 0, done.stdout + done.stderr

    # equal time: the iterations that the probe resolved stand in the recipe and took about the budget
    probe_file = json.loads(next((out / "probes").glob("*.json")).read_text(encoding="utf-8"))
    answer = json.loads(next((out / "cells").glob("*.json")).read_text(encoding="utf-8"))
    resolved = share_budget({"dm": Cost(**probe_file["cost"])}, 1.0)["dm"]
    assert answer["recipe"]["steps"][0]["settings"]["iterations"] == resolved > 10
    assert 0.2 < answer["distill_cpu_seconds"] < 3
    assert 0 < answer["start_rss_mb"] <= answer["distill_peak_rss_mb"] <= answer["peak_rss_mb"]
    assert set(answer["networks"]["convnet"]["arms"]) == {
        "chosen/soft",
        "chosen/hard",
        "common/soft",
        "common/hard",
    }

    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        *((f"compare_{what}", "data") for what in ("distillers", "pediatric", "retinamnist")),
        ("continual_learning", "sites"),
    ],
)
def test_the_shipped_files_are_read(name: str, sections: str) -> None:
    _, found, rest = read_study(REPOSITORY / "configs" / f"{name}.yaml", sections)
    assert found
    (ComparisonConfig if sections == "data" else ContinualConfig).from_values(rest)


def test_the_estimate_counts_budget_and_students(cohort: Path, tmp_path: Path) -> None:
    config = small(methods=["random", "real"], seeds=[0, 1], budget_seconds=100)
    cells = plan_cells(config, {"tiny": (cohort, 16)})
    guess = [estimate_seconds(cell, config) for cell in cells]
    assert guess[0] == guess[1] > 0
    choosing = 2 * sum(candidate.epochs for candidate in CANDIDATES)
    images = 2 * (choosing + 4 * 300)  # two images; choosing among the schedules, then four students
    assert guess[0] == pytest.approx(images * 16**2 * 1.1e-6)
    longer = small(budget_seconds=100)
    assert estimate_seconds(plan_cells(longer, {"tiny": (cohort, 16)})[0], longer) == pytest.approx(100 + guess[0])


# -- sections ----------------------------------------------------------------------------------------------------


def test_a_medmnist_file_is_ingested_once_and_another_one_is_told_from_it(tmp_path: Path) -> None:
    def write(path: Path, seed: int) -> None:
        made, parts = np.random.default_rng(seed), {"train": 24, "val": 8, "test": 8}
        arrays = {f"{split}_images": made.integers(0, 255, (n, 4, 16, 16)) for split, n in parts.items()}
        labels = {f"{split}_labels": np.arange(n)[:, None] % 2 for split, n in parts.items()}
        np.savez(path, **{name: array.astype(np.uint8) for name, array in (arrays | labels).items()})

    source, folder = tmp_path / "solid.npz", tmp_path / "data"
    write(source, 0)
    fractions = {"train": 0.8, "validation": 0.2, "holdout": 0.0, "test": 0.0}
    section = {"medmnist": str(source), "size": 16, "ingest": {"burned_in": "allow", "fractions": fractions}}
    path, size = cohort_of("sites.solid", section, folder)
    cohort = load_cohort(path)
    assert (len(cohort), size, len(cohort.patients)) == (40, 16, 40)
    assert len(cohort.split("test")) == 8
    with np.load(source) as archive:
        projected = archive["test_images"].astype(float).mean(1).round() / 255
    found = cohort.split("test").images(16).images[:, 0].numpy()
    assert np.allclose(np.sort(found.mean((1, 2))), np.sort(projected.mean((1, 2))), atol=1e-4)
    before = (path / "profile.json").stat().st_mtime_ns
    assert cohort_of("sites.solid", section, folder) == (path, 16)
    assert (path / "profile.json").stat().st_mtime_ns == before
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    assert cohort_of("sites.solid", section, copied) == (copied / "cohort", 16)
    write(source, 1)  # another file of the same name
    with pytest.raises(ConfigError, match=r"sites\.solid: another source was ingested"):
        cohort_of("sites.solid", section, folder)
    with pytest.raises(ConfigError, match=r"sites\.solid: another source was ingested"):
        cohort_of("sites.solid", section, copied)


def test_a_configuration_that_is_not_there_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nosuch\.yaml: No such file"):
        read_study(tmp_path / "nosuch.yaml", "sites")


@pytest.mark.parametrize(
    "section", [{}, {"cohort": "x", "source": {}}, {"cohort": "x", "sice": 3}, {"medmnist": "absent.npz"}]
)
def test_a_section_that_names_no_cohort_is_refused(tmp_path: Path, section: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        cohort_of("data.x", section, tmp_path)


# -- charts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.83, 0.96), (0.0, 1.0), (0.5, 0.5), (3.0, 7000.0)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low
    assert high <= found[-1]
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])


def test_points_on_one_another_are_drawn_side_by_side_and_names_are_escaped() -> None:
    point = Point(x=30, y=0.9, low=0.85, high=0.95)
    drawn = chart(
        [Series(name="<b>", points=(point,)), Series(name="c", points=(point,))],
        x_label="s",
        y_label="AUROC",
        log=True,
    )
    places = [float(part.split('"')[1]) for part in drawn.split("<circle ")[1:]]
    assert abs(places[0] - places[1]) >= 9
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn
