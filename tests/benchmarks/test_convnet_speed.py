"""Ratios behind three choices of the ConvNet on a CPU, measured side by side in one run.

Run with ``uv run pytest -m benchmark tests/benchmarks/test_convnet_speed.py -s``; half a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import fresh
from medistill.core.task import Task
from medistill.networks.convnet import ConvNet
from medistill.training.fit import cache_sized

pytestmark = pytest.mark.benchmark
TASK = Task.single_label(("a", "b"))


class _AveragePool(ConvNet):
    """The same network with the library's average pooling."""

    def features(self, images: Tensor) -> Tensor:
        hidden = (images - 0.5) / 0.25
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.avg_pool2d(F.relu(norm(convolution(hidden))), 2)
        return hidden.flatten(1)


def _milliseconds(work: Callable[[], object], repeats: int = 15) -> float:
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return 1e3 * (time.process_time() - began) / repeats


def test_pooling_as_a_depthwise_convolution() -> None:
    torch.set_num_threads(1)
    images = torch.rand(20, 1, 64, 64)
    ours, library = fresh(ConvNet, TASK, (1, 64, 64), 0), fresh(_AveragePool, TASK, (1, 64, 64), 0)
    torch.testing.assert_close(ours(images), library(images), rtol=1e-4, atol=1e-5)
    times = {
        name: _milliseconds(lambda n=n: n(images).sum().backward())
        for name, n in (("ours", ours), ("library", library))
    }
    print(f"\ntraining step, 20 images of 64 px: {times}, ratio {times['library'] / times['ours']:.2f}")


def test_batches_that_fit_the_cache() -> None:
    torch.set_num_threads(1)
    network = fresh(ConvNet, TASK, (1, 64, 64), 0).requires_grad_(False)
    images = torch.rand(512, 1, 64, 64)
    whole = _milliseconds(lambda: network(images), 3)
    parts = _milliseconds(lambda: [network(part) for part in cache_sized(images)], 3)
    print(
        f"\nforward pass, 512 images of 64 px: at once {whole:.0f} ms, in parts {parts:.0f} ms, "
        f"ratio {whole / parts:.2f}"
    )


_STEP = """
import json, resource, sys, time, torch
from medistill.cpu import keep_freed_memory
from medistill.core.task import Task
from medistill.core.compute import fresh
from medistill.networks.convnet import ConvNet
if sys.argv[1] == "keep": assert keep_freed_memory()
torch.set_num_threads(1)
network, images = fresh(ConvNet, Task.single_label(("a", "b")), (1, 64, 64), 0), torch.rand(64, 1, 64, 64)
network(images).sum().backward()
began = time.process_time()
for _ in range(10): network(images).sum().backward()
print(json.dumps([time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def test_keeping_freed_memory() -> None:
    def run(mode: str) -> tuple[float, float]:
        command = [sys.executable, "-c", _STEP, mode]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
        seconds, peak = json.loads(output)
        return seconds, peak

    given_back, kept = run("give-back"), run("keep")
    print(
        f"\n10 training steps, 64 images of 64 px: given back {given_back[0]:.2f} s and {given_back[1]:.0f} MB, "
        f"kept {kept[0]:.2f} s and {kept[1]:.0f} MB, ratio {given_back[0] / kept[0]:.2f}"
    )
