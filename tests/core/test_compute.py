"""Device, precision and workers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medistill.core.compute import Compute
from medistill.errors import ConfigError


def test_a_device_that_is_not_there_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        Compute(device="cuda:63")
    with pytest.raises(ConfigError, match="'gpu'"):
        Compute(device="gpu")


def test_bad_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="jobs"):
        Compute(jobs=0)
    with pytest.raises(ConfigError, match="engine"):
        Compute(engine="dask")


def test_mixed_precision_is_bfloat16_inside_only() -> None:
    layer, images = nn.Linear(4, 2), torch.rand(3, 4)
    with Compute(mixed_precision=True).autocast():
        assert layer(images).dtype is torch.bfloat16
    assert layer(images).dtype is torch.float32
    with Compute().autocast():
        assert layer(images).dtype is torch.float32


def test_a_worker_starts_no_workers() -> None:
    worker = Compute(jobs=4).of_worker(3)
    assert worker.workers() == 1
    assert worker.device == "cpu"
