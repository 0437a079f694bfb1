"""Arms side by side: networks trained on real, random real and distilled images, tested on real patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Schedule, ViewLabels
from medistill.core.images import ImageSet
from medistill.core.reports import ArmResult, DiagnosticReport, Estimate
from medistill.core.task import TaskKind
from medistill.distill.start import random_images
from medistill.errors import ConfigError
from medistill.evaluate.bootstrap import over_networks, patient_weights, percentile_estimate
from medistill.evaluate.metrics import class_aurocs, operating_points, task_metrics
from medistill.progress import Progress
from medistill.registry import NETWORKS, nearest
from medistill.seeds import derive_seed
from medistill.training.students import Floats, Student, train_students
from medistill.training.views import hard_views

_OPERATING_POINT = "(operating point)"
ARMS = ("real", "random", "distilled", "distilled_hard")
REAL_SCHEDULE = Schedule(epochs=8, learning_rate=1e-3, optimizer="adam", batch_size=64)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared.

    Args:
        arms: Training sets: all ``real`` images, as many ``random`` real ones as the release has, the
            ``distilled`` set, and the same with ``distilled_hard`` labels.
        networks: Registered network names; every arm trains each of them from scratch.
        seeds: Trainings per arm and network.
        real_epochs: Epochs of the ``real`` arm.
        draws: Bootstrap draws.

    Raises:
        ConfigError: If an arm or a network is unknown, or a number is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    arms: tuple[str, ...] = ARMS
    networks: tuple[str, ...] = ("convnet",)
    seeds: int = 3
    real_epochs: int = 8
    draws: int = 1000

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        known = f"Known: {', '.join(ARMS)}."
        if unknown:
            raise ConfigError(f"Unknown arms {', '.join(unknown)}.{nearest(unknown[0], ARMS)} {known}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"Expected at least one of the arms, and each once. {known}")
        strange = [name for name in self.networks if name not in NETWORKS.names()]
        if strange:
            raise ConfigError(f"Unknown network {strange[0]!r}.{nearest(strange[0], NETWORKS.names())}")
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ConfigError("Expected at least one of the networks, and each once.")
        if self.seeds < 1 or self.draws < 100 or self.real_epochs < 1:
            raise ConfigError("Expected seeds >= 1, real_epochs >= 1 and draws >= 100.")


@dataclass(frozen=True, kw_only=True)
class _TrainingSet:
    images: Tensor
    soft_labels: Tensor
    schedule: Schedule
    views: ViewLabels | None = None


def evaluate(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    validation: ImageSet,
    tests: Mapping[str, ImageSet],
    config: EvaluationConfig | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> DiagnosticReport:
    """Train every arm with several networks and seeds and test it on real patients.

    The ``random`` and ``distilled_hard`` arms are trained by the schedule that the release carries, which was
    chosen for the distilled set. Hard labels of a multilabel task are the soft ones rounded to 0 or 1.

    Args:
        distilled: The release.
        train: Real images of training patients, for the ``real`` and ``random`` arms.
        validation: Patients on whom the operating point is chosen.
        tests: Evaluation splits by name; nothing is chosen on them.
        config: Arms, networks, seeds.
        seed: Public seed.
        compute: Device, precision and workers; the CPU by default.
        progress: Shows the trainings.

    Returns:
        Mean over seeds of every metric, with 95 % intervals by bootstrap over the split's patients; network after
        network, each with all arms.

    Privacy:
        Reads non-released data. The numbers are measurements, not guarantees.
    """
    progress, config = progress or Progress(), config or EvaluationConfig()
    kinds = [(network, arm) for network in config.networks for arm in config.arms]
    jobs = [(*kind, repeat) for kind in kinds for repeat in range(config.seeds)]
    judged_on = {
        _OPERATING_POINT: validation.images.numpy(),
        **{name: t.images.numpy() for name, t in tests.items()},
    }
    students = [
        replace(_student(job, distilled, train, config, seed, judged_on), compute=compute or Compute())
        for job in jobs
    ]
    outputs: dict[tuple[str, str, str], list[_Output]] = {}
    seconds: dict[tuple[str, str], float] = dict.fromkeys(kinds, 0.0)
    sizes = {arm: len(student.images) for (_, arm, _), student in zip(jobs, students, strict=True)}
    trained = progress.track(train_students(students), "evaluating", total=len(jobs))
    for (network, arm, _), result in zip(jobs, trained, strict=True):
        seconds[network, arm] += result.cpu_seconds / config.seeds
        found = {name: values.astype(np.float64) for name, values in result.probabilities.items()}
        cuts = operating_points(train.task.kind, found[_OPERATING_POINT], validation.targets.double().numpy())
        for name in tests:
            output = _Output(probabilities=found[name], thresholds=cuts)
            outputs.setdefault((network, arm, name), []).append(output)
    results = [
        _arm_result(
            arm=arm,
            network=network,
            split=name,
            outputs=outputs[network, arm, name],
            test=tests[name],
            images=sizes[arm],
            seconds=seconds[network, arm],
            config=config,
            seed=seed,
        )
        for network, arm in kinds
        for name in tests
    ]
    return DiagnosticReport(
        arms=tuple(results), class_names=train.task.class_names, release=distilled.fingerprint()
    )


@dataclass(frozen=True, kw_only=True)
class _Output:
    probabilities: NDArray[np.float64]
    thresholds: tuple[float, ...]


def _student(
    job: tuple[str, str, int],
    distilled: DistilledSet,
    train: ImageSet,
    config: EvaluationConfig,
    seed: int,
    apply_to: Mapping[str, Floats],
) -> Student:
    network, arm, repeat = job
    chosen = _training_set(arm, distilled, train, config, derive_seed(seed, "random", repeat))
    return Student(
        network=NETWORKS.load(network),
        task=train.task,
        images=chosen.images.numpy(),
        soft_labels=chosen.soft_labels.numpy(),
        schedule=chosen.schedule,
        weights_seed=derive_seed(seed, "student", arm, repeat),
        order_seed=derive_seed(seed, "order", arm, repeat),
        apply_to=apply_to,
        views=chosen.views,
    )


def _training_set(
    arm: str, distilled: DistilledSet, train: ImageSet, config: EvaluationConfig, seed: int
) -> _TrainingSet:
    if arm == "real":
        schedule = Schedule(**{**REAL_SCHEDULE.__dict__, "epochs": config.real_epochs})
        return _TrainingSet(images=train.images, soft_labels=train.targets, schedule=schedule)
    if arm == "random":
        chosen = random_images(train, ipc=distilled.ipc, seed=seed)
        return _TrainingSet(images=chosen.images, soft_labels=chosen.targets, schedule=distilled.schedule)
    labels = distilled.soft_labels
    if arm == "distilled_hard" and distilled.task.kind is TaskKind.MULTILABEL:
        labels = (labels >= 0.5).float()
    elif arm == "distilled_hard":
        labels = F.one_hot(distilled.hard_labels, distilled.task.n_classes).float()
    views = distilled.views if arm == "distilled" else hard_views(distilled.views, labels)
    return _TrainingSet(images=distilled.images, soft_labels=labels, schedule=distilled.schedule, views=views)


def _arm_result(
    *,
    arm: str,
    network: str,
    split: str,
    outputs: list[_Output],
    test: ImageSet,
    images: int,
    seconds: float,
    config: EvaluationConfig,
    seed: int,
) -> ArmResult:
    weights = patient_weights(test.patients, draws=config.draws, seed=derive_seed(seed, "bootstrap", split))
    plain, kind = np.ones((1, len(test))), test.task.kind
    targets = test.targets.double().numpy()
    values = [task_metrics(kind, o.probabilities, targets, plain, thresholds=o.thresholds) for o in outputs]
    draws = [task_metrics(kind, o.probabilities, targets, weights, thresholds=o.thresholds) for o in outputs]
    estimates, deviations = over_networks(values, draws, n=len(test.unique_patients))
    return ArmResult(
        arm=arm,
        network=network,
        split=split,
        images=images,
        seeds=len(outputs),
        metrics=estimates,
        seed_deviation=deviations,
        cpu_seconds=round(seconds, 2),
        class_auroc=_class_auroc(outputs, test, plain, weights),
    )


def _class_auroc(
    outputs: list[_Output], test: ImageSet, plain: NDArray[np.float64], weights: NDArray[np.float64]
) -> Mapping[str, Estimate]:
    """Of every class against the rest; nothing for two classes, which have the same."""
    if test.task.kind is TaskKind.BINARY:
        return {}
    targets = test.targets.double().numpy()
    value = np.mean([class_aurocs(o.probabilities, targets, plain)[:, 0] for o in outputs], axis=0)
    draws = np.mean([class_aurocs(o.probabilities, targets, weights) for o in outputs], axis=0)
    patients = len(test.unique_patients)
    named = zip(test.task.class_names, value, draws, strict=True)
    return {name: percentile_estimate(float(v), drawn, n=patients) for name, v, drawn in named}
