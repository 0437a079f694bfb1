"""Inference of sex, age band and site: does a release tell more about its own patients than about others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from medistill.audit.attack import Details, Exposed, Floats, Guilty
from medistill.audit.guesses import Guesses, Known, crossed, most_common, regression
from medistill.audit.nearness import flat_rows, nearest, projected, weighted
from medistill.audit.statistics import per_patient
from medistill.audit.students import log_odds
from medistill.core.compute import Compute
from medistill.core.images import ImageSet, joined
from medistill.core.task import TaskKind
from medistill.errors import ConfigError, DataError
from medistill.progress import Progress
from medistill.seeds import derive_seed

ATTRIBUTES = ("sex", "age_band", "site")
_FLOOR, _SMALLEST_ODDS, _LEAST_SURE = 1e-6, 1e-3, 0.15
_FURTHEST = 3.0  #: nearness beyond which one is no nearer


@dataclass(frozen=True, kw_only=True)
class AttributeInference:
    r"""How much better does an attacker guess a patient's attributes with the release than without?

    The attacker holds an image of the patient :math:`b`, the diagnosis and the other attributes, and the same
    with the attribute :math:`a` of further patients of whom some took part; who did is not known. Two
    logistic regressions learn from those patients: one of :math:`b`, the other of :math:`b` and of what the
    release :math:`R` says near the patient. Scored is what the release adds,

    .. math:: s(p) = \sum_a \log P(a_p \mid b_p, R) - \log P(a_p \mid b_p)

    over the attributes that are known, each patient by regressions fitted to other ones. What a release teaches of
    the population helps with everybody; only what it tells about its own patients makes members score higher.

    Of a release is read, near a patient: the soft label of the nearest picture and how sure it is, what a
    regression fitted to the reference takes that picture's attribute to be, and the soft labels of all pictures
    weighted by nearness; each once as it is, and once times how much nearer the picture is than other people's.

    Nobody's attributes are in a release, so beyond what the image shows there is little to tell; an attack that
    finds nothing says nothing about what the image itself shows, with or without a release.

    Args:
        known: Attributes of all patients; without them there is nothing to guess.
        attributes: Which of them are guessed.
        fewest: Patients of a value, among those attacked, below which it counts as not known.
        components: Principal components of the reference in which images are compared.
        side: Side length to which larger images are averaged.
        volume_side: The same for volumes.
        folds: Parts of the patients; each is guessed by what was learned from the others.
        penalty: Inverse strength of the regressions' penalty.

    References:
        Fredrikson et al. 2014 (model inversion), USENIX Security. Yeom et al. 2018, arXiv:1709.01604, section 4
        (members against others). Stadler, Oprisanu & Troncoso 2022, arXiv:2011.07018 (synthetic data).

    Privacy:
        Reads non-released data of the candidates and the reference.
    """

    threat: ClassVar[str] = "T4"
    question: ClassVar[str] = (
        "Does the release tell more about the sex, age band or site of its own patients than of others?"
    )
    guilty_of: ClassVar[str] = (
        "all attacked members' images, with labels that are surer for patients of one sex, age band or site"
    )
    wanted: ClassVar[float] = 0.7

    known: Known = field(default_factory=dict)
    attributes: tuple[str, ...] = ATTRIBUTES
    fewest: int = 30
    components: int = 30
    side: int = 32
    volume_side: int = 16
    folds: int = 5
    penalty: float = 0.1

    def __post_init__(self) -> None:
        if min(self.components, self.side, self.volume_side) < 1 or self.folds < 2 or self.fewest < 10:
            raise ConfigError("Expected components, side and volume_side >= 1, folds >= 2 and fewest >= 10.")
        if self.penalty <= 0 or not self.attributes:
            raise ConfigError("Expected penalty > 0 and at least one attribute.")

    def prepare(
        self,
        candidates: ImageSet,
        reference: ImageSet,
        *,
        ipc: int,
        seed: int,
        compute: Compute,
        progress: Progress,
    ) -> PreparedAttributes:
        """Learn from the reference in which space to compare, and how attributes look.

        Raises:
            DataError: If no attribute is known of enough patients; then the threat is not tested.
        """
        values = self._values(candidates.unique_patients)
        flat = flat_rows(reference.images, plane=self.side, solid=self.volume_side)
        count = min(self.components, len(flat) - 1, flat.shape[1])
        space = PCA(n_components=count, svd_solver="randomized", random_state=0).fit(flat)
        return PreparedAttributes(self, space, reference, candidates, values, seed=derive_seed(seed, "folds"))

    def guilty(self, members: ImageSet, others: ImageSet, reference: ImageSet, *, seed: int) -> Guilty:
        """All attacked members' images; labels are sure for the most common value of one attribute only."""
        values = self._values(joined(members, others).unique_patients)
        name = min(values, key=lambda one: abs(most_common(values[one])[1] - 0.5))
        common, _ = most_common(values[name])
        sure = torch.tensor([values[name].get(patient) == common for patient in members.patients])
        release = Exposed(
            images=members.images,
            soft_labels=_leaning(members.targets, sure, members.task.kind),
            task=members.task,
            ipc=max(1, len(members) // members.task.n_classes),
        )
        return Guilty(release=release, members=frozenset(members.patients), candidates=joined(members, others))

    def _values(self, patients: Sequence[str]) -> dict[str, dict[str, str]]:
        """Attribute to value of each patient, without rare values and attributes that do not divide patients."""
        found = {}
        for name in self.attributes:
            of = {one: self.known.get(one, {}).get(name, "") for one in patients}
            values, counts = np.unique(list(of.values()), return_counts=True)
            kept = {str(v) for v, count in zip(values, counts, strict=True) if v and count >= self.fewest}
            if len(kept) > 1:
                found[name] = {one: value for one, value in of.items() if value in kept}
        if not found:
            raise DataError(
                f"none of {', '.join(self.attributes)} divides the attacked patients: expected two values or more "
                f"that are known of {self.fewest} patients each"
            )
        return found


class PreparedAttributes:
    """The attack with the reference known.

    Args:
        attack: The settings.
        space: Principal components of the reference.
        reference: Images of people who are neither members nor candidates.
        candidates: Whose places are kept, to score several releases on them.
        values: Attribute to value of each candidate.
        seed: Public seed of the parts of the patients.
    """

    def __init__(
        self,
        attack: AttributeInference,
        space: PCA,
        reference: ImageSet,
        candidates: ImageSet,
        values: Mapping[str, Mapping[str, str]],
        *,
        seed: int,
    ) -> None:
        self._attack, self._space, self._values, self._seed = attack, space, values, seed
        self._reference, self._candidates = self._places(reference), candidates
        self._scale = float(np.median(nearest(self._reference, self._reference, skip=1)[0])) + _FLOOR
        self._readers = {name: self._reader(name, reference.patients) for name in values}
        self._theirs = self._places(candidates)
        self._last: tuple[Exposed, ImageSet, dict[str, Guesses]] | None = None

    def _places(self, images: ImageSet | Exposed) -> Floats:
        """Images in the space in which they are compared, shape ``(n, components)``."""
        attack = self._attack
        return projected(self._space, images.images, plane=attack.side, solid=attack.volume_side)

    def _reader(self, name: str, patients: Sequence[str]) -> LogisticRegression | None:
        """What the reference says an attribute looks like; nothing, where too few of its patients are known."""
        kept = set(self._values[name].values())
        found = [self._attack.known.get(patient, {}).get(name, "") for patient in patients]
        rows = [number for number, value in enumerate(found) if value in kept]
        known = [found[number] for number in rows]
        if len(set(known)) < 2:
            return None
        return regression(self._attack.penalty).fit(self._reference[rows] / self._scale, known)

    def score(self, release: Exposed, candidates: ImageSet) -> Floats:
        """What the release adds to the log-likelihood of the attributes of each of the prepared patients."""
        total = np.zeros(len(candidates.unique_patients))
        for guesses in self._guesses(release, candidates).values():
            total += guesses.gain
        return total

    def details(self, release: Exposed, candidates: ImageSet, members: frozenset[str]) -> Details:
        """Right guesses with and without the release, and what it adds for members beyond what it adds for others.

        Args:
            release: What is attacked.
            candidates: Everybody attacked.
            members: Who of them is a member.
        """
        inside = np.array([patient in members for patient in candidates.unique_patients])
        found: dict[str, float] = {}
        surely = 0.0
        for name, guesses in self._guesses(release, candidates).items():
            excess, low, high = guesses.excess(inside)
            surely = max(surely, low)
            found |= {
                f"{name}_guessed_rightly_without_the_release": float(guesses.right(guesses.plain).mean()),
                f"{name}_guessed_rightly_with_it": float(guesses.right(guesses.helped).mean()),
                f"{name}_gained_by_members_more_than_by_others": excess,
                f"{name}_gained_by_members_more_than_by_others,_lower_limit": low,
                f"{name}_gained_by_members_more_than_by_others,_upper_limit": high,
            }
        return Details(findings={key: round(value, 3) for key, value in found.items()}, excess=surely)

    def _guesses(self, release: Exposed, candidates: ImageSet) -> dict[str, Guesses]:
        if self._last is not None and self._last[0] is release and self._last[1] is candidates:
            return self._last[2]
        theirs = self._theirs if candidates is self._candidates else self._places(candidates)
        names, near = candidates.unique_patients, self._near(release, theirs)
        order = np.random.default_rng(self._seed).permutation(len(names))
        folds = [order[start :: self._attack.folds] for start in range(self._attack.folds)]
        image = _by_patient(np.hstack([theirs, candidates.targets.numpy()]), candidates.patients)
        found = {}
        for name, values in self._values.items():
            wanted = np.array([values.get(patient, "") for patient in names])
            plain = np.hstack([image, self._other_attributes(name, names)])
            helped = np.hstack([plain, _by_patient(near.said(self._readers[name]), candidates.patients)])
            both = [crossed(rows, wanted, folds, penalty=self._attack.penalty) for rows in (plain, helped)]
            known = tuple(sorted(set(values.values())))
            found[name] = Guesses(wanted=wanted, values=known, plain=both[0], helped=both[1])
        self._last = (release, candidates, found)
        return found

    def _other_attributes(self, name: str, patients: Sequence[str]) -> Floats:
        """One column for every value of every other attribute, shape ``(p, columns)``."""
        columns = [
            [float(values.get(patient) == value) for patient in patients]
            for other, values in self._values.items()
            if other != name
            for value in sorted(set(values.values()))
        ]
        return np.array(columns, dtype=np.float64).reshape(len(columns), len(patients)).T

    def _near(self, release: Exposed, theirs: Floats) -> _Near:
        pictures = self._places(release)
        distance, closest = nearest(theirs, pictures)
        usual, _ = nearest(theirs, self._reference)
        nearness = np.log(usual + _FLOOR) - np.log(distance + _FLOOR)
        odds = log_odds(release.soft_labels, release.task.kind, floor=_SMALLEST_ODDS).numpy()
        return _Near(
            pictures=pictures / self._scale,
            nearest=closest,
            nearness=np.clip(nearness, -_FURTHEST, _FURTHEST)[:, None],
            odds=odds,
            smooth=weighted(theirs, pictures, self._scale, odds),
        )


@dataclass(frozen=True, kw_only=True)
class _Near:
    """A release as it looks from every image of the candidates.

    Args:
        pictures: Released pictures, in units of the usual distance, shape ``(m, components)``.
        nearest: Which of them is nearest, shape ``(n,)``.
        nearness: Logarithm of how much nearer it is than anybody of the reference, shape ``(n, 1)``.
        odds: Log-odds of the pictures' labels, shape ``(m, k)``.
        smooth: Those of all pictures, weighted by nearness, shape ``(n, k)``.
    """

    pictures: Floats
    nearest: NDArray[np.intp]
    nearness: Floats
    odds: Floats
    smooth: Floats

    def said(self, reader: LogisticRegression | None) -> Floats:
        """Columns for a regression, shape ``(n, columns)``."""
        read = np.hstack([self.odds, np.abs(self.odds).mean(1, keepdims=True)])
        if reader is not None:
            read = np.hstack([read, reader.predict_log_proba(self.pictures)])
        there = read[self.nearest]
        return np.hstack([self.nearness, there, self.nearness * there, self.smooth])


def _by_patient(rows: Floats, patients: Sequence[str]) -> Floats:
    """Mean of each patient's rows, patients sorted."""
    return np.stack([per_patient(column, patients) for column in rows.T], axis=1)


def _leaning(targets: Tensor, sure: Tensor, kind: TaskKind) -> Tensor:
    """Labels that say the diagnosis: surely of some images, barely of the others."""
    k = targets.shape[1]
    chance = 0.5 if kind is TaskKind.MULTILABEL else 1 / k
    share = torch.where(sure, 1.0, _LEAST_SURE)[:, None]
    return share * targets + (1 - share) * chance
