"""Copies mirrored, moved, inverted or with other contrast, which pixels alone do not find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medistill.audit import AuditPolicy, Exposed, audit_images, edited_copies
from medistill.audit.copy_alarm import unit_rows
from medistill.audit.edited_copies import EditedCopies, edited
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, AuditReport, Verdict
from medistill.core.task import Task
from medistill.distill.public_features import pink_noise
from tests.conftest import blobs, pseudonym

TASK = Task.single_label(("normal", "ill"))
POLICY = AuditPolicy(profile="quick", fewest_patients=100)


def outcome(report: AuditReport, attack: str) -> AttackOutcome:
    (found,) = (entry for entry in report.outcomes if entry.attack == attack)
    return found


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 40, 40), (1, 24, 24, 24)])
def test_edits_leave_the_embedding_as_it_is(shape: tuple[int, ...]) -> None:
    """Mirrored, turned upside down, inverted, or moved round: the strength of every frequency is the same."""
    image = pink_noise(3, shape, seed=5)
    spectra = EditedCopies(side=64, volume_side=24).spectra
    expected = spectra(image)
    for changed in (image.flip(-1), image.flip(-2), 1 - image):
        torch.testing.assert_close(spectra(changed), expected, atol=1e-3, rtol=1e-3)
    pixels = unit_rows(image.flatten(1).double().numpy())
    moved = unit_rows(edited(image, seed=1).flatten(1).double().numpy())
    assert float(np.abs((pixels * moved).sum(1)).max()) < 0.9, "the edits are too slight to test anything"
    apart = unit_rows((spectra(image) - expected.mean(0)).double().numpy())
    found = unit_rows((spectra(edited(image, seed=1)) - expected.mean(0)).double().numpy())
    assert (apart @ found.T).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 40, 40), (3, 32, 32)])
def test_edited_copies_are_found_where_pixels_do_not_match(shape: tuple[int, ...]) -> None:
    def people(count: int, seed: int, first: int) -> ImageSet:
        images, names = pink_noise(count, shape, seed=seed), tuple(pseudonym(first + i) for i in range(count))
        return ImageSet(images=images, targets=torch.eye(2).repeat(count // 2, 1), patients=names, task=TASK)

    train, holdout, reference = people(160, 1, 0), people(80, 2, 1000), people(80, 3, 2000)
    strangers = people(20, 4, 3000)
    copied = replace(strangers, images=torch.cat([edited(train.images[:5], seed=9), strangers.images[5:]]))
    parts = {"train": train, "holdout": holdout, "reference": reference}
    for released, verdict, copies in ((copied, Verdict.FAIL, 5), (strangers, Verdict.PASS, 0)):
        report = audit_images(Exposed.of_images(released), **parts, policy=POLICY, seed=1)
        found = outcome(report, "edited_copies")
        assert all(control.passed for control in found.controls)
        assert (found.verdict, found.findings["edited_copies"]) == (verdict, copies)
        assert outcome(report, "copy_alarm").findings["copies"] == 0
        assert (found.p_value < 0.01) == bool(copies)
    assert report.verdict is not Verdict.FAIL


def test_edits_that_cannot_be_recognised_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edited_copies, "_CAUGHT", 1.01)
    report = audit_images(
        Exposed.of_images(blobs(20, seed=23, first=9000)),
        train=blobs(120, seed=1, first=0),
        holdout=blobs(60, seed=2, first=1000),
        reference=blobs(50, seed=3, first=2000),
        policy=POLICY,
    )
    assert "edited_copies" not in {entry.attack for entry in report.outcomes}
    assert [
        text for text in report.not_tested if text.startswith("edited copies: such edits cannot be recognised")
    ]
    assert report.verdict is not Verdict.INVALID
