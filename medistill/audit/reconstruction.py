"""Do the pictures of a class, taken together, show one training patient?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from medistill.audit.attack import Exposed
from medistill.audit.pool import Pool
from medistill.audit.portraits import People, Portraits, Recognised
from medistill.audit.shadow_distillation import ShadowDistillation
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, averaged
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.core.task import Task
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed

NAME = "reconstruction"
_FALSE_ALARMS, _CAUGHT = 0.01, 0.5
#: Two people are distilled at a time, each as a class of its own.
_PAIR = Task.single_label(("one", "other"))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    r"""Recover a patient from all pictures of a class together, where no single picture shows one.

    Pictures that begin as noise keep most of it, and each alone is like nobody. Their mean, weighted by the soft
    labels, is not: for distribution matching it tends to the mean image of the class's patients. What is left of
    it without the class itself,

    .. math:: r_c = W (m_c - \mu_c)

    with :math:`\mu_c` the mean image of the class in the reference and :math:`W` its whitened components, is the
    portrait of a patient where one patient made up the class, or most of it. The portrait is compared with
    every training patient of the class by the cosine with :math:`W (x_p - \mu_c)`, and with patients who had no
    part in the release: the most alike of :math:`N` training patients is recognised when its Fisher :math:`z`
    exceeds what :math:`N` strangers reach in fewer than one search of a hundred. The tail of the strangers'
    highest tenth (ten, where they are few) is taken as exponential with unknown scale, which gives for an excess
    :math:`y` over :math:`k` of them with mean excess :math:`b`

    .. math:: P(y) = (1 + y / (k b))^{-k}.

    That is cautious: on X-rays strangers pass the limit far less often than said, where a normal tail would let
    several times as many pass. It recognises the patient of a class of one, or one of two; of three the mean shows
    nobody any more, and only tracing sees that they are in it. Inverting the features of random networks, to one
    or to several images per class, recognised fewer patients than the mean does and is not done.

    Args:
        components: Principal components of the reference.
        side: Side length to which larger images are averaged.
        volume_side: The same for volumes.
        strangers: Patients of a class without part in the release, below which the class is not judged.
        portraits: Releases of the positive control, each distilled from one member.
        distillation: How these are distilled.

    References:
        Loo et al. 2023, arXiv:2302.01428 (reconstruction where a set is distilled from few images). Zhao & Bilen
        2023, arXiv:2110.04181. Embrechts, Klüppelberg & Mikosch 1997, chapter 6 (exponential tails).

    Privacy:
        Reads non-released data of the pool and the reference.
    """

    components: int = 50
    side: int = 16
    volume_side: int = 10
    strangers: int = 30
    portraits: int = 8
    distillation: ShadowDistillation = field(default_factory=lambda: ShadowDistillation(iterations=200))

    def __post_init__(self) -> None:
        if min(self.components, self.side, self.volume_side, self.portraits - 1) < 1 or self.strangers < 2:
            raise ConfigError("Expected components, side and volume_side >= 1, portraits and strangers >= 2.")

    def within(self, reference: ImageSet) -> Portraits:
        """Learn from people outside the pool what a class looks like, and how its images differ."""
        return Portraits(
            reference,
            components=self.components,
            side=self.side,
            volume_side=self.volume_side,
            strangers=self.strangers,
        )


def search_portraits(
    release: Exposed,
    control: Exposed,
    *,
    control_name: str,
    pool: Pool,
    seed: int,
    compute: Compute,
    attack: Reconstruction | None = None,
) -> AttackOutcome:
    """Attack a release and its controls.

    Args:
        release: What is audited.
        control: A release of patients of whom none is a candidate.
        control_name: What that is, in words.
        pool: Who is attacked, and who stands beside them.
        seed: Public seed.
        compute: Device of the networks of the positive control.
        attack: Settings.

    Raises:
        DataError: If no class has enough patients who had no part in the release; then nothing can be concluded.
    """
    attack = attack or Reconstruction()
    portraits = attack.within(pool.reference)
    members, strangers = portraits.people(pool.train), portraits.people(pool.holdout)
    judged = portraits.judged(members, strangers)
    if not judged:
        raise DataError(f"no class has {attack.strangers} patients without part in the release to compare with")
    inside = pool.candidates.of_patients(pool.members)
    alone = _Alone(attack, inside, judged, derive_seed(seed, "portraits"))
    beside = portraits.search(control, portraits.people(inside), strangers)
    return _outcome(
        portraits.search(release, members, strangers),
        (
            _positive(alone, portraits, members, strangers, len(judged), compute),
            _negative(beside, control_name, len(judged)),
        ),
        pool.train.task.class_names,
        len(judged),
    )


def _alarms(found: Sequence[Recognised], classes: int) -> list[Recognised]:
    """Those more alike than chance allows in one search of a hundred, over all classes."""
    return [one for one in found if one.p_value * classes < _FALSE_ALARMS]


class _Alone:
    """Releases of known guilt: pictures distilled from one member each."""

    def __init__(self, attack: Reconstruction, inside: ImageSet, judged: Sequence[int], seed: int) -> None:
        self._attack, self._seed, self._k = attack, seed, inside.task.n_classes
        self._chosen = _members_by_turns(inside, judged, attack.portraits, derive_seed(seed, "drawn"))
        positions: list[int] = []
        of_whom: list[str] = []
        for place, (number, name) in enumerate(self._chosen):
            shown = (inside.targets[:, number] > 0.5).tolist()
            own = [
                i
                for i, (who, there) in enumerate(zip(inside.patients, shown, strict=True))
                if there and who == name
            ]
            positions, of_whom = positions + own, of_whom + [f"{place:05d}"] * len(own)
        targets = torch.eye(2)[torch.tensor([int(place) % 2 for place in of_whom], dtype=torch.long)]
        images = averaged(inside.images[positions], plane=attack.side, solid=attack.volume_side)
        self._drawn = ImageSet(images=images, targets=targets, patients=tuple(of_whom), task=_PAIR)

    def releases(self, compute: Compute) -> Iterator[tuple[int, str, Exposed]]:
        """Class, patient and pictures of each."""
        pairs = torch.arange(len(self._chosen)) // 2
        parts = self._attack.distillation.run(
            self._drawn,
            pairs[None] == torch.arange(len(self._chosen) // 2)[:, None],
            ipc=self._attack.distillation.most,
            seed=derive_seed(self._seed, "distilled"),
            compute=compute,
            progress=Progress(),
        )
        for part in parts:
            for pair, images in zip(part.numbers.tolist(), part.images, strict=True):
                for (number, name), own in zip(self._chosen[2 * pair :], images.chunk(2), strict=False):
                    labels = torch.zeros(len(own), self._k)
                    labels[:, number] = 1.0
                    yield number, name, Exposed(images=own, soft_labels=labels, task=_PAIR, ipc=len(own))


def _members_by_turns(images: ImageSet, judged: Sequence[int], count: int, seed: int) -> list[tuple[int, str]]:
    """An even number of classes, by turns, with a patient of each, everybody at most once a class."""
    generator = torch.Generator().manual_seed(seed)
    waiting = {number: _shuffled(images, number, generator) for number in judged}
    found = []
    for turn in range(count):
        number = judged[turn % len(judged)]
        if waiting[number]:
            found.append((number, waiting[number].pop()))
    return found[: len(found) // 2 * 2]


def _shuffled(images: ImageSet, number: int, generator: torch.Generator) -> list[str]:
    """Patients of a class in random order."""
    names = images.select((images.targets[:, number] > 0.5).nonzero().flatten()).unique_patients
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


def _positive(
    alone: _Alone, portraits: Portraits, members: People, strangers: People, classes: int, compute: Compute
) -> ControlOutcome:
    caught = []
    for number, name, release in alone.releases(compute):
        alarms = _alarms(portraits.search(release, members, strangers), classes)
        caught.append([(one.number, one.patient) for one in alarms] == [(number, name)])
    share = float(np.mean(caught)) if caught else 0.0
    return ControlOutcome(
        name="positive: pictures distilled from one member each",
        expected=f"at least {_CAUGHT:.0%} of these members recognised among all training patients",
        observed=f"{share:.0%} of {len(caught)} recognised",
        passed=share >= _CAUGHT,
    )


def _negative(found: Sequence[Recognised], name: str, classes: int) -> ControlOutcome:
    alarms = len(_alarms(found, classes))
    return ControlOutcome(
        name=f"negative: {name}",
        expected="nobody recognised",
        observed=f"{alarms} recognised",
        passed=alarms == 0,
    )


def _outcome(
    found: Sequence[Recognised], controls: tuple[ControlOutcome, ...], names: Sequence[str], classes: int
) -> AttackOutcome:
    alarms, valid = _alarms(found, classes), all(control.passed for control in controls)
    nearest = max(found, key=lambda one: one.likeness, default=None)
    findings = {
        "patients_recognised": float(len(alarms)),
        "classes_compared": float(classes),
        "classes_with_too_few_other_patients": float(len(names) - classes),
    }
    if nearest is not None:
        findings["largest_likeness_to_a_training_patient"] = round(nearest.likeness, 2)
        findings["largest_likeness_to_a_stranger_there"] = round(nearest.of_strangers, 2)
    return AttackOutcome(
        attack=NAME,
        question="Do the pictures of a class, taken together, show one training patient?",
        auroc=None,
        tpr_at_fpr={},
        p_value=min(1.0, classes * min((one.p_value for one in found), default=1.0)),
        minimum_detectable_auroc=None,
        findings=findings,
        controls=controls,
        verdict=Verdict.INVALID if not valid else Verdict.FAIL if alarms else Verdict.PASS,
        summary=_summary(valid, [names[one.number] for one in alarms]),
    )


def _summary(valid: bool, classes: Sequence[str]) -> str:
    if not valid:
        return "A control failed, so this result says nothing about the release."
    if classes:
        return f"The mean of the released pictures shows one training patient (class {', '.join(classes)})."
    return (
        "The mean of the released pictures of a class is like no single training patient. Nothing is said of "
        "patients of whom several make up a class."
    )
