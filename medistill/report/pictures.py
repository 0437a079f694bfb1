"""The distilled images with their soft labels, and how they formed, as a page shows them.

A page is to stay small: where pictures would be large together as PNG, it shows them as JPEG and says so; the
exact ones lie beside it in a release.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medistill.core.distilled import DistilledSet, Recipe
from medistill.distill.watch import Look, shown_images
from medistill.errors import DataError
from medistill.report.png import data_uri, encode, picture
from medistill.report.wording import number, words

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_PICTURES = 120
_MOST_BARS = 5
#: Bytes of all pictures together as PNG up to which a page shows them so.
_MOST_EXACT = 120_000
_QUALITY, _STRIP_QUALITY = 80, 55
_MOMENTS = 6
_VOLUME_AXES = 5
_LEVELS = 255
_NOISE = "start"  #: the stage before the first step; recorded only where it is noise
_BEFORE = "before the first step"


def pictures_by_class(distilled: DistilledSet) -> list[dict[str, Any]]:
    """Per class its pictures with soft labels; of large sets the first ones of each class."""
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    limit = max(1, _MOST_PICTURES // len(names))
    shown = [_of_class(labels, c)[:limit] for c in range(len(names))]
    order = [i for own in shown for i in own]
    drawn = _sources([picture(distilled.images[i]) for i in order], quality=_QUALITY)
    sources = dict(zip(order, drawn, strict=True))
    return [
        {
            "name": name,
            "count": labels.count(c),
            "five": labels.count(c) in (5, 10, 15, 20) and distilled.images.ndim < _VOLUME_AXES,
            "pictures": [_picture(distilled, i, sources[i]) for i in shown[c]],
        }
        for c, name in enumerate(names)
    ]


def _sources(drawn: Sequence[Image], *, quality: int) -> list[str]:
    """Exact pictures while they are small together, else all in JPEG."""
    exact = [encode(one) for one in drawn]
    if sum(map(len, exact)) <= _MOST_EXACT:
        return [data_uri(png) for png in exact]
    return [_jpeg(one, quality=quality) for one in drawn]


def _jpeg(drawn: Image, *, quality: int) -> str:
    content = BytesIO()
    drawn.save(content, "JPEG", optimize=True, quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def compressed(sources: Iterable[str]) -> bool:
    """Whether pictures of a page are not exact."""
    return any(source.startswith("data:image/jpeg") for source in sources)


def _of_class(labels: list[int], wanted: int) -> list[int]:
    return [i for i, label in enumerate(labels) if label == wanted]


def _picture(distilled: DistilledSet, index: int, source: str) -> dict[str, Any]:
    names, own = distilled.task.class_names, int(distilled.hard_labels[index])
    shares: list[float] = distilled.soft_labels[index].tolist()
    order = list(range(len(names)))
    if len(names) > _MOST_BARS:
        order = sorted(order, key=lambda c: (-shares[c], c))[:_MOST_BARS]
    spoken = ", ".join(f"{names[c]} {shares[c]:.2f}" for c in order)
    what = "volume" if distilled.images.ndim == _VOLUME_AXES else "image"
    return {
        "number": index + 1,
        "source": source,
        "alt": f"Distilled {what} {index + 1} of {len(distilled)}, made for {names[own]}; soft label {spoken}",
        "bars": [
            {"name": names[c], "share": f"{shares[c]:.2f}", "width": f"{100 * shares[c]:.1f}", "own": c == own}
            for c in order
        ],
        "others": len(names) - len(order),
    }


@dataclass(frozen=True, kw_only=True)
class _Stage:
    name: str
    pictures: Tensor
    figure: str = ""


def formation(
    distilled: DistilledSet, snapshots: Mapping[str, Tensor] | None, moments: Sequence[Look] = ()
) -> dict[str, Any] | None:
    """A few images at some moments, the same ones throughout; nothing where they began as a patient's.

    Args:
        distilled: What the images became.
        snapshots: Named stages, each like ``distilled.images``.
        moments: Looks at the images as they formed, in order; shown instead of all stages but the noise before the
            first step, a few of them at equal distances.

    Returns:
        ``None`` without stages and moments. CPU seconds of the moments are left out: they differ from run to run,
        and the same run gives the same bytes.

    Raises:
        DataError: If a stage or moment has another number of images than the set.
    """
    if not snapshots and not moments:
        return None
    if distilled.recipe.starts_from_real:
        return {"withheld": True}
    shown = shown_images(distilled.hard_labels)
    stages = _stages(distilled, snapshots or {}, shown)
    looks = [_moment(look, len(shown)) for look in moments]
    if looks:
        stages = _few([*(stage for stage in stages if stage.name == _BEFORE), *looks])
    who, sources = (
        _who(distilled, shown),
        _sources([_strip(stage.pictures) for stage in stages], quality=_STRIP_QUALITY),
    )
    return {
        "withheld": False,
        "who": who,
        "count": len(shown),
        "rows": [
            {
                "name": stage.name,
                "figure": stage.figure,
                "source": source,
                "alt": f"{who}: {stage.name}",
            }
            for stage, source in zip(stages, sources, strict=True)
        ],
        "exact": not compressed(sources),
        "noise": stages[0].name == _BEFORE,
        "judged": any(look.validation_auroc is not None for look in moments),
    }


def _stages(distilled: DistilledSet, snapshots: Mapping[str, Tensor], shown: list[int]) -> list[_Stage]:
    for stage in snapshots.values():
        if len(stage) != len(distilled):
            raise DataError(f"Expected snapshots of {len(distilled)} images, got {len(stage)}.")
    ordered = _in_order(snapshots, distilled.recipe)
    return [
        _Stage(name=_BEFORE if name == _NOISE else words(name), pictures=images[shown]) for name, images in ordered
    ]


def _moment(look: Look, shown: int) -> _Stage:
    if len(look.pictures) != shown:
        raise DataError(f"Expected moments of {shown} images, got {len(look.pictures)}.")
    auroc = look.validation_auroc
    return _Stage(
        name=f"{words(look.distiller)}, step {look.step} of {look.steps}",
        pictures=look.pictures.float() / _LEVELS,
        figure="" if auroc is None else f"validation AUROC {number(auroc)}",
    )


def _few(stages: list[_Stage]) -> list[_Stage]:
    """At equal distances, with the first and the last."""
    count = min(_MOMENTS, len(stages))
    return [stages[i] for i in torch.linspace(0, len(stages) - 1, count).round().long().tolist()]


def _who(distilled: DistilledSet, shown: list[int]) -> str:
    """Numbers and classes from left to right."""
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    groups: dict[int, list[str]] = {}
    for i in shown:
        groups.setdefault(labels[i], []).append(str(i + 1))
    said = [f"{', '.join(numbers)} (made for {names[label]})" for label, numbers in groups.items()]
    return f"Image{'s' if len(shown) > 1 else ''} {', '.join(said)}"


def _strip(images: Tensor) -> Image:
    """Pictures side by side with a white line between them."""
    from PIL import Image as pillow  # noqa: PLC0415, N813

    drawn = [picture(image) for image in images]
    width, height = drawn[0].size
    pitch = width + max(2, width // 8)
    strip = pillow.new(drawn[0].mode, (pitch * len(drawn) - (pitch - width), height), "white")
    for place, one in enumerate(drawn):
        strip.paste(one, (place * pitch, 0))
    return strip


def _in_order(snapshots: Mapping[str, Tensor], recipe: Recipe) -> list[tuple[str, Tensor]]:
    """Stages as they followed each other: the start, what belongs to each step of the recipe, then the rest.

    Within a step the given order is kept; a file that sorted the names does not change the story.
    """
    steps = [step.distiller for step in recipe.steps]

    def place(stage: str) -> int:
        if stage == _NOISE:
            return -1
        return next((i for i, name in enumerate(steps) if stage.startswith(name)), len(steps))

    return sorted(snapshots.items(), key=lambda item: place(item[0]))
