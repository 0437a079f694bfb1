"""Radiographs cut into overlapping patches, labelled by the region they lie in.

The protocol of the gastric X-ray studies (Kanai et al. 2020; Li et al. 2020): a patch inside the organ carries the
diagnosis of its radiograph, a patch outside a class of its own, and a patch on the border is left out of training.

Example:
    >>> PatchGrid(patch=32, stride=24).starts(100)
    (0, 24, 48, 68)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medistill.core.cohort import Cohort
from medistill.core.task import Task
from medistill.errors import ConfigError, DataError, SourceError
from medistill.ingest.geometry import WHITE, Fit, fit_square
from medistill.ingest.identity import Pseudonymiser

if TYPE_CHECKING:
    from medistill.core.images import ImageSet

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Where patches are cut; the last of a row and of a column end at the border, so that every pixel is in one.

    Args:
        patch: Side length of a patch. Published: 299 of about 2,000 px.
        stride: Distance of neighbouring patches.

    Raises:
        ConfigError: If the stride leaves gaps or a number is below 1.
    """

    patch: int = 32
    stride: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.patch:
            raise ConfigError(f"Expected 1 <= stride <= patch, got stride {self.stride} and patch {self.patch}.")

    def starts(self, side: int) -> tuple[int, ...]:
        """First pixels of the patches along one side.

        Raises:
            ConfigError: If the patch is larger than the image.
        """
        last = side - self.patch
        if last < 0:
            raise ConfigError(
                f"Expected patches of at most {side} px, the side of a radiograph, got {self.patch}."
            )
        return (*range(0, last, self.stride), last)

    def cut(self, images: NDArray[np.floating]) -> Floats:
        """Patches of images, row by row of the grid.

        Args:
            images: Shape ``(n, c, h, w)``.

        Returns:
            Shape ``(n, g, c, patch, patch)``.
        """
        places = [(top, left) for top in self.starts(images.shape[2]) for left in self.starts(images.shape[3])]
        side = self.patch
        patches = np.empty((len(images), len(places), images.shape[1], side, side), dtype=np.float32)
        for number, (top, left) in enumerate(places):
            patches[:, number] = images[:, :, top : top + side, left : left + side]
        return patches


def central_regions(count: int, size: int) -> Floats:
    """One fixed ellipse in the middle of every radiograph, for cohorts whose organ nobody has outlined.

    A rule of the position alone: it reads neither a label nor a pixel.

    Args:
        count: Number of radiographs.
        size: Side length.

    Returns:
        Shape ``(count, size, size)``; 1 within 0.84 of the half-width and 0.76 of the half-height.
    """
    across = (np.arange(size) + 0.5) / size * 2 - 1
    inside = (across[None, :] / 0.84) ** 2 + (across[:, None] / 0.76) ** 2 <= 1
    return np.broadcast_to(inside.astype(np.float32), (count, size, size))


def load_regions(folder: Path, cohort: Cohort, *, key: bytes, size: int) -> Floats:
    """Regions of a cohort's images, from one mask per DICOM file.

    Args:
        folder: Holds ``<SOPInstanceUID>.png`` for every image, white inside the organ, of the film's shape.
        cohort: Images in the order wanted.
        key: Key under which the cohort was ingested; finds the mask of a pseudonymised image.
        size: Side length of the result.

    Returns:
        Shape ``(n, size, size)`` in ``[0, 1]``, made square as the cohort's images were.

    Raises:
        SourceError: If a mask is missing or cannot be read.
    """
    pseudonymiser, fit = Pseudonymiser(key), Fit(cohort.profile["config"]["fit"])
    paths = {pseudonymiser.uid(path.stem): path for path in Path(folder).glob("*.png")}
    missing = sum(instance.uid not in paths for instance in cohort.instances)
    if missing:
        raise SourceError(
            f"{missing} of {len(cohort)} images have no region. Expected one <SOPInstanceUID>.png for each image, "
            "and the key with which the cohort was ingested."
        )
    regions = np.empty((len(cohort), size, size), dtype=np.float32)
    for number, instance in enumerate(cohort.instances):
        try:
            with Image.open(paths[instance.uid], formats=("PNG",)) as picture:
                mask = np.asarray(picture.convert("L")).astype(np.float32) / np.float32(255)
        except OSError:
            raise SourceError(f"The region of image {number} cannot be read; expected a PNG file.") from None
        regions[number] = fit_square(mask, size, fit) / np.float32(WHITE)
    return regions


def cut_patches(
    films: ImageSet,
    regions: Floats | None = None,
    *,
    grid: PatchGrid,
    classes: tuple[str, str, str],
    covered: tuple[float, float] = (0.2, 0.8),
) -> ImageSet:
    """Patches of radiographs as images of their own, patient by patient.

    Args:
        films: Radiographs; their classes are among ``classes``, the last of which may be missing.
        regions: Where the organ is, shape ``(n, h, w)``. A patch of which at least the second share of ``covered``
            lies inside has the class of its radiograph, of which at most the first is outside, and others are
            left out. Without regions every patch is kept under the class of its radiograph: for a diagnosis,
            which does not know where the organ is.
        grid: Where to cut.
        classes: Negative, positive and outside the organ.
        covered: The two shares.

    Raises:
        DataError: If regions and radiographs differ in shape or a class is unknown.
    """
    import torch  # noqa: PLC0415 - ingestion works without loading torch

    from medistill.core.images import ImageSet  # noqa: PLC0415

    unknown = set(films.task.class_names) - set(classes)
    if unknown:
        raise DataError(
            f"Expected the classes {', '.join(classes)}; the radiographs have {len(unknown)} other ones."
        )
    task = Task.single_label(classes)
    of_film = np.array([classes.index(name) for name in films.task.class_names])[films.classes.numpy()]
    pixels = films.images.numpy()
    patches = grid.cut(pixels)
    labels = np.repeat(of_film[:, None], patches.shape[1], axis=1)
    if regions is not None:
        if regions.shape != (len(pixels), *pixels.shape[2:]):
            raise DataError(f"Expected regions of shape {(len(pixels), *pixels.shape[2:])}, got {regions.shape}.")
        shares = grid.cut(regions[:, None]).mean(axis=(2, 3, 4))
        labels = np.where(shares >= covered[1], labels, np.where(shares <= covered[0], 2, -1))
    film, place = np.nonzero(labels >= 0)
    return ImageSet(
        images=torch.from_numpy(patches[film, place]),
        targets=torch.nn.functional.one_hot(torch.from_numpy(labels[film, place]), len(classes)).float(),
        patients=tuple(films.patients[i] for i in film),
        task=task,
    )


def patients_positive(films: ImageSet, *, negative: str, positive: str) -> Mapping[str, bool]:
    """Whether each patient has the finding: one positive radiograph suffices.

    Args:
        films: Radiographs.
        negative: Class of radiographs without the finding.
        positive: Class of radiographs with it.

    Returns:
        Patients with at least one radiograph of either class; others cannot be judged.
    """
    found: dict[str, bool] = {}
    for patient, label in zip(films.patients, films.classes.tolist(), strict=True):
        name = films.task.class_names[label]
        if name in (negative, positive):
            found[patient] = found.get(patient, False) or name == positive
    return found
