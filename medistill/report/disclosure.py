"""What a reader outside the hospital may see of the numbers that were counted on real patients.

Every count of patients, of their images or of their files is rounded down to tens, so that no single patient
changes what is printed by more than a step; a ``0`` can mean up to nine. The rounding is a courtesy against small
cells, not a guarantee: counts and measurements are computed on real patients and are not covered by any epsilon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medistill.core.reports import AuditReport, DiagnosticReport
from medistill.errors import DataError

STEP = 10
ROUNDING_NOTE = (
    "Counts of patients, of their images and of their files are rounded down to tens; 0 can mean up to 9."
)
NOT_COVERED_NOTE = (
    "Counts and measured figures were computed on real patients. They describe the release; they are not part of "
    "any differential privacy guarantee."
)

#: Settings of ingestion that describe the processing and hold no count and no value of a patient.
PUBLIC_PROFILE_KEYS = (
    *("size", "volumes", "fit", "intensity", "colour", "burned_in", "ocr", "heads", "missing_patient", "labels"),
)

_PARTS = frozenset({"splits", "quarantine", "modality", "profile"})
_LOCATION = re.compile(r"""(?:(?<=^)|(?<=[\s='"]))(?:~|[A-Za-z]:\\|/|\\\\)[^\s'"]*""")
_ADDRESS = re.compile(r"""\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'"]+""")


def rounded(count: float) -> int:
    """A count of patients, images or files, rounded down to tens."""
    return int(count) // STEP * STEP


def public_commands(commands: tuple[str, ...]) -> tuple[str, ...]:
    """Commands with absolute paths and network addresses replaced by ``PATH`` and ``ADDRESS``.

    Relative paths stay; whoever passes the commands keeps names of patients out of them.
    """
    return tuple(_LOCATION.sub("PATH", _ADDRESS.sub("ADDRESS", command)) for command in commands)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of about the same probability.

    Args:
        predicted: Their mean.
        observed: Share of them that was so.
        share: Share of all predictions.
    """

    predicted: float
    observed: float
    share: float


def joined_bins(bins: Sequence[tuple[float, float, float]], *, patients: int) -> tuple[Bin, ...]:
    """Bins that hold ten patients' worth of predictions at least; smaller ones join the next one.

    A bin of one or two images would show what these patients have. A last bin that is too small joins the one
    before; means are weighted, so that those over all bins stay what they were.

    Args:
        bins: Mean prediction, share that was so, share of all predictions, by rising prediction.
        patients: Patients behind the predictions.

    Example:
        >>> bins = [(0.1, 0.0, 0.5), (0.5, 1.0, 0.05), (0.9, 1.0, 0.45)]
        >>> [round(one.share, 2) for one in joined_bins(bins, patients=100)]
        [0.5, 0.5]
    """
    groups: list[list[tuple[float, float, float]]] = [[]]
    for one in bins:
        groups[-1].append(one)
        if _share(groups[-1]) * patients >= STEP - 1e-9:
            groups.append([])
    rest = groups.pop()
    if rest and groups:
        groups[-1] += rest
    return tuple(_joined(group) for group in groups)


def _share(group: Sequence[tuple[float, float, float]]) -> float:
    return math.fsum(share for _, _, share in group)


def _joined(group: Sequence[tuple[float, float, float]]) -> Bin:
    whole = _share(group)
    return Bin(
        predicted=math.fsum(predicted * share for predicted, _, share in group) / whole,
        observed=math.fsum(observed * share for _, observed, share in group) / whole,
        share=whole,
    )


def public_cohort(cohort: Mapping[str, Any]) -> dict[str, Any]:
    """What of a cohort's summary may leave: rounded counts and how the images were processed.

    Args:
        cohort: ``splits`` (as of :meth:`medistill.core.cohort.Cohort.counts`), ``quarantine`` (reason code to
            number of files), ``modality`` (name to number of images) and ``profile``; each may be absent.

    Raises:
        DataError: If there is any other part.

    Privacy:
        Reads non-released counts and rounds every one of them; of the profile only
        :data:`PUBLIC_PROFILE_KEYS` pass.
    """
    if cohort.keys() - _PARTS:
        raise DataError(
            f"Expected only {', '.join(sorted(_PARTS))} in the summary of a cohort; found another part."
        )
    profile = cohort.get("profile") or {}
    settings = profile.get("config", profile)
    return {
        "splits": {
            split: {name: rounded(number) for name, number in row.items()}
            for split, row in (cohort.get("splits") or {}).items()
        },
        "quarantine": {code: rounded(number) for code, number in sorted((cohort.get("quarantine") or {}).items())},
        "modality": {name: rounded(number) for name, number in sorted((cohort.get("modality") or {}).items())},
        "profile": {key: settings[key] for key in PUBLIC_PROFILE_KEYS if key in settings},
    }


def public_audit(audit: AuditReport) -> dict[str, Any]:
    """An audit as strict plain values with every number of patients rounded.

    Privacy:
        Reads measurements made on real patients; counts are rounded, figures are kept.
    """
    values = audit.to_json()
    values["members"] = rounded(audit.members)
    values["non_members"] = rounded(audit.non_members)
    plain: dict[str, Any] = _plain(values)
    return plain


def public_diagnosis(diagnosis: DiagnosticReport, *, released: int) -> dict[str, Any]:
    """A diagnosis as strict plain values with every number of patients and real images rounded.

    The time of training is left out: it differs from run to run, and the same run gives the same bytes.

    Args:
        diagnosis: Arms side by side.
        released: Number of released images; arms trained on exactly so many keep their exact number.

    Privacy:
        Reads measurements made on real patients; counts are rounded, figures are kept.
    """
    values = diagnosis.to_json()
    values["arms"] = [
        {
            **{name: value for name, value in asdict(arm).items() if name != "cpu_seconds"},
            "images": arm.images if arm.images == released else rounded(arm.images),
            "reliability": [
                (one.predicted, one.observed, one.share)
                for one in joined_bins(arm.reliability, patients=arm.patients)
            ],
        }
        for arm in diagnosis.arms
    ]
    values["subgroups"] = [{**asdict(group), "patients": rounded(group.patients)} for group in diagnosis.subgroups]
    plain: dict[str, Any] = _plain(values)
    return plain


def _plain(value: Any) -> Any:
    """Strict JSON values: tuples become lists, a number that is not finite ``None``, an estimate's n rounded."""
    if isinstance(value, Mapping):
        estimate = value.keys() == {"value", "low", "high", "confidence", "n"}
        return {
            str(key): rounded(item) if estimate and key == "n" else _plain(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
