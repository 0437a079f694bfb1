"""Occlusion against a naive loop, on a network whose answer is known, and the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from medistill.core.task import Task, TaskKind
from medistill.diagnose import DiagnosticModel
from medistill.diagnose.ensemble import Ensemble
from medistill.diagnose.explain import occlusion, overlay
from medistill.diagnose.preprocessing import Preprocessing
from tests.diagnose.conftest import noise


class Corner(nn.Module):
    """Takes an image for class 1 the more, the brighter its first quarter is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1] // 2
        bright = images[..., :side, :side].flatten(1).mean(1)
        return torch.stack([torch.zeros_like(bright), 8 * bright - 2], dim=1)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 20), (1, 8, 8, 8)])
def test_occlusion_is_the_mean_loss_over_the_patches_that_cover_a_pixel(
    shape: tuple[int, ...], model: DiagnosticModel
) -> None:
    watching = replace(
        model,
        ensemble=Ensemble([Corner()], kind=TaskKind.BINARY),
        task=Task.single_label(("no", "yes")),
        preprocessing=Preprocessing.of_release({}, shape),
    )
    image = noise(1, shape)[0]
    found = occlusion(watching, image, 1).numpy()
    side = shape[-1]
    patch, step = side // 4, side // 8
    starts = sorted({*range(0, side - patch + 1, step), side - patch})
    grids = np.stack(np.meshgrid(*[starts] * (len(shape) - 1), indexing="ij"), -1).reshape(-1, len(shape) - 1)
    total, count = np.zeros(shape[1:]), np.zeros(shape[1:])
    grey = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
    before = watching.probabilities(image[None])[0, 1]
    for corner in grids:
        place = tuple(slice(at, at + patch) for at in corner)
        covered = image.clone()
        covered[(slice(None), *place)] = grey
        total[place] += float(before - watching.probabilities(covered[None])[0, 1])
        count[place] += 1
    np.testing.assert_allclose(found, total / count, atol=1e-6)


def test_what_the_answer_does_not_depend_on_has_no_heat(model: DiagnosticModel) -> None:
    watching = replace(
        model, ensemble=Ensemble([Corner()], kind=TaskKind.BINARY), task=Task.single_label(("no", "yes"))
    )
    image = torch.zeros(1, 16, 16)
    image[0, :8, :8] = 1
    heat = occlusion(watching, image, 1)
    assert float(heat[:8, :8].min()) > 0
    assert float(heat[10:, 10:].abs().max()) == 0


def test_red_speaks_for_and_blue_against() -> None:
    heat = torch.zeros(16, 16)
    heat[0, 0], heat[15, 15] = 0.2, -0.2
    drawn = overlay(torch.full((1, 16, 16), 0.5), heat)
    assert drawn.shape == (3, 256, 512)
    assert torch.equal(drawn[:, :, :256], torch.full((3, 256, 256), 0.5))
    left, right = drawn[:, 0, 256], drawn[:, 255, 511]
    assert left[0] > left[2]
    assert right[2] > right[0]
    assert overlay(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 8)).shape == (3, 8, 8, 16)
