"""The page, the contact sheet and the figures: patients' images, readable by their owner only."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medistill.core.cohort import Cohort, Instance, PixelStore
from medistill.errors import OutputError
from medistill.ingest.cache import load_cohort
from medistill.report import wording
from medistill.report.contact_sheet import stacked_sheets
from medistill.report.plots import Axis, Track, outline
from medistill.report.png import picture_source
from medistill.report.quality.checks import GOES_WITH, SHORTCUT, share
from medistill.report.quality.pixels import blocks, sampled_instances, scaled
from medistill.report.quality.records import Attribute, Intensity, PerPatient, Quality
from medistill.report.quality.terminal import between, first_values, is_given
from medistill.report.templates import style, template
from medistill.report.wording import one_line

if TYPE_CHECKING:
    pass

MOST_PICTURES = 72  #: images on the contact sheet
_THUMBNAIL = 160
_FLAGS = {
    "patient_is_study": "No patient was named; the study was taken for a patient.",
    "patient_is_folder": "No patient was named; the folder was taken for a patient.",
    "patient_is_image": "No patient was named; the image was taken for a patient.",
    "invalid_window": "The display window was not usable and was ignored.",
    "colour": "A colour image was turned into grey.",
    "no_meta": "The file had no file meta header.",
    "excess_bytes": "The pixel data was longer than the header says; the rest was ignored.",
    "masked_bits": "Bits outside the stored ones were cleared.",
    "frames_counted": "The number of frames was taken from the pixel data.",
    "last_resort": "Only the decoder of last resort could read the file.",
    "burned_in_allowed": "Text in the pixels was not looked for.",
    "text_masked": "Burned-in text was blacked out.",
    "outside_masked": "What lies outside the image proper was blacked out.",
    "marker": "A side or position marker was found and kept.",
    "line_acquitted": "What looked like a line of text could not be read as text.",
    "ocr_sampled": "The image was drawn to be searched for text.",
    "localiser_left_out": "A localiser in the series was left out of the volume.",
    "imager_spacing": "The spacing is that of the detector, not of the patient.",
    "straightened": "Slices of a tilted gantry were moved into line.",
    "duplicate_slices": "A slice that was there twice counts once.",
    "rescaled_slices": "Slices of one volume had rescale values of their own; all were applied.",
    "one_window": "Slices of one volume had different windows; that of the middle one was used for all.",
    "no_window": "The file has no window; percentiles were used.",
    "not_finite": "Values that are not numbers were taken for background.",
}
_STAYS = (
    "This page shows patients' images and small counts of real patients. It is for those who hold the cohort: "
    "do not send it, publish it or put it into a release."
)


def write_quality(quality: Quality, cohort: Path, out: Path | None = None) -> Path:
    """Write ``inspect.html``, ``contact_sheet.png`` and ``quality.json``, readable by their owner only.

    Files of an earlier inspection are replaced.

    Args:
        quality: What :func:`inspect_cohort` found.
        cohort: Folder of the cohort.
        out: Where to write; the folder of the cohort where not given.

    Returns:
        The page.

    Raises:
        OutputError: If the folder is a release, cannot be written, or the disk is full.

    Privacy:
        Writes images and exact counts of real patients.
    """
    folder = Path(cohort if out is None else out)
    _refuse_release(folder)
    opened = load_cohort(Path(cohort))
    pictures = _pictures(quality, opened)
    content = {
        "contact_sheet.png": _sheet(pictures),
        "quality.json": (json.dumps(quality.to_json(), indent=2) + "\n").encode(),
        "inspect.html": _page(quality, opened, pictures).encode(),
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in content.items():
            _write_privately(folder / name, data)
    except OSError:
        raise OutputError("The quality page cannot be written. Name a folder on a writable disk.") from None
    return folder / "inspect.html"


def _refuse_release(folder: Path) -> None:
    for place in (folder.absolute(), *folder.absolute().parents):
        if (place / "card.json").exists() and (place / "SHA256SUMS").exists():
            raise OutputError("The output folder is a release. Patients' images must not lie there; name another.")


def _write_privately(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Pictures under one title."""

    title: str
    images: Tensor
    captions: tuple[str, ...]


def _pictures(quality: Quality, cohort: Cohort) -> tuple[_Group, ...]:
    """Some images of each class, each of another patient as long as there are enough."""
    each = max(2, min(12, MOST_PICTURES // len(quality.classes)))
    generator = np.random.default_rng((quality.seed, 1))
    groups = []
    for label in quality.classes:
        own = [i for i in cohort.instances if label in cohort.task.names_in(i.label)]
        first_of: dict[str, Instance] = {}
        shuffled = [own[i] for i in generator.permutation(len(own))]
        for instance in shuffled:
            first_of.setdefault(instance.patient, instance)
        others = [instance for instance in shuffled if first_of[instance.patient] is not instance]
        chosen = [*first_of.values(), *others][:each]
        if chosen:
            groups.append(
                _Group(
                    title=one_line(label),
                    images=_thumbnails(cohort.store, [instance.row for instance in chosen]),
                    captions=tuple(f"{instance.row} · {instance.split.value}" for instance in chosen),
                )
            )
    return tuple(groups)


def _thumbnails(store: PixelStore, rows: Sequence[int]) -> Tensor:
    """Images of at most :data:`_THUMBNAIL` pixels a side, ``(n, c, h, w)`` in ``[0, 1]``; a volume's middle."""
    made = []
    for _, block in blocks(store, rows):
        images = scaled(block)
        factor = _THUMBNAIL / max(images.shape[-2:])
        if factor < 1:
            size = [max(1, round(side * factor)) for side in images.shape[-2:]]
            images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
        made.append(images.clamp_(0, 1))
    return torch.cat(made)


def _sheet(pictures: Sequence[_Group]) -> bytes:
    columns = max(1, min(6, max(len(group.captions) for group in pictures)))
    return stacked_sheets(
        {f"{group.title} ({len(group.captions)} images)": (group.images, group.captions) for group in pictures},
        columns=columns,
        heading="Patients' images: stays in the hospital",
    )


def _average(cohort: Cohort, label: str, seed: int) -> Tensor | None:
    """The mean of the sampled images of a class, of a volume its middle slice; nothing for a class without any."""
    sampled = sampled_instances(cohort, seed=seed)
    rows = [instance.row for instance in sampled if label in cohort.task.names_in(instance.label)]
    sums = [scaled(block).double().sum(0) for _, block in blocks(cohort.store, rows)]
    return (torch.stack(sums).sum(0) / len(rows)).float() if rows else None


def _page(quality: Quality, cohort: Cohort, pictures: Sequence[_Group]) -> str:
    averages = {label: _average(cohort, label, quality.seed) for label in quality.classes}
    return template("quality.html.j2").render(
        quality=quality,
        style=style("page.css"),
        stays=_STAYS,
        share=share,
        purpose=wording.SPLITS,
        flags=[
            {"name": flag.replace("_", " "), "text": _FLAGS.get(flag, ""), "images": count}
            for flag, count in quality.flags.items()
        ],
        groups=[
            {"title": g.title, "pictures": list(zip(map(picture_source, g.images), g.captions, strict=True))}
            for g in pictures
        ],
        averages=[(one_line(name), picture_source(mean)) for name, mean in averages.items() if mean is not None],
        unusual=_unusual_pictures(quality, cohort),
        pairs=_pair_pictures(quality, cohort),
        attributes=[_drawn_attribute(attribute) for attribute in quality.attributes],
        histograms=_drawn_histograms(quality.intensity),
        spreads=_drawn_spreads(quality.intensity),
        shortcuts=_drawn_shortcuts(quality.intensity),
        shortcut_limit=SHORTCUT,
        per_patient=_drawn_counts(quality.per_patient),
    )


def _unusual_pictures(quality: Quality, cohort: Cohort) -> list[dict[str, Any]]:
    unusual = quality.intensity.unusual
    if not unusual:
        return []
    images = _thumbnails(cohort.store, [item.row for item in unusual])
    by_row = {instance.row: instance for instance in cohort.instances}
    return [
        {
            "source": picture_source(image),
            "what": item.what,
            "row": item.row,
            "label": one_line(by_row[item.row].label),
        }
        for item, image in zip(unusual, images, strict=True)
    ]


def _pair_pictures(quality: Quality, cohort: Cohort) -> list[dict[str, Any]]:
    by_row = {instance.row: instance for instance in cohort.instances}
    return [
        {
            "sources": [picture_source(image) for image in _thumbnails(cohort.store, rows)],
            "captions": [f"{row} · {one_line(by_row[row].label)} · {by_row[row].split.value}" for row in rows],
            "alike": f"{alike:.3f}",
        }
        for *rows, alike in quality.intensity.lookalikes.pairs
    ]


def _drawn_attribute(attribute: Attribute) -> dict[str, Any]:
    values = first_values(attribute)
    most = max((sum(value.classes.values()) for value in values), default=1)
    return {
        "name": attribute.name.replace("_", " ").capitalize(),
        "association": f"{attribute.association:.2f}",
        "strong": attribute.association >= GOES_WITH,
        "given": is_given(attribute),
        "values": [
            {
                "name": value.name,
                "total": value.total,
                "spoken": ", ".join(f"{one_line(label)} {count}" for label, count in value.classes.items()),
                "parts": [(c, round(100 * count / most, 2)) for c, count in enumerate(value.classes.values())],
            }
            for value in values
        ],
    }


def _drawn_histograms(intensity: Intensity) -> list[dict[str, Any]]:
    levels = [*intensity.classes, intensity.overall]
    drawn = [between(level) for level in levels]
    top = 1.05 * max((max(heights) for heights in drawn), default=0.0)
    behind = outline(drawn[-1], top=top)
    return [
        {
            "name": one_line(level.name) or "all classes",
            "path": outline(heights, top=top),
            "behind": behind if level.name else "",
            "black": share(level.black, 1),
            "white": share(level.white, 1),
            "images": level.images,
        }
        for level, heights in zip(levels, drawn, strict=True)
        if level.images
    ]


def _drawn_spreads(intensity: Intensity) -> list[dict[str, Any]]:
    """Per measure one axis and per class the middle with the range of nine images in ten."""
    drawn = []
    for measure in ("brightness", "contrast"):
        levels = [level for level in (*intensity.classes, intensity.overall) if level.images]
        axis = Axis(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0))
        if measure == "contrast":
            axis = Axis(low=0.0, high=0.5, ticks=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
        rows = []
        for level in levels:
            low, middle, high = getattr(level, measure)
            left = axis.position(low)
            place = Track(dot=axis.position(middle), left=left, width=round(axis.position(high) - left, 2))
            rows.append(
                {
                    "name": one_line(level.name) or "all classes",
                    "track": place,
                    "text": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                }
            )
        drawn.append({"name": measure, "axis": axis, "rows": rows})
    return drawn


def _drawn_shortcuts(intensity: Intensity) -> dict[str, Any]:
    axis = Axis(low=0.5, high=1.0, ticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    return {
        "axis": axis,
        "rows": [
            {
                "name": one_line(shortcut.name),
                "measure": shortcut.measure,
                "auroc": f"{shortcut.auroc:.2f}",
                "dot": axis.position(shortcut.auroc),
                "chance": axis.position(shortcut.chance),
                "strong": shortcut.auroc >= max(SHORTCUT, shortcut.chance),
            }
            for shortcut in intensity.shortcuts
        ],
    }


def _drawn_counts(each: PerPatient, most: int = 12) -> list[tuple[str, int, float]]:
    """Images per patient as bars: the number, the patients, the width in percent; the tail in one bar."""
    counts = Counter({min(images, most): 0 for images in each.histogram})
    for images, patients in each.histogram.items():
        counts[min(images, most)] += patients
    top = max(counts.values())
    return [
        (f"{images} or more" if images == most else str(images), count, round(100 * count / top, 2))
        for images, count in sorted(counts.items())
    ]
