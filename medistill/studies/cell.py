"""One cell of a comparison, in a process of its own: its CPU time and its memory are those of this work alone."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Schedule, ViewLabels
from medistill.core.images import ImageSet, averaged
from medistill.core.protocols import Synthetic
from medistill.core.task import Task
from medistill.distill import distill
from medistill.distill.schedule import DEFAULT_SCHEDULE, choose_schedule
from medistill.errors import ConfigError, MedistillError
from medistill.evaluate.arms import REAL_SCHEDULE
from medistill.evaluate.bootstrap import patient_weights
from medistill.evaluate.metrics import METRICS, operating_points, task_metrics
from medistill.ingest import load_cohort
from medistill.networks.convnet import ConvNet
from medistill.privacy import OpenCurator
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.release.durable import replace_durably
from medistill.seeds import derive_seed
from medistill.studies.budget import Cost, probe, share_budget
from medistill.studies.records import keep_record
from medistill.training.students import Student, train_student, train_students
from medistill.training.views import hard_views, hardened, pictures

#: The schedule by which all methods are compared as well, beside the one chosen for each.
COMMON_SCHEDULE = Schedule(epochs=300, learning_rate=0.01)
#: Method names of the baselines: as many random real images, and all of them.
RANDOM, REAL = "random", "real"
_SIDE, _SOLID_SIDE, _CHUNK = 32, 16, 512
_ALONE = Compute(jobs=1)
_PROBE_LIMIT = 3.0

Request = Mapping[str, Any]


def main() -> None:
    """Do what the request file in the first argument says, and write the answer to the second one."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(sys.argv[2])
    try:
        warm_up()
        found = probe_cost(request) if request["kind"] == "probe" else run(request, target)
        answer = {"status": "done", **found}
    except Exception as error:
        answer = {"status": "failed", "error": error_line(error)}
    answer |= {"cpu_seconds": round(time.process_time(), 2), "peak_rss_mb": peak_rss_mb()}
    keep_record(target, answer)


def error_line(error: Exception) -> str:
    """One line about what went wrong; of errors that are not ours only where, as their text can hold a path."""
    if isinstance(error, MedistillError):
        return " ".join(str(error).split())
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "medistill" in Path(f.filename).parts]
    where = f" in {Path(ours[-1].filename).stem}, line {ours[-1].lineno}" if ours else ""
    said = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{where}{said}"


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, in MB.

    Linux lets ``getrusage`` begin with what the parent held when it started this process; the high-water mark of
    the address space does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) / 1024)
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def warm_up() -> None:
    """Train two networks on a few pixels: what torch loads at the first step is no method's cost."""
    task, images = Task.single_label(("0", "1")), np.zeros((2, 1, 16, 16), dtype=np.float32)
    for optimizer in ("adam", "sgd"):
        schedule = Schedule(epochs=1, learning_rate=0.01, optimizer=optimizer)
        student = Student(
            network=ConvNet, task=task, images=images, soft_labels=np.eye(2, dtype=np.float32), schedule=schedule,
            weights_seed=0, order_seed=0, apply_to={"again": images}, compute=_ALONE,
        )  # fmt: skip
        train_student(student)


def _part(request: Request, split: str) -> ImageSet:
    return load_cohort(Path(request["cohort"])).split(split).images(int(request["size"]))


# -- what a distiller costs ------------------------------------------------------------------------------------


def probe_cost(request: Request) -> dict[str, Any]:
    """CPU seconds of one distiller of a recipe as a straight line in its iterations."""
    budget, name = float(request["budget_seconds"]), str(request["method"])
    _limit_cpu(budget)
    curator = OpenCurator(_part(request, "train"))

    def run_short(iterations: int, progress: Progress) -> None:
        settings = {name: {**request["settings"], "iterations": iterations}}
        distill(
            curator, method=name, ipc=request["ipc"], seed=0, settings=settings, compute=_ALONE, looks=1,
            progress=progress,
        )  # fmt: skip

    cost, runs = probe(run_short, budget=budget)
    return {"cost": asdict(cost), "runs": [list(one) for one in runs]}


def _limit_cpu(budget: float) -> None:
    """Stop a probe whose fixed cost alone is far beyond the budget."""

    def stop(number: int, frame: object) -> None:
        raise ConfigError(
            f"{_PROBE_LIMIT:g} times the budget of {budget:g} CPU seconds were spent on a few iterations. Raise "
            "budget_seconds or lower the settings that are paid once."
        )

    signal.signal(signal.SIGXCPU, stop)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = int(time.process_time() + _PROBE_LIMIT * budget) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def budgeted(request: Request) -> dict[str, dict[str, Any]]:
    """The settings of a request with the iterations that its budget allows."""
    settings = {name: dict(values) for name, values in request["settings"].items()}
    costs = {name: Cost(**cost) for name, cost in request["costs"].items()}
    if costs:
        found = share_budget(costs, float(request["budget_seconds"]), request["share"])
        for name, iterations in found.items():
            settings.setdefault(name, {})["iterations"] = iterations
    return settings


# -- one cell --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A training set, and the schedule that its method brings along."""

    synthetic: Synthetic
    distilled: DistilledSet | None


def run(request: Request, target: Path) -> dict[str, Any]:
    """Distil, train students, test them, and look for the nearest real images."""
    before, method = peak_rss_mb(), str(request["method"])
    train = _part(request, "train")
    began, wall = time.process_time(), time.perf_counter()
    made = _make(request, train)
    answer: dict[str, Any] = {
        "distill_cpu_seconds": round(time.process_time() - began, 3),
        "distill_seconds": round(time.perf_counter() - wall, 3),
        "distill_peak_rss_mb": peak_rss_mb(),
        "start_rss_mb": before,
        "images": len(made.synthetic.images),
        "recipe": made.distilled.recipe.to_json() if made.distilled else None,
        "from_real": made.distilled is None or made.distilled.recipe.starts_from_real,
    }
    tensors: dict[str, Tensor] = {}
    if method != REAL:
        if len(load_cohort(Path(request["cohort"])).split("holdout")):
            answer["nearest"] = nearest(
                pictures(made.synthetic.images, made.synthetic.views), train, _part(request, "holdout")
            )
        tensors |= {"images": made.synthetic.images, "labels": made.synthetic.hard_labels}
    test, validation = _part(request, "test"), _part(request, "validation")
    answer["patients"], answer["networks"] = len(test.unique_patients), {}
    weights = patient_weights(test.patients, draws=int(request["draws"]), seed=derive_seed(0, "bootstrap"))
    for name in request["networks"]:
        judge = _Judge(request=request, network=name, validation=validation, test=test, weights=weights)
        answer["networks"][name], draws = judge.judge(made.synthetic)
        tensors |= draws
    replace_durably(target.with_suffix(".safetensors"), save({k: v.contiguous() for k, v in tensors.items()}))
    return answer


def _make(request: Request, train: ImageSet) -> _Made:
    if request["method"] == REAL:
        whole = Synthetic(images=train.images, soft_labels=train.targets, hard_labels=train.classes)
        return _Made(synthetic=whole, distilled=None)
    made = distill(
        OpenCurator(train),
        method="coreset" if request["method"] == RANDOM else request["method"],
        ipc=int(request["ipc"]),
        seed=int(request["seed"]),
        settings=budgeted(request),
        compute=_ALONE,
        looks=1,
    ).distilled
    own = None if made.schedule == DEFAULT_SCHEDULE else made.schedule
    synthetic = Synthetic(
        images=made.images,
        soft_labels=made.soft_labels,
        hard_labels=made.hard_labels,
        schedule=own,
        views=made.views,
    )
    return _Made(synthetic=synthetic, distilled=made)


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """What students are taught: labels of the images, or of crops of them."""

    targets: Tensor
    views: ViewLabels | None = None

    def same_as(self, other: _Labels) -> bool:
        """Whether students would learn the same."""
        return self.views is None and other.views is None and torch.equal(self.targets, other.targets)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Trains students of one architecture and tests them."""

    request: Request
    network: str
    validation: ImageSet
    test: ImageSet
    weights: NDArray[np.float64]

    def judge(self, made: Synthetic) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Every protocol and kind of label: figures for the answer, bootstrap draws as tensors."""
        seed, whole = int(self.request["seed"]), self.request["method"] == REAL
        if whole:
            schedules = {"chosen": replace(REAL_SCHEDULE, epochs=int(self.request["real_epochs"]))}
        else:
            chosen = choose_schedule(
                made, self.validation, network=NETWORKS.load(self.network), seed=derive_seed(seed, "schedule"),
                compute=_ALONE, progress=Progress(),
            )  # fmt: skip
            schedules = {"chosen": chosen[0].schedule, "common": COMMON_SCHEDULE}
        labels = {"soft": _Labels(targets=made.soft_labels, views=made.views)}
        if not whole:
            hard = hardened(made.soft_labels, made.hard_labels, self.test.task)
            labels["hard"] = _Labels(targets=hard, views=hard_views(made.views, hard))
        arms: dict[str, Any] = {}
        draws: dict[str, Tensor] = {}
        trained: list[tuple[Schedule, _Labels, dict[str, Any], NDArray[np.float64]]] = []
        for protocol, schedule in schedules.items():
            for kind, taught in labels.items():
                same = [t for t in trained if t[0] == schedule and t[1].same_as(taught)]
                if not same:  # otherwise the same students would come out again
                    trained.append((schedule, taught, *self._train(made.images, taught, schedule)))
                    same = trained[-1:]
                _, _, arms[f"{protocol}/{kind}"], found = same[0]
                draws[f"draws/{self.network}/{protocol}/{kind}"] = torch.from_numpy(found).clone()
        return {"schedule": asdict(schedules["chosen"]), "arms": arms}, draws

    def _train(
        self, images: Tensor, taught: _Labels, schedule: Schedule
    ) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """Figures, and bootstrap draws of shape ``(metrics, draws)``, both averaged over students."""
        seed, task = int(self.request["seed"]), self.test.task
        students = [
            Student(
                network=NETWORKS.load(self.network),
                task=task,
                images=images.numpy(),
                soft_labels=taught.targets.numpy(),
                views=taught.views,
                schedule=schedule,
                weights_seed=derive_seed(seed, "student", number),
                order_seed=derive_seed(seed, "order", number),
                apply_to={"validation": self.validation.images.numpy(), "test": self.test.images.numpy()},
                compute=_ALONE,
            )
            for number in range(int(self.request["students"]))
        ]
        one, truth = np.ones((1, len(self.test))), self.test.targets.double().numpy()
        values, draws, seconds = [], [], 0.0
        for result in train_students(students):
            found = {name: p.astype(np.float64) for name, p in result.probabilities.items()}
            cuts = operating_points(task.kind, found["validation"], self.validation.targets.double().numpy())
            value = task_metrics(task.kind, found["test"], truth, one, thresholds=cuts)
            draw = task_metrics(task.kind, found["test"], truth, self.weights, thresholds=cuts)
            values.append([float(value[metric][0]) for metric in METRICS])
            draws.append(np.stack([draw[metric] for metric in METRICS]))
            seconds += result.cpu_seconds / len(students)
        figures = dict(zip(METRICS, np.mean(values, axis=0).tolist(), strict=True))
        return {"metrics": figures, "cpu_seconds": round(seconds, 2)}, np.mean(draws, axis=0)


# -- the leak check --------------------------------------------------------------------------------------------


def nearest(released: Tensor, train: ImageSet, held_out: ImageSet) -> dict[str, float]:
    """Mean correlation of released images with their nearest training and their nearest held-out image.

    A larger pool has a nearer nearest image by chance, so the train images are dealt into groups as large as the
    held-out pool and the groups averaged; ``train_all`` is the nearest of all of them.

    Args:
        released: Shape ``(m, …)``.
        train: Images that were distilled from.
        held_out: Images of other patients.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, "nearest"))
    size = min(len(train), len(held_out))
    order = torch.randperm(len(train), generator=generator)
    groups = [order[start : start + size] for start in range(0, len(train) - size + 1, size)]
    others = torch.randperm(len(held_out), generator=generator)[:size]
    unit = _unit(released)
    near = [float(_largest(unit, train.images[group]).mean()) for group in groups]
    far = float(_largest(unit, held_out.images[others]).mean())
    of_train = sum(near) / len(near)
    return {
        "train": of_train,
        "held_out": far,
        "gap": of_train - far,
        "train_all": float(_largest(unit, train.images).mean()),
        "pool": size,
    }


def _unit(images: Tensor) -> Tensor:
    """Images reduced to 32 px, and volumes to 16, centred and of length one, one row each."""
    flat = averaged(images, plane=_SIDE, solid=_SOLID_SIDE).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return unit


def _largest(unit: Tensor, pool: Tensor) -> Tensor:
    """Largest correlation of every row with an image of the pool, chunk by chunk."""
    best = torch.full((len(unit),), -1.0)
    for start in range(0, len(pool), _CHUNK):
        best = torch.maximum(best, (unit @ _unit(pool[start : start + _CHUNK]).T).amax(1))
    return best
