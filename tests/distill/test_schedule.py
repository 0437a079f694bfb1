"""The part of the validation patients on which schedules are compared."""

from __future__ import annotations

from medistill.distill.schedule import _part
from tests.conftest import blobs


def test_a_rare_class_is_never_left_out() -> None:
    everything = blobs(patients=400, per_patient=2, size=16)
    rare = (everything.classes == 1).nonzero().flatten().tolist()[:3]
    common = (everything.classes == 0).nonzero().flatten().tolist()
    part = _part(everything.select(common + rare), seed=0)
    assert int((part.classes == 1).sum()) == 3
    assert int((part.classes == 0).sum()) == 300
