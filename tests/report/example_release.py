"""Made-up records that look like those of a real run; no number in here was measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medistill.core.distilled import DistilledSet, Recipe, Schedule, Step
from medistill.core.guarantee import PrivacyStatement
from medistill.core.reports import (
    ArmResult,
    AttackOutcome,
    AuditReport,
    ControlOutcome,
    DiagnosticReport,
    Difference,
    Estimate,
    SubgroupResult,
    Verdict,
)
from medistill.core.task import Task
from medistill.distill.watch import Look, eight_bit, shown_images

TWO = ("no finding", "pneumonia")
THREE = ("normal", "benign lesion", "melanoma")
PRIVATE = PrivacyStatement(
    epsilon=3.0,
    delta=1e-5,
    accountants=("PLD", "RDP"),
    assumptions=(
        "Noise was drawn from the operating system and is not kept.",
        "Image size, intensity scaling and class counts were chosen without looking at the patients.",
    ),
)
OPEN = PrivacyStatement.nothing_proved("the method reads real images directly.")


def pictures(task: Task, ipc: int, *, size: int, channels: int) -> Tensor:
    """Soft discs on noise, one kind per class."""
    generator = torch.Generator().manual_seed(7)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = []
    for c in range(task.n_classes):
        for i in range(ipc):
            lungs = torch.exp(-((x.abs() - 0.42) ** 2 / 0.06 + (y + 0.05) ** 2 / 0.3))
            spot = torch.exp(-((x - 0.4 + 0.05 * i) ** 2 + (y - 0.3) ** 2) / 0.02) * c
            noise = 0.15 * torch.rand(channels, size, size, generator=generator)
            images.append((0.65 - 0.5 * lungs + 0.3 * spot + noise).clamp(0, 1))
    return torch.stack(images)


def distilled_set(
    class_names: tuple[str, ...] = TWO,
    *,
    ipc: int = 10,
    size: int = 16,
    channels: int = 1,
    privacy: PrivacyStatement = OPEN,
    init: str = "noise",
) -> DistilledSet:
    """A set of ``ipc`` images per class."""
    task = Task.single_label(class_names)
    generator = torch.Generator().manual_seed(3)
    hard = torch.arange(task.n_classes).repeat_interleave(ipc)
    logits = 2.5 * torch.eye(task.n_classes)[hard] + torch.randn(len(hard), task.n_classes, generator=generator)
    settings = {"init": init, "iterations": 500, "learning_rate": 1.0}
    steps = (
        Step(distiller="distribution_matching", settings=settings),
        Step(distiller="kernel_ridge", settings={"width": 128}),
    )
    return DistilledSet(
        images=pictures(task, ipc, size=size, channels=channels),
        soft_labels=logits.softmax(1),
        hard_labels=hard,
        ipc=ipc,
        task=task,
        recipe=Recipe(steps=steps, ipc=ipc, seed=20, version="0.1.0"),
        schedule=Schedule(epochs=300, learning_rate=0.01),
        privacy=privacy,
    )


def estimate(value: float, half: float = 0.04, n: int = 217) -> Estimate:
    """An estimate with a symmetric interval inside [0, 1]."""
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half), confidence=0.95, n=n)


def controls(*, passed: bool = True) -> tuple[ControlOutcome, ...]:
    """A positive and a negative control."""
    observed = "AUROC 0.996" if passed else "AUROC 0.61"
    return (
        ControlOutcome(
            name="release of all real images", expected="AUROC ≥ 0.99", observed=observed, passed=passed
        ),
        ControlOutcome(
            name="distilled from other patients",
            expected="interval holds 0.5",
            observed="0.507 [0.431, 0.583]",
            passed=True,
        ),
    )


def attack(
    name: str, question: str, auroc: float | None, *, verdict: Verdict = Verdict.PASS, passed: bool = True
) -> AttackOutcome:
    """One attack with its controls."""
    return AttackOutcome(
        attack=name,
        question=question,
        auroc=None if auroc is None else estimate(auroc, 0.055),
        tpr_at_fpr={"0.1": estimate(0.12), "0.01": None} if auroc is not None else {},
        p_value=0.31,
        minimum_detectable_auroc=None if auroc is None else 0.578,
        findings={"copies_found": 0.0} if auroc is None else {},
        controls=controls(passed=passed),
        verdict=verdict,
        summary="Members and others could not be told apart." if auroc else "No released image is a copy.",
    )


def audit_report(distilled: DistilledSet, verdict: Verdict = Verdict.PASS) -> AuditReport:
    """Three attacks; the tracing attack carries the verdict."""
    passed = verdict is not Verdict.INVALID
    auroc = 0.71 if verdict is Verdict.FAIL else 0.521
    return AuditReport(
        outcomes=(
            attack("copy_search", "Is a released image a copy or a blend of a patient's images?", None),
            attack(
                "tracing", "Did this patient contribute to the release?", auroc, verdict=verdict, passed=passed
            ),
            attack("nearest_neighbour", "Is the release closer to members than to other patients?", 0.508),
        ),
        verdict=verdict,
        threat_model="Holds the release, all images of the patient in question, and public X-rays.",
        members=217,
        non_members=213,
        not_tested=("attribute inference (sex, age band, site)", "reconstruction by inversion"),
        release=distilled.fingerprint(),
    )


def arm(name: str, images: int, auroc: float, *, split: str = "test") -> ArmResult:
    """One row of the diagnosis."""
    return ArmResult(
        arm=name,
        network="convnet",
        split=split,
        images=images,
        seeds=3,
        metrics={
            "auroc": estimate(auroc, 0.03, n=403),
            "diagnostic_sensitivity": estimate(auroc - 0.08),
            "specificity": estimate(auroc - 0.05),
            "harmonic_mean": estimate(auroc - 0.06),
            "balanced_accuracy": estimate(auroc - 0.07),
        },
        seed_deviation={"auroc": 0.006},
        cpu_seconds=12.5,
    )


def diagnostic_report(distilled: DistilledSet) -> DiagnosticReport:
    """Four arms on the test split and two on another site."""
    m = len(distilled)
    return DiagnosticReport(
        arms=(
            arm("real", 4321, 0.951),
            arm("random", m, 0.742),
            arm("distilled", m, 0.912),
            arm("distilled_hard", m, 0.886),
            arm("real", 4321, 0.903, split="other_site"),
            arm("distilled", m, 0.871, split="other_site"),
        ),
        class_names=distilled.task.class_names,
        release=distilled.fingerprint(),
    )


def full_diagnostic_report(
    distilled: DistilledSet, *, networks: tuple[str, ...] = ("convnet", "resnet18")
) -> DiagnosticReport:
    """All arms with all that is measured, as a complete evaluation gives it."""
    m, names = len(distilled), distilled.task.class_names
    aurocs = {
        "real": (4321, 0.951),
        "random": (m, 0.742),
        "random_soft": (m, 0.801),
        "herding": (m, 0.775),
        "distilled": (m, 0.912),
        "distilled_hard": (m, 0.886),
    }
    arms = [
        full_arm(name, network, images, auroc - drop, split=split, class_names=names)
        for network in networks
        for name, (images, auroc) in aurocs.items()
        for split, drop in (("test", 0.0), ("other_site", 0.04))
    ]
    return DiagnosticReport(
        arms=tuple(arms),
        class_names=names,
        release=distilled.fingerprint(),
        differences=tuple(one for network in networks for one in differences(network)),
        subgroups=tuple(
            one for network in networks for arm in ("real", "random", "distilled") for one in groups(network, arm)
        ),
    )


def full_arm(
    name: str, network: str, images: int, auroc: float, *, split: str, class_names: tuple[str, ...]
) -> ArmResult:
    """One row with calibration and with decisions per patient."""
    plain = arm(name, images, auroc, split=split)
    metrics = {
        **plain.metrics,
        "average_precision": estimate(auroc - 0.1),
        "ece": estimate(1 - auroc, 0.015),
    }
    middles = [(i + 0.5) / 15 for i in range(15)]
    lean = 1 - auroc  # the worse, the too surer
    bins = [(x, min(1.0, max(0.0, x + lean * (0.5 - x))), (1 + 9 * abs(2 * x - 1) ** 3) / 48.0) for x in middles]
    whole = sum(share for *_, share in bins)
    rules = {"mean": 0.012, "max": -0.02, "vote": -0.004}
    return replace(
        plain,
        network=network,
        metrics=metrics,
        seed_deviation=dict.fromkeys(metrics, 0.006),
        class_auroc={}
        if len(class_names) == 2
        else {c: estimate(auroc - 0.02 * i) for i, c in enumerate(class_names)},
        reliability=tuple((x, y, share / whole) for x, y, share in bins),
        by_patient={
            rule: {name: estimate(e.value + gain, 0.05, n=217) for name, e in metrics.items() if name != "ece"}
            for rule, gain in rules.items()
        },
    )


def differences(network: str) -> list[Difference]:
    """Every kind, with figures that are told apart and figures that are not."""
    found = {
        ("against_real", "random", "real"): -0.209,
        ("against_real", "random_soft", "real"): -0.150,
        ("against_real", "herding", "real"): -0.176,
        ("against_real", "distilled", "real"): -0.039,
        ("against_real", "distilled_hard", "real"): -0.065,
        ("label_recovery", "real", "distilled_hard"): 0.065,
        ("improvement_over_random", "distilled", "random_soft"): 0.111,
    }
    return [
        Difference(
            kind=kind,
            arm=one,
            against=other,
            network=network,
            split=split,
            metric=metric,
            value=Estimate(value=value, low=value - 0.045, high=value + 0.045, confidence=0.95, n=403),
            p_value=0.074 if abs(value) < 0.045 else 0.0004,
            delong_p_value=0.081 if metric == "auroc" else None,
        )
        for (kind, one, other), value in found.items()
        for split in ("test", "other_site")
        for metric in ("auroc", "balanced_accuracy")
    ]


def groups(network: str, arm_name: str) -> list[SubgroupResult]:
    """Large groups, a small one, one without a class, and one that is too small to be shown."""
    base = {"real": 0.95, "random": 0.74}.get(arm_name, 0.91)
    few, absent = "few patients: differences may be chance", "a class is absent: AUROC cannot be computed"
    known = (
        ("sex", "F", 197, ""),
        ("sex", "M", 203, ""),
        ("sex", "not stated", 3, "fewer than 10 patients: not shown"),
        ("age_band", "0-17", 33, few),
        ("age_band", "18-39", 123, ""),
        ("age_band", "40-59", 147, ""),
        ("age_band", "60+", 101, ""),
        ("site", "site 1", 291, ""),
        ("site", "site 2", 112, ""),
        ("view", "AP", 57, absent),
        ("view", "PA", 346, ""),
    )
    return [
        SubgroupResult(
            arm=arm_name,
            network=network,
            split="test",
            attribute=attribute,
            group=group,
            patients=patients,
            metrics={} if patients < 10 else group_metrics(base - 0.01 * i, patients, no_auroc=warning == absent),
            warning=warning,
        )
        for i, (attribute, group, patients, warning) in enumerate(known)
    ]


def group_metrics(auroc: float, patients: int, *, no_auroc: bool) -> dict[str, Estimate]:
    """Wider intervals for fewer patients."""
    half = 0.5 / patients**0.5
    unknown = Estimate(value=float("nan"), low=0.0, high=1.0, confidence=0.95, n=patients)
    return {
        "auroc": unknown if no_auroc else estimate(auroc, half, n=patients),
        "diagnostic_sensitivity": estimate(auroc - 0.08, half, n=patients),
        "specificity": estimate(auroc - 0.05, half, n=patients),
        "ece": estimate(1 - auroc, half / 3, n=patients),
    }


def cohort_summary(distilled: DistilledSet) -> dict[str, object]:
    """Counts, quarantine and profile, with counts that must not appear as they are."""
    names = distilled.task.class_names
    return {
        "splits": {
            split: {"images": images, "patients": patients, **{name: images // len(names) for name in names}}
            for split, images, patients in (
                ("train", 4321, 1987),
                ("validation", 613, 303),
                ("holdout", 617, 307),
                ("test", 809, 403),
            )
        },
        "quarantine": {"undecodable": 23, "burned_in_text": 117, "no_patient": 3},
        "profile": {"config": {"size": 64, "fit": "pad", "intensity": "voi", "seed": 77}, "rows": 6361},
    }


def snapshots(distilled: DistilledSet) -> dict[str, Tensor]:
    """Noise that turns into the images."""
    noise = torch.rand(distilled.images.shape, generator=torch.Generator().manual_seed(1))
    return {
        name: torch.lerp(noise, distilled.images, weight)
        for name, weight in (("start", 0.0), ("iteration_100", 0.4), ("iteration_500", 0.8), ("end", 1.0))
    }


def look(pictures: Tensor, step: int, auroc: float | None = 0.75, *, distiller: str = "kernel_ridge") -> Look:
    """One moment of six hundred steps."""
    return Look(
        distiller=distiller, step=step, steps=600, pictures=pictures, validation_auroc=auroc, cpu_seconds=step / 10
    )


def moments(distilled: DistilledSet, count: int = 10, auroc: float | None = 0.75) -> tuple[Look, ...]:
    """Looks at noise that turns into the images."""
    shown = distilled.images[shown_images(distilled.hard_labels)]
    noise = torch.rand(shown.shape, generator=torch.Generator().manual_seed(1))
    return tuple(
        look(eight_bit(torch.lerp(noise, shown, (i + 1) / count)), 60 * (i + 1), auroc) for i in range(count)
    )
