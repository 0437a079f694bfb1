"""Curators: the only door to patients' images."""

from __future__ import annotations

import copy
import hashlib
import math
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from medistill.core.guarantee import Budget, PrivacyPlan, PrivacyStatement, QueryKind
from medistill.core.images import ImageSet
from medistill.core.protocols import Embed, Loss
from medistill.core.task import Task
from medistill.errors import PrivacyError
from medistill.privacy.accounting import PATIENCE, Mechanism
from medistill.privacy.answers import Answers, packed
from medistill.privacy.calibration import calibrate, mechanisms_of, whole
from medistill.privacy.clipping import check_clip_norm, clipped, grid_step, on_grid
from medistill.privacy.contributions import images_of, patient_rows
from medistill.privacy.gradients import ImageGradients
from medistill.privacy.ledger import Ledger, Reservation
from medistill.privacy.noise import SYSTEM, Entropy, gaussian, sampled
from medistill.privacy.selection import another_run, drawn

_CHUNK = 256
_SEEDS = 2**31
_MATRIX = 2
_PROBES = 3
_APART = 0.02  # the same numbers in half precision and another order
#: What every private release takes for granted.
_ASSUMED = (
    "Images reach the unit interval by a fixed public scaling, and every image names its patient.",
    "Which patients are distilled from, and which are in other splits, is taken as given.",
    "Settings, image size, class names and images per class were chosen without looking at these patients.",
    "Whoever runs the distillation is trusted, and running times are not published.",
    "Other releases of the same patients add up; the ledger of the cohort counts them.",
)


_FIXED = (
    "The settings of the method and of the student's training are fixed beforehand, and nothing is chosen on "
    "validation patients.",
)
_CHOSEN = (
    "The settings of every run are drawn from a list that was fixed beforehand, and nothing is chosen on "
    "validation patients but the run with the best noisy score.",
    "The number of runs, and what the other runs gave, stay inside.",
)


def assumed(plan: PrivacyPlan) -> tuple[str, ...]:
    """Everything that a release by a plan takes for granted, each once."""
    return tuple(dict.fromkeys((*_ASSUMED, *(_CHOSEN if plan.selects else _FIXED), *plan.assumptions)))


class OpenCurator:
    """Answers every question exactly; guarantees nothing.

    Args:
        images: The images distilled from: the train split of a cohort.

    Privacy:
        Reads non-released data. :meth:`statement` says that nothing is proved.
    """

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    @property
    def task(self) -> Task:
        """What is diagnosed."""
        return self._images.task

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(c, h, w)``."""
        return tuple(self._images.images.shape[1:])

    @torch.no_grad()
    def sum(self, embed: Embed, *, clip_norm: float = math.inf, sampling_rate: float = 1.0) -> Tensor:
        """One row per patient (the mean over the patient's images), summed over patients, shape ``(d,)``.

        Every patient weighs the same, however many images there are of them; memory does not grow with the
        number of images. Nothing is clipped and nobody is left out.
        """
        total: Tensor | None = None
        for images, targets, shares in self._parts():
            rows = embed(images, targets)
            answer = shares.to(rows) @ rows
            total = answer if total is None else total + answer
        assert total is not None
        return total

    def gradient(
        self, network: nn.Module, loss: Loss, *, clip_norm: float = math.inf, sampling_rate: float = 1.0
    ) -> dict[str, Tensor]:
        """Gradient of each patient's mean loss, summed over patients; nothing is clipped and nobody left out."""
        trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        total = {name: torch.zeros_like(value) for name, value in trained.items()}
        device = next(iter(trained.values())).device
        for images, targets, shares in self._parts():
            losses = loss(network(images.to(device)), targets.to(device))
            found = torch.autograd.grad((shares.to(losses) * losses).sum(), list(trained.values()))
            for name, part in zip(total, found, strict=True):
                total[name] += part
        return total

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, targets and each image's share of its patient, some at a time."""
        shares = torch.empty(len(self._images))
        for own in images_of(self._images.patients):
            shares[own] = 1.0 / len(own)
        for start in range(0, len(self._images), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield self._images.images[part], self._images.targets[part], shares[part]

    def noise(self, position: int) -> float:
        """0: answers are exact."""
        return 0.0

    def resume(self, answered: int) -> None:
        """Nothing to do: nothing is counted."""

    def images(self) -> ImageSet:
        """Raw access to all images."""
        return self._images

    def statement(self) -> PrivacyStatement:
        """Nothing is proved: answers are exact."""
        return PrivacyStatement.nothing_proved("distilled without differential privacy.")


class PrivateCurator:
    r"""Answers the queries of a plan with noise; differentially private for each patient.

    Query :math:`i` of the plan is answered by

    .. math:: T_i = \sum_{p \in B_i} \operatorname{clip}_C\Big(\tfrac{1}{n_p} \sum_j \phi_i(x_{pj})\Big)
        + \sigma_i C \, \mathcal{N}(0, I)

    where each patient is in :math:`B_i` with the query's sampling rate, on their own. The whole plan is written to
    the ledger before the first answer, and the hash of every answer before it is given; nothing else is answered.

    Args:
        images: The images distilled from. Every image needs a patient.
        budget: What this release may spend.
        plan: Everything that will be asked, in order.
        ledger: The cohort's.
        store: Folder in which answers are kept. A second run there takes them up and spends nothing twice; without
            it an interrupted run has to begin, and spend, anew.
        recipe: Fingerprint of the release's recipe, for the ledger.
        seconds: Longest time for each accountant.

    Raises:
        PrivacyError: If the plan cannot be kept to the budget, or the ledger refuses it.

    Privacy:
        (epsilon, delta)-differentially private for each patient, one patient added or removed, as
        :meth:`statement` says; ``medistill/privacy/README.md`` has the proof and its limits.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        budget: Budget,
        plan: PrivacyPlan,
        ledger: Ledger,
        store: Path | None = None,
        recipe: str = "",
        seconds: float = PATIENCE,
        _entropy: Entropy = SYSTEM,
    ) -> None:
        _check_named(images)
        self._images, self._budget, self._plan = images, budget, plan
        self._patients = images_of(images.patients)
        self._ledger, self._entropy = ledger, _entropy
        self._answers = Answers(store) if store else None
        self._next, self._first = 0, 0
        self._reservation = self._taken_up(recipe) or self._reserved(recipe, seconds)
        self._sealed = self._sealed_of_run()

    def _taken_up(self, recipe: str) -> Reservation | None:
        """The reservation that the kept answers belong to, if there is one."""
        identity = self._answers.reservation if self._answers else None
        found = self._ledger.find(identity) if identity else None
        if found is None:
            if self._answers and self._answers.any():
                raise PrivacyError(
                    "The ledger does not hold the reservation that the kept answers belong to. Put the cohort's "
                    "own ledger back, or name another folder; a new release spends its budget anew."
                )
            return None
        if (found.plan, found.budget, found.recipe) != (self._plan, self._budget, recipe):
            raise PrivacyError(
                "The kept answers belong to another plan, budget or recipe. Name another folder; a new release "
                "spends its budget anew."
            )
        return found

    def _sealed_of_run(self) -> dict[int, str]:
        mine = range(self._first, self._first + self._plan.per_run)
        sealed = self._reservation.sealed.items()
        return {position - self._first: digest for position, digest in sealed if position in mine}

    def _reserved(self, recipe: str, seconds: float) -> Reservation:
        calibrated = calibrate(self._budget, self._plan, seconds=seconds)
        reservation = Reservation(
            identity=secrets.token_hex(16),
            plan=self._plan,
            noise_multipliers=calibrated.noise_multipliers,
            budget=self._budget,
            recipe=recipe,
            epsilon=calibrated.bound.epsilon,
            accountants=calibrated.bound.accountants,
            date=datetime.now(UTC).date().isoformat(),
        )
        if self._answers:  # first, so that a reservation is never written that nobody finds again
            self._answers.belong_to(reservation.identity)
        self._ledger.reserve(reservation, seconds=seconds)
        return reservation

    @property
    def task(self) -> Task:
        """What is diagnosed; public."""
        return self._images.task

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image; public."""
        return tuple(self._images.images.shape[1:])

    @property
    def identity(self) -> str:
        """Random name of this release's reservation; what is kept between runs can be named by it."""
        return self._reservation.identity

    def runs(self, candidates: int) -> tuple[tuple[int, int], ...]:
        """The secret runs of a plan of which the best run is kept: drawn once, before the first answer, and kept.

        Args:
            candidates: Number of recipes to choose from.

        Returns:
            For every run the number of its recipe and its public seed.

        Raises:
            PrivacyError: If the plan is asked once, or answers were given and the record of the runs is gone.
        """
        if not (self._plan.selects and self._answers):
            raise PrivacyError(
                "Runs are drawn for a plan of which the best run is kept, with a folder for answers."
            )
        found = self._answers.runs(candidates)
        if found is None and (self._reservation.sealed or self._answers.any()):
            raise PrivacyError(
                "The record of the runs is missing though answers were given; it must not be drawn again. Put it "
                "back, or begin a new release, which spends its budget anew."
            )
        if found is None:
            found = (self._drawn_run(candidates),)
            while another_run(self._plan.expected_runs, entropy=self._entropy):
                found += (self._drawn_run(candidates),)
            self._answers.keep_runs(found)
        return found

    def run(self, number: int) -> PrivateCurator:
        """The curator of one of the drawn runs; all belong to one reservation.

        Args:
            number: Counted from 0, which is this curator itself. Answers of a later run lie in a folder below.

        Raises:
            PrivacyError: If there is no such run, or its folder holds answers of something else.
            OutputError: If another process works there.
        """
        if number == 0:
            return self
        kept = self._answers.runs() if self._answers else None
        now = self._ledger.find(self.identity)
        if not (self._answers and 0 < number < len(kept or ()) and now):
            raise PrivacyError(
                "There is no such run: it was not drawn, or the ledger does not hold its reservation."
            )
        answers = self._answers.of_run(number)
        if answers.reservation not in (None, self.identity) or (answers.reservation is None and answers.any()):
            answers.close()
            raise PrivacyError(
                "The folder of a later run holds answers of another release, which must not be mixed with these. "
                "Name another folder; a new release spends its budget anew."
            )
        answers.belong_to(self.identity)
        later = copy.copy(self)
        later._answers, later._reservation = answers, now
        later._next, later._first = 0, number * self._plan.per_run
        later._sealed = later._sealed_of_run()
        return later

    def _drawn_run(self, candidates: int) -> tuple[int, int]:
        return drawn(candidates, entropy=self._entropy), drawn(_SEEDS, entropy=self._entropy)

    @torch.no_grad()
    def sum(self, embed: Embed, *, clip_norm: float = math.inf, sampling_rate: float = 1.0) -> Tensor:
        """The next query: a noisy sum of clipped rows, one per patient.

        Args:
            embed: A fixed function that gives one row per image, whatever other images are beside it. It is first
                tried on made-up images.
            clip_norm: Longest row of a patient; needed.
            sampling_rate: As declared.

        Returns:
            Shape ``(d,)``, on the device and in the precision of the rows.

        Raises:
            PrivacyError: If this is not what the plan says, the clip norm bounds nothing, or rows depend on other
                images.
        """
        self._check(QueryKind.SUM, clip_norm, sampling_rate)
        like = self._tried(embed)

        def rows(patients: list[list[int]]) -> Iterator[Tensor]:
            return patient_rows(self._images, patients, embed, chunk=_CHUNK)

        return self._answer(rows, like.shape[1], clip_norm).to(like)

    def gradient(
        self, network: nn.Module, loss: Loss, *, clip_norm: float = math.inf, sampling_rate: float = 1.0
    ) -> dict[str, Tensor]:
        """The next query: a noisy sum of clipped gradients, one per patient, of the mean loss of their images.

        Args:
            network: Every image goes through it alone.
            loss: One loss per image.
            clip_norm: Longest gradient of a patient, all parameters together; needed.
            sampling_rate: As declared.

        Returns:
            Names of the trainable parameters and their sums.

        Raises:
            PrivacyError: If this is not what the plan says, the clip norm bounds nothing, or the network ties
                images together.
        """
        self._check(QueryKind.GRADIENT, clip_norm, sampling_rate)
        gradients = ImageGradients(network, loss, self.image_shape)

        def rows(patients: list[list[int]]) -> Iterator[Tensor]:
            return patient_rows(self._images, patients, gradients, chunk=gradients.chunk)

        # Single precision is enough for a step, and answers of many steps lie on the disk.
        return gradients.split(self._answer(rows, gradients.numbers, clip_norm, dtype=torch.float32))

    @torch.no_grad()
    def score(self, images: ImageSet, embed: Embed, *, clip_norm: float) -> Tensor:
        """The end of a run: a noisy sum over other patients, by which the best of several runs is chosen.

        Args:
            images: Images of patients who are not distilled from. A patient is in one of the two sums, so the
                noise is that of all queries of the run together.
            embed: As for :meth:`sum`.
            clip_norm: Longest row of a patient.

        Returns:
            Shape ``(d,)``.

        Raises:
            PrivacyError: If the plan has no score, a patient is distilled from, or rows depend on other images.
        """
        if not self._plan.selects:
            raise PrivacyError("A score ends a run of a plan of which the best run is kept, and nothing else.")
        self._next = self._plan.total  # nothing more is asked of those distilled from
        check_apart(self._images, images)
        check_clip_norm(clip_norm)
        like = self._tried(embed)

        def rows(_: list[list[int]]) -> Iterator[Tensor]:
            return patient_rows(images, images_of(images.patients), embed, chunk=_CHUNK)

        return self._answer(rows, like.shape[1], clip_norm).to(like)

    def noise(self, position: int) -> float:
        """Standard deviation of the noise on an answer, over ``clip_norm``; public."""
        if self._plan.selects and position == self._plan.total:
            (run,) = whole(self._plan, self._reservation.noise_multipliers)
            return run.noise_multiplier
        first = 0
        for query, sigma in zip(self._plan.queries, self._reservation.noise_multipliers, strict=True):
            if first <= position < first + query.count:
                return sigma
            first += query.count
        raise PrivacyError(f"The plan has {first} queries; there is none at position {position}.")

    def resume(self, answered: int) -> None:
        """Go on after this many queries; answers before are no longer needed, and deleted.

        Raises:
            PrivacyError: If the plan has fewer.
        """
        if not 0 <= answered <= self._plan.total:
            raise PrivacyError(
                f"The plan has {self._plan.total} queries, so {answered} cannot have been answered."
            )
        self._next = max(self._next, answered)
        if self._answers:
            self._answers.forget_before(answered)

    def close(self) -> None:
        """Let another process take up the kept answers; also done when nobody holds the curator any more."""
        if self._answers:
            self._answers.close()

    def images(self) -> ImageSet:
        """Refused.

        Raises:
            PrivacyError: Always.
        """
        raise PrivacyError(
            "This needs the images themselves, which differential privacy does not allow: real starts, coresets, "
            "batch statistics and selection on real images. Take a method that asks for sums only, and start from "
            "noise."
        )

    def statement(self) -> PrivacyStatement:
        """What is proved: the epsilon of the whole plan with all its runs, however much of it was asked."""
        mechanisms = mechanisms_of(self._plan, self._reservation.noise_multipliers)
        events = [
            f"{query.purpose}: {mechanism.sentence}"
            for query, mechanism in zip(self._plan.queries, mechanisms, strict=True)
        ]
        if self._plan.selects:
            score = Mechanism(noise_multiplier=self.noise(self._plan.total))
            events.append(
                f"the best of a random number of runs, {self._plan.expected_runs:g} on average, each with a score "
                f"on other patients: {score.sentence}"
            )
        return PrivacyStatement(
            epsilon=self._reservation.epsilon,
            delta=self._budget.delta,
            accountants=self._reservation.accountants,
            event=tuple(events),
            assumptions=assumed(self._plan),
        )

    # -- one query ---------------------------------------------------------------------------------------------

    def _check(self, kind: QueryKind, clip_norm: float, sampling_rate: float) -> None:
        declared = self._plan.at(self._next)
        if declared is None:
            raise PrivacyError(f"All {self._plan.total} queries of the plan were asked; nothing more is answered.")
        if (declared.kind, declared.sampling_rate) != (kind, sampling_rate):
            raise PrivacyError(
                f"Query {self._next + 1} was declared as {declared.kind.value} at sampling rate "
                f"{declared.sampling_rate:g}, not {kind.value} at {sampling_rate:g}. Nothing else is answered."
            )
        check_clip_norm(clip_norm)

    def _tried(self, embed: Embed) -> Tensor:
        """Rows of made-up images, after seeing that each is the same without the others."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand((_PROBES, *self.image_shape), generator=generator)
        targets = torch.eye(self.task.n_classes)[torch.arange(_PROBES) % self.task.n_classes]
        together = embed(images, targets)
        alone = torch.cat([embed(images[i : i + 1], targets[i : i + 1]) for i in range(_PROBES)])
        gap = (together - alone).abs().max() if together.shape == alone.shape else math.inf
        if together.ndim != _MATRIX or not gap <= _APART * alone.abs().max():
            raise PrivacyError(
                "Rows must be a fixed function of single images, one each: the same images gave other rows when "
                "they were alone. Clipping bounds nobody's influence then. Remove batch statistics and randomness."
            )
        return together

    def _answer(
        self,
        rows: Callable[[list[list[int]]], Iterator[Tensor]],
        length: int,
        clip_norm: float,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """The answer kept for this query, or else a new one, sealed before it is given."""
        position = self._next
        if position in self._sealed:
            if self._answers is None:
                raise PrivacyError(f"The answer to query {position + 1} was given and not kept; it is given once.")
            answer = self._answers.read(position, self._sealed[position])
        else:
            begun = self._unsealed(position)
            answer = self._drawn(rows, length, clip_norm, dtype) if begun is None else begun
            self._seal(position, answer)
        if answer.shape != (length,):
            raise PrivacyError(f"The kept answer to query {position + 1} has another length than asked for now.")
        self._next += 1
        return answer

    def _unsealed(self, position: int) -> Tensor | None:
        """An answer of a process that ended before it sealed it: given to nobody, and not drawn again."""
        digest = self._answers.digest(position) if self._answers else None
        return self._answers.read(position, digest) if self._answers and digest else None

    def _seal(self, position: int, answer: Tensor) -> None:
        content = packed(answer)
        if self._answers:
            self._answers.keep(position, content)
        digest = hashlib.sha256(content).hexdigest()
        self._ledger.seal(self._reservation.identity, self._first + position, digest)
        self._sealed[position] = digest

    def _drawn(
        self,
        rows: Callable[[list[list[int]]], Iterator[Tensor]],
        length: int,
        clip_norm: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Sampled patients' clipped rows, summed exactly on a grid, and noise on the same grid."""
        query = self._plan.at(self._next)
        rate = query.sampling_rate if query else 1.0  # a score takes all
        present = sampled(len(self._patients), rate, entropy=self._entropy)
        total = torch.zeros(length, dtype=torch.int64)
        for own in rows([self._patients[i] for i in present.nonzero().flatten().tolist()]):
            total += contributions(own, clip_norm).sum(0)
        return noisy(total, self.noise(self._next), clip_norm, entropy=self._entropy).to(dtype)


def check_apart(distilled_from: ImageSet, others: ImageSet) -> None:
    """Refuse images that no score can be made of.

    Args:
        distilled_from: What queries are about.
        others: What a score would be about.

    Raises:
        PrivacyError: If an image names no patient, or a patient is in both.
    """
    _check_named(others)
    if set(others.patients) & set(distilled_from.patients):
        raise PrivacyError("A patient is among those distilled from and among those a score is made of.")


def _check_named(images: ImageSet) -> None:
    if not all(patient.strip() for patient in images.patients):
        raise PrivacyError("An image names no patient, so nobody's privacy can be bounded. Give every image one.")


def contributions(rows: Tensor, clip_norm: float) -> Tensor:
    """What patients add to an answer: their clipped rows, as whole numbers of steps of the grid.

    Args:
        rows: One per patient, shape ``(n, d)``.
        clip_norm: Public bound.
    """
    return on_grid(clipped(rows, clip_norm), grid_step(clip_norm))


def noisy(total: Tensor, noise_multiplier: float, clip_norm: float, *, entropy: Entropy = SYSTEM) -> Tensor:
    """Sums of :func:`contributions` with noise on the same grid, in double precision.

    Args:
        total: Whole numbers, any shape; every number gets noise of its own.
        noise_multiplier: Standard deviation of the noise over the clip norm.
        clip_norm: Public bound.
        entropy: Source of random bytes.
    """
    step = grid_step(clip_norm)
    noise = gaussian(tuple(total.shape), noise_multiplier * clip_norm, entropy=entropy)
    return (total + torch.round(noise / step).to(torch.int64)).double() * step
