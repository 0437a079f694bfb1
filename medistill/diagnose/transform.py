"""What a MONAI bundle of ours names in its configuration: reading a file as released, and a run over a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medistill.diagnose.preprocessing import Preprocessing
from medistill.diagnose.reading import ReadImage, explained, open_files, read_images
from medistill.errors import DataError, SourceError
from medistill.release.durable import output_errors, replace_durably


class LoadAsReleased:
    """Reads one DICOM file (or, for volumes, one folder of a series) exactly as ``medistill predict`` does.

    Args:
        preprocessing: Plain values of :class:`~medistill.diagnose.preprocessing.Preprocessing`.

    Raises:
        DataError: If the values make no sense.
    """

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = Preprocessing.from_json(preprocessing)

    def __call__(self, path: str | Path) -> Tensor:
        """All images of the file, shape ``(n, *image_shape)`` in ``[0, 1]``.

        Raises:
            SourceError: If it cannot be read, with the reason code.
        """
        source = open_files([Path(path)], self.preprocessing)
        images: list[ReadImage] = []
        for found in read_images(source, self.preprocessing):
            for one in found:
                if not isinstance(one, ReadImage):
                    raise SourceError(f"{one.code}: {explained(one)}")
                images.append(one)
        images.sort(key=lambda image: (image.ordinal, image.frame))
        return torch.cat([self.preprocessing.tensor(image.pixels) for image in images])


def files_below(folder: str | Path) -> list[str]:
    """Regular files below a folder, sorted; none where there is no folder, so that a bundle can be opened."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


class FolderEvaluator:
    """Applies a network to every item of a data set and writes the probabilities as CSV.

    Args:
        network: Gives probabilities.
        weights: State dictionary; loaded when it runs, with ``weights_only``, so that no code in it can run.
        dataset: One tensor ``(n, *image_shape)`` for each file.
        inferer: Calls the network.
        class_names: Headings of the columns.
        device: Where the network runs.
        output: New or replaced CSV.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str,
        dataset: Iterable[Tensor],
        inferer: Callable[[Tensor, nn.Module], Tensor],
        class_names: Sequence[str],
        device: str | torch.device,
        output: str,
    ) -> None:
        self.network, self.weights, self.dataset = network, weights, dataset
        self.inferer, self.class_names = inferer, tuple(class_names)
        self.device, self.output = device, output

    @torch.no_grad()
    def run(self) -> list[list[float]]:
        """Predict; returns one row of probabilities for each image.

        Raises:
            DataError: If there is no image; nothing is written then.
        """
        self.network.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        network = self.network.to(self.device).eval()
        rows: list[list[float]] = []
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["file", "image", *(f"probability:{name}" for name in self.class_names)])
        for file, images in enumerate(self.dataset, start=1):
            for number, row in enumerate(self.inferer(images.to(self.device), network).cpu().tolist(), start=1):
                table.writerow([file, number, *(f"{share:.6f}" for share in row)])
                rows.append(row)
        if not rows:
            raise DataError(
                "Expected DICOM files below the folder of images, found none. Put them into `input` of the bundle "
                "or name another folder: --dataset_dir FOLDER."
            )
        path = Path(self.output)
        with output_errors(path):
            replace_durably(path, text.getvalue().encode())
        return rows
