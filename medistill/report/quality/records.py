"""What is known of a cohort's quality, as frozen records of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medistill.errors import DataError
from medistill.report.wording import Warned

SCHEMA_VERSION = 1
NOT_GIVEN = "not given"
BINS = 64  #: equal bins of the stored grey levels 0 to 65535
_KIND = "medistill quality"


@dataclass(frozen=True, kw_only=True)
class Count:
    """Images and the patients they are of."""

    images: int
    patients: int


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Files (of a file with several images: images) kept out for one reason, with the detail given most often."""

    code: str
    sentence: str
    files: int
    detail: str = ""
    detail_files: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split, or the whole cohort: in all and per class."""

    name: str
    total: Count
    classes: dict[str, Count]


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of an attribute; ``classes`` counts its patients per class."""

    name: str
    total: Count
    classes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """How patients spread over a modality, view, sex, age band or site.

    Args:
        name: Attribute.
        values: Its values.
        association: Cramér's V between value and class over patients, corrected for bias: 0 (none) to 1.
    """

    name: str
    values: tuple[Value, ...]
    association: float


@dataclass(frozen=True, kw_only=True)
class PerPatient:
    """Images per patient; ``histogram`` maps a number of images to a number of patients."""

    minimum: int
    median: float
    maximum: int
    histogram: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Images whose decoded pixels are the same, found by their keyed hash.

    Args:
        images: Images that repeat an earlier one.
        groups: Pictures that occur more than once.
        across_patients: Groups under more than one patient.
        across_classes: Groups under more than one class.
    """

    images: int
    groups: int
    across_patients: int
    across_classes: int


@dataclass(frozen=True, kw_only=True)
class Lookalikes:
    """Different images that look almost the same: scaled to 32 by 32 they correlate above :data:`LOOKALIKE`.

    Args:
        across_patients: Pairs under two patients.
        across_splits: Of those, pairs in two splits: what is learned in one is tested in the other.
        pairs: Rows of the closest pairs, with their correlation.
    """

    across_patients: int
    across_splits: int
    pairs: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Grey levels of the sampled images of a class, or of all.

    Args:
        name: Class, or empty for all.
        images: Images looked at.
        histogram: Share of pixels in each of :data:`BINS` equal bins from black to white.
        black: Share of pixels at 0.
        white: Share of pixels at 65535.
        brightness: 5th, 50th and 95th percentile over images of the mean grey level, in ``[0, 1]``.
        contrast: The same of the standard deviation within an image.
    """

    name: str
    images: int
    histogram: tuple[float, ...]
    black: float
    white: float
    brightness: tuple[float, float, float]
    contrast: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """How well one number per image, averaged over a patient, tells a class from the others.

    Args:
        measure: ``brightness`` or ``contrast``.
        name: Class.
        auroc: 0.5 is chance; always 0.5 or more.
        chance: What chance alone stays below, 997 times of 1000, with so many patients.
    """

    measure: str
    name: str
    auroc: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Unusual:
    """An image worth a look; ``row`` is its position in the cohort."""

    row: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """Grey levels of a sample of the images.

    Args:
        sampled: Images looked at.
        images: Images there are.
        overall: All classes together, each weighted by its number of images.
        classes: Each class.
        shortcuts: What brightness and contrast alone tell about the class.
        constant: Images of one grey level.
        empty: Images that are almost all black, or almost without contrast.
        overexposed: Images of which more than half is white.
        unusual: Those, and the darkest, brightest and flattest others.
        lookalikes: Pairs of patients with almost the same picture.
    """

    sampled: int
    images: int
    overall: Levels
    classes: tuple[Levels, ...]
    shortcuts: tuple[Shortcut, ...]
    constant: int
    empty: int
    overexposed: int
    unusual: tuple[Unusual, ...]
    lookalikes: Lookalikes


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is in a cohort, as plain values.

    Args:
        seed: Chose the sample and the pictures.
        files: Files that were scanned.
        accepted: Of those, files that gave at least one image.
        rejected: Of those, files that gave none.
        quarantine: What was kept out, by reason; most frequent first.
        classes: Names of the classes.
        whole: The whole cohort.
        splits: Each split.
        attributes: Modality, view, sex, age band, site.
        per_patient: Images per patient.
        flags: Assumptions made while reading, with the number of images.
        duplicates: The same picture more than once.
        intensity: Grey levels.
        settings: How the images were made.
        warnings: What may need a decision, most serious first.
        checks: What was looked for.
    """

    seed: int
    files: int
    accepted: int
    rejected: int
    quarantine: tuple[Reason, ...]
    classes: tuple[str, ...]
    whole: Part
    splits: tuple[Part, ...]
    attributes: tuple[Attribute, ...]
    per_patient: PerPatient
    flags: dict[str, int]
    duplicates: Duplicates
    intensity: Intensity
    settings: dict[str, str]
    warnings: tuple[Warned, ...] = ()
    checks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"kind": _KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Quality:
        """Inverse of :meth:`to_json`.

        Raises:
            DataError: If the values are of another kind, or of a newer version.
        """
        rest = {name: value for name, value in values.items() if name not in {"kind", "schema_version"}}
        if values.get("kind") != _KIND or values.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"Expected the quality of a cohort, schema version {SCHEMA_VERSION}; found another.")
        try:
            return TypeAdapter(cls).validate_python(rest)
        except ValidationError:
            raise DataError("The quality of the cohort is incomplete. Inspect the cohort again.") from None
