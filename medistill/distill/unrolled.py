"""Back-propagation through the training of a network, one step at a time, and Adam on what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from medistill.core.task import TaskKind
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.training.objectives import objective

Parameters = Mapping[str, Tensor]


def descended(
    network: nn.Module,
    parameters: Parameters,
    images: Tensor,
    soft_labels: Tensor,
    rate: Tensor,
    kind: TaskKind,
    *,
    differentiable: bool = True,
) -> dict[str, Tensor]:
    r"""Parameters after one step of gradient descent.

    .. math:: \theta' = \theta - \eta \nabla_\theta \ell(\tilde x, \tilde y; \theta)

    Args:
        network: Gives the architecture; its own parameters are not used.
        parameters: :math:`\theta` by name; they require gradients.
        images: :math:`\tilde x`, shape ``(m, c, h, w)``.
        soft_labels: :math:`\tilde y`, shape ``(m, k)``.
        rate: :math:`\eta`, a scalar.
        kind: Chooses the loss.
        differentiable: Whether the result is a differentiable function of everything given.
    """
    loss = objective(kind, functional_call(network, dict(parameters), (images,)), soft_labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=differentiable)
    stepped = zip(parameters.items(), gradients, strict=True)
    return {name: value - rate * gradient for (name, value), gradient in stepped}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a network is trained on, step after step.

    Args:
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
        soft_labels: Shape ``(m, k)``.
        rates: Learning rate of each step, shape ``(t,)``.
        batches: Rows of ``images`` that each step takes, ``t`` of them or more.
    """

    images: Tensor
    soft_labels: Tensor
    rates: Tensor
    batches: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Hypergradients:
    """Loss of real images after the training, and its gradients; shapes as in :class:`Training`."""

    loss: Tensor
    images: Tensor
    soft_labels: Tensor
    rates: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.loss, self.images, self.soft_labels, self.rates


def hypergradients(
    network: nn.Module,
    training: Training,
    images: Tensor,
    targets: Tensor,
    *,
    kind: TaskKind,
    window: int = 0,
) -> Hypergradients:
    """Train a network, then go back through the training step by step.

    Only the parameters before each step are kept, and one step is differentiated at a time: beside them, memory
    does not grow with the number of steps, and the gradients are those of the whole graph.

    Args:
        network: Its parameters are where the training begins; they are not changed.
        training: What it is trained on.
        images: Real images, shape ``(n, c, h, w)``.
        targets: Shape ``(n, k)``.
        kind: Chooses the losses.
        window: Last steps that are gone back through; ``0`` all of them.
    """
    steps = len(training.rates)
    first = steps - (window or steps)
    fixed = _detached(training)
    parameters = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    before: list[dict[str, Tensor]] = []
    for step in range(steps):
        if step >= first:
            before.append(parameters)
        rows = fixed.batches[step]
        stepped = descended(
            network,
            parameters,
            fixed.images[rows],
            fixed.soft_labels[rows],
            fixed.rates[step],
            kind,
            differentiable=False,
        )
        parameters = {name: value.detach().requires_grad_() for name, value in stepped.items()}
    loss = objective(kind, functional_call(network, parameters, (images,)), targets)
    adjoint = torch.autograd.grad(loss, list(parameters.values()))
    found = Hypergradients(
        loss=loss.detach(),
        images=torch.zeros_like(fixed.images),
        soft_labels=torch.zeros_like(fixed.soft_labels),
        rates=torch.zeros_like(fixed.rates),
    )
    for step in reversed(range(first, steps)):
        adjoint = _back(network, before.pop(), fixed, step, adjoint, kind, found)
    return found


def _detached(training: Training) -> Training:
    return Training(
        images=training.images.detach(),
        soft_labels=training.soft_labels.detach(),
        rates=training.rates.detach(),
        batches=training.batches,
    )


def _back(
    network: nn.Module,
    parameters: dict[str, Tensor],
    training: Training,
    step: int,
    adjoint: tuple[Tensor, ...],
    kind: TaskKind,
    found: Hypergradients,
) -> tuple[Tensor, ...]:
    """Gradient before a step from the gradient after it; adds the step's share to ``found``."""
    rows = training.batches[step]
    batch = [training.images[rows], training.soft_labels[rows], training.rates[step].clone()]
    images, soft_labels, rate = (tensor.requires_grad_() for tensor in batch)
    stepped = descended(network, parameters, images, soft_labels, rate, kind)
    inputs = [*parameters.values(), images, soft_labels, rate]
    *earlier, of_images, of_labels, of_rate = torch.autograd.grad(
        list(stepped.values()), inputs, grad_outputs=adjoint
    )
    found.images.index_add_(0, rows, of_images)
    found.soft_labels.index_add_(0, rows, of_labels)
    found.rates[step] += of_rate
    return tuple(earlier)


class Learned:
    """Named tensors that one Adam changes, each with its own step size.

    Args:
        tensors: Starting values; ``"images"`` stay in ``[0, 1]``.
        step_sizes: Of each tensor.
        clip: Largest norm of the gradient of each tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, step_sizes: Mapping[str, float], clip: float) -> None:
        self.tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        groups = [{"params": [tensor], "lr": step_sizes[name]} for name, tensor in self.tensors.items()]
        self._optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))
        self._clip = clip
        self._halvings = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def descend(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step of Adam along the gradients of functions of the tensors.

        Args:
            outputs: Functions of the learned tensors, or the tensors themselves.
            gradients: Of each output.
        """
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(list(outputs), list(gradients))
        for tensor in self.tensors.values():
            nn.utils.clip_grad_norm_([tensor], self._clip)
        self._optimizer.step()
        with torch.no_grad():
            self.tensors["images"].clamp_(0.0, 1.0)

    def halve(self, times: int = 1) -> None:
        """Halve every step size, some times."""
        self._halvings += times
        for group in self._optimizer.param_groups:
            group["lr"] *= 0.5**times

    def state(self, step: int, generator: Generator) -> dict[str, Tensor]:
        """What a checkpoint keeps after ``step`` steps."""
        counted = {"step": torch.tensor(step), "halvings": torch.tensor(self._halvings)}
        adam = pack_optimizer(self._optimizer, "adam")
        return {**counted, "generator": generator.get_state(), **self.tensors, **adam}

    def restore(self, state: Mapping[str, Tensor] | None, generator: Generator) -> int:
        """Take up a kept state; returns the number of steps done."""
        if state is None:
            return 0
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])
        unpack_optimizer(self._optimizer, state, "adam")
        self.halve(int(state["halvings"]))
        generator.set_state(state["generator"])
        return int(state["step"])


def before_softplus(rate: float) -> float:
    """The number whose softplus is a learning rate."""
    return rate + math.log(-math.expm1(-rate))


def softplus(raw: Tensor) -> Tensor:
    """A positive learning rate from any number (Wang et al. 2018)."""
    return F.softplus(raw)
