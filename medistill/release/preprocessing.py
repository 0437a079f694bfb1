"""How a picture from a scanner becomes an image like those of a release; without it a model cannot be applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Settings of ingestion that shape pixels.
SETTINGS = ("size", "fit", "intensity", "colour", "volumes", "burned_in")
_RESIZING = "triangle filter along every axis, widened where the axis shrinks; then clamped to 0 and 1"
_FITS = {
    "pad": "its shape kept, with black borders",
    "crop": "its centre cut out",
    "stretch": "stretched to equal sides",
}
_INTENSITIES = {
    "voi": "scaled by the window its header states",
    "percentile": "scaled between percentiles of its own values",
    "none": "scaled by the full range its header allows",
}


def preprocessing(images: Tensor, profile: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``card.json`` says of it, as plain values.

    Args:
        images: Of the release.
        profile: Of the cohort, or only its settings; ``None`` where the cohort is not at hand.

    Returns:
        ``cohort`` holds the settings of ingestion that shape pixels, under the names they have there (``size`` is
        the side of the images that were distilled, before they were resized to ``shape``); empty where nothing was
        stated, and ``stated`` is false unless all are there.

    Privacy:
        Settings of the processing only; of each patient's image nothing.
    """
    cohort = cohort_settings(profile or {})
    values = {
        "stated": cohort.keys() == set(SETTINGS),
        "cohort": cohort,
        "shape": list(images.shape[1:]),
        "range": [0, 1],
        "polarity": "bright is high, as in MONOCHROME2",
        "resizing": _RESIZING,
    }
    return {**values, "sentence": _sentence(values)}


def cohort_settings(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cohort's profile, or of its settings alone, what :func:`preprocessing` needs."""
    settings = profile.get("config", profile)
    return {name: settings[name] for name in SETTINGS if name in settings}


def _sentence(values: Mapping[str, Any]) -> str:
    cohort, size = values["cohort"], values["shape"][-1]
    if not {"size", "fit", "intensity"} <= cohort.keys():
        return (
            "The release does not state how the patients' images were scaled and fitted before distillation; its "
            f"own are {size} pixels wide. Ask the data owner before you apply a model to other images."
        )
    fit = _FITS.get(cohort["fit"], cohort["fit"])
    scaled = _INTENSITIES.get(cohort["intensity"], cohort["intensity"])
    kind = "volume" if len(values["shape"]) == 4 else "image"
    return (
        f"Each patient's {kind} was {scaled}, brought to {cohort['size']} pixels a side ({fit}), then to {size}."
    )
