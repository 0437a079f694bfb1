"""De-identified instances grouped by patient."""

from __future__ import annotations

import re
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
_IMAGE_AXES = 3
_READ_CHUNK = 500


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
        label: Class name.
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
        """Pixels of some rows, shape ``(n, c, h, w)``; 0 is black and 65535 is white."""


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
        for instance in self.instances:
            if instance.label not in self.task.class_names:
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
        """Read and resize all images, in constant extra memory.

        Args:
            size: Side length in pixels; images are stored square.

        Returns:
            Images of shape ``(n, c, size, size)`` in ``[0, 1]``.

        Raises:
            DataError: If there is no image, or the cohort holds volumes.
        """
        shape = self.profile.get("shape", ())
        if len(shape) > _IMAGE_AXES:
            raise DataError(
                "Expected a cohort of images; found one of volumes, which distillation does not read yet. "
                "Ingest again with volumes: slices."
            )
        import torch  # noqa: PLC0415 - ingestion works without loading torch
        from torch.nn.functional import interpolate  # noqa: PLC0415

        from medistill.core.images import ImageSet  # noqa: PLC0415

        if not self.instances:
            raise DataError("Expected at least one image in this part of the cohort, got none.")
        blocks = []
        for start in range(0, len(self.instances), _READ_CHUNK):
            rows = [instance.row for instance in self.instances[start : start + _READ_CHUNK]]
            block = torch.from_numpy(self.store.read(rows).astype(np.float32)) / 65535.0
            if block.shape[-2:] != (size, size):
                block = interpolate(block, size=(size, size), mode="bilinear", antialias=True)
            blocks.append(block.clamp_(0.0, 1.0))
        index = {name: i for i, name in enumerate(self.task.class_names)}
        classes = torch.tensor([index[instance.label] for instance in self.instances])
        return ImageSet(
            images=torch.cat(blocks),
            targets=torch.nn.functional.one_hot(classes, self.task.n_classes).float(),
            patients=tuple(instance.patient for instance in self.instances),
            task=self.task,
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: images, patients, and images per class."""
        table: dict[str, dict[str, int]] = {}
        for name in Split:
            part = [instance for instance in self.instances if instance.split is name]
            table[name.value] = {
                "images": len(part),
                "patients": len({instance.patient for instance in part}),
                **{label: sum(i.label == label for i in part) for label in self.task.class_names},
            }
        return table
