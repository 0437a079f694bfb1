"""What is known of patients beside their images, and how well it is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from medistill.audit.attack import Floats
from medistill.core.cohort import Cohort, Split
from medistill.core.images import ImageSet
from medistill.errors import DataError

#: Attribute to its value, of each patient of whom it is known.
Known = Mapping[str, Mapping[str, str]]
#: Name of a part of an audit to attribute to the value of each of its images.
Attributes = Mapping[str, Mapping[str, Sequence[str]]]
_PARTS = {"train": Split.TRAIN, "holdout": Split.HOLDOUT, "reference": Split.VALIDATION}
_FLOOR, _SMALLEST, _Z = 1e-6, 1e-3, 1.96


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Guesses of one attribute, of every candidate.

    Args:
        wanted: True values, empty where not known, shape ``(p,)``.
        values: All values, sorted.
        plain: Log-probability of every value without the release, shape ``(p, values)``.
        helped: The same with it.
    """

    wanted: NDArray[np.str_]
    values: tuple[str, ...]
    plain: Floats
    helped: Floats

    @property
    def gain(self) -> Floats:
        """Log-likelihood of the true value that the release adds; 0 where it is not known, shape ``(p,)``."""
        places = [self.values.index(value) if value else 0 for value in self.wanted]
        rows = np.arange(len(places))
        gain: Floats = np.where(self.wanted != "", self.helped[rows, places] - self.plain[rows, places], 0.0)
        return gain

    def right(self, logs: Floats) -> Floats:
        """Whether the likeliest value is the true one, shape ``(known,)``."""
        known = self.wanted != ""
        right: Floats = (np.array(self.values)[logs.argmax(1)] == self.wanted)[known].astype(np.float64)
        return right

    def excess(self, inside: NDArray[np.bool_]) -> tuple[float, float, float]:
        """Right guesses that the release adds, as a share: of members minus of others; with its 95 % interval.

        Args:
            inside: Who is a member, shape ``(p,)``.
        """
        added, member = self.right(self.helped) - self.right(self.plain), inside[self.wanted != ""]
        parts = [added[member], added[~member]]
        if min(map(len, parts)) < 2:
            return 0.0, -1.0, 1.0
        half = _Z * float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))
        value = float(parts[0].mean() - parts[1].mean())
        return value, value - half, value + half


def attributes_of(cohort: Cohort) -> Attributes:
    """What a cohort knows of the images of each part of its audit; the reference are validation patients."""
    return {part: cohort.split(name).attributes() for part, name in _PARTS.items()}


def attributes_of_patients(
    parts: Sequence[tuple[ImageSet, Mapping[str, Sequence[str]]]],
) -> dict[str, dict[str, str]]:
    """Attributes by patient; one that differs between a patient's images counts as not known.

    Args:
        parts: Images, and attribute to value for each of them, empty where not known.

    Raises:
        DataError: If there are not as many values as images.
    """
    found: dict[str, dict[str, str]] = {}
    for images, attributes in parts:
        for name, values in attributes.items():
            if len(values) != len(images):
                raise DataError(f"Expected {name} of {len(images)} images, got {len(values)} values.")
            for patient, value in zip(images.patients, values, strict=True):
                of = found.setdefault(patient, {})
                of[name] = value if of.get(name, value) == value else ""
    return found


def crossed(
    rows: Floats, wanted: NDArray[np.str_], folds: Sequence[NDArray[np.intp]], *, penalty: float
) -> Floats:
    """Log-probability of every value for each patient, by logistic regressions on patients of the other parts.

    Args:
        rows: What is known of each patient, shape ``(p, d)``.
        wanted: True values, empty where not known, shape ``(p,)``.
        folds: Positions of the patients of each part.
        penalty: Inverse strength of the penalty.

    Returns:
        Shape ``(p, values)``, values sorted; never below a thousandth.
    """
    values = sorted(set(wanted.tolist()) - {""})
    centre, spread = rows.mean(0), rows.std(0)
    rows = (rows - centre) / np.where(spread > _FLOOR, spread, 1.0)
    found = np.full((len(rows), len(values)), -np.inf)
    for fold in folds:
        learned = np.setdiff1d(np.flatnonzero(wanted != ""), fold)
        model = regression(penalty).fit(rows[learned], wanted[learned])
        columns = np.searchsorted(values, model.classes_)
        found[np.ix_(fold, columns)] = model.predict_log_proba(rows[fold])
    floored: Floats = np.maximum(found, np.log(_SMALLEST))
    return floored


def regression(penalty: float) -> LogisticRegression:
    """A logistic regression of any number of values.

    Args:
        penalty: Inverse strength of the penalty.
    """
    return LogisticRegression(C=penalty, max_iter=1000, tol=1e-3)


def most_common(values: Mapping[str, str]) -> tuple[str, float]:
    """The most common value and its share."""
    found, counts = np.unique(list(values.values()), return_counts=True)
    return str(found[counts.argmax()]), float(counts.max() / counts.sum())
