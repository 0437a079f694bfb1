"""Soft-label distillation through unrolled training (Li et al. 2020, on gastric X-rays; Wang et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from medistill.core.compute import Compute, fresh
from medistill.core.distilled import Schedule
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import TaskKind
from medistill.distill.batches import balanced_batch
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.start import check_init, initial
from medistill.distill.unrolled import Parameters, descended
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import objective


@dataclass(frozen=True, kw_only=True)
class SoftLabel:
    r"""Learn images, soft labels and the learning rate together.

    With synthetic images :math:`\tilde x`, soft labels :math:`\tilde y` and a learned step size
    :math:`\tilde\eta`, a network starts at random weights :math:`\theta_0` and takes ``unroll`` steps

    .. math:: \theta_{i+1} = \theta_i - \tilde\eta \nabla_\theta \ell(\tilde x, \tilde y; \theta_i),

    and :math:`(\tilde x, \tilde y, \tilde\eta)` descend the loss of real images at the last weights,
    :math:`\mathcal L = \ell(x, y; \theta_n)`, back-propagated through all steps. Labels start one-hot and the
    images from noise.

    Where it deviates: labels are a softmax of learned scores, so that they stay probabilities; the step size is
    a softplus of a learned number (as in Wang et al.); real batches are balanced over classes, because clinical
    classes are not; pixels are projected to ``[0, 1]`` after each step; hypergradients are clipped by norm.

    Args:
        iterations: Outer steps.
        unroll: Inner training steps; memory grows with it.
        batch_per_class: Real images per class and outer step.
        image_rate: Adam step size of the images (betas 0.5, 0.999).
        label_rate: Adam step size of the label scores.
        rate_rate: Adam step size of the learned learning rate.
        inner_rate: Learning rate to begin with.
        decay_every: The step sizes are halved this often; ``0`` never.
        clip: Largest norm of a hypergradient.
        init: ``"noise"`` or ``"real"``.
        width: Width of the ConvNet.

    References:
        Li, Togo, Ogawa, Haseyama, ICIP 2020, arXiv:2104.02857. Wang et al. 2018, arXiv:1811.10959.

    Privacy:
        Needs raw images; nothing is proved about the result.
    """

    iterations: int = 300
    unroll: int = 15
    batch_per_class: int = 64
    image_rate: float = 0.01
    label_rate: float = 0.02
    rate_rate: float = 0.02
    inner_rate: float = 0.02
    decay_every: int = 120
    clip: float = 1.0
    init: str = "noise"
    width: int = 32
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        check_init(self.init)
        if self.iterations < 1 or self.unroll < 1 or self.batch_per_class < 1:
            raise ConfigError("Expected iterations, unroll and batch_per_class >= 1.")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Run the outer loop; resumes from the checkpoint with the same bits."""
        real, first = curator.images(), initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        generator = torch.Generator().manual_seed(derive_seed(seed, "soft_label"))
        learned = _Learned(first, self, bench.compute)
        done = learned.restore(bench.checkpoint.load(), generator)
        for step in bench.steps(
            done,
            self.iterations,
            "soft labels",
            every=self.checkpoint_every,
            state=lambda step: learned.state(step, generator),
            current=lambda: learned.result(self.unroll),
        ):
            network = fresh(
                lambda task, shape: ConvNet(task, shape, width=self.width),
                real.task,
                curator.image_shape,
                derive_seed(seed, "network", step),
            )
            images, targets = map(bench.compute.put, balanced_batch(real, self.batch_per_class, generator))
            loss = unrolled_loss(
                network.to(bench.compute.device),
                learned,
                augment(images, generator),
                targets,
                kind=real.task.kind,
                unroll=self.unroll,
            )
            learned.descend(loss, clip=self.clip)
            if self.decay_every and (step + 1) % self.decay_every == 0:
                learned.halve()
            bench.progress.note(loss=loss.item(), rate=learned.rate.item())
        return learned.result(self.unroll)


class _Learned:
    """The learned quantities with their optimiser."""

    def __init__(self, start: Synthetic, settings: SoftLabel, compute: Compute) -> None:
        self.images = compute.put(start.images.clone()).requires_grad_()
        self.scores = compute.put(4.0 * (start.soft_labels - 0.5)).clone().requires_grad_()
        self.hard_labels = start.hard_labels
        raw = compute.put(torch.tensor(settings.inner_rate))
        self.raw_rate = torch.log(torch.expm1(raw)).requires_grad_()
        groups = [
            {"params": [self.images], "lr": settings.image_rate},
            {"params": [self.scores], "lr": settings.label_rate},
            {"params": [self.raw_rate], "lr": settings.rate_rate},
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))
        self._halvings = 0

    @property
    def rate(self) -> Tensor:
        return F.softplus(self.raw_rate)

    @property
    def soft_labels(self) -> Tensor:
        return self.scores.softmax(1)

    def descend(self, loss: Tensor, *, clip: float) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for tensor in (self.images, self.scores, self.raw_rate):
            nn.utils.clip_grad_norm_([tensor], clip)
        self._optimizer.step()
        with torch.no_grad():
            self.images.clamp_(0.0, 1.0)

    def halve(self, times: int = 1) -> None:
        self._halvings += times
        for group in self._optimizer.param_groups:
            group["lr"] *= 0.5**times

    def state(self, step: int, generator: Generator) -> dict[str, Tensor]:
        return {
            "step": torch.tensor(step),
            "halvings": torch.tensor(self._halvings),
            "generator": generator.get_state(),
            "images": self.images,
            "scores": self.scores,
            "raw_rate": self.raw_rate,
            **pack_optimizer(self._optimizer, "adam"),
        }

    def restore(self, state: dict[str, Tensor] | None, generator: Generator) -> int:
        if state is None:
            return 0
        with torch.no_grad():
            self.images.copy_(state["images"])
            self.scores.copy_(state["scores"])
            self.raw_rate.copy_(state["raw_rate"])
        unpack_optimizer(self._optimizer, state, "adam")
        self.halve(int(state["halvings"]))
        generator.set_state(state["generator"])
        return int(state["step"])

    def result(self, unroll: int) -> Synthetic:
        schedule = Schedule(
            epochs=unroll, learning_rate=self.rate.item(), momentum=0.0, decay="constant", augment=False
        )
        return Synthetic(
            images=self.images.detach().cpu().clone(),
            soft_labels=self.soft_labels.detach().cpu().clone(),
            hard_labels=self.hard_labels,
            schedule=schedule,
        )


def unrolled_loss(
    network: nn.Module,
    learned: _Learned,
    images: Tensor,
    targets: Tensor,
    *,
    kind: TaskKind,
    unroll: int,
) -> Tensor:
    """Loss of real images after ``unroll`` differentiable steps on the learned ones."""
    parameters: Parameters = dict(network.named_parameters())
    for _ in range(unroll):
        parameters = descended(network, parameters, learned.images, learned.soft_labels, learned.rate, kind)
    return objective(kind, functional_call(network, dict(parameters), (images,)), targets)
