"""A linear layer on features that stay as they are, solved by ridge regression in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from medistill.core.task import TaskKind

_Seen = Iterable[tuple[Tensor, Tensor]]
#: Logits per unit of a label: a label of 1 against 0 becomes a probability of .98.
SHARPNESS = 4.0


@runtime_checkable
class SolvedHead(Protocol):
    """A network of which :func:`medistill.training.fit.fit` solves the ``head`` and leaves the rest alone."""

    ridge: float
    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """Embedding before the head, shape ``(n, d)``."""


@torch.no_grad()
def solve_head(
    network: SolvedHead, batches: Iterable[tuple[Tensor, Tensor]], *, images: int, kind: TaskKind
) -> None:
    r"""Solve the head, in place.

    Its weights :math:`W` minimise

    .. math:: \sum_i \lVert W^\top (\phi_i - \bar\phi) - (y_i - \bar y) \rVert^2
        + \lambda \operatorname{mean}_i \lVert \phi_i - \bar\phi \rVert^2 \, \lVert W \rVert^2,

    and are then scaled, so that labels in ``[0, 1]`` become logits. Fewer images than features are solved by their
    Gram matrix; of more images only moments are kept, and memory does not grow with their number.

    Args:
        network: Gives features :math:`\phi` and :math:`\lambda`, its ``ridge``; changed in place.
        batches: Images on the network's device and their soft labels ``(n, k)``.
        images: Images in all batches together.
        kind: Multilabel tasks have their logits around a label of one half.
    """
    seen = ((network.features(batch).double(), labels.double()) for batch, labels in batches)
    weight, centre, level = (_dual if images <= network.head.in_features else _primal)(seen, network.ridge)
    sharp = SHARPNESS
    if kind is TaskKind.MULTILABEL:
        sharp, level = 2 * SHARPNESS, level - 0.5
    network.head.weight.copy_(sharp * weight.T)
    network.head.bias.copy_(sharp * (level - centre @ weight))


def _dual(seen: _Seen, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``(d, k)``, mean features and mean labels, by the Gram matrix ``(n, n)``."""
    features, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    centre, level = features.mean(0), labels.mean(0)
    features = features - centre
    gram = features @ features.T
    gram.diagonal().add_(_positive(ridge * gram.diagonal().mean()))
    return features.T @ torch.linalg.solve(gram, labels - level), centre, level


def _primal(seen: _Seen, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the moments ``(d, d)`` of the features."""
    count, total, squares, answers, products = 0, *(torch.zeros((), dtype=torch.float64) for _ in range(4))
    for features, labels in seen:
        if not count:
            total, squares, answers, products = (one.to(features) for one in (total, squares, answers, products))
        count += len(features)
        total, answers = total + features.sum(0), answers + labels.sum(0)
        squares, products = squares + features.T @ features, products + features.T @ labels
    centre, level = total / count, answers / count
    squares = squares - count * torch.outer(centre, centre)
    squares.diagonal().add_(_positive(ridge * squares.diagonal().sum() / count))
    return torch.linalg.solve(squares, products - count * torch.outer(centre, level)), centre, level


def _positive(penalty: Tensor) -> Tensor:
    """A penalty that is above 0 even where all images are the same."""
    return penalty.clamp_min(torch.finfo(penalty.dtype).eps)
