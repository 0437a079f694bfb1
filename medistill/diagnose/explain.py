"""Where in an image a model looks: occlusion.

A grey patch is slid over the image; where covering it lowers the probability of the class that was decided for,
the class was seen there. It shows what this model uses, which need not be what a physician would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.diagnose.model import DiagnosticModel, require_new, write_folder
from medistill.diagnose.predict import Predictions
from medistill.progress import Progress
from medistill.report.png import encode, picture

_PLANE_AXES = 2
#: A patch is a quarter of the side, moved by half of itself.
PATCH, STRIDE = 4, 8
_SHOWN = 256
_STRONGEST = 0.7


@torch.no_grad()
def occlusion(model: DiagnosticModel, image: Tensor, label: int, *, compute: Compute | None = None) -> Tensor:
    r"""Mean loss of probability over all patches that cover a pixel.

    .. math:: h(x) = \frac{1}{|\{P \ni x\}|} \sum_{P \ni x} \big( p_c(I) - p_c(I_P) \big)

    :math:`I_P` is the image with patch :math:`P` grey: the mean of the image, channel by channel.

    Args:
        model: From :func:`medistill.diagnose.load_model`.
        image: Shape ``(c, h, w)`` or ``(c, d, h, w)`` in ``[0, 1]``.
        label: Class whose probability is watched.
        compute: Device; the CPU by default.

    Returns:
        Shape of the image without channels, in ``[-1, 1]``; above 0 where the image speaks for the class.

    References:
        Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    sides = image.shape[1:]
    patch, step = max(1, sides[0] // PATCH), max(1, sides[0] // STRIDE)
    starts = sorted({*range(0, sides[0] - patch + 1, step), sides[0] - patch})
    grey = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
    before = float(model.probabilities(image[None], compute=compute)[0, label])
    total, covered = torch.zeros(sides), torch.zeros(sides)
    for row in itertools.groupby(itertools.product(starts, repeat=len(sides)), key=lambda corner: corner[:-1]):
        places = [tuple(slice(at, at + patch) for at in corner) for corner in row[1]]
        batch = image.repeat(len(places), *(1,) * image.ndim)
        for one, place in zip(batch, places, strict=True):
            one[(slice(None), *place)] = grey
        lost = before - model.probabilities(batch, compute=compute)[:, label]
        for change, place in zip(lost, places, strict=True):
            total[place] += change
            covered[place] += 1
    return total / covered


def explain(
    model: DiagnosticModel,
    found: Predictions,
    pictures: Mapping[int, Tensor],
    out: Path,
    *,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one PNG per image: the image as the model sees it, and beside it with the occlusion map over it.

    Red speaks for the class decided for, blue against it. Files are named by the file's position (and frame),
    never by its name. For a multilabel task the map is that of the most probable class.

    Args:
        model: The model that predicted.
        found: What it predicted.
        pictures: Images by their place among the rows, see :func:`medistill.diagnose.predict_files`.
        out: New or empty folder.
        compute: Device; the CPU by default.
        progress: Shows how far it is.

    Returns:
        The folder.

    Raises:
        OutputError: If it is not empty or cannot be written.
    """
    require_new(out)
    files: dict[str, bytes] = {}
    for place, image in (progress or Progress()).track(sorted(pictures.items()), "explaining"):
        row = found.images[place]
        label = _shown_class(model, row.probabilities, row.decision)
        heat = occlusion(model, image, label, compute=compute)
        frame = f"-{row.frame:04d}" if row.frame else ""
        files[f"{row.file:05d}{frame}.png"] = encode(picture(overlay(image, heat)))
    write_folder(out, files)
    return out


def _shown_class(model: DiagnosticModel, probabilities: tuple[float, ...], decision: str) -> int:
    names = model.task.class_names
    return names.index(decision) if decision in names else max(range(len(names)), key=probabilities.__getitem__)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """The image and, to its right, the image under its map; shape ``(3, h, w)``, or volumes likewise.

    Args:
        image: Shape ``(c, h, w)`` or ``(c, d, h, w)``.
        heat: Shape of the image without channels; its strongest value is given the full colour.
    """
    colour = image.expand(3, *image.shape[1:]) if len(image) == 1 else image
    strength = (heat / heat.abs().max().clamp_min(1e-6)).clamp(-1, 1)
    share = strength.abs() * _STRONGEST
    red, blue = (strength > 0).float(), (strength < 0).float()
    tint = torch.stack([red, torch.zeros_like(red), blue])
    both = torch.cat([colour, colour * (1 - share) + tint * share], dim=-1)
    if heat.ndim > _PLANE_AXES:
        return both
    factor = max(1, math.ceil(_SHOWN / heat.shape[0]))
    return F.interpolate(both[None], scale_factor=factor, mode="nearest")[0]
