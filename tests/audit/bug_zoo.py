"""Mechanisms with faults found in published code, and what is left of their claims."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medistill.audit.mechanism import ClipsEachImage, DividesByPrivateCount
from medistill.audit.worst_case import CLIP_NORM, Mechanism, long_rows
from medistill.core.guarantee import PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.privacy.clipping import grid_step, on_grid
from medistill.privacy.contributions import images_of, patient_rows
from medistill.privacy.curator import contributions
from medistill.privacy.noise import Entropy

ONE_SUM = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="moments"),))


def rows(cohort: ImageSet) -> Tensor:
    return torch.cat(list(patient_rows(cohort, images_of(cohort.patients), long_rows, chunk=len(cohort))))


class FreshNoiseEachStep(Mechanism):
    """Noise is drawn anew in each of 20 steps, and accounted once."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        return super().answer(cohort, replace(query, count=20 * query.count), noise, runs)


class OneStepMore(Mechanism):
    """``iteration + 1`` steps run, ``iteration`` accounted."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        return super().answer(cohort, replace(query, count=query.count + 1), noise, runs)


class NoiseDividedByCount(Mechanism):
    """The noise of a mean, added to a sum."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        return super().answer(cohort, query, noise / len(images_of(cohort.patients)), runs)


class PrivateCentring(Mechanism):
    """The mean over these very patients is taken off before clipping."""

    def added(self, cohort: ImageSet) -> Tensor:
        found = rows(cohort)
        return contributions(found - found.mean(0), CLIP_NORM)


class SeededNoise(Mechanism):
    """Noise and sampling from a generator whose seed is in the recipe: every run has the same."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        known = replace(self, entropy=published())
        return Mechanism.answer(known, cohort, query, noise, 1).expand(runs, -1, -1)


class HalfTheNoise(Mechanism):
    """The standard deviation where the distance between plus and minus one of it was meant."""

    def noised(self, totals: Tensor, noise: float) -> Tensor:
        return super().noised(totals, noise / 2)


class NoClipping(Mechanism):
    """Rows are taken to be short, and are not."""

    def added(self, cohort: ImageSet) -> Tensor:
        return on_grid(rows(cohort), grid_step(CLIP_NORM))


class EverybodyTakesPart(Mechanism):
    """Sampling is accounted, and nobody is left out."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        return super().answer(cohort, replace(query, sampling_rate=1.0), noise, runs)


class NoiseFromPrivateCount(Mechanism):
    """The noise is calibrated to a delta that follows from the true number of patients."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        return super().answer(cohort, query, noise * (1 + 0.25 / len(images_of(cohort.patients))), runs)


class AddsNothing(Mechanism):
    """No fault: nobody adds anything, so there is nothing to see."""

    def added(self, cohort: ImageSet) -> Tensor:
        return 0 * super().added(cohort)


def published() -> Entropy:
    generator = torch.Generator().manual_seed(0)

    def entropy(count: int) -> bytes:
        return bytes(torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).tolist())

    return entropy


#: Each breaks a claim of epsilon 1 and one of 3 when a sum is asked for once.
ZOO: dict[str, type[Mechanism]] = {
    "every image is clipped": ClipsEachImage,
    "fresh noise in each step": FreshNoiseEachStep,
    "noise divided by the count": NoiseDividedByCount,
    "centred by the private mean": PrivateCentring,
    "divided by the private count": DividesByPrivateCount,
    "noise from a published seed": SeededNoise,
    "one step more than accounted": OneStepMore,
    "half the noise": HalfTheNoise,
    "no clipping": NoClipping,
}
