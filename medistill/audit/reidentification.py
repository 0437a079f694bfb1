"""Linkage of released images to patients of whom the attacker has other images (Packhäuser et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from medistill.audit.attack import Exposed, Floats, Guilty
from medistill.core.compute import Compute, fresh
from medistill.core.images import ImageSet, averaged, joined
from medistill.core.task import Task
from medistill.distill.decay import cosine
from medistill.errors import ConfigError, DataError
from medistill.networks.convnet import ConvNet
from medistill.progress import Progress
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.fit import cache_sized

MEANS = ("network", "pixels")
#: Log-odds (up to a constant) that two images show the same patient: of ``(n, …)`` and ``(m, …)``, ``(n, m)``.
Verify = Callable[[Tensor, Tensor], Tensor]
_AT_ONCE, _FLOOR = 512, 1e-6


@dataclass(frozen=True, kw_only=True)
class Reidentification:
    r"""Which patients can be linked to a released image by another image of theirs?

    A verification network learns from *other* patients whether two images show the same one: an embedding
    :math:`f`, and log-odds :math:`v(a, b) = -\sum_j w_j |f_j(a) - f_j(b)|` with learned :math:`w_j \ge 0`. It is
    trained by cross-entropy: which of the second images of a batch, of patients with the same diagnosis, belongs
    to the first. At its optimum :math:`v` is the log-odds of "same patient" up to a constant. A patient's score is
    the largest log-odds between one of the patient's images and a released image,

    .. math:: s(p) = \max_{i, r} \frac{v(x_{pi}, r) - m_r}{d_r} - \beta \log n_p

    with :math:`m_r` and :math:`d_r` the mean and deviation of what images of the reference reach with the released
    image :math:`r`, and :math:`\beta` the scale of a Gumbel distribution fitted to their largest: a patient with
    :math:`n_p` images has as many chances.

    Where it deviates from Packhäuser et al.: a small ConvNet from scratch, pairs compared with all others of a
    batch instead of one at a time, images of ``side`` pixels. Pairs of single-image patients are two augmented
    copies of the same image, which teaches the network less than two examinations would; they are used only as
    ``single`` of a batch, and never make up for missing patients with several images. Trained on some hundred such
    patients the network tells pairs apart (AUC 0.8 on children's chest X-rays), but not yet the one true match
    among a hundred released images: there the positive control is missed, and the attack says nothing.

    Args:
        by: ``"network"``, or ``"pixels"``: correlation of pixels, the floor that any attacker reaches.
        steps: Training steps of the network.
        batch: Patients in a step, two images each.
        single: How many of them have one image only.
        rate: Adam step size, cosine-decayed.
        width: Width of the network.
        dimension: Size of the embedding.
        side: Side length to which larger images are averaged.
        volume_side: The same for volumes.
        fewest: Patients with several images that the reference, and each side of the control, must have.

    References:
        Packhäuser et al. 2022, Scientific Reports 12:14851. The loss: van den Oord et al. 2018, arXiv:1807.03748.

    Privacy:
        Reads non-released data of the candidates and the reference.
    """

    threat: ClassVar[str] = "T3"
    question: ClassVar[str] = (
        "Can this patient be linked to a released image by another image of the same patient?"
    )
    guilty_of: ClassVar[str] = "a release of one real image of every attacked member who has several"
    wanted: ClassVar[float] = 0.65

    by: str = "network"
    steps: int = 300
    batch: int = 48
    single: int = 16
    rate: float = 2e-3
    width: int = 16
    dimension: int = 64
    side: int = 64
    volume_side: int = 32
    fewest: int = 20

    def __post_init__(self) -> None:
        if self.by not in MEANS:
            raise ConfigError(f"Expected by to be one of {', '.join(MEANS)}, got {self.by!r}.")
        whole = (self.steps, self.width, self.dimension, self.side, self.volume_side, self.batch - 1)
        if min(whole) < 1 or self.fewest < 2 or self.rate <= 0 or not 0 <= self.single < self.batch:
            raise ConfigError(
                "Expected steps, width, dimension, side and volume_side >= 1, batch and fewest >= 2, rate > 0 and "
                "0 <= single < batch."
            )

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> PreparedReidentification:
        """Learn from the reference who looks like whom; the candidates are not looked at.

        Raises:
            DataError: If the reference has too few patients with several images.
        """
        known = self._reduced(reference)
        verify: Verify = pixel_correlation
        if self.by == "network":
            _require_several(known, "The reference", self.fewest)
            verify = self._train(known, derive_seed(seed, "verification"), compute, progress)
        return PreparedReidentification(self, verify, known)

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """Release one image of each member who has several; the attacker holds the rest.

        Of the other patients, too, those with several images are attacked, and one image of each is left out, so
        that the number of images says nothing.

        Raises:
            DataError: If too few members or other patients have several images.
        """
        for images, whose in ((members, "The attacked members"), (others, "The other attacked patients")):
            _require_several(images, whose, self.fewest)
        shown, unseen = _one_and_the_rest(members, derive_seed(seed, "shown"))
        _, unseen_of_others = _one_and_the_rest(others, derive_seed(seed, "left out"))
        return Guilty(
            release=Exposed.of_images(shown),
            members=frozenset(shown.patients),
            candidates=joined(unseen, unseen_of_others),
        )

    def _reduced(self, images: ImageSet) -> ImageSet:
        return replace(images, images=self.reduce(images.images))

    def reduce(self, images: Tensor) -> Tensor:
        """Images in the size in which they are compared."""
        return averaged(images, plane=self.side, solid=self.volume_side)

    def _train(self, known: ImageSet, seed: int, compute: Compute, progress: Progress) -> Verify:
        several, alone = patients_by_images(known)
        generator = torch.Generator().manual_seed(seed)
        network = fresh(self._network, known.task, tuple(known.images.shape[1:]), derive_seed(seed, "weights"))
        assert isinstance(network, Verification)
        compute.ready(network)
        adam = torch.optim.Adam(network.parameters(), lr=self.rate)
        for step in progress.track(range(self.steps), "verification network"):
            adam.param_groups[0]["lr"] = self.rate * cosine(step / self.steps, floor=0.01)
            pairs = _draw(several, self.batch - self.single, generator) + _draw(alone, self.single, generator)
            first, second = torch.tensor(pairs).T
            images = compute.put(augment(known.images[torch.cat([first, second])], generator))
            with compute.autocast():
                odds = network(*network.embed(images).float().chunk(2))
            alike = known.targets[first] @ known.targets[second].T > 0
            alike |= torch.eye(len(pairs), dtype=torch.bool)  # an image of a multilabel task may have no label
            odds = odds.masked_fill(~compute.put(alike), -1e4)
            own = torch.arange(len(pairs), device=odds.device)
            loss = (F.cross_entropy(odds, own) + F.cross_entropy(odds.T, own)) / 2
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            progress.note(loss=loss.item())
        return _Verifier(network.eval(), compute)

    def _network(self, task: Task, image_shape: tuple[int, ...]) -> nn.Module:
        return Verification(task, image_shape, width=self.width, dimension=self.dimension)


class Verification(nn.Module):
    """Do two images show the same patient?

    Args:
        task: Of the images; its classes play no part.
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)``.
        width: Width of the ConvNet.
        dimension: Size of the embedding.
    """

    def __init__(self, task: Task, image_shape: tuple[int, ...], *, width: int, dimension: int) -> None:
        super().__init__()
        self.body = ConvNet(task, image_shape, width=width)
        self.last = nn.Linear(self.body.feature_count, dimension)
        self.weights = nn.Parameter(torch.zeros(dimension))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings, shape ``(n, dimension)``."""
        embedding: Tensor = self.last(self.body.features(images))
        return embedding

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-odds of every pair of embeddings up to a constant, ``(n, m)``; never above 0."""
        weights = F.softplus(self.weights) / math.sqrt(len(self.weights))
        distance: Tensor = torch.cdist(first * weights, second * weights, p=1)
        return -distance


class _Verifier:
    """A trained network as a :data:`Verify`."""

    def __init__(self, network: Verification, compute: Compute) -> None:
        self._network, self._compute = network, compute

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        odds: Tensor = self._network(self._embed(first), self._embed(second))
        return odds.cpu()

    def _embed(self, images: Tensor) -> Tensor:
        parts = cache_sized(images) if self._compute.device_type == "cpu" else torch.split(images, _AT_ONCE)
        return torch.cat([self._network.embed(self._compute.put(part)) for part in parts])


def pixel_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Fisher's z of the correlation of every pair of images, shape ``(n, m)``: what needs no training at all."""
    unit = []
    for images in (first, second):
        rows = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
        unit.append(rows / rows.norm(dim=1, keepdim=True).clamp_min(_FLOOR))
    correlation: Tensor = (unit[0] @ unit[1].T).clamp(-1 + _FLOOR, 1 - _FLOOR)
    return correlation.atanh()


class PreparedReidentification:
    """A verification network and the images of the reference that say what is usual.

    Args:
        attack: The settings.
        verify: Log-odds of pairs of images.
        reference: Images of people who are neither members nor candidates, reduced.
    """

    def __init__(self, attack: Reidentification, verify: Verify, reference: ImageSet) -> None:
        self._attack, self.verify, self._reference = attack, verify, reference

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """One number for each of the candidates' patients; higher: more likely linked.

        Args:
            release: What is attacked.
            candidates: Images that the attacker has.
        """
        released = self._attack.reduce(release.images)
        usual = self.verify(self._reference.images, released).double()
        found = self.verify(self._attack.reduce(candidates.images), released).double()
        mean, deviation = usual.mean(0), usual.std(0).clamp_min(_FLOOR)
        largest = ((found - mean) / deviation).max(1).values.numpy()
        scale = float(((usual - mean) / deviation).max(1).values.std()) * math.sqrt(6) / math.pi
        names, of_image, counts = np.unique(candidates.patients, return_inverse=True, return_counts=True)
        best: Floats = np.full(len(names), -np.inf)
        np.maximum.at(best, of_image, largest)
        score: Floats = best - scale * np.log(counts)
        return score


def patients_by_images(images: ImageSet) -> tuple[list[list[int]], list[list[int]]]:
    """Positions of the images of each patient: of those with several images, and of those with one."""
    of_patient: dict[str, list[int]] = {name: [] for name in images.unique_patients}
    for position, name in enumerate(images.patients):
        of_patient[name].append(position)
    positions = of_patient.values()
    return [found for found in positions if len(found) > 1], [found for found in positions if len(found) == 1]


def _draw(patients: list[list[int]], count: int, generator: Generator) -> list[tuple[int, int]]:
    """Two images of each of some patients; of a patient with one image, that image twice."""
    pairs = []
    for number in torch.randperm(len(patients), generator=generator)[:count].tolist():
        images = patients[number]
        order = torch.randperm(len(images), generator=generator).tolist()
        pairs.append((images[order[0]], images[order[-1]]))
    return pairs


def _one_and_the_rest(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """One image of each patient with several, and all their other images."""
    generator, shown, rest = torch.Generator().manual_seed(seed), [], []
    for positions in patients_by_images(images)[0]:
        chosen = int(torch.randint(len(positions), (1,), generator=generator))
        shown.append(positions[chosen])
        rest += positions[:chosen] + positions[chosen + 1 :]
    return images.select(shown), images.select(rest)


def _require_several(images: ImageSet, whose: str, fewest: int) -> None:
    several = len(patients_by_images(images)[0])
    if several < fewest:
        raise DataError(
            f"Re-identification needs patients with several images: found {several} among {whose[0].lower()}"
            f"{whose[1:]}, expected at least {fewest}. Ingest follow-up images with their patients, or read the "
            "result as: linkage was not tested."
        )
