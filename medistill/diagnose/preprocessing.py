"""How a file becomes an image the model can take: exactly as the cohort's images were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill.core.images import resized
from medistill.errors import ConfigError, DataError
from medistill.ingest import IngestConfig
from medistill.release.preprocessing import SETTINGS

_VOLUME_AXES = 4
_COLOURS = 3
_WHITE = 65535.0
_BUT_SIZE = tuple(name for name in SETTINGS if name != "size")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Settings of ingestion that shape pixels, and the shape that the network takes.

    A cohort stores squares (or cubes) of ``stored`` pixels a side at 16 bits, which are then resized to
    ``image_shape``; both steps are repeated, so that a file gives the same numbers here and there.

    Args:
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)`` of the released images.
        stored: Side length in the cohort.
        volumes: ``slices`` or ``cubes``.
        fit: ``pad``, ``crop`` or ``stretch``.
        intensity: ``voi``, ``percentile`` or ``none``.
        colour: ``grey`` or ``rgb``.
        burned_in: ``mask`` where text was blacked out in the cohort.
        stated: Whether the release says all this; otherwise these are the defaults of ingestion.

    Raises:
        DataError: If a value is none of those that ingestion knows, or contradicts the shape.
    """

    image_shape: tuple[int, ...]
    stored: int
    volumes: str = "slices"
    fit: str = "pad"
    intensity: str = "voi"
    colour: str = "grey"
    burned_in: str = "reject"
    stated: bool = False

    def __post_init__(self) -> None:
        values = (self.volumes, self.fit, self.intensity, self.colour, self.burned_in)
        if type(self.stored) is not int or not all(isinstance(value, str) for value in values):
            raise DataError("Expected the preprocessing as text and a whole number; found another type.")
        try:
            IngestConfig(size=self.stored, **{name: getattr(self, name) for name in _BUT_SIZE})
        except ConfigError as error:
            raise DataError(f"The preprocessing is not one this medistill knows. {error}") from error
        cubes, channels = self.volumes == "cubes", 3 if self.colour == "rgb" else 1
        if cubes != (len(self.image_shape) == _VOLUME_AXES) or self.image_shape[0] != channels:
            raise DataError(
                f"Expected images of {channels} channels and volumes {self.volumes}, got {self.image_shape}."
            )
        if len(set(self.image_shape[1:])) != 1:
            raise DataError(f"Expected images with equal sides, got {self.image_shape}.")

    @classmethod
    def of_release(cls, card: Mapping[str, Any], image_shape: tuple[int, ...]) -> Preprocessing:
        """What a release says about its cohort, or the defaults of ingestion where it says nothing.

        The defaults follow the shape: volumes become cubes, three channels are colour, and the side in the cohort
        is that of ingestion (256), or of the released images where they are larger.

        Args:
            card: What ``card.json`` holds; ``preprocessing.cohort`` is read, or in releases of older versions
                ``cohort.profile``.
            image_shape: Shape of a released image.

        Raises:
            DataError: If the settings cannot be.
        """
        given = _inner(card, "preprocessing", "cohort") or _inner(card, "cohort", "profile")
        cubes, colour = len(image_shape) == _VOLUME_AXES, image_shape[0] == _COLOURS
        values: dict[str, Any] = {
            "volumes": "cubes" if cubes else "slices",
            "colour": "rgb" if colour else "grey",
            "stored": max(IngestConfig().size, image_shape[-1]),
        }
        values |= {name: given[name] for name in _BUT_SIZE if name in given}
        if "size" in given:
            values["stored"] = given["size"]
        stated = set(SETTINGS) <= given.keys()
        return cls(image_shape=tuple(image_shape), stated=stated, **values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Inverse of :meth:`to_json`."""
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise DataError(f"Expected the preprocessing to have exactly {', '.join(sorted(known))}.")
        return cls(**{**values, "image_shape": tuple(int(side) for side in values["image_shape"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "image_shape": list(self.image_shape)}

    def tensor(self, pixels: NDArray[np.uint16]) -> Tensor:
        """What ingestion stored of one image as the network takes it: ``(1, *image_shape)`` in ``[0, 1]``."""
        block = torch.from_numpy(pixels.astype(np.float32))[None] / _WHITE
        if self.colour == "grey":
            block = block[:, None]
        return resized(block, self.image_shape[-1]).clamp_(0.0, 1.0)


def _inner(card: Mapping[str, Any], outer: str, inner: str) -> Mapping[str, Any]:
    part = card.get(outer)
    found = part.get(inner) if isinstance(part, Mapping) else None
    return found if isinstance(found, Mapping) else {}
