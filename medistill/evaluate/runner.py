"""Arms side by side: networks trained on real, random real and distilled images, tested on real patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.images import ImageSet
from medistill.core.reports import ArmResult, DiagnosticReport
from medistill.distill.start import random_images
from medistill.errors import ConfigError
from medistill.evaluate.bootstrap import patient_weights, percentile_estimate
from medistill.evaluate.metrics import METRICS, diagnostic_metrics, operating_point
from medistill.progress import Progress
from medistill.registry import NETWORKS, nearest
from medistill.seeds import derive_seed
from medistill.training.students import Floats, Student, train_students

_OPERATING_POINT = "(operating point)"
ARMS = ("real", "random", "distilled", "distilled_hard")
REAL_SCHEDULE = Schedule(epochs=8, learning_rate=1e-3, optimizer="adam", batch_size=64)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared.

    Args:
        arms: Training sets: all ``real`` images, as many ``random`` real ones as the release has, the
            ``distilled`` set, and the same with ``distilled_hard`` labels.
        network: Registered network name, trained from scratch.
        seeds: Networks per arm.
        real_epochs: Epochs of the ``real`` arm.
        draws: Bootstrap draws.

    Raises:
        ConfigError: If an arm or the network is unknown, or a number is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    arms: tuple[str, ...] = ARMS
    network: str = "convnet"
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
        if self.network not in NETWORKS.names():
            raise ConfigError(f"Unknown network {self.network!r}.{nearest(self.network, NETWORKS.names())}")
        if self.seeds < 1 or self.draws < 100 or self.real_epochs < 1:
            raise ConfigError("Expected seeds >= 1, real_epochs >= 1 and draws >= 100.")


@dataclass(frozen=True, kw_only=True)
class _TrainingSet:
    images: Tensor
    soft_labels: Tensor
    schedule: Schedule


def evaluate(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    validation: ImageSet,
    tests: Mapping[str, ImageSet],
    config: EvaluationConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DiagnosticReport:
    """Train every arm with several seeds and test it on real patients.

    The ``random`` and ``distilled_hard`` arms are trained by the schedule that the release carries, which was
    chosen for the distilled set.

    Args:
        distilled: The release.
        train: Real images of training patients, for the ``real`` and ``random`` arms.
        validation: Patients on whom the operating point is chosen.
        tests: Evaluation splits by name; nothing is chosen on them.
        config: Arms, network, seeds.
        seed: Public seed.
        progress: Shows the trainings.

    Returns:
        Mean over seeds of every metric, with 95 % intervals by bootstrap over the split's patients.

    Privacy:
        Reads non-released data. The numbers are measurements, not guarantees.
    """
    progress, config = progress or Progress(), config or EvaluationConfig()
    jobs = [(arm, repeat) for arm in config.arms for repeat in range(config.seeds)]
    judged_on = {
        _OPERATING_POINT: validation.images.numpy(),
        **{name: t.images.numpy() for name, t in tests.items()},
    }
    students = [_student(arm, repeat, distilled, train, config, seed, judged_on) for arm, repeat in jobs]
    outputs: dict[tuple[str, str], list[_Output]] = {}
    seconds: dict[str, float] = dict.fromkeys(config.arms, 0.0)
    sizes = {arm: len(student.images) for (arm, _), student in zip(jobs, students, strict=True)}
    trained = progress.track(train_students(students), "evaluating", total=len(jobs))
    for (arm, _), result in zip(jobs, trained, strict=True):
        seconds[arm] += result.cpu_seconds / config.seeds
        found = {name: values.astype(np.float64) for name, values in result.probabilities.items()}
        cut = (
            operating_point(found[_OPERATING_POINT], validation.classes.numpy())
            if train.task.n_classes == 2
            else None
        )
        for name in tests:
            outputs.setdefault((arm, name), []).append(_Output(probabilities=found[name], threshold=cut))
    results = [
        _arm_result(
            arm=arm,
            split=name,
            outputs=outputs[arm, name],
            test=tests[name],
            images=sizes[arm],
            seconds=seconds[arm],
            config=config,
            seed=seed,
        )
        for arm in config.arms
        for name in tests
    ]
    return DiagnosticReport(
        arms=tuple(results), class_names=train.task.class_names, release=distilled.fingerprint()
    )


@dataclass(frozen=True, kw_only=True)
class _Output:
    probabilities: NDArray[np.float64]
    threshold: float | None


def _student(
    arm: str,
    repeat: int,
    distilled: DistilledSet,
    train: ImageSet,
    config: EvaluationConfig,
    seed: int,
    apply_to: Mapping[str, Floats],
) -> Student:
    chosen = _training_set(arm, distilled, train, config, derive_seed(seed, "random", repeat))
    return Student(
        network=NETWORKS.load(config.network),
        task=train.task,
        images=chosen.images.numpy(),
        soft_labels=chosen.soft_labels.numpy(),
        schedule=chosen.schedule,
        weights_seed=derive_seed(seed, "student", arm, repeat),
        order_seed=derive_seed(seed, "order", arm, repeat),
        apply_to=apply_to,
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
    if arm == "distilled_hard":
        labels = F.one_hot(distilled.hard_labels, distilled.task.n_classes).float()
    return _TrainingSet(images=distilled.images, soft_labels=labels, schedule=distilled.schedule)


def _arm_result(
    *,
    arm: str,
    split: str,
    outputs: list[_Output],
    test: ImageSet,
    images: int,
    seconds: float,
    config: EvaluationConfig,
    seed: int,
) -> ArmResult:
    weights = patient_weights(test.patients, draws=config.draws, seed=derive_seed(seed, "bootstrap", split))
    plain = np.ones((1, len(test)))
    classes = test.classes.numpy()
    values = [diagnostic_metrics(o.probabilities, classes, plain, threshold=o.threshold) for o in outputs]
    draws = [diagnostic_metrics(o.probabilities, classes, weights, threshold=o.threshold) for o in outputs]
    patients = len(test.unique_patients)
    estimates, deviations = {}, {}
    for metric in METRICS:
        per_seed = np.array([value[metric][0] for value in values])
        per_draw = np.mean([draw[metric] for draw in draws], axis=0)
        estimates[metric] = percentile_estimate(float(per_seed.mean()), per_draw, n=patients)
        deviations[metric] = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
    return ArmResult(
        arm=arm,
        network=config.network,
        split=split,
        images=images,
        seeds=len(outputs),
        metrics=estimates,
        seed_deviation=deviations,
        cpu_seconds=round(seconds, 2),
    )
