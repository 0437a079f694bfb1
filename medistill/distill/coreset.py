"""Random real images: the baseline every distillation must beat. Its release *is* patients' images."""

from __future__ import annotations

from dataclasses import dataclass

from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.distill.start import random_images


@dataclass(frozen=True, kw_only=True)
class Coreset:
    """Choose ``ipc`` real images of every class at random, each of a different patient where possible.

    Privacy:
        The result consists of real images; a release made of it gives patients away, and the audit says so.
    """

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Choose the images; ``start`` and ``bench`` are not needed."""
        images = curator.images()
        chosen = random_images(images, ipc=ipc, seed=seed)
        return Synthetic(
            images=chosen.images.clone(), soft_labels=chosen.targets.clone(), hard_labels=chosen.classes
        )
