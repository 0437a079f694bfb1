"""Class-incremental learning on a memory that is never revisited.

The classes of several cohorts make one task and arrive in steps. At each step a site distils its own classes once
and hands on the images; after each step a network is trained from scratch on the memory of all classes so far, and
must tell all of them apart. What is measured is recognition across sites and modalities as they join one after
another, not a diagnosis within one of them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from medistill import __version__
from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule
from medistill.core.images import ImageSet
from medistill.core.reports import Estimate
from medistill.core.task import Task, TaskKind
from medistill.distill import distill, make_recipe, resolve_method
from medistill.errors import ConfigError
from medistill.evaluate.arms import REAL_SCHEDULE
from medistill.evaluate.bootstrap import patient_weights, percentile_estimate
from medistill.ingest import load_cohort
from medistill.parallel import parallel_map
from medistill.privacy import OpenCurator
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.report.continual import Curve, render_continual
from medistill.seeds import derive_seed
from medistill.studies.contest import content_digest
from medistill.studies.incremental import Benchmark, Judge, class_groups, join_cohorts
from medistill.studies.records import keep, keep_record, read_record
from medistill.training.fit import fit, predict
from medistill.training.views import picture_labels, pictures

ARMS = ("distilled", "random", "herding", "all", "finetune")
_ALONE = Compute(jobs=1)

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """What is learned, and how.

    Args:
        steps: Numbers of steps; each must divide the number of classes.
        seeds: Each gives an order of the classes and new networks.
        arms: ``distilled`` memory; ``random`` and ``herding``, real memories of the same size; ``all`` real images
            so far (the upper bound); ``finetune``, one network trained on with each step's real images alone (the
            lower bound).
        method: How the memory is distilled. A step of one class has nothing to tell apart, so that of ``auto``
            only the first distiller, distribution matching, runs there.
        settings: Per distiller, settings that differ from the defaults.
        ipc: Images per class in the memory.
        epochs: Epochs of training on a memory, the whole memory a batch.
        real_epochs: Epochs on real images.
        network: Registered network.
        draws: Bootstrap draws.

    Raises:
        ConfigError: If a value is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    steps: tuple[int, ...] = (5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ARMS
    method: str = "auto"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ipc: int = 10
    epochs: int = 300
    real_epochs: int = 8
    network: str = "convnet"
    draws: int = 1000

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ConfigError(f"arms: expected some of {', '.join(ARMS)}; found {', '.join(unknown)}.")
        for what in ("steps", "seeds", "arms"):
            if not getattr(self, what) or len(set(getattr(self, what))) < len(getattr(self, what)):
                raise ConfigError(f"{what}: expected at least one value, and each once.")
        if min((*self.steps, self.ipc, self.epochs, self.real_epochs)) < 1 or self.draws < 100:
            raise ConfigError("Expected steps, ipc, epochs and real_epochs >= 1 and draws >= 100.")
        NETWORKS.load(self.network)
        make_recipe(Task.single_label(("0", "1")), method=self.method, settings=self.settings)  # or refuses

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ContinualConfig:
        """Plain values of a YAML file as a configuration.

        Raises:
            ConfigError: With every problem.
        """
        return read_record(cls, values)


# -- one cell: one arm under one order of classes ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm, one number of steps, one order of classes."""

    arm: str
    steps: int
    seed: int

    def name(self, config: ContinualConfig, digest: str) -> str:
        """Name of the cell's files; it carries all that the result depends on."""
        settings = {key: value for key, value in asdict(config).items() if key not in ("steps", "seeds", "arms")}
        text = json.dumps([asdict(self), settings, digest, __version__], sort_keys=True)
        return f"{self.arm}-{self.steps}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """Training images with targets over all classes."""

    images: Tensor
    targets: Tensor


def run_cell(
    cell: Cell, *, config: ContinualConfig, sites: Mapping[str, tuple[Path, int]], out: Path, digest: str
) -> None:
    """Go through all steps of one cell and keep what was measured as one JSON file with its bootstrap draws."""
    target, began = out / "cells" / f"{cell.name(config, digest)}.json", time.process_time()
    world = join_cohorts(sites)
    groups = class_groups(world.task.n_classes, cell.steps, cell.seed)
    weights = patient_weights(world.test.patients, draws=config.draws, seed=derive_seed(0, "bootstrap"))
    judge = Judge(test=world.test, weights=weights)
    made: list[_Memory] = []
    network = fresh(NETWORKS.load(config.network), world.task, _shape(world), derive_seed(cell.seed, "network"))
    sizes = []
    for step, group in enumerate(groups):
        new = _of_step(cell, config, world, group, out, target.stem, step)
        made = [new] if cell.arm == "finetune" else [*made, new]
        if cell.arm != "finetune":  # from scratch
            seed = derive_seed(cell.seed, "network", step)
            network = fresh(NETWORKS.load(config.network), world.task, _shape(world), seed)
        images = torch.cat([one.images for one in made])
        fit(
            network,
            images,
            torch.cat([one.targets for one in made]),
            kind=world.task.kind,
            schedule=_schedule(cell, config),
            seed=derive_seed(cell.seed, "order", step),
            compute=_ALONE,
        )
        sizes.append(len(images))
        judge.look(predict(network, world.test.images, kind=world.task.kind).double().numpy(), groups[: step + 1])
    values = {
        "cell": asdict(cell),
        "classes": [[world.task.class_names[c] for c in group] for group in groups],
        "images": sizes,
        "cpu_seconds": round(time.process_time() - began, 2),
        **judge.figures(),
    }
    keep(target.with_suffix(".safetensors"), save(judge.draws()))
    keep_record(target, values)


def _shape(world: Benchmark) -> tuple[int, ...]:
    return tuple(world.train.images.shape[1:])


def _schedule(cell: Cell, config: ContinualConfig) -> Schedule:
    if cell.arm in ("all", "finetune"):
        return replace(REAL_SCHEDULE, epochs=config.real_epochs)
    return Schedule(epochs=config.epochs, learning_rate=0.01)


def _of_step(
    cell: Cell, config: ContinualConfig, world: Benchmark, group: tuple[int, ...], out: Path, name: str, step: int
) -> _Memory:
    """What a step adds, made from the images of its own classes alone; a finished memory is read back."""
    mine = world.train.select((world.train.targets[:, list(group)].sum(1) > 0.5).nonzero().flatten())
    if cell.arm in ("all", "finetune"):
        return _Memory(images=mine.images, targets=mine.targets)
    kept = out / "memory" / f"{name}-{step}.safetensors"
    if not kept.exists():
        memory = _remember(cell, config, mine, group, step)
        keep(kept, save({"images": memory.images, "targets": memory.targets}))
    found = load_file(kept)
    return _Memory(images=found["images"], targets=found["targets"])


def _remember(cell: Cell, config: ContinualConfig, mine: ImageSet, group: tuple[int, ...], step: int) -> _Memory:
    names, one = tuple(mine.task.class_names[c] for c in group), len(group) == 1
    targets, task = mine.targets[:, list(group)].contiguous(), None
    if one:  # a task needs two classes: the class is entered twice, and the second half of the images dropped
        task = Task(kind=TaskKind.MULTILABEL, class_names=(*names, f"{names[0]}, again"))
        targets = targets.repeat(1, 2)
    task = task or Task.single_label(names)
    local = replace(mine, targets=targets, task=task)
    method, settings = config.method, config.settings
    if cell.arm != "distilled":
        method, settings = "coreset", {"coreset": {"selection": cell.arm}}
    resolved = resolve_method(method, task, config.ipc, image_shape=tuple(mine.images.shape[1:]))
    chosen = resolved.distillers
    if one and method == "auto":
        chosen, method = chosen[:1], chosen[0]
        settings = {method: {**resolved.settings.get(method, {}), **settings.get(method, {})}}
    made = distill(
        OpenCurator(local),
        method=method,
        ipc=config.ipc,
        seed=derive_seed(cell.seed, "memory", step),
        settings={key: value for key, value in settings.items() if key in chosen},
        compute=_ALONE,
        looks=1,
    ).distilled
    shown, labels, hard = made.images, made.soft_labels, made.hard_labels
    shown, labels = pictures(shown, made.views), picture_labels(labels, made.views)
    hard = hard.repeat_interleave(len(shown) // len(hard))
    kept = hard < len(group)
    joint = torch.zeros(int(kept.sum()), mine.task.n_classes)
    joint[:, list(group)] = labels[kept][:, : len(group)]
    return _Memory(images=shown[kept], targets=joint)


# -- all cells ---------------------------------------------------------------------------------------------------


def learn_continually(
    config: ContinualConfig,
    sites: Mapping[str, tuple[Path, int]],
    out: Path,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
) -> tuple[Curve, ...]:
    """Run the cells that are missing, then write ``continual.csv``, ``.json`` and ``.html``.

    Args:
        config: Steps, arms, memory.
        sites: Name to the folder of a cohort and the side length of its images.
        out: Folder of the results; a later call goes on there.
        jobs: Cells at a time.
        progress: Shows the cells.

    Returns:
        One curve per number of steps and arm.

    Raises:
        ConfigError: If the classes cannot arrive in as many equal steps.

    Privacy:
        The arms ``random``, ``herding``, ``all`` and ``finetune`` use real images; the folder stays inside.
    """
    progress, digest = progress or Progress(), _sites_digest(sites)
    classes = sum(load_cohort(path).task.n_classes for path, _ in sites.values())
    for steps in config.steps:
        class_groups(classes, steps, 0)
    cells = [Cell(arm=a, steps=n, seed=s) for n in config.steps for a in config.arms for s in config.seeds]
    todo = [cell for cell in cells if not _answer(out, cell.name(config, digest)).exists()]
    work = partial(run_cell, config=config, sites=dict(sites), out=out, digest=digest)
    done = parallel_map(work, todo, jobs=jobs)
    for _ in progress.track(done, "learning", total=len(cells), completed=len(cells) - len(todo)):
        pass
    patients = sum(len(load_cohort(path).split("test").patients) for path, _ in sites.values())
    curves = make_curves(config, out, digest, patients=patients)
    _write(config, curves, out)
    return curves


def _answer(out: Path, name: str) -> Path:
    return out / "cells" / f"{name}.json"


def _sites_digest(sites: Mapping[str, tuple[Path, int]]) -> str:
    found = [(name, content_digest(path), size) for name, (path, size) in sites.items()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def make_curves(config: ContinualConfig, out: Path, digest: str, *, patients: int) -> tuple[Curve, ...]:
    """Mean over seeds with bootstrap intervals over so many test patients, from the kept cells."""
    curves = []
    for steps in config.steps:
        for arm in config.arms:
            files = [_answer(out, Cell(arm=arm, steps=steps, seed=s).name(config, digest)) for s in config.seeds]
            found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            draws = [load_file(file.with_suffix(".safetensors")) for file in files]
            curves.append(_curve(arm, steps, found, draws, patients))
    return tuple(curves)


def _curve(
    arm: str, steps: int, found: Sequence[Mapping[str, Any]], draws: Sequence[Mapping[str, Tensor]], patients: int
) -> Curve:
    def over_seeds(name: str) -> tuple[Floats, Floats]:
        values = np.array([np.array(one[name], dtype=np.float64) for one in found])
        return values, np.mean([one[name].numpy() for one in draws], axis=0)

    def estimate(values: Floats, drawn: Floats) -> Estimate:
        return percentile_estimate(float(values.mean()), drawn, n=patients)

    accuracy, accuracy_draws = over_seeds("accuracy")
    area, area_draws = over_seeds("auroc")
    first = 0 if np.isfinite(area[:, 0]).all() else 1  # of one class there is no AUROC
    lost, lost_draws = over_seeds("forgetting")
    several = len(found) > 1
    return Curve(
        arm=arm,
        steps=steps,
        seeds=len(found),
        classes=tuple(int(n) for n in np.cumsum([len(group) for group in found[0]["classes"]])),
        images=tuple(round(float(n)) for n in np.mean([one["images"] for one in found], axis=0)),
        accuracy=tuple(estimate(accuracy[:, t], accuracy_draws[t]) for t in range(steps)),
        auroc=tuple(None if t < first else estimate(area[:, t], area_draws[t]) for t in range(steps)),
        average_accuracy=estimate(accuracy.mean(1), accuracy_draws.mean(0)),
        average_auroc=estimate(area[:, first:].mean(1), area_draws[first:].mean(0)) if steps > first else None,
        forgetting=estimate(lost, lost_draws),
        deviation=float(accuracy.mean(1).std(ddof=1)) if several else None,
        last_deviation=float(accuracy[:, -1].std(ddof=1)) if several else None,
        cpu_seconds=float(np.mean([one["cpu_seconds"] for one in found])),
    )


def _write(config: ContinualConfig, curves: Sequence[Curve], out: Path) -> None:
    text = io.StringIO(newline="")
    names = ["steps", "arm", "step", "classes", "images"]
    names += [f"{metric}{end}" for metric in ("accuracy", "auroc") for end in ("", "_low", "_high")]
    table = csv.DictWriter(text, fieldnames=names)
    table.writeheader()
    for curve in curves:
        for t in range(curve.steps):
            line: dict[str, Any] = {"steps": curve.steps, "arm": curve.arm, "step": t + 1}
            line |= {"classes": curve.classes[t], "images": curve.images[t]}
            for metric, found in (("accuracy", curve.accuracy[t]), ("auroc", curve.auroc[t])):
                if found is not None:
                    line |= {metric: round(found.value, 4), f"{metric}_low": round(found.low, 4)}
                    line[f"{metric}_high"] = round(found.high, 4)
            table.writerow(line)
    keep(out / "continual.csv", text.getvalue().encode())
    keep_record(out / "continual.json", {"config": asdict(config), "curves": [asdict(c) for c in curves]})
    keep(out / "continual.html", render_continual(curves, facts=_facts(config)).encode())


def _facts(config: ContinualConfig) -> dict[str, str]:
    return {
        "What is measured": "The classes of several cohorts arrive in steps. After each step a network must tell "
        "all classes so far apart, whatever site they come from: recognition across sites and modalities as "
        "hospitals join one after another, not a diagnosis within one site. Telling two sites apart is easier "
        "than telling two grades of one disease apart, and the figures mix both.",
        "Arms": f"distilled: {config.ipc} images per class, distilled once by {config.method} when the class "
        "arrives and never touched again; a mosaic of four is one image of the memory and counts as four that are "
        "trained on. random and herding: as many real images. all: all real images so far. "
        "finetune: one network trained on with the new real images alone. All but the last are trained from "
        "scratch after every step.",
        "Figures": f"Accuracy is the mean recall over the classes seen (balanced). Mean over {len(config.seeds)} "
        "orders of the classes; 95 % interval by bootstrap over test patients, without the spread over orders, "
        "which the standard deviation gives. Forgetting is the mean fall of a class's recall from its best "
        "earlier step to the last. After a first step of one class every answer is right, and there is no AUROC.",
    }
