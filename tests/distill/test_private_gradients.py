"""Distillers that ask for noisy gradients: what they ask, that a break costs nothing, and where noise vanishes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.compute import Compute, fresh
from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill import squeeze as squeezing
from medistill.distill.checkpoint import FileCheckpoint
from medistill.distill.gradient_matching import (
    GradientMatching,
    matching_distance,
    patients_of_each,
    weights_of,
)
from medistill.distill.runner import make_distiller
from medistill.distill.sre2l import SRe2L, means_distance, recover, without_leaning
from medistill.errors import ConfigError, PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import Ledger
from tests.conftest import blobs

#: One network of each, few steps; everybody takes part, so that noise has a closed form and nothing is waited for.
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient_matching": {
        "iterations": 3,
        "outer": 2,
        "inner": 1,
        "width": 8,
        "sampling_rate": 1.0,
        "checkpoint_every": 1,
    },
    "sre2l": {
        "norm": "group",
        "width": 8,
        "private_steps": 4,
        "sampling_rate": 1.0,
        "iterations": 6,
        "views": 3,
        "checkpoint_every": 2,
    },
}
LIFETIME = Budget(epsilon=50.0, delta=1e-5)
SHAPE = (1, 16, 16)


class Counting(PrivateCurator):
    """Writes down what is asked, and can stop as Ctrl-C would."""

    stop_after = math.inf

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.asked: list[tuple[QueryKind, float]] = []
        self.drawn = 0

    def sum(self, embed: Any, **how: Any) -> Tensor:
        return self._count(QueryKind.SUM, how) or super().sum(embed, **how)

    def gradient(self, network: nn.Module, loss: Any, **how: Any) -> dict[str, Tensor]:
        return self._count(QueryKind.GRADIENT, how) or super().gradient(network, loss, **how)

    def _count(self, kind: QueryKind, how: dict[str, Any]) -> Any:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((kind, how.get("sampling_rate", 1.0)))

    def _drawn(self, *arguments: Any) -> Tensor:
        self.drawn += 1
        return super()._drawn(*arguments)


def curator(
    data: ImageSet, plan: PrivacyPlan, folder: Path, *, epsilon: float = 8.0, entropy: int | None = None
) -> Counting:
    more = {} if entropy is None else {"_entropy": np.random.default_rng(entropy).bytes}
    return Counting(
        data,
        budget=Budget(epsilon=epsilon, delta=1e-5),
        plan=plan,
        ledger=Ledger(folder / "ledger.jsonl", lifetime=LIFETIME),
        store=folder / "answers",
        **more,
    )


class Whispering(OpenCurator):
    """Exact answers of a curator that says that there is a little noise."""

    def __init__(self, data: ImageSet) -> None:
        super().__init__(data)
        self.networks: list[dict[str, Tensor]] = []

    def noise(self, position: int) -> float:
        return 1e-6

    def gradient(self, network: nn.Module, loss: Any, **how: Any) -> dict[str, Tensor]:
        found = clipped_by_hand(network, loss, self.images(), how["clip_norm"])
        self.networks.append(found)
        return found


def clipped_by_hand(network: nn.Module, loss: Any, data: ImageSet, clip_norm: float) -> dict[str, Tensor]:
    """One patient, one image, one backward pass at a time."""
    named = {name: value for name, value in network.named_parameters() if value.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    patients = np.array(data.patients)
    for patient in data.unique_patients:
        own = np.flatnonzero(patients == patient)
        mean = {name: torch.zeros_like(value) for name, value in named.items()}
        for i in own:
            one = loss(network(data.images[i : i + 1]), data.targets[i : i + 1]).sum()
            for name, part in zip(named, torch.autograd.grad(one, list(named.values())), strict=True):
                mean[name] += part / len(own)
        length = math.sqrt(sum(float(part.square().sum()) for part in mean.values()))
        for name, part in mean.items():
            total[name] += part * min(1.0, clip_norm / length)
    return total


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).double()


def run(name: str, given: Curator, bench: Workbench | None = None, **more: Any) -> Synthetic:
    distiller = make_distiller(name, {**SETTINGS[name], **more})
    return distiller.distill(given, ipc=2, seed=0, start=None, bench=bench or Workbench())


def planned(name: str, task: Task, shape: tuple[int, ...] = SHAPE, **more: Any) -> PrivacyPlan:
    return make_distiller(name, {**SETTINGS[name], **more}).plan(task, shape, 2)


# -- what is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_plan_is_what_is_asked_and_one_more_is_refused(name: str, tmp_path: Path) -> None:
    data = blobs(patients=12)
    plan = planned(name, data.task)
    asking = curator(data, plan, tmp_path)
    found = run(name, asking)
    declared = [(query.kind, query.sampling_rate) for query in plan.queries for _ in range(query.count)]
    assert asking.asked == declared
    assert {kind for kind, _ in declared} == {QueryKind.SUM, QueryKind.GRADIENT}
    assert found.images.shape == (4, *SHAPE)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    assert asking.statement().epsilon <= 8.0
    assert set(plan.assumptions) <= set(asking.statement().assumptions)
    network = ConvNet(data.task, SHAPE, width=8)
    with pytest.raises(PrivacyError, match="nothing more is answered"):
        asking.gradient(network, lambda logits, targets: logits.sum(1), clip_norm=1.0)


def test_published_loops_are_planned_for_every_size() -> None:
    task = Task.single_label(("normal", "ill"))
    for ipc, steps in ((1, 200), (10, 200), (15, 200), (50, 200)):
        counts = [query.count for query in GradientMatching().plan(task, SHAPE, ipc).queries]
        assert counts == [1, steps]
    assert GradientMatching(iterations=3, outer=7, sampling_rate=0.1).plan(task, SHAPE, 1).queries[1] == Query(
        kind=QueryKind.GRADIENT, purpose="gradients to match", count=21, sampling_rate=0.1
    )
    assert SRe2L(norm="instance", private_steps=30).plan(task, SHAPE, 1).queries[0].count == 30


@pytest.mark.parametrize("name", SETTINGS)
def test_patients_are_sampled_at_the_declared_rate(name: str, tmp_path: Path) -> None:
    data, few = blobs(patients=12), {"iterations": 1, "sampling_rate": 0.25}
    (rate,) = {q.sampling_rate for q in planned(name, data.task, **few).queries if q.kind is QueryKind.GRADIENT}
    asked: set[float] = set()

    class Rates(Whispering):
        def gradient(self, network: nn.Module, loss: Any, **how: Any) -> dict[str, Tensor]:
            asked.add(how["sampling_rate"])
            return super().gradient(network, loss, **how)

    run(name, Rates(data), **few)
    assert asked == {rate} == {0.25}
    with pytest.raises(PrivacyError, match=r"was declared as gradient at sampling rate 1, not gradient at 0\.25"):
        run(name, curator(data, planned(name, data.task), tmp_path), **few)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("gradient_matching", {"init": "real"}, "init 'noise'"),
        ("gradient_matching", {"siamese": True}, "siamese"),
        ("sre2l", {"norm": "batch"}, "BatchNorm"),
        ("sre2l", {"init": "real"}, "init 'noise'"),
    ],
)
def test_what_needs_images_is_refused_before_anything_is_asked(
    name: str, settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    data = blobs(patients=8)
    with pytest.raises(PrivacyError, match=match):
        planned(name, data.task, **settings)
    asking = curator(data, planned(name, data.task), tmp_path)
    with pytest.raises(PrivacyError, match=match):
        run(name, asking, **settings)
    assert asking.asked == []


def test_batchnorm_is_refused_by_the_training_too(tmp_path: Path) -> None:
    data = blobs(patients=8)
    settings = SRe2L(**{**SETTINGS["sre2l"], "norm": "batch"}).squeeze()
    with pytest.raises(PrivacyError, match="BatchNorm2d ties the images"):
        squeezing.squeeze(
            curator(data, planned("sre2l", data.task), tmp_path), settings=settings, seed=0, bench=Workbench()
        )


@pytest.mark.parametrize("bad", [0.0, 1.5, math.nan])
@pytest.mark.parametrize("method", [GradientMatching, SRe2L])
def test_odd_rates_and_clip_norms_are_refused(method: Any, bad: float) -> None:
    with pytest.raises(ConfigError, match="sampling_rate"):
        method(sampling_rate=bad)
    with pytest.raises(ConfigError, match="clip_norm"):
        method(clip_norm=math.inf if bad == 1.5 else bad)


def test_odd_settings_of_a_private_teacher_are_refused() -> None:
    for odd, match in (({"norm": "none"}, "norm"), ({"private_steps": 0}, "private_steps")):
        with pytest.raises(ConfigError, match=match):
            SRe2L(**odd)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mean_weight"):
        SRe2L(mean_weight=-1.0)


# -- what decides the release -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_sealed_answers_alone_decide_the_release(name: str, tmp_path: Path) -> None:
    """With the kept answers, a cohort of others gives the same bits, and nothing is drawn."""
    first, others = blobs(patients=12), blobs(patients=12, seed=5, first=900)
    plan = planned(name, first.task)
    recorded = run(name, curator(first, plan, tmp_path, entropy=0))
    again = curator(others, plan, tmp_path, entropy=1)
    replayed = run(name, again)
    assert torch.equal(replayed.images, recorded.images)
    assert torch.equal(replayed.soft_labels, recorded.soft_labels)
    assert again.drawn == 0
    anew = run(name, curator(first, plan, tmp_path / "anew", entropy=1))
    assert not torch.equal(anew.images, recorded.images)


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_break_draws_nothing_twice(name: str, checkpoints: bool, tmp_path: Path) -> None:
    data = blobs(patients=12)
    plan = planned(name, data.task)
    whole = run(name, curator(data, plan, tmp_path / "whole", entropy=3))
    entropy = np.random.default_rng(3).bytes
    bench = Workbench(checkpoint=FileCheckpoint(tmp_path / "kept.safetensors")) if checkpoints else Workbench()
    drawn, answered = 0, 0
    for stop in (1, 2, 2, math.inf):
        given = curator(data, plan, tmp_path)
        given._entropy, given.stop_after = entropy, stop
        try:
            found = run(name, given, bench)
        except KeyboardInterrupt:
            assert stop < math.inf
        drawn, answered = drawn + given.drawn, answered + len(given.asked)
        given.close()
    assert drawn == plan.total
    assert answered >= plan.total + (not checkpoints)  # without them all are given again
    assert torch.equal(found.images, whole.images)
    assert torch.equal(found.soft_labels, whole.soft_labels)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_break_after_the_last_answer_needs_none(name: str, tmp_path: Path) -> None:
    """A checkpoint has what was made of the answers, which are then deleted."""
    data = blobs(patients=12)
    plan = planned(name, data.task)
    whole = run(name, curator(data, plan, tmp_path / "whole", entropy=3))
    kept = FileCheckpoint(tmp_path / "kept.safetensors")
    first = curator(data, plan, tmp_path, entropy=3)
    run(name, first, Workbench(checkpoint=kept))
    first.close()
    second = curator(data, plan, tmp_path)
    found = run(name, second, Workbench(checkpoint=kept))
    assert second.asked == []
    assert not list((tmp_path / "answers").glob("*.safetensors"))
    assert torch.equal(found.images, whole.images)
    assert torch.equal(found.soft_labels, whole.soft_labels)


def several(kind: str) -> ImageSet:
    data = blobs(patients=12, classes=3)
    if kind == "colour":
        return replace(data, images=data.images.expand(-1, 3, -1, -1).contiguous())
    if kind == "volume":
        return replace(data, images=data.images[:, :, None].expand(-1, -1, 16, -1, -1).contiguous())
    targets = torch.maximum(data.targets, data.targets.roll(1, 0)) * (torch.arange(24) % 5 > 0)[:, None]
    return replace(data, targets=targets, task=Task.multilabel(data.task.class_names))


@pytest.mark.parametrize("kind", ["colour", "volume", "multilabel"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_task(name: str, kind: str, tmp_path: Path) -> None:
    data = several(kind)
    few = {"iterations": 1} if name == "gradient_matching" else {"private_steps": 2, "iterations": 2}
    plan = planned(name, data.task, tuple(data.images.shape[1:]), **few)
    found = run(name, curator(data, plan, tmp_path), **few)
    assert found.images.shape == (6, *data.images.shape[1:])
    assert found.hard_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.isfinite(found.images).all()
    assert 0 <= float(found.soft_labels.min()) <= float(found.soft_labels.max()) <= 1


# -- where noise vanishes -----------------------------------------------------------------------------------------


def test_images_move_along_the_naive_gradient_of_the_distance() -> None:
    """First step of plain descent, against patients' gradients one by one and the whole formula written out."""
    data = blobs(patients=9, classes=2, per_patient=3)
    quick = {"iterations": 1, "outer": 1, "momentum": 0.0, "rate": 1e-3, "clip_norm": 0.05}
    asking = Whispering(data)
    settings = GradientMatching(**{**SETTINGS["gradient_matching"], **quick})
    found = settings.distill(asking, ipc=2, seed=0, start=None, bench=Workbench())
    start = torch.full((4, *SHAPE), 0.5) + 0.1 * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    first = Synthetic(
        images=start, soft_labels=F.one_hot(found.hard_labels, 2).float(), hard_labels=found.hard_labels
    )
    asking.networks.clear()
    moved = settings.distill(asking, ipc=2, seed=0, start=first, bench=Workbench()).images
    network = settings._network(asking, squeezing.derive_seed(0, "network", 0))
    losses = lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")  # noqa: E731
    biases = [p.requires_grad_(False) for p in network.parameters() if p.ndim <= 1]
    expected = clipped_by_hand(network, losses, data, 0.05)
    assert len(biases) > 0
    assert list(asking.networks[0]) == list(expected)  # nothing is spent on biases and scales
    assert F.cosine_similarity(flat(asking.networks[0].values()), flat(expected.values()), dim=0) > 0.99999
    images = start.clone().requires_grad_()
    share = torch.tensor([5 / 9, 4 / 9])  # of patients, as blobs deals them out
    loss = sum(share[c] * losses(network(images), first.soft_labels)[2 * c : 2 * c + 2].mean() for c in (0, 1))
    synthetic = torch.autograd.grad(loss, weights_of(network), create_graph=True)
    distance = matching_distance(synthetic, [part / (9 * 0.05) for part in expected.values()])
    (slope,) = torch.autograd.grad(distance, images)
    assert F.cosine_similarity(flat([start - moved]), flat([slope]), dim=0) > 0.999
    assert torch.allclose((start - moved) / 1e-3, slope, rtol=0.02, atol=2e-3 * float(slope.abs().max()))


def test_private_gradients_point_where_those_of_a_naive_loop_do(tmp_path: Path) -> None:
    data = blobs(patients=40, per_patient=2)
    network = fresh(lambda task, shape: ConvNet(task, shape, width=8, norm="group"), data.task, SHAPE, 0)
    cropped = squeezing._Cropped(network, torch.tensor([[0.1, 0.2, 0.8, 0.9]]))
    losses = torch.vmap(F.cross_entropy)
    plan = PrivacyPlan(queries=(Query(kind=QueryKind.GRADIENT, purpose="steps"),))
    expected = flat(clipped_by_hand(cropped, losses, data, 0.2).values())
    cosines = []
    for epsilon in (50.0, 0.5):
        asking = curator(data, plan, tmp_path / str(epsilon), epsilon=epsilon, entropy=0)
        answer = asking.gradient(cropped, losses, clip_norm=0.2)
        cosines.append(float(F.cosine_similarity(flat(answer.values()), expected, dim=0)))
        noise = flat(answer.values()) - expected
        assert float(noise.std()) == pytest.approx(asking.noise(0) * 0.2, rel=0.1)
    assert cosines[0] > 0.8 > cosines[1]


def test_a_private_teacher_with_hardly_any_noise_learns() -> None:
    data, unseen = blobs(patients=16, per_patient=1), blobs(patients=30, per_patient=1, seed=1)
    settings = replace(SRe2L(**SETTINGS["sre2l"]).squeeze(), private_steps=20, rate=0.01, clip_norm=1.0, crop=0.5)
    teacher = squeezing.squeeze(Whispering(data), settings=settings, seed=0, bench=Workbench())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    assert float((teacher(unseen.images).argmax(1) == unseen.classes).float().mean()) > 0.9


def test_counts_are_of_patients_and_never_below_their_noise() -> None:
    data = blobs(patients=9, per_patient=3)
    assert patients_of_each(OpenCurator(data)).tolist() == pytest.approx([5, 4, 9])

    class Loud(OpenCurator):
        def noise(self, position: int) -> float:
            return 4.5

    least = 4.5 * math.sqrt(2)
    assert patients_of_each(Loud(data)).tolist() == pytest.approx([least, least, 9])


def test_no_norms_no_statistics_but_class_means_of_unit_features() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    targets = F.one_hot(torch.tensor([0, 0, 2, 2, 2, 0]), 3).float()
    means = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    expected = sum(
        float(((unit[rows].mean(0) - means[c].numpy()) ** 2).sum()) for c, rows in ((0, [0, 1, 5]), (2, [2, 3, 4]))
    )
    assert float(means_distance(features, targets, means)) == pytest.approx(expected, rel=1e-5)


def test_recovered_features_come_closer_to_the_means() -> None:
    data = blobs(patients=16)
    settings = SRe2L(**{**SETTINGS["sre2l"], "iterations": 30, "crop": 1.0, "roll": 0.0, "epochs": 2})
    teacher = squeezing.squeeze(OpenCurator(data), settings=settings.squeeze(), seed=0, bench=Workbench())
    means = settings._moments(OpenCurator(data), teacher, Compute())[:, :-1]
    with torch.no_grad():
        unit = F.normalize(teacher.features(data.images), dim=1)  # type: ignore[operator]
    assert torch.allclose(means, torch.stack([unit[data.classes == c].mean(0) for c in (0, 1)]), atol=1e-5)
    hard = torch.tensor([0, 0, 1, 1])
    start = Synthetic(images=torch.rand(4, *SHAPE), soft_labels=F.one_hot(hard, 2).float(), hard_labels=hard)

    def distance(weight: float) -> float:
        how = replace(settings, mean_weight=weight)
        found = recover(teacher, start, kind=TaskKind.BINARY, settings=how, seed=0, bench=Workbench(), means=means)
        with torch.no_grad():
            return float(means_distance(teacher.features(found), start.soft_labels, means))  # type: ignore[operator]

    assert distance(10.0) < 0.7 * distance(0.0)


def test_a_teacher_is_freed_of_leaning_by_the_logarithm_of_shares() -> None:
    task = Task.single_label(("normal", "ill", "other"))
    network = ConvNet(task, SHAPE, width=8)
    images = torch.rand(3, *SHAPE)
    before = network(images)
    after = without_leaning(network, torch.tensor([60.0, 30.0, 10.0]))(images)
    assert torch.allclose(before - after, torch.tensor([0.6, 0.3, 0.1]).log().expand(3, 3), atol=1e-5)
    assert torch.equal(network(images), before)
