"""Every distiller on a made-up GPU: torch refuses operations on tensors of different devices, as on a real one.

Long, and in a run of its own, because torch's made-up tensors have crashed an interpreter that had trained before:
``uv run pytest -m long tests/distill/test_devices.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medistill.core.compute import Compute
from medistill.core.images import ImageSet
from medistill.core.protocols import Synthetic, Workbench
from medistill.distill import trajectory_matching
from medistill.distill.experts import architecture, flattened
from medistill.distill.runner import make_distiller
from medistill.privacy.curator import OpenCurator
from tests.conftest import blobs
from tests.contracts.test_distillers import QUICK

_ATEN = torch.ops.aten

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*CUDA is not available"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


class _MadeUp(FakeTensorMode):
    """Tensors with shapes and devices but without numbers; where one is asked for, it is 1."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is _ATEN.nonzero.default:
            shape = (args[0].numel() // 2, args[0].ndim)
            return torch.zeros(shape, dtype=torch.long, device=args[0].device)
        return super().dispatch(func, types, args, kwargs or {})


def _moved(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module.to``, for tensors that cannot change their device in place."""
    for module in self.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(change(value.detach()), requires_grad=value.requires_grad)
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = change(value)
    return self


def _zeros(outputs: Any, inputs: Tensor | Sequence[Tensor], **_: Any) -> tuple[Tensor, ...]:
    """Gradients without an engine, which would ask for the driver."""
    return tuple(map(torch.zeros_like, [inputs] if isinstance(inputs, Tensor) else inputs))


def _untrained(real: ImageSet, numbers: range, *, epochs: int, width: int, **_: Any) -> Iterator[Tensor]:
    """Experts without their processes."""
    network = architecture(real.task, tuple(real.images.shape[1:]), width=width, seed=0)
    yield from (torch.stack([flattened(network)] * (epochs + 1)) for _ in numbers)


def _on_a_gpu(name: str, patch: pytest.MonkeyPatch) -> Synthetic:
    patch.setattr(nn.Module, "_apply", _moved)
    patch.setattr(torch.autograd, "grad", _zeros)
    patch.setattr(torch.autograd, "backward", lambda *_, **__: None)
    patch.setattr(Tensor, "backward", lambda *_, **__: None)
    patch.setattr(trajectory_matching, "train_experts", _untrained)
    few = {"iterations": 1, "steps": 1, "unroll": 1, "networks": 1, "views": 1, "student_steps": 1}
    settings = {key: few.get(key, value) for key, value in QUICK[name].items()}
    with _MadeUp(allow_non_fake_inputs=True):
        bench = Workbench(compute=Compute(device="cuda"))
        return make_distiller(name, settings).distill(
            OpenCurator(blobs(patients=8)), ipc=1, seed=0, start=None, bench=bench
        )


@pytest.mark.parametrize("name", QUICK)
def test_tensors_meet_on_one_device_and_results_come_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _on_a_gpu(name, monkeypatch)
    assert {made.images.device.type, made.soft_labels.device.type, made.hard_labels.device.type} == {"cpu"}


def test_a_tensor_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Compute, "put", lambda self, tensor: tensor if tensor.ndim == 2 else tensor.to(self.device)
    )
    with pytest.raises(RuntimeError, match=r"device.*(cpu|cuda)"):
        _on_a_gpu("soft_label", monkeypatch)
