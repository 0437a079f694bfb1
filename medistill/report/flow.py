"""Which data went where, what was kept out, and what leaves: with no count of patients that is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medistill.core.distilled import DistilledSet
from medistill.ingest.quarantine import REASON_CODES
from medistill.report import wording
from medistill.report.disclosure import public_cohort

_DISTILLED_FROM = "train"
#: Settings of ingestion in words, and their values where these are words of ours too.
PREPARATION: dict[str, tuple[str, dict[str, str]]] = {
    "size": ("Side length in pixels", {}),
    "volumes": (
        "Volumes",
        {"slices": "every slice is an image of its own", "cubes": "every series is one volume"},
    ),
    "fit": (
        "Images that are not square",
        {"pad": "black borders added", "crop": "cut to the middle", "stretch": "stretched"},
    ),
    "intensity": (
        "Grey values",
        {"voi": "by the window in the file", "percentile": "by percentiles of each image", "none": "full range"},
    ),
    "colour": ("Colour", {"grey": "turned to grey", "rgb": "kept", "auto": "kept where the source has colours"}),
    "burned_in": (
        "Text in the pixels",
        {"reject": "image kept out", "mask": "text masked", "allow": "allowed and not looked for"},
    ),
    "ocr": (
        "Reading of suspected text",
        {"auto": "where a reader is installed", "require": "always", "never": "no: judged by shape alone"},
    ),
    "heads": (
        "CT and MR images of heads (faces)",
        {"reject": "kept out", "defaced": "taken: the source is defaced"},
    ),
    "missing_patient": (
        "Images without a patient",
        {"reject": "kept out", "own": "each study counts as a patient of its own"},
    ),
    "labels": ("Labels", {"single": "one class for each image", "multilabel": "any of the classes"}),
}


def data_flow(cohort: Mapping[str, Any] | None, distilled: DistilledSet) -> dict[str, Any]:
    """The way of the data in steps, and the tables behind them.

    Args:
        cohort: As :func:`medistill.report.disclosure.public_cohort` reads it; ``None`` where it is not known.
        distilled: What leaves.

    Privacy:
        Reads counts of real patients; every one is rounded down to tens.
    """
    leaves = (
        f"{len(distilled)} distilled images with soft labels, how they were made, and the figures on this page"
    )
    if cohort is None:
        return {"known": False, "steps": [("Leaves", f"{leaves}.", True)]}
    public = public_cohort(cohort)
    return {
        "known": True,
        "steps": [*((title, text, False) for title, text in _steps(cohort)), ("Leaves", f"{leaves}.", True)],
        "parts": _parts(cohort, public["splits"]),
        "quarantine": [
            {"code": code, "sentence": REASON_CODES.get(code, ""), "files": wording.at_least(files)}
            for code, files in public["quarantine"].items()
            if cohort["quarantine"][code]
        ],
        "modality": [
            {"name": name or "not given", "images": wording.at_least(images)}
            for name, images in public["modality"].items()
        ],
        "profile": dict(_prepared(key, value) for key, value in public["profile"].items()),
    }


def _steps(cohort: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    splits: Mapping[str, Mapping[str, int]] = cohort.get("splits") or {}
    if "quarantine" in cohort:
        kept_out = sum((cohort["quarantine"] or {}).values())
        yield "Kept out", f"{wording.at_least(kept_out)} files, by reason below." if kept_out else "No file."
    if splits:
        yield "Taken in", f"{_total(splits, 'images')} images of {_total(splits, 'patients')} patients."
        yield "Divided", "By patient: each is in exactly one part, with all images."
    if _DISTILLED_FROM in splits:
        part = {_DISTILLED_FROM: splits[_DISTILLED_FROM]}
        yield (
            "Distilled",
            f"From the part “{_DISTILLED_FROM}” alone: {_total(part, 'images')} images of "
            f"{_total(part, 'patients')} patients.",
        )


def _prepared(setting: str, value: object) -> tuple[str, str]:
    name, meanings = PREPARATION.get(setting, (wording.words(setting), {}))
    return name, meanings.get(str(value), str(value))


def _total(splits: Mapping[str, Mapping[str, int]], count: str) -> str:
    return wording.at_least(sum(row.get(count, 0) for row in splits.values()))


def _parts(cohort: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Parts of the cohort as columns, for a page is wide enough for them however many classes there are."""
    splits = [split for split in counts if any(cohort["splits"][split].values())]
    rows = dict.fromkeys(name for split in splits for name in counts[split])
    return {
        "heads": [(split, wording.SPLITS.get(split, "")) for split in splits],
        "rows": [
            {
                "name": name if name in ("images", "patients") else f"images: {name}",
                "cells": [
                    wording.at_least(counts[split][name]) if name in counts[split] else "–" for split in splits
                ],
            }
            for name in rows
        ],
    }
