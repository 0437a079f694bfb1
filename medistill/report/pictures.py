"""The distilled images with their soft labels, and how they formed, as a page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medistill.core.distilled import DistilledSet, Recipe
from medistill.errors import DataError
from medistill.report.png import picture_source
from medistill.report.wording import words

_MOST_PICTURES = 120
_MOST_BARS = 5
_STAGE_PICTURES = 6
_VOLUME_AXES = 5
_NOISE = "start"  #: the stage before the first step; recorded only where it is noise


def pictures_by_class(distilled: DistilledSet) -> list[dict[str, Any]]:
    """Per class its pictures with soft labels; of large sets the first ones of each class."""
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    limit = max(1, _MOST_PICTURES // len(names))
    return [
        {
            "name": name,
            "count": labels.count(c),
            "five": labels.count(c) in (5, 10, 15, 20) and distilled.images.ndim < _VOLUME_AXES,
            "pictures": [_picture(distilled, i) for i in _of_class(labels, c)[:limit]],
        }
        for c, name in enumerate(names)
    ]


def _of_class(labels: list[int], wanted: int) -> list[int]:
    return [i for i, label in enumerate(labels) if label == wanted]


def _picture(distilled: DistilledSet, index: int) -> dict[str, Any]:
    names, own = distilled.task.class_names, int(distilled.hard_labels[index])
    shares: list[float] = distilled.soft_labels[index].tolist()
    order = list(range(len(names)))
    if len(names) > _MOST_BARS:
        order = sorted(order, key=lambda c: (-shares[c], c))[:_MOST_BARS]
    spoken = ", ".join(f"{names[c]} {shares[c]:.2f}" for c in order)
    what = "volume" if distilled.images.ndim == _VOLUME_AXES else "image"
    return {
        "number": index + 1,
        "source": picture_source(distilled.images[index]),
        "alt": f"Distilled {what} {index + 1} of {len(distilled)}, made for {names[own]}; soft label {spoken}",
        "bars": [
            {"name": names[c], "share": f"{shares[c]:.2f}", "width": f"{100 * shares[c]:.1f}", "own": c == own}
            for c in order
        ],
        "others": len(names) - len(order),
    }


def formation(distilled: DistilledSet, snapshots: Mapping[str, Tensor] | None) -> dict[str, Any] | None:
    """A few images at each stage, the same ones throughout; nothing where the first stage would be a patient.

    Args:
        distilled: What the images became.
        snapshots: Named stages, each like ``distilled.images``.

    Returns:
        ``None`` without stages.

    Raises:
        DataError: If a stage has another number of images than the set.
    """
    if not snapshots:
        return None
    if distilled.recipe.starts_from_real:
        return {"withheld": True, "rows": []}
    for stage in snapshots.values():
        if len(stage) != len(distilled):
            raise DataError(f"Expected snapshots of {len(distilled)} images, got {len(stage)}.")
    shown = _one_of_each(distilled)
    names, labels = distilled.task.class_names, distilled.hard_labels.tolist()
    rows = [
        {
            "name": words(stage),
            "pictures": [
                {
                    "source": picture_source(images[i]),
                    "alt": f"Image {i + 1}, made for {names[labels[i]]}, at stage {words(stage)}",
                }
                for i in shown
            ],
        }
        for stage, images in _in_order(snapshots, distilled.recipe)
    ]
    heads = [(i + 1, names[labels[i]]) for i in shown]
    return {"withheld": False, "rows": rows, "heads": heads, "noise": _NOISE in snapshots}


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


def _one_of_each(distilled: DistilledSet) -> list[int]:
    """The first image of every class, then the second of every class, as long as there is room."""
    labels = distilled.hard_labels.tolist()
    by_class = [_of_class(labels, c) for c in range(distilled.task.n_classes)]
    order = [own[turn] for turn in range(distilled.ipc) for own in by_class if turn < len(own)]
    return sorted(order[:_STAGE_PICTURES], key=lambda i: (labels[i], i))
