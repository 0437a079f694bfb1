"""Arms side by side on images that can be told apart; nothing is chosen on test patients."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.images import ImageSet
from medistill.core.reports import ArmResult, DiagnosticReport
from medistill.core.task import Task
from medistill.distill import distill
from medistill.errors import ConfigError
from medistill.evaluate import EvaluationConfig, evaluate, judge
from medistill.evaluate.arms import Arms
from medistill.evaluate.metrics import METRICS
from medistill.privacy.curator import OpenCurator
from medistill.training import students
from tests.conftest import blobs


def doubtful(data: ImageSet) -> ImageSet:
    """The same images, every sixth patient under the wrong label, so that no arm can be perfect."""
    wrong = torch.tensor([data.unique_patients.index(patient) % 6 == 0 for patient in data.patients])
    return replace(data, targets=torch.where(wrong[:, None], data.targets.flip(1), data.targets))


TRAIN = blobs(40, seed=1)
VALIDATION = doubtful(blobs(20, seed=2, first=1000))
TEST = doubtful(blobs(30, seed=3, first=2000))
QUICK = EvaluationConfig(seeds=2, real_epochs=20, draws=200)


def release(data: ImageSet = TRAIN, ipc: int = 3) -> DistilledSet:
    """A release with labels that are soft, and a short schedule."""
    made = distill(OpenCurator(data), method="coreset", ipc=ipc, seed=4).distilled
    soft = 0.8 * made.soft_labels + 0.2 / made.task.n_classes
    return replace(made, soft_labels=soft, schedule=Schedule(epochs=30, learning_rate=0.01))


usual_release = cache(release)


def compared(
    *,
    config: EvaluationConfig = QUICK,
    test: ImageSet = TEST,
    distilled: DistilledSet | None = None,
    seed: int = 7,
) -> DiagnosticReport:
    return evaluate(
        distilled or usual_release(),
        train=TRAIN,
        validation=VALIDATION,
        tests={"test": test, "holdout": VALIDATION},
        config=config,
        seed=seed,
    )


@pytest.fixture(scope="module")
def report() -> DiagnosticReport:
    return compared()


def arm(report: DiagnosticReport, name: str, split: str = "test") -> ArmResult:
    (found,) = (entry for entry in report.arms if (entry.arm, entry.split) == (name, split))
    return found


def test_every_arm_is_there_on_every_split(report: DiagnosticReport) -> None:
    names = ("real", "random", "random_soft", "herding", "distilled", "distilled_hard")
    assert [(entry.arm, entry.split) for entry in report.arms] == [
        (name, split) for name in names for split in ("test", "holdout")
    ]
    assert report.class_names == ("class0", "class1")


def test_arms_say_how_many_images_and_seeds_they_had(report: DiagnosticReport) -> None:
    assert {entry.arm: entry.images for entry in report.arms} == {
        "real": 80,
        "random": 6,
        "random_soft": 6,
        "herding": 6,
        "distilled": 6,
        "distilled_hard": 6,
    }
    assert {entry.seeds for entry in report.arms} == {2}
    assert {entry.network for entry in report.arms} == {"convnet"}
    assert all(entry.cpu_seconds > 0 for entry in report.arms)


def test_every_number_has_an_interval_over_patients(report: DiagnosticReport) -> None:
    for entry in report.arms:
        assert set(entry.metrics) == set(METRICS) == set(entry.seed_deviation)
        for estimate in entry.metrics.values():
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
            assert estimate.n == (30 if entry.split == "test" else 20)
            assert estimate.confidence == 0.95


def test_arms_of_chosen_images_hold_images_of_train_patients_and_the_schedule_of_the_release() -> None:
    distilled = usual_release()
    arms = Arms(distilled=distilled, train=TRAIN, real_epochs=1, seed=0)
    teacher = np.random.default_rng(0).dirichlet((1, 1), len(TRAIN))
    rows = {
        image.numpy().tobytes(): target.tolist() for image, target in zip(TRAIN.images, TRAIN.targets, strict=True)
    }
    sets = {name: arms.training_set(name, 0, teacher=teacher) for name in ("random", "random_soft", "herding")}
    for name, made in sets.items():
        assert made.schedule == distilled.schedule
        of_class = [rows[image.numpy().tobytes()] for image in made.images]
        assert of_class == [[1, 0]] * 3 + [[0, 1]] * 3
        assert (made.soft_labels.tolist() == of_class) is (name != "random_soft")
    assert torch.equal(sets["random"].images, sets["random_soft"].images)
    places = [
        next(i for i, o in enumerate(TRAIN.images) if torch.equal(o, image)) for image in sets["random"].images
    ]
    assert np.allclose(sets["random_soft"].soft_labels, teacher[places])
    assert not torch.equal(sets["random"].images, arms.training_set("random", 1).images)
    assert torch.equal(sets["herding"].images, arms.training_set("herding", 1).images)


def test_the_teacher_of_random_soft_is_the_first_network_on_all_real_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    make = Arms.training_set

    def watch(self: Arms, arm: str, repeat: int, *, teacher: np.ndarray | None = None) -> object:
        asked.append((arm, repeat, teacher))
        return make(self, arm, repeat, teacher=teacher)

    monkeypatch.setattr(Arms, "training_set", watch)
    compared(config=replace(QUICK, arms=("random_soft", "real"), networks=("convnet", "mlp"), seeds=1))
    assert [arm for arm, *_ in asked] == ["real", "real", "random_soft", "random_soft"]
    labels = asked[2][2]
    assert labels.shape == (len(TRAIN), 2)
    right = (labels.argmax(1) == TRAIN.classes.numpy()).mean()
    assert right > 0.6
    assert np.array_equal(labels, asked[3][2])


def test_differences_are_those_of_the_arms(report: DiagnosticReport) -> None:
    kinds = {(d.kind, d.arm, d.against, d.metric) for d in report.differences}
    others = ("random", "random_soft", "herding", "distilled", "distilled_hard")
    assert kinds == {("against_real", name, "real", "auroc") for name in others} | {
        (kind, *pair, metric)
        for kind, pair in (
            ("label_recovery", ("real", "distilled_hard")),
            ("improvement_over_random", ("distilled", "random_soft")),
        )
        for metric in ("auroc", "balanced_accuracy")
    }
    for found in report.differences:
        first, second = (
            arm(report, name, found.split).metrics[found.metric] for name in (found.arm, found.against)
        )
        assert found.value.value == pytest.approx(first.value - second.value)
        assert found.value.low <= found.value.value <= found.value.high
        assert 0 < found.p_value <= 1
        assert (found.delong_p_value is not None) == (found.metric == "auroc")


def test_patients_with_several_images_are_judged_as_patients(report: DiagnosticReport) -> None:
    found = arm(report, "real")
    assert set(found.by_patient) == {"mean", "max", "vote"}
    assert all(estimate.n == 30 for rule in found.by_patient.values() for estimate in rule.values())
    first = {patient: place for place, patient in reversed(list(enumerate(TEST.patients)))}
    alone = compared(config=replace(QUICK, arms=("real",)), test=TEST.select(sorted(first.values())))
    assert arm(alone, "real").by_patient == {}


def test_groups_are_judged_apart_and_small_ones_hidden() -> None:
    number = {patient: i for i, patient in enumerate(TEST.unique_patients)}
    sex = ["F" if number[patient] < 16 else "M" if number[patient] < 24 else "" for patient in TEST.patients]
    found = evaluate(
        usual_release(),
        train=TRAIN,
        validation=VALIDATION,
        tests={"test": TEST},
        attributes={"test": {"sex": sex, "view": ["PA"] * len(TEST)}},
        config=replace(QUICK, arms=("real",)),
        seed=7,
    )
    groups = {group.group: group for group in found.subgroups}
    assert {group.attribute for group in found.subgroups} == {"sex"}, "one view divides nobody"
    assert [(g.group, g.patients, bool(g.metrics)) for g in found.subgroups] == [
        ("F", 16, True),
        ("M", 8, False),
        ("not stated", 6, False),
    ]
    assert "few patients" in groups["F"].warning
    assert "not shown" in groups["M"].warning
    women = TEST.of_patients({patient for patient, i in number.items() if i < 16})
    alone = arm(compared(config=replace(QUICK, arms=("real",)), test=women), "real").metrics["auroc"]
    assert groups["F"].metrics["auroc"].value == pytest.approx(alone.value)
    assert DiagnosticReport.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_real_images_beat_chance(report: DiagnosticReport) -> None:
    for split in ("test", "holdout"):
        assert arm(report, "real", split).metrics["auroc"].low > 0.55
        assert arm(report, "real", split).metrics["balanced_accuracy"].value > 0.6


def test_shuffled_labels_do_not_beat_chance() -> None:
    order = torch.randperm(len(TEST), generator=torch.Generator().manual_seed(0))
    shuffled = replace(TEST, targets=TEST.targets[order])
    found = arm(compared(config=replace(QUICK, arms=("real",)), test=shuffled), "real").metrics["auroc"]
    assert found.low <= 0.5 <= found.high


def test_more_patients_make_intervals_narrower(report: DiagnosticReport) -> None:
    few = TEST.of_patients(set(TEST.unique_patients[:10]))

    def width(of: DiagnosticReport) -> float:
        estimate = arm(of, "random").metrics["balanced_accuracy"]
        return estimate.high - estimate.low

    assert width(compared(config=replace(QUICK, arms=("random",)), test=few)) > width(report)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(report: DiagnosticReport) -> None:
    def figures(of: DiagnosticReport) -> list[object]:
        return [entry.metrics for entry in of.arms if entry.arm == "random"]

    only = replace(QUICK, arms=("random",))
    assert figures(compared(config=only)) == figures(report)
    assert figures(compared(config=only, seed=8)) != figures(report)


def test_one_seed_has_no_deviation() -> None:
    found = arm(compared(config=replace(QUICK, seeds=1, arms=("random",))), "random")
    assert set(found.seed_deviation.values()) == {0.0}
    assert found.seeds == 1


def test_more_than_two_classes_are_compared() -> None:
    train, test = blobs(36, classes=3, seed=1), blobs(24, classes=3, seed=2, first=500)
    found = evaluate(
        release(train, ipc=2),
        train=train,
        validation=test,
        tests={"test": test},
        config=replace(QUICK, arms=("real",), seeds=1, real_epochs=60),
        seed=0,
    )
    assert found.class_names == ("class0", "class1", "class2")
    assert arm(found, "real").metrics["auroc"].low > 0.7


# -- nothing is chosen on test ----------------------------------------------------------------------------------


def _watched(monkeypatch: pytest.MonkeyPatch, test: ImageSet) -> tuple[list[tuple[float, ...]], list[np.ndarray]]:
    """Thresholds and trained weights of a comparison on a test set."""
    cuts: list[tuple[float, ...]] = []
    weights: list[np.ndarray] = []
    choose, train = judge.operating_points, students.fit

    def watch_cut(*args: object) -> tuple[float, ...]:
        cuts.append(choose(*args))
        return cuts[-1]

    def watch_fit(network: nn.Module, *args: object, **options: object) -> nn.Module:
        fitted = train(network, *args, **options)
        weights.append(np.concatenate([p.detach().numpy().ravel() for p in fitted.parameters()]))
        return fitted

    with monkeypatch.context() as patch:
        patch.setattr(judge, "operating_points", watch_cut)
        patch.setattr(students, "fit", watch_fit)
        compared(test=test, config=replace(QUICK, seeds=1, real_epochs=3))
    return cuts, weights


def test_test_labels_and_images_change_neither_weights_nor_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    flipped = replace(TEST, targets=TEST.targets.flip(1), images=1 - TEST.images)
    cuts, weights = _watched(monkeypatch, TEST)
    other_cuts, other_weights = _watched(monkeypatch, flipped)
    assert len(weights) == 6
    assert len(cuts) == len(weights) * 2 * (1 + 3)  # both splits; images, and patients by three rules
    assert cuts == other_cuts
    assert all(np.array_equal(one, other) for one, other in zip(weights, other_weights, strict=True))


def test_flipped_test_labels_turn_the_auroc_round(report: DiagnosticReport) -> None:
    flipped = replace(TEST, targets=TEST.targets.flip(1))
    found = arm(compared(config=replace(QUICK, arms=("real",)), test=flipped), "real").metrics["auroc"].value
    assert found == pytest.approx(1 - arm(report, "real").metrics["auroc"].value)


def test_the_distilled_arms_train_on_the_release_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, Schedule]] = []
    train, distilled = students.fit, usual_release()

    def watch(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: object) -> nn.Module:
        seen.append((images, labels, options["schedule"]))
        return train(network, images, labels, **options)

    monkeypatch.setattr(students, "fit", watch)
    compared(config=replace(QUICK, seeds=1, arms=("distilled", "distilled_hard")), distilled=distilled)
    (soft_images, soft, schedule), (hard_images, hard, _) = seen
    assert torch.equal(soft_images, distilled.images)
    assert torch.equal(hard_images, distilled.images)
    assert torch.equal(soft, distilled.soft_labels)
    assert torch.equal(hard, torch.eye(2).repeat_interleave(3, 0))
    assert schedule == distilled.schedule


def test_a_report_survives_json(report: DiagnosticReport) -> None:
    assert DiagnosticReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("real", "randm")}, "Unknown arms randm. Did you mean 'random'?"),
        ({"arms": ()}, "at least one"),
        ({"arms": ("random_soft", "distilled")}, "Add 'real'"),
        ({"arms": ("real", "real")}, "each once"),
        ({"networks": ("convent",)}, "Unknown network 'convent'. Did you mean 'convnet'?"),
        ({"networks": ()}, "at least one of the networks"),
        ({"networks": ("convnet", "convnet")}, "each once"),
        ({"seeds": 0}, "seeds >= 1"),
        ({"draws": 99}, "draws >= 100"),
        ({"real_epochs": 0}, "real_epochs >= 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluationConfig(**settings)
    assert message in str(caught.value)


def test_every_network_trains_every_arm(report: DiagnosticReport) -> None:
    both = compared(config=replace(QUICK, arms=("random", "distilled"), networks=("convnet", "mlp")))
    assert [(a.network, a.arm, a.split) for a in both.arms] == [
        (network, name, split)
        for network in ("convnet", "mlp")
        for name in ("random", "distilled")
        for split in ("test", "holdout")
    ]
    assert arm(replace(both, arms=both.arms[:4]), "random").metrics == arm(report, "random").metrics
    assert both.arms[0].metrics != both.arms[4].metrics


def test_hard_labels_of_several_findings_are_the_soft_ones_rounded() -> None:
    task = Task.multilabel(("class0", "class1"))
    soft = torch.tensor([[0.9, 0.6], [0.2, 0.1]])
    made = replace(release(ipc=1), task=task, soft_labels=soft)
    found = Arms(distilled=made, train=TRAIN, real_epochs=1, seed=0).training_set("distilled_hard", 0)
    assert found.soft_labels.tolist() == [[1, 1], [0, 0]]
