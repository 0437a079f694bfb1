"""De-identified instances grouped by patient."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medistill.core.task import Task
from medistill.errors import DataError

if TYPE_CHECKING:
    from medistill.core.images import ImageSet

PSEUDONYM = re.compile(r"[A-Z2-7]{16}")
REMAPPED_UID = re.compile(r"2\.25\.[1-9][0-9]{0,38}")
AGE_BANDS = ("", "0-17", "18-29", "30-39", "40-49", "50-59", "60-69", "70-79", "80-89", "90+")
SEXES = ("", "F", "M", "O")
_READ_VALUES = 1 << 23  #: pixels that are read at once


class Split(StrEnum):
    """What a patient's images are used for; every patient is in exactly one split."""

    TRAIN = "train"  #: distilled from
    VALIDATION = "validation"  #: schedules, operating points and the audit's reference
    HOLDOUT = "holdout"  #: never touched by distillation: the audit's non-members
    TEST = "test"  #: diagnosis


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One image of a cohort. Cannot hold an original identifier.

    Args:
        uid: Remapped SOP instance UID under ``2.25.``.
        patient: Pseudonym: 16 characters of base32.
        study: Pseudonym of the study, or empty where the source has none.
        label: Class name; in a multilabel task names joined by ``;`` in alphabetical order, and ``;`` alone where
            the image shows none of the classes.
        split: What this patient's images are used for.
        row: Position in the pixel store.
        modality: For example ``CR``, or empty.
        view: View position, for example ``PA``, or empty.
        sex: ``F``, ``M``, ``O`` or empty.
        age_band: One of :data:`AGE_BANDS`; an age is never kept.
        site: Pseudonym of the site, or empty.
        pixel_key: Keyed hash of the decoded pixels, to find the same image under two patients.

    Raises:
        DataError: If a field could be an original identifier.
    """

    uid: str
    patient: str
    label: str
    split: Split
    row: int
    study: str = ""
    modality: str = ""
    view: str = ""
    sex: str = ""
    age_band: str = ""
    site: str = ""
    pixel_key: str = ""

    def __post_init__(self) -> None:
        if not PSEUDONYM.fullmatch(self.patient):
            raise DataError("Expected a patient pseudonym of 16 base32 characters; found another form.")
        if not REMAPPED_UID.fullmatch(self.uid):
            raise DataError("Expected a remapped UID under 2.25; found another form.")
        for name in ("study", "site", "pixel_key"):
            value = getattr(self, name)
            if value and not PSEUDONYM.fullmatch(value):
                raise DataError(f"Expected {name} to be a pseudonym or empty; found another form.")
        if self.age_band not in AGE_BANDS or self.sex not in SEXES:
            raise DataError("Expected age_band and sex from the closed lists; found another form.")
        for name in ("modality", "view"):
            if not re.fullmatch(r"[A-Z0-9 ]{0,16}", getattr(self, name)):
                raise DataError(f"Expected {name} as a short code string; found another form.")


class PixelStore(Protocol):
    """Random access to decoded pixels."""

    def read(self, rows: Sequence[int]) -> NDArray[np.uint16]:
        """Pixels of some rows, shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``; 0 is black and 65535 is white."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A de-identified cohort.

    Args:
        instances: Images in a fixed order.
        task: What is diagnosed.
        profile: How the images were made, as plain values (size, fit, intensity policy, counts).
        store: Where the pixels are.

    Raises:
        DataError: If UIDs repeat, a label is not a class, or a patient (or one image under two patients) is in
            two splits.
    """

    instances: tuple[Instance, ...]
    task: Task
    profile: Mapping[str, Any]
    store: PixelStore = field(repr=False)

    def __post_init__(self) -> None:
        if len({instance.uid for instance in self.instances}) != len(self.instances):
            raise DataError("Expected unique instance UIDs; found repeats.")
        home: dict[str, Split] = {}
        classes = set(self.task.class_names)
        for instance in self.instances:
            if not instance.label or not classes.issuperset(self.task.names_in(instance.label)):
                raise DataError("Expected every label to be a class of the task; found another.")
            for key in (instance.patient, instance.pixel_key, instance.study):
                if key and home.setdefault(key, instance.split) is not instance.split:
                    raise DataError(
                        "Expected every patient (and study) in one split; found one in two "
                        f"({home[key].value} and {instance.split.value})."
                    )

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def patients(self) -> tuple[str, ...]:
        """Distinct pseudonyms, sorted."""
        return tuple(sorted({instance.patient for instance in self.instances}))

    def split(self, *names: Split | str) -> Cohort:
        """The part of the cohort in one or several splits; patient-disjoint from the rest."""
        wanted = {Split(name) for name in names}
        chosen = tuple(instance for instance in self.instances if instance.split in wanted)
        return replace(self, instances=chosen)

    def images(self, size: int) -> ImageSet:
        """Read and resize all images; extra memory does not grow with their number.

        Every axis is resized by the triangle filter: linear between pixels, and where an axis shrinks the filter
        grows with the factor, so that every pixel counts. For volumes that is trilinear, one axis after another.

        Args:
            size: Side length in pixels; images are stored square, volumes as cubes.

        Returns:
            Images of shape ``(n, c, size, size)``, or volumes ``(n, c, size, size, size)``, in ``[0, 1]``; targets
            one-hot, or multi-hot for a multilabel task.

        Raises:
            DataError: If there is no image.
        """
        import torch  # noqa: PLC0415 - ingestion works without loading torch

        from medistill.core.images import ImageSet, resized  # noqa: PLC0415

        if not self.instances:
            raise DataError("Expected at least one image in this part of the cohort, got none.")
        places = [instance.row for instance in self.instances]
        shape = self.store.read(places[:1]).shape[1:]
        chunk = max(1, _READ_VALUES // int(np.prod(shape)))
        images = torch.empty(len(places), shape[0], *[size] * (len(shape) - 1))
        for start in range(0, len(places), chunk):
            block = torch.from_numpy(self.store.read(places[start : start + chunk]).astype(np.float32)) / 65535.0
            images[start : start + chunk] = resized(block, size).clamp_(0.0, 1.0)
        index = {name: i for i, name in enumerate(self.task.class_names)}
        targets = torch.zeros(len(places), self.task.n_classes)
        for place, instance in enumerate(self.instances):
            targets[place, [index[name] for name in self.task.names_in(instance.label)]] = 1.0
        return ImageSet(
            images=images,
            targets=targets,
            patients=tuple(instance.patient for instance in self.instances),
            task=self.task,
        )

    def attributes(self) -> dict[str, tuple[str, ...]]:
        """What is known of each image, empty where not: ``sex``, ``age_band``, ``site``, ``view``."""
        names = ("sex", "age_band", "site", "view")
        return {name: tuple(getattr(instance, name) for instance in self.instances) for name in names}

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: images, patients, and images per class, which overlap in a multilabel task."""
        table: dict[str, dict[str, int]] = {}
        for name in Split:
            part = [instance for instance in self.instances if instance.split is name]
            shown = Counter(label for instance in part for label in self.task.names_in(instance.label))
            table[name.value] = {
                "images": len(part),
                "patients": len({instance.patient for instance in part}),
                **{label: shown[label] for label in self.task.class_names},
            }
        return table
