"""What an attack on membership is: it is shown a release and patients, and is never told who is a member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Schedule
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.progress import Progress
from medistill.training.views import picture_labels, pictures

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """What an attacker holds of a release.

    Args:
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``; the tiles of mosaics as images of their own.
        soft_labels: Shape ``(m, k)``.
        task: What is diagnosed.
        ipc: Images per class of the release, before mosaics are taken apart.
        schedule: How students are to be trained on it, where the release says so.
    """

    images: Tensor
    soft_labels: Tensor
    task: Task
    ipc: int
    schedule: Schedule | None = None

    @classmethod
    def of(cls, distilled: DistilledSet) -> Exposed:
        """All that a distilled set gives to whoever holds it."""
        return cls(
            images=pictures(distilled.images, distilled.views),
            soft_labels=picture_labels(distilled.soft_labels, distilled.views),
            task=distilled.task,
            ipc=distilled.ipc,
            schedule=distilled.schedule,
        )

    @classmethod
    def of_images(cls, images: ImageSet) -> Exposed:
        """A release that consists of real images."""
        ipc = max(1, len(images) // images.task.n_classes)
        return cls(images=images.images, soft_labels=images.targets, task=images.task, ipc=ipc)

    @classmethod
    def together(cls, releases: Sequence[Exposed]) -> Exposed:
        """Releases of one hospital, held together."""
        return replace(
            releases[0],
            images=torch.cat([one.images for one in releases]),
            soft_labels=torch.cat([one.soft_labels for one in releases]),
            ipc=sum(one.ipc for one in releases),
        )


@dataclass(frozen=True, kw_only=True)
class Guilty:
    """A release that is known to give patients away: the positive control of an attack.

    Args:
        release: The release.
        members: Patients it was made from.
        candidates: Whom the attacker holds images of: the members, and patients who are not.
    """

    release: Exposed
    members: frozenset[str]
    candidates: ImageSet


class Prepared(Protocol):
    """An attack that has learned all it can before it sees a release."""

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """One number for each of ``candidates.unique_patients``, in that order; higher: more likely a member."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """What an attack found beside its scores.

    Args:
        findings: Named numbers.
        excess: Right guesses of an attribute that the release adds for members beyond what it adds for others, as
            a share; the lower limit of the attribute with the largest.
    """

    findings: Mapping[str, float] = field(default_factory=dict)
    excess: float = 0.0


@runtime_checkable
class Detailed(Protocol):
    """A prepared attack that has more to say than scores, once it is known who is a member."""

    def details(self, release: Exposed, candidates: ImageSet, members: frozenset[str]) -> Details:
        """What was found beside the scores.

        Args:
            release: What is attacked.
            candidates: Everybody attacked.
            members: Who of them is a member.
        """


class MembershipAttack(Protocol):
    """Tells members of a release from other patients, by one score a patient."""

    @property
    def threat(self) -> str:
        """Which attacker of the threat model this is, for example ``T2``."""

    @property
    def question(self) -> str:
        """What the attacker wants to know, in plain words."""

    @property
    def guilty_of(self) -> str:
        """What the positive control is, in plain words."""

    @property
    def wanted(self) -> float:
        """AUROC that the positive control must reach; its interval must also begin above 0.6."""

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> Prepared:
        """Learn what patients look like.

        Args:
            candidates: Images of all patients who are attacked, members and others mixed.
            reference: Images of further patients, known to be no members.
            ipc: Images per class of the release.
            seed: Public seed.
            compute: Device of the networks.
            progress: Shows how far it is.
        """

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """Make the positive control.

        Args:
            members: Images of attacked members.
            others: Images of as many patients who are none.
            reference: Images of further patients, known to be no members.
            seed: Public seed.
        """
