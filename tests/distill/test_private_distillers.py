"""Private distillers: what they ask, what follows from the answers, and that nothing else is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.guarantee import Budget, QueryKind
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.checkpoint import FileCheckpoint
from medistill.distill.moments import (
    MOST_NOISE,
    Moments,
    Teacher,
    ask_moments,
    moments_plan,
    noise_to_signal,
    symmetric,
)
from medistill.distill.public_features import PublicFeatures, described, oriented_filters, pink_noise
from medistill.distill.runner import make_distiller
from medistill.distill.surrogate import every_class, smooth
from medistill.errors import DataError, PrivacyError
from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import Ledger
from medistill.progress import Progress
from medistill.registry import DISTILLERS
from tests.conftest import blobs

PRIVATE: dict[str, dict[str, Any]] = {
    "distribution_matching": {"iterations": 4, "dimension": 24},
    "surrogate": {"iterations": 2, "made_up": 6, "drawing": 2, "dimension": 24, "width": 8},
}


LIFETIME = Budget(epsilon=50.0, delta=1e-5)


def entropy(seed: int) -> Any:
    """Bytes of a seeded generator in the place of the operating system's."""
    generator = np.random.default_rng(seed)
    return generator.bytes


def private(data: ImageSet, folder: Path, *, epsilon: float = 8.0, seed: int = 0) -> PrivateCurator:
    return PrivateCurator(
        data,
        budget=Budget(epsilon=epsilon, delta=1e-5),
        plan=moments_plan(),
        ledger=Ledger(folder / "ledger.jsonl", lifetime=LIFETIME),
        store=folder / "answers",
        _entropy=entropy(seed),
    )


def asked(data: ImageSet, *, dimension: int = 24) -> Moments:
    return ask_moments(OpenCurator(data), dimension=dimension, compute=Compute())


@dataclass
class Recording(OpenCurator):
    """Exact answers under the noise of a private curator, and everything that was asked."""

    data: ImageSet
    deviation: float = 0.0
    rows: list[tuple[Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.data)

    def sum(self, embed: Any, *, clip_norm: float = math.inf, sampling_rate: float = 1.0) -> Tensor:
        assert sampling_rate == 1.0
        self.rows.append((embed(self.data.images, self.data.targets), clip_norm))
        return super().sum(embed)

    def noise(self, position: int) -> float:
        return self.deviation


def several(kind: str) -> ImageSet:
    """Images of another kind of task or shape."""
    data = blobs(patients=24, classes=3)
    if kind == "colour":
        return replace(data, images=data.images.expand(-1, 3, -1, -1).contiguous())
    if kind == "volume":
        return replace(data, images=data.images[:, :, None].expand(-1, -1, 16, -1, -1).contiguous())
    if kind == "multilabel":
        targets = torch.maximum(data.targets, data.targets.roll(1, 0)) * (torch.arange(48) % 5 > 0)[:, None]
        return replace(data, targets=targets, task=Task.multilabel(data.task.class_names))
    return data


KINDS = ("plane", "colour", "volume", "multilabel")


# -- features -----------------------------------------------------------------------------------------------------


def test_filters_have_unit_length_no_mean_and_see_their_own_direction() -> None:
    filters = oriented_filters(2, radius=3)
    assert filters.shape == (16, 1, 7, 7)
    assert torch.allclose(filters.square().sum((1, 2, 3)), torch.ones(16), atol=1e-5)
    assert filters.sum((1, 2, 3)).abs().max() < 1e-5
    across = torch.cos(torch.arange(32) * math.pi / 2).expand(32, 32)[None, None]
    even, odd = F.conv2d(across, filters)[0].chunk(2)
    strength = (even.square() + odd.square()).sqrt().mean((1, 2))
    assert strength.argmax() == 0  # the wave runs along the columns
    assert oriented_filters(3, radius=2).shape == (18, 1, 5, 5, 5)


def test_features_are_what_a_naive_loop_finds() -> None:
    side, filters = 12, oriented_filters(2, radius=3)
    image = np.random.default_rng(0).random((side, side))
    found = described(torch.tensor(image)[None, None].float(), filters)[0].numpy()
    standard = (image - image.mean()) / (image.std(ddof=1) + 1e-3)

    def cells(picture: Any, grid: int) -> list[float]:
        step = len(picture) / grid
        part = [slice(math.floor(k * step), math.ceil((k + 1) * step)) for k in range(grid)]
        return [picture[rows, columns].mean() for rows in part for columns in part]

    def seen(picture: Any, wave: Any) -> Any:
        size, padded = range(len(picture)), np.pad(picture, 3, mode="edge")
        return np.array([[(padded[r : r + 7, c : c + 7] * wave).sum() for c in size] for r in size])

    expected, grey = cells(standard, 7), standard
    for scale in range(3):
        if scale:
            half = len(grey) // 2
            grey = grey[: 2 * half, : 2 * half].reshape(half, 2, half, 2).mean((1, 3))
        for even, odd in zip(*filters[:, 0].numpy().reshape(2, 8, 7, 7), strict=True):
            strength = np.sqrt(seen(grey, even) ** 2 + seen(grey, odd) ** 2 + 1e-4)
            expected += cells(np.log(strength + 0.05), 5)
    assert np.allclose(found, expected, atol=1e-4)


def test_twice_as_strong_edges_add_a_constant() -> None:
    """Films of another sharpness differ from these by an offset, not by where their edges are."""
    coarse = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth_field = F.interpolate(coarse, 32, mode="bicubic")
    texture = torch.cos(torch.arange(32) * math.pi / 2).expand(32, 32)[None, None] * 0.2
    filters, finest = oriented_filters(2, radius=3), slice(49, 49 + 25)
    once, twice = (described(smooth_field + gain * texture, filters)[0, finest] for gain in (1.0, 2.0))
    assert (twice - once).mean() > 0.4
    assert (twice - once).std() < 0.1


def test_pink_noise_falls_with_frequency_and_depends_on_the_seed_alone() -> None:
    fields = pink_noise(64, (1, 32, 32), seed=1)
    assert torch.equal(fields, pink_noise(64, (1, 32, 32), seed=1))
    assert not torch.equal(fields, pink_noise(64, (1, 32, 32), seed=2))
    power = torch.fft.rfft2(fields - 0.5).abs().square().mean((0, 1))
    assert power[0, 2] > 5 * power[0, 8] > 0
    assert power[2, 0] > 5 * power[8, 0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_unit_vectors_of_single_images(kind: str) -> None:
    images = several(kind).images[:6]
    features = PublicFeatures(tuple(images.shape[1:]), 24, Compute())
    together = features(images)
    assert together.shape == (6, 24) == (6, features.dimension)
    assert torch.allclose(together.norm(dim=1), torch.ones(6), atol=1e-5)
    alone = torch.cat([features(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
    brighter = features(0.1 + 0.8 * images)
    assert torch.allclose(together, brighter, atol=0.02)


# -- what is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_as_long_as_declared(kind: str) -> None:
    curator = Recording(several(kind))
    ask_moments(curator, dimension=16, compute=Compute())
    declared = [(query.kind, query.sampling_rate) for query in moments_plan().queries]
    assert declared == [(QueryKind.SUM, 1.0)] * len(curator.rows)
    for rows, clip_norm in curator.rows:
        lengths = rows.norm(dim=1)
        assert lengths.max() <= clip_norm * (1 + 1e-5)
        if kind != "multilabel":  # no length is wasted, and none depends on the image
            assert torch.allclose(lengths, torch.full_like(lengths, clip_norm), rtol=1e-5)


def test_moments_are_those_of_a_naive_loop() -> None:
    data = blobs(patients=9, classes=3, per_patient=3)
    found = asked(data, dimension=12)
    rows = found.features(data.images).double().numpy()
    patients = np.array(data.patients)
    centre = np.mean([rows[patients == p].mean(0) for p in data.unique_patients], axis=0)
    assert np.allclose(found.centre, centre, atol=1e-5)
    centred = rows - centre
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    second, sums = np.zeros((12, 12)), np.zeros((3, 12))
    for patient in data.unique_patients:
        own = np.flatnonzero(patients == patient)
        second += sum(np.outer(centred[i], centred[i]) for i in own) / len(own)
        for i in own:
            sums[int(data.classes[i])] += centred[i] / len(own)
    assert np.allclose(found.second, second, atol=1e-4)
    assert np.allclose(found.sums, sums, atol=1e-4)
    assert found.counts.tolist() == pytest.approx([3, 3, 3], abs=1e-5)
    assert found.total == pytest.approx(9, abs=1e-5)


def test_symmetric_undoes_the_triangle_and_keeps_lengths() -> None:
    matrix = torch.randn(5, 5, dtype=torch.float64)
    matrix = matrix + matrix.T
    above, beside = torch.triu_indices(5, 5)
    triangle = matrix[above, beside] * torch.where(above == beside, 1.0, math.sqrt(2.0))
    assert torch.allclose(symmetric(triangle, 5), matrix)
    assert triangle.norm() == pytest.approx(matrix.norm().item())


def test_noise_decides_the_dimension_before_the_second_sum() -> None:
    data = blobs(patients=200, per_patient=1)
    for deviation, dimension in ((0.0, 64), (1.0, 64), (9.0, 35), (40.0, 16)):
        curator = Recording(data, deviation=deviation)
        if deviation == 40.0:
            with pytest.raises(DataError, match="too few to be seen"):
                ask_moments(curator, dimension=64, compute=Compute())
            continue
        found = ask_moments(curator, dimension=64, compute=Compute())
        assert len(found.centre) == dimension == len(found.second)
        assert found.signal == pytest.approx(noise_to_signal(found.noise, dimension, 100))
        assert found.signal <= MOST_NOISE


def test_a_class_without_patients_is_named() -> None:
    data = blobs(patients=4)
    lonely = data.select([i for i in range(len(data)) if data.classes[i] == 0])
    with pytest.raises(DataError, match="'class1' has no patient"):
        asked(lonely)


# -- what follows -------------------------------------------------------------------------------------------------


def test_teacher_is_the_regularised_linear_discriminant() -> None:
    data = blobs(patients=60, classes=3, per_patient=1)
    moments = asked(data, dimension=16)
    rows = moments.centred(data.images).double().numpy()
    labels = data.classes.numpy()
    means = np.stack([rows[labels == c].mean(0) for c in range(3)])
    within = sum(np.cov(rows[labels == c].T, bias=True) for c in range(3)) / 3
    inverse = np.linalg.inv(within + 0.01 / 16 * np.eye(16))
    scores = rows @ inverse @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means)
    teacher = Teacher(moments, kind=TaskKind.MULTICLASS)
    assert teacher.share == 1.0
    assert np.allclose(teacher.soft_labels(data.images), softmax(scores, axis=1), atol=2e-3)


@pytest.mark.parametrize("kind", ["plane", "multilabel"])
def test_teacher_of_noisy_moments_knows_unseen_patients(kind: str, tmp_path: Path) -> None:
    data, unseen = blobs(patients=300, classes=3), blobs(patients=60, classes=3, seed=1)
    if kind == "multilabel":
        data, unseen = (replace(part, task=Task.multilabel(part.task.class_names)) for part in (data, unseen))
    moments = ask_moments(private(data, tmp_path), dimension=32, compute=Compute())
    found = Teacher(moments, kind=data.task.kind).soft_labels(unseen.images)
    assert roc_auc_score(unseen.targets, found, average="macro") > 0.95
    assert not torch.equal(moments.second, asked(data, dimension=32).second)


def test_noise_alone_gives_no_direction_and_little_confidence() -> None:
    data = blobs(patients=100, per_patient=1)
    moments = asked(data, dimension=24)
    generator = torch.Generator().manual_seed(0)
    noise, nothing = 3.0, torch.randn(24, 24, generator=generator, dtype=torch.float64) * 3.0 / math.sqrt(2)
    upper = torch.triu(nothing, 1) + torch.diag(nothing.diagonal() * math.sqrt(2))
    only_noise = replace(
        moments,
        noise=noise,
        second=upper + torch.triu(upper, 1).T,
        sums=noise * torch.randn(2, 24, generator=generator, dtype=torch.float64),
        everyone=torch.zeros(24, dtype=torch.float64),
    )
    teacher = Teacher(only_noise, kind=TaskKind.BINARY)
    assert teacher.share < 0.5
    drawn = teacher.draw(50, generator)
    assert drawn.view(2, 50, 24).std(1).max() < 0.5  # at most the noise's own largest directions
    assert Teacher(moments, kind=TaskKind.BINARY).share == 1.0


def test_drawn_features_have_the_class_means_and_the_covariance() -> None:
    data = blobs(patients=200, per_patient=1)
    moments = asked(data, dimension=12)
    teacher = Teacher(moments, kind=TaskKind.BINARY)
    drawn = teacher.draw(4000, torch.Generator().manual_seed(0)).view(2, 4000, 12).double()
    rows = moments.centred(data.images).double()
    for label in range(2):
        real = rows[data.classes == label]
        assert F.cosine_similarity(drawn[label].mean(0), real.mean(0), dim=0) > 0.99
    assert torch.allclose(drawn.norm(dim=2), torch.ones(2, 4000, dtype=torch.float64), atol=1e-5)


def test_uncentring_is_the_reverse_of_centring() -> None:
    data = blobs(patients=20)
    moments = asked(data, dimension=12)
    back = moments.uncentred(moments.centred(data.images))
    assert torch.allclose(back, moments.uncentred_features(data.images), atol=1e-4)


def test_every_class_is_somebodys() -> None:
    task = Task.single_label(("a", "b", "c"))
    targets = torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    found = every_class(targets, torch.tensor([0, 2, 2]), task)
    assert torch.equal(found[0], targets[0])
    assert found[1:].argmax(1).tolist() == [2, 2]
    assert torch.allclose(found.sum(1), torch.ones(3))
    several = every_class(targets, torch.tensor([0, 1, 2]), Task.multilabel(("a", "b", "c")))
    assert several[2, 2] == pytest.approx(0.51)
    assert several[2, 1] == pytest.approx(0.7)


def test_smooth_is_a_binomial_blur_in_every_axis() -> None:
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 16.0
    line = torch.tensor([1.0, 2.0, 1.0])
    assert torch.equal(smooth(point)[0, 0, 1:4, 1:4], line[:, None] * line)
    assert torch.allclose(smooth(torch.full((1, 1, 3, 3, 3), 0.4)), torch.tensor(0.4))


# -- the distillers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRIVATE)
def test_private_release_of_every_kind_of_task(name: str, kind: str, tmp_path: Path) -> None:
    data = several(kind)
    many = replace(data, patients=tuple(str(i) for i in range(len(data))))
    distiller = make_distiller(name, PRIVATE[name])
    assert distiller.plan(data.task, tuple(data.images.shape[1:]), 2) == moments_plan()
    found = distiller.distill(private(many, tmp_path, epsilon=40.0), ipc=2, seed=0, start=None, bench=Workbench())
    assert found.images.shape == (6, *data.images.shape[1:])
    assert found.hard_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.isfinite(found.images).all()
    assert 0 <= float(found.soft_labels.min()) <= float(found.soft_labels.max()) <= 1


@pytest.mark.parametrize("name", PRIVATE)
def test_sealed_answers_alone_decide_the_release(name: str, tmp_path: Path) -> None:
    """Record and replay: with the kept answers, a cohort of others gives the same bits."""
    first, others = blobs(patients=80), blobs(patients=80, seed=5, first=900)
    distiller = make_distiller(name, PRIVATE[name])

    def release(data: ImageSet, seed: int, folder: Path = tmp_path) -> Tensor:
        curator = private(data, folder, seed=seed)
        return distiller.distill(curator, ipc=1, seed=0, start=None, bench=Workbench()).images

    recorded = release(first, 0)
    assert torch.equal(release(others, 1), recorded)
    assert not torch.equal(release(first, 1, tmp_path / "anew"), recorded)


@pytest.mark.parametrize(
    "name", [name for name in DISTILLERS.names() if name not in (*PRIVATE, "gradient_matching")]
)
def test_methods_that_need_images_refuse(name: str, tmp_path: Path) -> None:
    data, distiller = blobs(patients=80), make_distiller(name, {})
    with pytest.raises(PrivacyError, match=name):
        distiller.plan(data.task, (1, 16, 16), 1)
    with pytest.raises(PrivacyError):
        distiller.distill(private(data, tmp_path), ipc=1, seed=0, start=None, bench=Workbench())


def test_real_starts_are_refused_under_privacy(tmp_path: Path) -> None:
    distiller = make_distiller("distribution_matching", {"init": "real"})
    with pytest.raises(PrivacyError, match="init"):
        distiller.plan(blobs(patients=4).task, (1, 16, 16), 1)
    with pytest.raises(PrivacyError, match="images"):
        distiller.distill(private(blobs(patients=80), tmp_path), ipc=1, seed=0, start=None, bench=Workbench())


class _Stopping(Progress):
    """Ends the making up of patients in its third part, as Ctrl-C would; counts the parts."""

    def __init__(self, *, stop: bool) -> None:
        self.stop, self.parts = stop, 0

    def track(
        self, items: Iterable[Any], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Any]:
        for item in items:
            if description == "making up patients":
                if self.stop and self.parts == 2:
                    raise KeyboardInterrupt
                self.parts += 1
            yield item


def test_an_interruption_loses_no_made_up_patient(tmp_path: Path) -> None:
    data = blobs(patients=80)
    distiller = make_distiller("surrogate", {**PRIVATE["surrogate"], "made_up": 160})

    def release(bench: Workbench) -> Synthetic:
        return distiller.distill(private(data, tmp_path), ipc=1, seed=0, start=None, bench=bench)

    whole, checkpoint = release(Workbench()), FileCheckpoint(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        release(Workbench(checkpoint=checkpoint, progress=_Stopping(stop=True)))
    assert len((checkpoint.load() or {})["made_up"]) == 200
    again = _Stopping(stop=False)
    resumed = release(Workbench(checkpoint=checkpoint, progress=again))
    assert again.parts == 2
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.soft_labels, resumed.soft_labels)
