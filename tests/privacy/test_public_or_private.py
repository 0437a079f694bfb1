"""What must be private or public, row by row, as far as the curator can see to it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medistill.core.compute import fresh
from medistill.core.protocols import Curator
from medistill.distill.start import initial
from medistill.errors import PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.privacy import Ledger, PrivateCurator
from tests.privacy.asking import (
    BUDGET,
    TASK,
    cohort,
    curator,
    gradients,
    marks,
    only_sampling,
    pixels,
    silent,
    sums,
)
from tests.privacy.test_curator import cross_entropy


def counts(images: Tensor, targets: Tensor) -> Tensor:
    return targets


def test_class_and_patient_counts_are_noised_coordinates_and_nothing_else_tells_them(tmp_path: Path) -> None:
    answers = []
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        answers.append(curator(marks(16), tmp_path / str(run)).sum(counts, clip_norm=1.0))
    assert not torch.equal(*answers)
    assert not any(float(value).is_integer() for answer in answers for value in answer)
    public = {name for name in vars(PrivateCurator) if not name.startswith("_")}
    assert public == {
        "task",
        "image_shape",
        "identity",
        "sum",
        "gradient",
        "score",
        "runs",
        "run",
        "noise",
        "resume",
        "close",
        "images",
        "statement",
    }


def test_means_windows_and_centring_come_from_a_query_or_not_at_all(tmp_path: Path) -> None:
    asked = curator(marks(16), tmp_path)
    with pytest.raises(PrivacyError, match="differential privacy does not allow"):
        asked.images()
    assert any("fixed public scaling" in sentence for sentence in asked.statement().assumptions)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)], ids=str)
def test_statistics_of_batches_are_refused_in_gradients(layer: nn.Module, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(64, 2))
    asked = curator(marks(16), tmp_path, plan=gradients())
    with pytest.raises(PrivacyError, match="statistics"):
        asked.gradient(network, cross_entropy, clip_norm=1.0)


def test_statistics_of_batches_are_refused_in_sums(tmp_path: Path) -> None:
    layer = nn.BatchNorm2d(1)
    asked = curator(marks(16), tmp_path)
    with pytest.raises(PrivacyError, match="single images"):
        asked.sum(lambda images, _: layer(images).flatten(1), clip_norm=1.0)
    with pytest.raises(PrivacyError, match="single images"):
        asked.sum(lambda images, _: images.flatten(1) - images.flatten(1).mean(0), clip_norm=1.0)
    with pytest.raises(PrivacyError, match="single images"):
        asked.sum(lambda images, _: images.flatten(1).sum(0, keepdim=True), clip_norm=1.0)
    asked.sum(lambda images, _: layer.eval()(images).flatten(1), clip_norm=1.0)


def test_a_network_in_evaluation_mode_hides_no_batch_statistics(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(PrivacyError, match="statistics"):
        curator(marks(16), tmp_path, plan=gradients()).gradient(network, cross_entropy, clip_norm=1.0)


def test_real_images_are_no_start(tmp_path: Path) -> None:
    asked: Curator = curator(marks(16), tmp_path)
    with pytest.raises(PrivacyError):
        initial(asked, init="real", ipc=1, seed=0, start=None)
    start = initial(asked, init="noise", ipc=1, seed=0, start=None)
    assert start.images.shape == (2, 1, 4, 4)


def test_a_teacher_can_be_trained_from_noisy_gradients_of_group_norm_networks(tmp_path: Path) -> None:
    network = fresh(lambda *of: ConvNet(*of, width=8, depth=1, norm="group"), TASK, (1, 4, 4), 0)
    asked = curator(marks(16), tmp_path, plan=gradients(12, 0.5))
    for _ in range(2):
        found = asked.gradient(network, cross_entropy, clip_norm=1.0, sampling_rate=0.5)
        for name, value in network.named_parameters():
            value.data -= 0.1 * found[name] / 8
    assert all(torch.isfinite(value).all() for value in network.parameters())


def test_every_trial_of_a_setting_on_the_patients_is_counted(tmp_path: Path) -> None:
    for _ in range(3):
        curator(marks(16), tmp_path).sum(pixels, clip_norm=1.0)
    spent = Ledger(tmp_path / "ledger.jsonl").spent()
    assert spent is not None
    assert spent.epsilon > 1.5 * BUDGET.epsilon
    sentence = (
        "Settings, image size, class names and images per class were chosen without looking at these patients."
    )
    asked = curator(marks(16), tmp_path / "other")
    assert sentence in asked.statement().assumptions


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_patient_whose_row_is_not_finite_counts_as_zero(bad: float, tmp_path: Path) -> None:
    def broken(images: Tensor, targets: Tensor) -> Tensor:
        rows = images.flatten(1)
        return torch.where((rows[:, :1] == 1.0), bad, rows)  # the first patient of marks

    found = curator(marks(16), tmp_path, _entropy=silent).sum(broken, clip_norm=1.0)
    assert found.tolist() == pytest.approx([0.0] + [1.0] * 15, abs=1e-6)


def test_a_batch_of_nobody_is_answered_with_noise(tmp_path: Path) -> None:
    sources = iter([silent, os.urandom])  # nobody is sampled, and the noise is real

    def entropy(count: int) -> bytes:
        return next(sources)(count)

    asked = curator(marks(16), tmp_path, plan=sums(12, 0.5), _entropy=entropy)
    answer = asked.sum(pixels, clip_norm=1.0, sampling_rate=0.5)
    assert answer.shape == (16,)
    assert (answer != 0).all()
    nobody = cohort(torch.zeros(0, 16))
    assert curator(nobody, tmp_path / "other").sum(pixels, clip_norm=1.0).shape == (16,)


def test_sampling_is_secret_and_new_each_time(tmp_path: Path) -> None:
    answers = []
    for run in range(2):
        torch.manual_seed(0)
        asked = curator(marks(64), tmp_path / str(run), plan=sums(12, 0.5), _entropy=only_sampling())
        answers += [asked.sum(pixels, clip_norm=1.0, sampling_rate=0.5).round() for _ in range(2)]
    different = {tuple(answer.tolist()) for answer in answers}
    assert len(different) == 4  # two alike: less than one in 10^18
    ledger = (tmp_path / "0" / "ledger.jsonl").read_text()
    assert "seed" not in ledger
