"""Portraits of classes, and who is like them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

from medistill.audit.attack import Exposed, Floats
from medistill.audit.nearness import flat_rows, projected
from medistill.core.images import ImageSet

_TAIL, _FEWEST_OF_TAIL = 0.1, 10
_SMALLEST, _NEARLY_ONE = 1e-12, 1 - 1e-9


@dataclass(frozen=True, kw_only=True)
class People:
    """Patients of every class in whitened coordinates.

    Args:
        names: Of each class.
        rows: Mean images of these patients less that of their class, of length 1, one ``(p, components)`` a class.
    """

    names: tuple[tuple[str, ...], ...]
    rows: tuple[Floats, ...]


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """Who is most like the portrait of a class.

    Args:
        number: Class.
        patient: The most alike training patient.
        likeness: Cosine with this patient.
        of_strangers: Largest cosine with a stranger.
        p_value: That the most alike of so many strangers is as alike.
    """

    number: int
    patient: str
    likeness: float
    of_strangers: float
    p_value: float


class Portraits:
    """The space in which portraits are compared.

    Args:
        reference: Images of people outside the pool.
        components: Principal components of the reference.
        side: Side length to which larger images are averaged.
        volume_side: The same for volumes.
        strangers: Strangers of a class, below which it is not judged.
    """

    def __init__(
        self, reference: ImageSet, *, components: int, side: int, volume_side: int, strangers: int
    ) -> None:
        self._plane, self._solid, self._strangers = side, volume_side, strangers
        self._classes = range(reference.task.n_classes)
        flat = flat_rows(reference.images, plane=side, solid=volume_side)
        count = max(1, min(components, len(flat) - 1, flat.shape[1]))
        self._space = PCA(n_components=count, svd_solver="covariance_eigh", whiten=True).fit(flat)
        rows, targets = self._space.transform(flat), reference.targets.double().numpy()
        self._centres = targets.T @ rows / np.maximum(targets.sum(0), _SMALLEST)[:, None]

    def people(self, images: ImageSet) -> People:
        """Patients by class; one with images of several classes is in each of them."""
        rows, names = self._transformed(images.images), np.asarray(images.patients)
        found = []
        for number in self._classes:
            of_class = (images.targets[:, number] > 0.5).numpy()
            distinct, place = np.unique(names[of_class], return_inverse=True)
            mean = np.zeros((len(distinct), rows.shape[1]))
            np.add.at(mean, place, rows[of_class])
            mean /= np.bincount(place, minlength=len(distinct))[:, None]
            found.append((tuple(map(str, distinct)), _unit(mean - self._centres[number])))
        return People(names=tuple(one for one, _ in found), rows=tuple(one for _, one in found))

    def judged(self, members: People, strangers: People) -> tuple[int, ...]:
        """Classes of members and of enough strangers."""
        return tuple(
            number
            for number in self._classes
            if members.names[number] and len(strangers.names[number]) >= self._strangers
        )

    def search(self, release: Exposed, members: People, strangers: People) -> tuple[Recognised, ...]:
        """Compare the portrait of every class that can be judged.

        Args:
            release: What is attacked.
            members: Patients that may be in it.
            strangers: Patients that are not.
        """
        pictures, labels = self._transformed(release.images), release.soft_labels.double().numpy()
        found = []
        for number in self.judged(members, strangers):
            weight = labels[:, number].sum()
            if weight <= _SMALLEST:
                continue
            portrait = _unit((labels[:, number] @ pictures / weight - self._centres[number])[None])[0]
            alike, usual = (people.rows[number] @ portrait for people in (members, strangers))
            best = int(alike.argmax())
            p_value = chance_of_largest(float(_fisher(alike[best])), _fisher(usual), len(alike))
            found.append(
                Recognised(
                    number=number,
                    patient=members.names[number][best],
                    likeness=float(alike[best]),
                    of_strangers=float(usual.max()),
                    p_value=p_value,
                )
            )
        return tuple(found)

    def _transformed(self, images: Tensor) -> Floats:
        return projected(self._space, images, plane=self._plane, solid=self._solid)


def chance_of_largest(value: float, usual: Floats, count: int) -> float:
    """Probability that the largest of so many draws reaches a value; their tail is taken as exponential.

    Args:
        value: What was reached.
        usual: Draws of the same distribution, shape ``(n,)``.
        count: Of how many draws the value is the largest.
    """
    ordered = np.sort(usual)[::-1]
    highest = max(1, min(max(_FEWEST_OF_TAIL, int(_TAIL * len(ordered))), len(ordered) // 2))
    start = ordered[min(highest, len(ordered) - 1)]
    if value <= start:
        return 1.0
    total = max(float((ordered[:highest] - start).sum()), _SMALLEST)
    beyond = highest / len(ordered) * (1 + (value - start) / total) ** -highest
    return float(min(1.0, count * beyond))


def _fisher(cosines: Floats) -> Floats:
    z: Floats = np.arctanh(np.clip(cosines, -_NEARLY_ONE, _NEARLY_ONE))
    return z


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)
    return unit
