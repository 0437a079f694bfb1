"""Where and how numbers are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medistill.core.task import Task
from medistill.errors import ConfigError
from medistill.parallel import check_engine


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device, precision and parallel workers of one computation. The same on a CPU gives the same bits.

    Real images stay in host memory; batches of them move to the device, so that its memory does not grow with
    their number. Random numbers are drawn on the host, whatever the device.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or another device of torch.
        mixed_precision: Forward passes in bfloat16 where the method tolerates it.
        compile: Compile networks with ``torch.compile``; the first step then takes long.
        jobs: Processes for parts that do not wait for each other; ``None`` takes as many as there are devices:
            cores, or GPUs.
        engine: ``"local"`` or ``"ray"``, see :func:`medistill.parallel.parallel_map`.

    Raises:
        ConfigError: If the device or engine is unknown or absent, or ``jobs`` is below 1.
    """

    device: str = "cpu"
    mixed_precision: bool = False
    compile: bool = False
    jobs: int | None = None
    engine: str = "local"

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ConfigError(
                f"The device {self.device!r} is not there; torch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices. Use --device cpu, or install torch for your GPU."
            ) from None
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"Expected jobs >= 1, got {self.jobs}.")
        check_engine(self.engine)

    @property
    def device_type(self) -> str:
        """Kind of the device, for example ``"cuda"``."""
        return torch.device(self.device).type

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        return tensor.to(self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Within it, matrix products and convolutions are taken in bfloat16 if ``mixed_precision`` is set."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.mixed_precision)

    def ready(self, network: nn.Module) -> nn.Module:
        """The network on the device, compiled where asked for."""
        network.to(self.device)
        if self.compile:
            network.compile()
        return network

    def workers(self) -> int | None:
        """Processes worth starting: as many as there are GPUs, or ``None`` for the cores."""
        return self.jobs or (max(1, torch.cuda.device_count()) if self.device_type == "cuda" else None)

    def of_worker(self, number: int) -> Compute:
        """What one of several workers computes on: GPUs are dealt out in turn, and workers start no workers."""
        device = self.device
        if device == "cuda":
            device = f"cuda:{number % max(1, torch.cuda.device_count())}"
        return replace(self, device=device, jobs=1, engine="local")


def fresh(
    factory: Callable[[Task, tuple[int, ...]], nn.Module], task: Task, image_shape: tuple[int, ...], seed: int
) -> nn.Module:
    """A network initialised from a seed without touching the global random state of the caller.

    Args:
        factory: A :class:`medistill.core.protocols.NetworkFactory`.
        task: Gives the number of outputs.
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)``.
        seed: Public seed of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(task, image_shape)
