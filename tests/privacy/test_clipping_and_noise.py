"""What one patient adds, and what hides it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from medistill.errors import PrivacyError
from medistill.privacy.clipping import check_clip_norm, clipped, grid_step, on_grid
from medistill.privacy.contributions import images_of, patient_rows
from medistill.privacy.noise import gaussian, sampled
from tests.conftest import blobs

UNLIKELY = 1e-7  #: probability with which a statistical test on fresh entropy may fail


def test_long_rows_are_shortened_and_short_ones_kept() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = clipped(rows, 1.0)
    assert found[0].tolist() == pytest.approx([0.6, 0.8])
    assert torch.equal(found[1:], rows[1:].double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_counts_as_zero(bad: float) -> None:
    rows = torch.tensor([[1.0, bad], [0.3, 0.4]])
    assert clipped(rows, 1.0)[0].tolist() == [0.0, 0.0]
    assert clipped(rows, 1.0)[1].tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("clip_norm", [1e-3, 0.7, 1.0, 3e5])
def test_no_row_is_longer_than_the_clip_norm_on_the_grid(scale: float, clip_norm: float) -> None:
    rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)).double() * scale
    step = grid_step(clip_norm)
    assert math.log2(step).is_integer()
    whole = on_grid(clipped(rows, clip_norm), step)
    for row in whole.tolist():  # exact whole numbers of Python
        assert sum(value * value for value in row) * step * step <= clip_norm**2


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan, None, "1"])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="clip norm"):
        check_clip_norm(clip_norm)


def test_rows_are_means_over_each_patients_images_whatever_the_chunk() -> None:
    data = blobs(patients=7, per_patient=3)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    data = data.select(order)
    patients = images_of(data.patients)
    expected = torch.stack([data.images[own].flatten(1).double().mean(0) for own in patients])
    for chunk in (1, 2, 4, 100):
        rows = patient_rows(data, patients, lambda images, _: images.flatten(1), chunk=chunk)
        torch.testing.assert_close(torch.cat(list(rows)), expected)


def test_noise_is_gaussian_in_both_tails() -> None:
    values = gaussian((200, 1000), 2.5).numpy().ravel() / 2.5
    assert stats.kstest(values, "norm").pvalue > UNLIKELY
    for level in (3.0, 4.0):
        for outside in (values > level, values < -level):
            assert stats.binomtest(int(outside.sum()), values.size, stats.norm.sf(level)).pvalue > UNLIKELY


def test_noise_reaches_as_far_as_it_says() -> None:
    largest = gaussian((1,), 1.0, entropy=bytes).item()
    smallest = gaussian((1,), 1.0, entropy=lambda count: b"\x01" + bytes(count - 1)).item()
    assert -largest == smallest
    assert largest == pytest.approx(stats.norm.isf(2.0**-65))
    assert 9.1 < largest < 9.3


def test_patients_are_sampled_independently_at_their_rate() -> None:
    draws = np.stack([sampled(500, 0.3).numpy() for _ in range(400)])
    assert stats.binomtest(int(draws.sum()), draws.size, 0.3).pvalue > UNLIKELY
    sizes = draws.sum(1)
    dispersion = ((sizes - 150) ** 2 / (500 * 0.3 * 0.7)).sum()
    assert UNLIKELY < stats.chi2.sf(dispersion, len(sizes)) < 1 - UNLIKELY
    both = int((draws[:, :-1] & draws[:, 1:]).sum())
    assert abs(both - 0.09 * 499 * 400) < 6 * math.sqrt(0.09 * 499 * 400 * 2)
    assert sampled(500, 1.0).all()


def test_no_seed_reaches_noise_or_sampling() -> None:
    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return gaussian((64,), 1.0), sampled(64, 0.5)

    (noise, mask), (other_noise, other_mask) = drawn(), drawn()
    assert not torch.equal(noise, other_noise)
    assert not torch.equal(mask, other_mask)


def test_plain_floats_give_an_answer_away_and_the_grid_does_not() -> None:
    """1 + noise is a multiple of 2**-53 wherever it is near 0, and 0 + noise mostly is not: its last bits tell."""
    step = grid_step(1.0)

    def near_zero(answers: torch.Tensor) -> torch.Tensor:
        return answers[answers.abs() < 1 / 16]

    def coarse(answers: torch.Tensor, width: float) -> float:
        return float((answers / width % 1 == 0).double().mean())

    absent, present = (near_zero(answer + gaussian((100_000,), 1.0)) for answer in (0.0, 1.0))
    assert coarse(present, 2.0**-53) == 1.0
    assert coarse(absent, 2.0**-53) < 0.2
    for answer in (0.0, 1.0):
        whole = on_grid(torch.full((1, 1), answer).double(), step) + torch.round(
            gaussian((1, 100_000), 1.0) / step
        )
        assert coarse(near_zero(whole.double() * step), step) == 1.0
