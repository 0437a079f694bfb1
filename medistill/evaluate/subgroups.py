"""Parts of the test patients: by sex, age band, site and view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Attribute to its value for each image of a split; empty where it is not known.
Attributes = Mapping[str, Sequence[str]]

#: Groups of fewer patients are not shown: figures of so few could be those of one of them.
FEWEST_SHOWN = 10
#: Below this many patients, or :data:`FEWEST_SHOWN` patients of some class, figures carry a warning.
FEWEST_RELIABLE = 50
NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """Images of one group.

    Args:
        attribute: ``sex``, ``age_band``, ``site`` or ``view``.
        group: Value, sites as ``site 1``, ``site 2``, …
        images: Whether each image of the split belongs to it, shape ``(n,)``.
        patients: Patients among them.
        warning: Why figures should not be relied on, or empty.
    """

    attribute: str
    group: str
    images: NDArray[np.bool_]
    patients: int
    warning: str

    @property
    def shown(self) -> bool:
        """Whether the group is large enough for figures."""
        return self.patients >= FEWEST_SHOWN


def subgroups(
    attributes: Attributes, patients: Sequence[str], targets: NDArray[np.float64], *, sites: Sequence[str]
) -> Iterator[Subgroup]:
    """Groups of every attribute that divides the images of a split.

    Args:
        attributes: Attribute to values, one for each image.
        patients: Pseudonym of each image's patient, length ``n``.
        targets: Shape ``(n, k)``, one-hot or multi-hot.
        sites: Pseudonyms of sites in the order of their numbers.
    """
    of = np.asarray(patients)
    for attribute, values in attributes.items():
        column = np.asarray(values, dtype=object)
        named = {site: number for number, site in enumerate(sites, start=1)} if attribute == "site" else {}
        distinct = sorted(set(values), key=lambda value: (value == "", named.get(value, 0), value))
        if len(distinct) < 2:
            continue
        for value in distinct:
            here = column == value
            count = len(np.unique(of[here]))
            yield Subgroup(
                attribute=attribute,
                group=f"site {named[value]}" if value in named else value or NOT_STATED,
                images=here,
                patients=count,
                warning=_warning(count, of[here], targets[here]),
            )


def number_sites(splits: Sequence[tuple[Attributes, Sequence[str]]]) -> tuple[str, ...]:
    """Pseudonyms of the sites of several splits, the one with most patients first."""
    patients: dict[str, set[str]] = {}
    for attributes, of in splits:
        for site, patient in zip(attributes.get("site", ()), of, strict=False):
            patients.setdefault(site, set()).add(patient)
    return tuple(sorted((s for s in patients if s), key=lambda s: (-len(patients[s]), s)))


def _warning(count: int, patients: NDArray[np.str_], targets: NDArray[np.float64]) -> str:
    if count < FEWEST_SHOWN:
        return f"fewer than {FEWEST_SHOWN} patients: not shown"
    of_class = [len(np.unique(patients[shown > 0.5])) for shown in targets.T]
    if min(of_class) == 0:
        return "a class is absent: AUROC cannot be computed"
    if count < FEWEST_RELIABLE or min(of_class) < FEWEST_SHOWN:
        return "few patients: differences may be chance"
    return ""
