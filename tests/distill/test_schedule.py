"""The part of the validation patients on which schedules are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.distill.schedule import _auroc, _part
from medistill.errors import DataError
from tests.conftest import blobs


def test_a_rare_class_is_never_left_out() -> None:
    everything = blobs(patients=400, per_patient=2, size=16)
    rare = (everything.classes == 1).nonzero().flatten().tolist()[:3]
    common = (everything.classes == 0).nonzero().flatten().tolist()
    part = _part(everything.select(common + rare), seed=0)
    assert int((part.classes == 1).sum()) == 3
    assert int((part.classes == 0).sum()) == 300


def several(patients: int) -> ImageSet:
    """Few images show the second class, and many none."""
    everything = blobs(patients=patients, per_patient=1, size=16)
    targets = torch.zeros(patients, 2)
    targets[: patients // 2, 0] = 1
    targets[:3, 1] = 1
    return replace(everything, targets=targets, task=Task.multilabel(("a", "b")))


def test_of_several_labels_every_class_and_none_of_them_are_kept() -> None:
    part = _part(several(1000), seed=0)
    assert part.targets.sum(0).tolist() == [200 + int(part.targets[200:, 0].sum()), 3]
    assert int((part.targets.sum(1) == 0).sum()) == 200
    assert len(set(part.patients)) == len(part)


def test_the_auroc_is_the_mean_over_classes_that_can_be_judged() -> None:
    part = several(40)
    scores = np.random.default_rng(0).random((40, 2))
    shown = part.targets.numpy()
    expected = np.mean([roc_auc_score(shown[:, c], scores[:, c]) for c in range(2)])
    assert _auroc(part, scores) == pytest.approx(expected)
    everybody = replace(part, targets=torch.cat([torch.ones(40, 1), part.targets[:, 1:]], dim=1))
    assert _auroc(everybody, scores) == pytest.approx(roc_auc_score(shown[:, 1], scores[:, 1]))
    with pytest.raises(DataError, match="some validation images show"):
        _auroc(replace(part, targets=torch.ones(40, 2)), scores)
