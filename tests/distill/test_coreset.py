"""Coresets against greedy loops that recompute everything, and who is chosen when patients or images run short."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from medistill.core.images import ImageSet
from medistill.core.protocols import Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.coreset import Coreset, herding, k_center
from medistill.distill.runner import make_distiller
from medistill.distill.start import choose_images, initial, random_images
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from tests.conftest import blobs, pseudonym


def _features(count: int, *, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows + 0.3)


def _pick_all(pick: object, count: int, total: int) -> list[int]:
    picked: list[int] = []
    for _ in range(count):
        left = torch.tensor([i for i in range(total) if i not in picked])
        picked.append(pick(left, picked))  # type: ignore[operator]
    return picked


def _naive_herding(rows: np.ndarray, count: int) -> list[int]:
    mean, picked = rows.mean(0), []
    for _ in range(count):
        gaps = {i: np.linalg.norm(mean - rows[[*picked, i]].mean(0)) for i in range(len(rows)) if i not in picked}
        picked.append(min(gaps, key=lambda i: gaps[i]))
    return picked


def _naive_k_center(rows: np.ndarray, count: int) -> list[int]:
    picked = [int(np.linalg.norm(rows - rows.mean(0), axis=1).argmin())]
    while len(picked) < count:
        gaps = [min(np.linalg.norm(row - rows[i]) for i in picked) for row in rows]
        picked.append(int(np.argmax(gaps)))
    return picked


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_the_naive_greedy_loop(seed: int) -> None:
    rows = _features(40, seed=seed)
    assert _pick_all(herding(rows), 12, 40) == _naive_herding(rows.numpy(), 12)


@pytest.mark.parametrize("seed", range(5))
def test_k_center_is_the_naive_greedy_loop(seed: int) -> None:
    rows = _features(40, seed=seed)
    assert _pick_all(k_center(rows), 12, 40) == _naive_k_center(rows.numpy(), 12)


def test_herded_means_come_close_and_k_centers_cover() -> None:
    rows = _features(200)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:10]
    herded, centers = _pick_all(herding(rows), 10, 200), _pick_all(k_center(rows), 10, 200)

    def off(picked: torch.Tensor | list[int]) -> float:
        return float((rows[picked].mean(0) - rows.mean(0)).norm())

    def radius(picked: torch.Tensor | list[int]) -> float:
        return float(torch.cdist(rows, rows[picked]).min(1).values.max())

    assert off(herded) < 0.3 * off(chosen)
    assert radius(centers) < radius(chosen)


def _random_before(images: ImageSet, *, ipc: int, seed: int) -> list[int]:
    """The rule for one label an image, spelled out: patients in random order, then their further images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    for label in range(images.task.n_classes):
        seen: set[str] = set()
        first, again = [], []
        for i in [i for i in order if images.classes[i] == label]:
            (again if images.patients[i] in seen else first).append(i)
            seen.add(images.patients[i])
        chosen += (first + again)[:ipc]
    return chosen


@pytest.mark.parametrize(("classes", "ipc"), [(2, 3), (2, 25), (3, 8), (3, 18)])
def test_random_images_prefer_new_patients(classes: int, ipc: int) -> None:
    data = blobs(patients=9 * classes, per_patient=3, classes=classes)
    for seed in range(3):
        expected = data.select(_random_before(data, ipc=ipc, seed=seed))
        found = random_images(data, ipc=ipc, seed=seed)
        assert torch.equal(found.images, expected.images)
        assert found.patients == expected.patients


@pytest.mark.parametrize("selection", ["random", "herding", "k_center"])
def test_no_patient_twice_unless_they_run_out(selection: str) -> None:
    data = blobs(patients=12, per_patient=3)
    for ipc in (6, 9):
        found = [_position(data, image) for image in _coreset(data, selection=selection, ipc=ipc)]
        assert len(set(found)) == 2 * ipc
        for label in (0, 1):
            mine = found[label * ipc : (label + 1) * ipc]
            assert all(data.classes[i] == label for i in mine)
            times = Counter(data.patients[i] for i in mine)
            assert len(times) == 6
            assert ipc == 9 or max(times.values()) == 1


def _coreset(data: ImageSet, *, selection: str, ipc: int) -> torch.Tensor:
    distiller = Coreset(selection=selection, epochs=1, width=8)
    return distiller.distill(OpenCurator(data), ipc=ipc, seed=0, start=None, bench=Workbench()).images


def _position(data: ImageSet, image: torch.Tensor) -> int:
    return int((data.images - image).abs().flatten(1).sum(1).argmin())


@pytest.mark.parametrize("selection", ["herding", "k_center"])
def test_selections_differ_from_random_and_repeat(selection: str) -> None:
    data = blobs(patients=24)
    chosen = _coreset(data, selection=selection, ipc=3)
    assert torch.equal(chosen, _coreset(data, selection=selection, ipc=3))
    assert not torch.equal(chosen, _coreset(data, selection="random", ipc=3))


def test_random_weights_are_an_option() -> None:
    data = blobs(patients=24)
    for epochs in (0, 1):
        made = Coreset(selection="herding", epochs=epochs, width=8).distill(
            OpenCurator(data), ipc=2, seed=0, start=None, bench=Workbench()
        )
        assert made.images.shape == (4, 1, 16, 16)


def _multilabel(rows: list[list[int]], *, patients: list[int] | None = None) -> ImageSet:
    pixels = torch.rand(len(rows), 1, 16, 16, generator=torch.Generator().manual_seed(3))
    numbers = patients or list(range(len(rows)))
    return ImageSet(
        images=pixels,
        targets=torch.tensor(rows).float(),
        patients=tuple(pseudonym(number) for number in numbers),
        task=Task(kind=TaskKind.MULTILABEL, class_names=("a", "b", "c")[: len(rows[0])]),
    )


@pytest.mark.parametrize("selection", ["random", "herding", "k_center"])
def test_several_labels_choose_by_every_label_and_no_image_twice(selection: str) -> None:
    rows = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]] * 2
    data = _multilabel(rows)
    for seed in range(5):
        made = Coreset(selection=selection, epochs=1, width=8).distill(
            OpenCurator(data), ipc=3, seed=seed, start=None, bench=Workbench()
        )
        assert made.hard_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert bool((made.soft_labels.gather(1, made.hard_labels[:, None]) == 1).all())
        assert len({_position(data, image) for image in made.images}) == 9


def test_the_rarest_label_chooses_first_and_an_image_serves_twice_only_without_another() -> None:
    data = _multilabel([[1, 1], [1, 0], [1, 0]])
    for seed in range(5):
        chosen = choose_images(data, ipc=1, seed=seed, picker=lambda _: lambda open_, _: int(open_[0]))
        assert chosen[1] == 0
        assert chosen[0] in (1, 2)
    short = random_images(_multilabel([[1, 1], [1, 0]]), ipc=1, seed=0)
    assert short.targets.tolist() == [[1, 0], [1, 1]]
    twice = random_images(_multilabel([[1, 1], [1, 1]]), ipc=2, seed=0)
    assert len(twice) == 4
    with pytest.raises(DataError, match="Class 'b' has 1 images"):
        random_images(_multilabel([[1, 1], [1, 0]]), ipc=2, seed=0)


def test_a_start_from_real_images_keeps_their_labels() -> None:
    data = _multilabel([[1, 1, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1]])
    made = initial(OpenCurator(data), init="real", ipc=1, seed=0, start=None)
    found = [_position(data, image) for image in made.images]
    assert torch.equal(made.soft_labels, data.targets[found])
    assert made.hard_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "herdin"}, "random, herding, k_center"),
        ({"epochs": -1}, "epochs >= 0"),
        ({"width": 0}, "width"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_distiller("coreset", settings)
