"""Does a released image show a patient's image mirrored, moved, inverted or with other contrast?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medistill.audit.attack import Exposed, Floats
from medistill.audit.copies import one_image_each
from medistill.audit.copy_alarm import CopiesWithin, CopySearch, unit_rows
from medistill.audit.pool import Pool
from medistill.core.images import ImageSet, averaged, joined
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.seeds import derive_seed
from medistill.training.fit import cache_sized

NAME = "edited_copies"
_EDITED = 20
_CAUGHT = 0.8
_FLOOR = 1e-2
_SMALLEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class EditedCopies:
    r"""Search for copies whose pixels do not match, by an embedding that such edits leave as it is.

    .. math:: e(x) = \log\Big(\epsilon + \sum_{m} |\mathcal{F}(w \, m(x - \bar x))|\Big)

    with a Hann window :math:`w` and the reflections :math:`m` of the axes: how strong each spatial frequency is,
    not where. Moving an image, mirroring, inverting it or turning it upside down leaves this nearly the same, and
    another contrast adds nearly a constant; both are taken away by standardising over the pool and then by
    correlation. What stands out follows from people outside the pool as in
    :class:`medistill.audit.copy_alarm.CopyAlarm`; a copy must also be nearer than any of them, because images
    without detail can stand out by chance.

    Args:
        side: Side length at which images are compared.
        volume_side: The same for volumes.

    Privacy:
        Reads non-released data of the pool and the reference.
    """

    side: int = 64
    volume_side: int = 32

    def within(self, pool: ImageSet, reference: Tensor) -> CopiesWithin:
        """Learn what images of strangers reach, to search for several releases.

        Args:
            pool: Images of all patients that could have been copied, and of others.
            reference: Images of people outside the pool, shape ``(r, c, h, w)``.
        """
        rows = self.spectra(pool.images)
        mean, spread = rows.mean(0), rows.std(0).clamp_min(_SMALLEST)

        def described(images: Tensor) -> Floats:
            return unit_rows(((self.spectra(images) - mean) / spread).double().numpy())

        return CopiesWithin(described, pool, reference)

    def spectra(self, images: Tensor) -> Tensor:
        """Logarithms of the strength of every spatial frequency, shape ``(n, d)``."""
        return torch.cat([self._spectra(batch) for batch in cache_sized(images)])

    def _spectra(self, images: Tensor) -> Tensor:
        grey = averaged(images, plane=self.side, solid=self.volume_side).mean(1)
        axes = tuple(range(1, grey.ndim))
        grey = grey - grey.mean(axes, keepdim=True)
        for axis in axes:
            shape = [1] * grey.ndim
            shape[axis] = -1
            grey = grey * torch.hann_window(grey.shape[axis], periodic=False).view(shape)
        strength = torch.fft.fftn(grey, dim=axes).abs()
        for axis in axes[1:]:  # the reflection of the first axis follows, because images are real numbers
            strength = strength + torch.roll(strength.flip(axis), 1, axis)
        for axis in axes:
            strength = strength.narrow(axis, 0, strength.shape[axis] // 2 + 1)
        rows: Tensor = (strength + _FLOOR).log().flatten(1)
        return rows


def search_edited(
    release: Exposed, control: Exposed, *, control_name: str, pool: Pool, seed: int
) -> AttackOutcome:
    """Search a release and its controls.

    Args:
        release: What is audited.
        control: A release of patients of whom none is a candidate.
        control_name: What that is, in words.
        pool: Who is attacked, and who stands beside them.
        seed: Public seed.

    Returns:
        The outcome; where a control fails, such edits cannot be recognised on these images.
    """
    inside = set(pool.train.patients)
    search = EditedCopies().within(joined(pool.train, pool.holdout), pool.reference.images)
    found = search.search(release.images)
    flags = _copies(search, found)
    copies = sum(bool(flag) and who in inside for flag, who in zip(flags, found.patients, strict=True))
    balanced = EditedCopies().within(pool.candidates, pool.reference.images)
    others = int(_copies(balanced, balanced.search(control.images)).sum())
    controls = (
        _positive(search, pool.train, seed),
        ControlOutcome(
            name=f"negative: {control_name}",
            expected="no copy found",
            observed=f"{others} copies found",
            passed=others == 0,
        ),
    )
    valid = all(control.passed for control in controls)
    return AttackOutcome(
        attack=NAME,
        question="Does a released image show a training patient's image mirrored, moved, inverted or with other "
        "contrast?",
        auroc=None,
        tpr_at_fpr={},
        p_value=search.chance_of(float(found.gap.max()), len(found.gap)),
        minimum_detectable_auroc=None,
        findings={
            "edited_copies": float(copies),
            "pictures_searched": float(len(found.gap)),
            "largest_gap": round(float(found.gap.max()), 2),
            "gap_limit": round(found.gap_limit, 2),
        },
        controls=controls,
        verdict=Verdict.INVALID if not valid else Verdict.FAIL if copies else Verdict.PASS,
        summary=_summary(valid, copies, len(found.gap)),
    )


def edited(images: Tensor, *, seed: int) -> Tensor:
    """Images mirrored, moved by up to a sixteenth of a side, with other contrast, every second one inverted.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``, in ``[0, 1]``.
        seed: Public seed.
    """
    draw = np.random.default_rng(seed)
    sides, axes = images.shape[2:], images.ndim - 2
    reach = max(1, min(sides) // 16)
    made = []
    for number, image in enumerate(images.flip(-1)):
        moved = F.pad(image[None], (reach,) * (2 * axes), mode="replicate")
        for axis, side in enumerate(sides, start=2):
            moved = moved.narrow(axis, int(draw.integers(0, 2 * reach + 1)), side)
        changed = moved ** float(draw.uniform(0.7, 1.4))
        made.append(1 - changed if number % 2 else changed)
    return torch.cat(made)


def _copies(search: CopiesWithin, found: CopySearch) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = found.copies & (found.correlation > search.closest_stranger)
    return flags


def _positive(search: CopiesWithin, train: ImageSet, seed: int) -> ControlOutcome:
    chosen = train.select(one_image_each(train, seed)[:_EDITED])
    found = search.search(edited(chosen.images, seed=derive_seed(seed, "edits")))
    rows = zip(_copies(search, found), found.patients, chosen.patients, strict=True)
    caught = np.mean([flag and who == true for flag, who, true in rows])
    return ControlOutcome(
        name="positive: real images mirrored, moved, with other contrast, half of them inverted",
        expected=f"at least {_CAUGHT:.0%} of the patients found",
        observed=f"{caught:.0%} of {len(chosen)} found",
        passed=bool(caught >= _CAUGHT),
    )


def _summary(valid: bool, copies: int, released: int) -> str:
    if not valid:
        return "A control failed, so this result says nothing about the release."
    if copies:
        return f"{copies} of {released} released pictures are edited copies of a training patient's image."
    return (
        f"None of the {released} released pictures is recognised as an edited copy of one patient's image. "
        "This is the absence of an alarm, not a proof."
    )
