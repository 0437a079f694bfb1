"""Arms side by side: networks trained on real, random real and distilled images, tested on real patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.images import ImageSet
from medistill.core.reports import DiagnosticReport
from medistill.errors import ConfigError
from medistill.evaluate.arms import ARMS, OPERATING_POINT, Arms, train_arms
from medistill.evaluate.bootstrap import patient_weights
from medistill.evaluate.judge import Judge
from medistill.evaluate.subgroups import Attributes, number_sites, subgroups
from medistill.progress import Progress
from medistill.registry import NETWORKS, nearest
from medistill.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared.

    Args:
        arms: Training sets: all ``real`` images, as many ``random`` real ones as the release has, the same with
            the soft labels of a network trained on all (``random_soft``), real ones chosen by ``herding``, the
            ``distilled`` set, and the same with ``distilled_hard`` labels.
        networks: Registered network names; every arm trains each of them from scratch.
        seeds: Trainings per arm and network.
        real_epochs: Epochs of the ``real`` arm.
        draws: Bootstrap draws.

    Raises:
        ConfigError: If an arm or a network is unknown, ``random_soft`` is asked for without ``real``, or a number
            is out of range.
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
        if "random_soft" in self.arms and "real" not in self.arms:
            raise ConfigError(
                "The labels of arm random_soft come from a network of arm real. Add 'real' to the arms."
            )
        strange = [name for name in self.networks if name not in NETWORKS.names()]
        if strange:
            raise ConfigError(f"Unknown network {strange[0]!r}.{nearest(strange[0], NETWORKS.names())}")
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ConfigError("Expected at least one of the networks, and each once.")
        if self.seeds < 1 or self.draws < 100 or self.real_epochs < 1:
            raise ConfigError("Expected seeds >= 1, real_epochs >= 1 and draws >= 100.")


def evaluate(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    validation: ImageSet,
    tests: Mapping[str, ImageSet],
    attributes: Mapping[str, Attributes] | None = None,
    config: EvaluationConfig | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> DiagnosticReport:
    """Train every arm with several networks and seeds and test it on real patients.

    All arms but ``real`` are trained by the schedule that the release carries, which was chosen for the distilled
    set. Hard labels of a multilabel task are the soft ones rounded to 0 or 1. Where a patient has several images,
    their scores are joined to a decision about the patient as well.

    Args:
        distilled: The release.
        train: Real images of training patients, for the ``real`` arm and those chosen from it.
        validation: Patients on whom the operating point is chosen.
        tests: Evaluation splits by name; nothing is chosen on them.
        attributes: For some splits, what is known of each image, as ``Cohort.attributes`` gives it; the groups
            are reported apart.
        config: Arms, networks, seeds.
        seed: Public seed.
        compute: Device, precision and workers; the CPU by default.
        progress: Shows the trainings.

    Returns:
        Mean over seeds of every metric, with 95 % intervals by bootstrap over the split's patients; network after
        network, each with all arms. Differences of arms are taken draw by draw.

    Privacy:
        Reads non-released data. The numbers are measurements, not guarantees.
    """
    config, compute, progress = config or EvaluationConfig(), compute or Compute(), progress or Progress()
    judged_on = {name: t.images.numpy() for name, t in tests.items()}
    arms = Arms(
        distilled=distilled,
        train=train,
        real_epochs=config.real_epochs,
        seed=seed,
        compute=compute,
        progress=progress,
    )
    trained = train_arms(
        arms,
        config.arms,
        networks=config.networks,
        repeats=config.seeds,
        apply_to={OPERATING_POINT: validation.images.numpy(), **judged_on},
    )
    known = attributes or {}
    sites = number_sites([(found, tests[name].patients) for name, found in known.items()])
    judges = {
        name: Judge(
            split=name,
            test=test,
            validation=validation,
            groups=tuple(
                subgroups(known.get(name, {}), test.patients, test.targets.double().numpy(), sites=sites)
            ),
            weights=patient_weights(test.patients, draws=config.draws, seed=derive_seed(seed, "bootstrap", name)),
        )
        for name, test in tests.items()
    }
    judged = [
        judge.judge(network, arm, trained[network, arm])
        for network in config.networks
        for arm in config.arms
        for judge in judges.values()
    ]
    return DiagnosticReport(
        arms=tuple(one.result for one in judged),
        class_names=train.task.class_names,
        release=distilled.fingerprint(),
        differences=tuple(difference for judge in judges.values() for difference in judge.differences(judged)),
        subgroups=tuple(group for one in judged for group in one.groups),
    )
