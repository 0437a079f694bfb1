"""Class-incremental learning: joining cohorts, memory that is never revisited, metrics, resuming."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from medistill.core.cohort import Cohort, Instance, Split
from medistill.core.task import Task
from medistill.errors import ConfigError, DataError
from medistill.ingest import IngestConfig, SplitFractions, ingest, load_cohort
from medistill.studies import incremental
from medistill.studies.continual import Cell, ContinualConfig, learn_continually
from medistill.studies.incremental import Judge, class_groups, forgetting, join_cohorts, mean_over_seen
from tests.conftest import blobs, pseudonym
from tests.pipelines import run_pipeline

QUICK = {
    "steps": [2],
    "seeds": [0, 1],
    "arms": ["distilled", "random"],
    "ipc": 2,
    "epochs": 3,
    "real_epochs": 1,
    "draws": 100,
    "settings": {
        "distribution_matching": {"networks": 1, "iterations": 2},
        "kernel_ridge": {"iterations": 2, "real_batch": 8, "pool": 2},
    },
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    return two_sites(tmp_path_factory.mktemp("sites"), size=16)


def two_sites(folder: Path, *, size: int) -> dict[str, tuple[Path, int]]:
    """Two cohorts of two classes each, of other brightness."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, name in enumerate(("north", "south")):
        made = blobs(40, per_patient=1, size=size, seed=number)
        images = (made.images[:, 0].numpy() * (255 if number else 120)).astype(np.uint8)
        patients = np.array([f"{name}{i}" for i in range(len(images))])
        np.savez(
            folder / f"{name}.npz", images=images, labels=made.classes.numpy().astype(str), patient_id=patients
        )
        fractions = SplitFractions(train=0.5, validation=0.25, holdout=0.0, test=0.25)
        config = IngestConfig(size=size, burned_in="allow", fractions=fractions)
        ingest(folder / f"{name}.npz", folder / name, key=bytes([number] * 32), config=config, jobs=1)
        found[name] = (folder / name, size)
    return found


def test_cohorts_become_one_task(sites: dict[str, tuple[Path, int]]) -> None:
    world = join_cohorts(sites)
    assert world.task.class_names == ("north: 0", "north: 1", "south: 0", "south: 1")
    assert (world.train.targets.sum(1) == 1).all()
    bright = world.train.images.flatten(1).mean(1)
    assert bright[world.train.classes >= 2].min() > bright[world.train.classes < 2].max()
    assert not set(world.train.patients) & set(world.test.patients)


def cohort(name: str, patients: list[str], splits: list[str], task: Task) -> Cohort:
    """One image each, of class 0 and 1 in turn."""
    labels = [task.class_names[i % 2] for i in range(len(patients))]
    instances = tuple(
        Instance(uid=f"2.25.{1 + i}", patient=patient, label=label, split=Split(split), row=i)
        for i, (patient, label, split) in enumerate(zip(patients, labels, splits, strict=True))
    )
    return Cohort(instances=instances, task=task, profile={"shape": [1, 8, 8], "name": name}, store=Grey())


class Grey:
    """Pixels that are all alike."""

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.full((len(rows), 1, 8, 8), 30_000, dtype=np.uint16)


def test_a_patient_of_two_sites_is_never_trained_on_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    two, people = Task.single_label(("0", "1")), [pseudonym(i) for i in range(8)]
    splits = ["train", "train", "test", "test"]
    found = {
        "a": cohort("a", people[:4], splits, two),
        "apart": cohort("apart", people[4:], splits, two),
        "mixed": cohort("mixed", [people[2], *people[5:8]], splits, two),
        "joint": cohort("joint", people[4:], splits, Task.multilabel(("0", "1"))),
    }
    monkeypatch.setattr(incremental, "load_cohort", lambda path: found[path.name])
    assert len(join_cohorts({name: (Path(name), 8) for name in ("a", "apart")}).test) == 4
    with pytest.raises(DataError, match="1 patients are in the train split of one site"):
        join_cohorts({name: (Path(name), 8) for name in ("a", "mixed")})
    with pytest.raises(ConfigError, match=r"sites\.joint: expected plane images of one class each"):
        join_cohorts({name: (Path(name), 8) for name in ("a", "joint")})


def test_every_class_arrives_once_in_an_order_of_the_seed() -> None:
    groups = class_groups(10, 5, 0)
    assert sorted(c for group in groups for c in group) == list(range(10))
    assert {len(group) for group in groups} == {2}
    assert class_groups(10, 5, 0) == groups != class_groups(10, 5, 1)
    with pytest.raises(ConfigError, match="10 classes cannot arrive in 3"):
        class_groups(10, 3, 0)


def test_forgetting_in_closed_form() -> None:
    nan = np.nan
    recalls = np.array([[[1.0, nan, nan]], [[0.6, 0.9, nan]], [[0.7, 0.3, 1.0]]])
    assert forgetting(recalls)[0] == pytest.approx(((1.0 - 0.7) + (0.9 - 0.3)) / 2)
    assert forgetting(recalls[:1])[0] == 0
    better = np.array([[[0.2, nan]], [[0.5, 0.5]]])
    assert forgetting(better)[0] == pytest.approx(-0.3)  # a gain is a negative loss


def test_mean_over_seen_leaves_out_what_is_not_there() -> None:
    values = np.array([[0.2, np.nan, 0.6], [np.nan, np.nan, np.nan]])
    assert mean_over_seen(values)[0] == pytest.approx(0.4)
    assert np.isnan(mean_over_seen(values)[1])


def test_the_judge_against_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    test = blobs(30, per_patient=1, size=16, classes=4)
    generator = np.random.default_rng(0)
    found = generator.dirichlet(np.ones(4), len(test)) + 0.5 * test.targets.numpy()
    judge = Judge(test=test, weights=np.ones((3, len(test))))
    judge.look(found, [[2], [0]])
    seen = np.isin(test.classes.numpy(), [0, 2])
    truth, shares = test.classes.numpy()[seen], found[seen][:, [0, 2]]
    shares = shares / shares.sum(1, keepdims=True)
    decided = np.array([0, 2])[shares.argmax(1)]
    figures = judge.figures()
    assert figures["accuracy"][0] == pytest.approx(balanced_accuracy_score(truth, decided))
    area = [roc_auc_score(truth == c, shares[:, i]) for i, c in enumerate((0, 2))]
    assert figures["auroc"][0] == pytest.approx(np.mean(area))
    assert torch.allclose(judge.draws()["accuracy"][0], torch.tensor(figures["accuracy"][0], dtype=torch.float64))


def test_a_class_without_test_images_does_not_take_the_auroc_of_the_others_away() -> None:
    test = blobs(30, per_patient=1, size=16, classes=3)
    test = test.select([i for i, c in enumerate(test.classes.tolist()) if c != 1])
    judge = Judge(test=test, weights=np.ones((2, len(test))))
    judge.look(test.targets.double().numpy() + 0.1, [[0, 1, 2]])
    assert judge.figures()["auroc"] == [1.0]


def test_an_unknown_arm_or_setting_is_refused() -> None:
    for what in ("steps", "seeds", "arms"):
        once = ContinualConfig().__getattribute__(what)[0]
        for wrong in ([], [once, once]):
            with pytest.raises(ConfigError, match=f"{what}: expected at least one value, and each once"):
                ContinualConfig.from_values({what: wrong})
    with pytest.raises(ConfigError, match="arms: expected some of"):
        ContinualConfig.from_values({"arms": ["distiled"]})
    with pytest.raises(ConfigError, match="rat"):
        ContinualConfig.from_values({"settings": {"kernel_ridge": {"rat": 1}}})


def test_resumed_without_touching_what_is_finished(
    sites: dict[str, tuple[Path, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ContinualConfig.from_values(QUICK)
    curves = learn_continually(config, sites, tmp_path)
    assert [(c.arm, c.classes, c.images) for c in curves] == [
        ("distilled", (2, 4), (4, 8)),
        ("random", (2, 4), (4, 8)),
    ]
    assert curves[0].accuracy[0].n == sum(
        len(load_cohort(path).split("test").patients) for path, _ in sites.values()
    )
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 4
    page = (tmp_path / "continual.html").read_bytes()

    # a cell that was interrupted after its first memory: the memory is read back, the rest comes out the same
    lost = next(path for path in cells if path.name.startswith("distilled-2-0"))
    first = json.loads(lost.read_text(encoding="utf-8"))
    draws = load_file(lost.with_suffix(".safetensors"))
    memory = sorted((tmp_path / "memory").glob(f"{lost.stem}-*.safetensors"))
    assert len(memory) == 2
    lost.unlink()
    memory[1].unlink()
    kept, others = memory[0].stat().st_mtime_ns, {p: p.stat().st_mtime_ns for p in cells if p != lost}
    learn_continually(config, sites, tmp_path)
    again = json.loads(lost.read_text(encoding="utf-8"))
    assert memory[0].stat().st_mtime_ns == kept
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert {k: v for k, v in again.items() if k != "cpu_seconds"} == {
        k: v for k, v in first.items() if k != "cpu_seconds"
    }
    for name, values in load_file(lost.with_suffix(".safetensors")).items():
        assert np.array_equal(values.numpy(), draws[name].numpy(), equal_nan=True)

    # the curve is the plain mean of its cells
    accuracies = [json.loads(p.read_text(encoding="utf-8"))["accuracy"] for p in cells if "random" in p.name]
    assert curves[1].accuracy[1].value == pytest.approx(np.mean([a[1] for a in accuracies]))
    assert curves[1].average_accuracy.value == pytest.approx(np.mean(accuracies))
    assert curves[1].deviation == pytest.approx(np.std(np.mean(accuracies, axis=1), ddof=1))
    rows = list(csv.DictReader((tmp_path / "continual.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 4
    assert float(rows[3]["accuracy"]) == pytest.approx(curves[1].accuracy[1].value, abs=1e-4)
    assert b"<svg" in page
    assert b"<script" not in page


def test_a_memory_knows_the_classes_of_its_step_alone(sites: dict[str, tuple[Path, int]], tmp_path: Path) -> None:
    config = ContinualConfig.from_values({**QUICK, "steps": [4], "seeds": [3], "arms": ["distilled", "herding"]})
    learn_continually(config, sites, tmp_path)
    for arm in config.arms:
        groups = class_groups(4, 4, Cell(arm=arm, steps=4, seed=3).seed)
        for step, group in enumerate(groups):
            file = next((tmp_path / "memory").glob(f"{arm}-4-3-*-{step}.safetensors"))
            targets = load_file(file)["targets"]
            assert targets.shape == (2, 4)
            assert torch.equal(targets.sum(0) > 0, torch.tensor([c in group for c in range(4)]))


def test_a_step_of_one_class_is_remembered_in_mosaics_as_others_are(tmp_path: Path) -> None:
    config = ContinualConfig.from_values({**QUICK, "steps": [2, 4], "seeds": [0], "arms": ["distilled", "random"]})
    curves = learn_continually(config, two_sites(tmp_path / "sites", size=24), tmp_path)
    four_each = {"distilled": 4 * config.ipc, "random": config.ipc}
    for curve in curves:
        assert curve.images == tuple(four_each[curve.arm] * classes for classes in curve.classes)


def test_the_pipeline_by_its_command_line(sites: dict[str, tuple[Path, int]], tmp_path: Path) -> None:
    values = {
        "output": str(tmp_path / "out"),
        "sites": {name: {"cohort": str(path), "size": size} for name, (path, size) in sites.items()},
        "steps": [4],
        "arms": ["distilled", "all", "finetune"],
    }
    config = tmp_path / "continual.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run_pipeline("continual_learning", config, "--quick")
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[:-1]] == ["distilled", "all", "finetune"]
    config.write_text(yaml.safe_dump({**values, "steps": [3]}), encoding="utf-8")
    refused = run_pipeline("continual_learning", config, "--quick")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "error: 4 classes cannot arrive in 3 equal steps."
