"""How much is gained by distilling all shadows at once, measured side by side in one run.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_shadow_speed.py -s``; five minutes.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from medistill.audit.shadow import Shadow
from medistill.audit.shadow_distillation import ShadowDistillation, draw_membership
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, averaged
from medistill.progress import Progress
from tests.conftest import blobs

pytestmark = pytest.mark.benchmark
SHADOWS, ALONE = 32, 2


def _cpu_seconds(real: ImageSet, membership: torch.Tensor, ipc: int) -> float:
    began = time.process_time()
    for _ in ShadowDistillation().run(real, membership, ipc=ipc, seed=0, compute=Compute(), progress=Progress()):
        pass
    return time.process_time() - began


@pytest.mark.parametrize("ipc", [1, 10])
def test_all_shadows_at_once_against_one_at_a_time(ipc: int) -> None:
    torch.set_num_threads(1)
    real = blobs(2500, per_patient=2, size=32)
    membership = draw_membership(2500, SHADOWS, seed=0)
    names = np.array(real.unique_patients)
    alone = 0.0
    for mine in membership[:ALONE]:
        half = real.of_patients(set(names[mine.numpy()]))
        alone += _cpu_seconds(half, torch.ones(1, int(mine.sum()), dtype=torch.bool), ipc)
    together = _cpu_seconds(real, membership, ipc)
    ratio = alone / ALONE * SHADOWS / together
    print(
        f"\n5,000 images of 32 px, ipc {ipc}: {SHADOWS} shadows at once {together:.1f} CPU s, one alone "
        f"{alone / ALONE:.1f} CPU s (mean of {ALONE}), ratio {ratio:.1f}"
    )
    assert ratio >= 3


def test_cost_of_the_default_attack_on_5000_images_of_64_px() -> None:
    torch.set_num_threads(1)
    candidates, reference = blobs(1250, size=32), blobs(1250, size=32, seed=1, first=5000)
    candidates, reference = (
        replace(part, images=torch.nn.functional.interpolate(part.images, scale_factor=2))
        for part in (candidates, reference)
    )
    assert averaged(candidates.images, plane=32, solid=16).shape == (2500, 1, 32, 32)
    began = time.process_time()
    Shadow().prepare(candidates, reference, ipc=10, seed=0, compute=Compute(), progress=Progress())
    seconds = time.process_time() - began
    print(f"\n32 shadows of 5,000 images of 64 px: {seconds:.0f} CPU s")
    assert seconds <= 150
