"""How certain a model may be: temperature, calibration error, and the thresholds of its decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medistill.core.task import Task, TaskKind
from medistill.errors import DataError
from medistill.training.objectives import probabilities

_LOW, _HIGH = math.log(0.05), math.log(20.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


def best_temperature(kind: TaskKind, logits: Tensor, targets: Tensor) -> float:
    r"""Temperature with the smallest negative log-likelihood (Guo et al. 2017).

    :math:`\min_T -\sum_{i,c} y_{ic} \log \frac1n\sum_m \sigma(z_{im} / T)_c` by golden section over
    :math:`\log T`, between 1/20 and 20; for a multilabel task the binary cross-entropy of every class.

    Args:
        kind: Kind of the task.
        logits: Shape ``(members, n, k)``, of images that the members were not trained on.
        targets: Shape ``(n, k)``, probabilities.

    References:
        Guo et al. 2017, arXiv:1706.04599.
    """
    logits, targets = logits.double(), targets.double()

    def loss(log_temperature: float) -> float:
        answers = torch.stack([probabilities(kind, z / math.exp(log_temperature)) for z in logits]).mean(0)
        found = -(targets * answers.clamp_min(1e-12).log()).sum()
        if kind is TaskKind.MULTILABEL:
            found = found - ((1 - targets) * (1 - answers).clamp_min(1e-12).log()).sum()
        return float(found)

    low, high = _LOW, _HIGH
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-4:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a model's probabilities are made and what they decide.

    Args:
        temperature: Divides the logits.
        source: ``release`` where the data owner found it on real patients and the release says so, ``cross_fit``
            from released images that the networks were not trained on (at most 1), or ``none``.
        thresholds: Probability from which a class is decided for: one (of the positive class) for two classes, one
            for each of a multilabel task, none where the most probable class is decided for.
        decided_by: ``release`` where the thresholds were chosen on real patients, or ``half`` for 0.5.

    Raises:
        DataError: If a value is out of range.
    """

    temperature: float = 1.0
    source: str = "none"
    thresholds: tuple[float, ...] = ()
    decided_by: str = "half"

    def __post_init__(self) -> None:
        numbers = (self.temperature, *self.thresholds)
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise DataError("Expected a temperature and thresholds that are finite numbers.")
        if not 0 < self.temperature <= 1000 or not all(0 <= cut <= 1 for cut in self.thresholds):
            raise DataError("Expected a temperature above 0 and thresholds from 0 to 1.")
        if self.source not in ("release", "cross_fit", "none") or self.decided_by not in ("release", "half"):
            raise DataError("Expected the calibration to name where it comes from; found another word.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], task: Task) -> Calibration:
        """Inverse of :meth:`to_json`; the thresholds must fit the task."""
        try:
            made = cls(**{**values, "thresholds": tuple(values["thresholds"])})
        except (KeyError, TypeError) as error:
            raise DataError("Expected a calibration with temperature, source, thresholds, decided_by.") from error
        if len(made.thresholds) != number_of_thresholds(task):
            raise DataError(f"Expected {number_of_thresholds(task)} thresholds, got {len(made.thresholds)}.")
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "thresholds": list(self.thresholds)}


def number_of_thresholds(task: Task) -> int:
    """One for two classes, one for each class of a multilabel task, none for classes that exclude each other."""
    return {TaskKind.BINARY: 1, TaskKind.MULTICLASS: 0, TaskKind.MULTILABEL: task.n_classes}[task.kind]


def stated_calibration(card: Mapping[str, Any], network: str, task: Task) -> Calibration | None:
    """What the data owner found on real patients, where the card says it.

    The card may hold ``calibration``: network name to ``{"temperature": T, "thresholds": [...]}``, both found with
    students trained on the release and applied to validation patients; the thresholds on probabilities after the
    temperature.

    Args:
        card: What ``card.json`` holds.
        network: Registered network name.
        task: Gives the number of thresholds.

    Raises:
        DataError: If it is there and makes no sense.
    """
    stated = card.get("calibration")
    found = stated.get(network) if isinstance(stated, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, Mapping) or found.keys() != {"temperature", "thresholds"}:
        raise DataError("Expected calibration in the card to give temperature and thresholds of each network.")
    return Calibration.from_json({**found, "source": "release", "decided_by": "release"}, task)
