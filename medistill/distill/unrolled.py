"""Training steps that can be differentiated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medistill.core.task import TaskKind
from medistill.training.objectives import objective

Parameters = Mapping[str, Tensor]


def descended(
    network: nn.Module, parameters: Parameters, images: Tensor, soft_labels: Tensor, rate: Tensor, kind: TaskKind
) -> dict[str, Tensor]:
    r"""Parameters after one step of gradient descent, as a differentiable function of everything given.

    .. math:: \theta' = \theta - \eta \nabla_\theta \ell(\tilde x, \tilde y; \theta)

    Args:
        network: Gives the architecture; its own parameters are not used.
        parameters: :math:`\theta` by name.
        images: :math:`\tilde x`, shape ``(m, c, h, w)``.
        soft_labels: :math:`\tilde y`, shape ``(m, k)``.
        rate: :math:`\eta`, a scalar.
        kind: Chooses the loss.
    """
    loss = objective(kind, functional_call(network, dict(parameters), (images,)), soft_labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    stepped = zip(parameters.items(), gradients, strict=True)
    return {name: value - rate * gradient for (name, value), gradient in stepped}
