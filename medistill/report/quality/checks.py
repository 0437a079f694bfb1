"""What may need a decision before distilling, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from medistill.core.cohort import Split
from medistill.report.quality.records import NOT_GIVEN, Attribute, Quality
from medistill.report.wording import Warned, one_line

_FEW_IN_SPLIT = 60
_AUDITED = 200  # patients attacked in all, below which the audit cannot pass by its default policy
SHORTCUT = 0.70
GOES_WITH = 0.3
_ASSUMED_PATIENT = ("patient_is_study", "patient_is_folder", "patient_is_image")


def judged(quality: Quality) -> Quality:
    """Add warnings; every check is named, so that silence means something."""
    warnings = [warned for check in _CHECKS.values() for warned in check(quality)]
    return replace(quality, warnings=tuple(warnings), checks=tuple(_CHECKS))


def _check_brightness(quality: Quality) -> Iterator[Warned]:
    for shortcut in quality.intensity.shortcuts:
        if shortcut.auroc >= max(SHORTCUT, shortcut.chance):
            yield Warned(
                title=f"{shortcut.measure.capitalize()} alone gives the class away",
                text=f"The {shortcut.measure} of an image tells {_quoted(shortcut.name)} from the rest with AUROC "
                f"{shortcut.auroc:.2f}. A model could learn that instead of the disease: compare devices, windows "
                "and borders of the classes.",
            )


def _check_attributes(quality: Quality) -> Iterator[Warned]:
    for attribute in quality.attributes:
        name = attribute.name.replace("_", " ")
        alone = [label for label in quality.classes if _only_value(attribute, label)]
        if alone:
            yield Warned(
                title=f"A class with one {name} only",
                text=f"All patients of {_listed(alone)} share one {name}, most of the others do not. A model "
                f"could learn the {name} instead of the disease, and so could the distilled images.",
            )
        elif attribute.association >= GOES_WITH:
            yield Warned(
                title=f"The class goes with the {name}",
                text=f"Class and {name} are associated (Cramér's V {attribute.association:.2f}). That can be "
                "medicine, or how the patients were collected; the second is a shortcut.",
            )


def _only_value(attribute: Attribute, label: str) -> bool:
    """Whether at least five patients of a class share one value that fewer than half of the others have."""
    mine = [value.classes[label] for value in attribute.values]
    others = [value.total.patients - own for value, own in zip(attribute.values, mine, strict=True)]
    only = [i for i, own in enumerate(mine) if own]
    return len(only) == 1 and mine[only[0]] >= 5 and 0 < 2 * sum(others) > 4 * others[only[0]]


def _check_duplicates(quality: Quality) -> Iterator[Warned]:
    found = quality.duplicates
    if found.across_classes:
        yield Warned(
            title="The same picture under two classes",
            text=f"{number(found.across_classes, 'picture')} with different labels: at least one label is wrong.",
        )
    if found.across_patients:
        yield Warned(
            title="The same picture under two patients",
            text=f"{number(found.across_patients, 'picture')} under more than one patient. They were kept in one "
            "split, but patients are the unit of privacy: find out whether they are one person.",
        )


def _check_lookalikes(quality: Quality) -> Iterator[Warned]:
    found = quality.intensity.lookalikes
    if found.across_patients:
        split = f"; {found.across_splits} of them in two splits, where one gives the other away"
        yield Warned(
            title="Pictures of two patients that look the same",
            text=f"{number(found.across_patients, 'pair')} among the images looked at"
            f"{split if found.across_splits else ''}. The page shows the closest: the same film stored twice "
            "under two names leaks from split to split, and its person counts as two.",
        )


def _check_faults(quality: Quality) -> Iterator[Warned]:
    intensity = quality.intensity
    bad = intensity.constant + intensity.empty + intensity.overexposed
    if bad:
        yield Warned(
            title="Images without a picture",
            text=f"{number(bad, 'image')} of the {intensity.sampled} looked at: {intensity.constant} of one grey "
            f"level, {intensity.empty} almost empty, {intensity.overexposed} over-exposed.",
        )


def _check_audit(quality: Quality) -> Iterator[Warned]:
    patients = {part.name: part.total.patients for part in quality.splits}
    holdout = patients[Split.HOLDOUT]
    attacked = holdout + min(holdout, patients[Split.TRAIN] // 2)
    if attacked < _AUDITED:
        yield Warned(
            title="Too few patients for an audit that concludes",
            text=f"The audit can attack {attacked} patients ({holdout} in holdout and as many from train, at most "
            f"half of it); below {_AUDITED} it ends NOT_ESTIMABLE unless the policy says otherwise.",
        )
    small = [f"{name} ({count})" for name, count in patients.items() if count < _FEW_IN_SPLIT]
    if small:
        yield Warned(
            title="Small splits",
            text=f"Fewer than {_FEW_IN_SPLIT} patients: {', '.join(small)}. Figures measured there will have wide "
            "intervals.",
        )


def _check_classes(quality: Quality) -> Iterator[Warned]:
    missing = [
        f"{_quoted(label)} in {part.name}"
        for part in quality.splits
        for label in quality.classes
        if part.total.images and not part.classes[label].images
    ]
    if missing:
        yield Warned(title="A class is missing from a split", text=f"No image of {', '.join(missing)}.")


def _check_quarantine(quality: Quality) -> Iterator[Warned]:
    if quality.rejected > 0.1 * quality.files:
        first = quality.quarantine[0]
        yield Warned(
            title="Many files were kept out",
            text=f"{share(quality.rejected, quality.files)} of {quality.files} files are in quarantine, most "
            f"often {first.code} ({first.files}). What is kept out is rarely random: check that no class, device "
            "or site went with them.",
        )
    if quality.accepted + quality.rejected != quality.files:
        yield Warned(
            title="Files unaccounted for",
            text=f"{quality.files} files were scanned, but the manifest accounts for "
            f"{quality.accepted + quality.rejected}. Ingest the source again.",
        )


def _check_mixture(quality: Quality) -> Iterator[Warned]:
    values = {a.name: [v.name for v in a.values if v.name != NOT_GIVEN] for a in quality.attributes}
    if len(values["modality"]) > 1:
        yield Warned(
            title="Several modalities",
            text=f"The cohort mixes {_listed(values['modality'])}. Mix them on purpose only: grey levels mean "
            "different things, and a class that is commoner in one of them can be recognised by it.",
        )
    if len(values["sex"]) == 1:
        yield Warned(
            title="Patients of one sex only",
            text=f"Where a sex is given, it is {values['sex'][0]}. A model may fail on everybody else.",
        )


def _check_flags(quality: Quality) -> Iterator[Warned]:
    assumed = sum(quality.flags.get(flag, 0) for flag in _ASSUMED_PATIENT)
    if assumed:
        yield Warned(
            title="Patients that were assumed",
            text=f"For {number(assumed, 'image')} no patient was named. One person may "
            "count as several, and the privacy unit is only as good as that assumption.",
        )


_CHECKS: dict[str, Callable[[Quality], Iterator[Warned]]] = {
    "brightness or contrast that gives the class away": _check_brightness,
    "a class tied to one modality, view, sex, age band or site": _check_attributes,
    "the same picture under two classes or two patients": _check_duplicates,
    "pictures of two patients that look the same": _check_lookalikes,
    "constant, empty or over-exposed images": _check_faults,
    "patients whose identity was assumed": _check_flags,
    "enough patients for the audit and in each split": _check_audit,
    "classes missing from a split": _check_classes,
    "share of files in quarantine, and files unaccounted for": _check_quarantine,
    "mixed modalities and one-sided sex": _check_mixture,
}


def _quoted(name: str) -> str:
    return f"“{one_line(name)}”"


def _listed(names: Sequence[str]) -> str:
    shown = [one_line(name) for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def number(count: int, noun: str) -> str:
    """A count with its noun, in the plural where it is due."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def share(part: float, whole: float) -> str:
    """A share in percent; never 0 % or 100 % for some but not all."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 1 or 99 < percent < 100:
        return "< 1 %" if percent < 1 else "> 99 %"
    return f"{percent:.0f} %"
