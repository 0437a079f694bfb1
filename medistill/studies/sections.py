"""The YAML file of a study, and the cohorts that its sections name, ingested when they are used first."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medistill.config import load_config, read_yaml
from medistill.errors import ConfigError
from medistill.ingest import ingest, load_or_create_key
from medistill.ingest.phantom import PhantomConfig, write_phantom
from medistill.ingest.reading import Source
from medistill.progress import Progress
from medistill.studies.records import keep

_KEYS = {"cohort", "size", "source", "medmnist", "ingest"}
_MEDMNIST = ("train", "val", "test")


def read_study(path: Path, sections: str) -> tuple[Path, Mapping[str, Mapping[str, Any]], dict[str, Any]]:
    """Read the file of a study.

    Args:
        path: YAML file.
        sections: Key of the cohorts, by name.

    Returns:
        Folder of the results, the sections of the cohorts, and everything else.

    Raises:
        ConfigError: If the file cannot be read, or has no output or no sections.
    """
    values = read_yaml(path)
    found = values.get(sections)
    if not isinstance(found, dict) or not found or "output" not in values:
        raise ConfigError(f"The configuration needs output and {sections} (name: section).")
    for name, section in found.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{sections}.{name}: expected cohort and size, or source, ingest and size.")
    rest = {key: value for key, value in values.items() if key not in ("output", sections)}
    return Path(values["output"]), found, rest


def cohort_of(
    name: str, section: Mapping[str, Any], folder: Path, progress: Progress | None = None
) -> tuple[Path, int]:
    """The cohort of one section: the one it names, or its source ingested.

    A source is given as for ``medistill run``; ``medmnist`` is a MedMNIST file whose images count as patients of
    their own, volumes projected along their first axis.

    Args:
        name: Of the section, for messages.
        section: ``cohort`` and ``size``; or ``source`` or ``medmnist`` with ``ingest`` and ``size``.
        folder: Where a source is ingested; a cohort that is there is taken if it came from the same section.
        progress: Shows the ingestion.

    Returns:
        The cohort's folder and the side length of its images.

    Raises:
        ConfigError: If the section is none of these, or another one was ingested there.
    """
    unknown = set(section) - _KEYS
    if unknown or len({"cohort", "source", "medmnist"} & set(section)) != 1:
        raise ConfigError(f"{name}: expected cohort and size, or source, ingest and size.")
    size = int(section.get("size", 64))
    if "cohort" in section:
        return Path(section["cohort"]), size
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    source = section["source"] if "source" in section else _medmnist(section["medmnist"], folder)
    # The strict reader of `medistill run` reads the source too; the file says later what was ingested.
    parts = {"source": source, "ingest": {"size": size, **section.get("ingest", {})}}
    written = yaml.safe_dump({"output": str(folder), **parts, "distill": {"size": size}}, sort_keys=False)
    note = folder / "source.yaml"
    if (folder / "cohort").exists():
        if not note.exists() or _moved(note.read_text(encoding="utf-8"), folder) != written:
            raise ConfigError(f"{name}: another source was ingested under this name. Choose another name.")
        return folder / "cohort", size
    keep(note, written.encode())
    _ingest(note, folder, progress or Progress())
    return folder / "cohort", size


def _moved(noted: str, folder: Path) -> str:
    """What was noted in a folder, as if it had been there from the beginning; folders may be copied."""
    before = yaml.safe_load(noted)["output"]
    return noted.replace(f"{before}\n", f"{folder}\n").replace(f"{before}/", f"{folder}/")


def _ingest(note: Path, folder: Path, progress: Progress) -> None:
    config = load_config(note)
    source: Source | Path
    labels: Path | None
    if config.source.kind == "phantom":
        phantom, made = folder / "phantom", PhantomConfig(**config.source.model_dump(exclude={"kind"}))
        shutil.rmtree(phantom, ignore_errors=True)  # of an interrupted call
        write_phantom(phantom, made, progress=progress)
        source, labels = phantom / "dicom", phantom / "labels.csv"
    else:
        source, labels = config.source.open(config.ingest.volumes), config.source.labels
    ingest(
        source,
        folder / "cohort",
        key=load_or_create_key(folder / "cohort.key"),
        labels=labels,
        config=config.ingest,
        private_notes=folder / "quarantine.private.csv",
        progress=progress,
    )


def _medmnist(where: object, folder: Path) -> dict[str, str]:
    """A source of images and patients, in a file whose name carries what it was made from."""
    try:
        content = Path(os.path.expandvars(str(where))).read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            images = np.concatenate([archive[f"{split}_images"] for split in _MEDMNIST])
            labels = [archive[f"{split}_labels"].ravel() for split in _MEDMNIST]
    except (OSError, KeyError, ValueError):
        raise ConfigError("medmnist: expected a readable .npz of MedMNIST.") from None
    target = folder / f"images-{hashlib.sha256(content).hexdigest()[:12]}.npz"
    if not target.exists():
        if images.ndim == 4 and images.shape[-1] != 3:
            images = images.astype(np.float32).mean(1).round().astype(np.uint8)
        made = io.BytesIO()
        np.savez_compressed(
            made,
            images=images,
            labels=np.concatenate(labels).astype(str),
            split=np.repeat(_MEDMNIST, [len(found) for found in labels]),
            patient_id=np.arange(len(images)).astype(str),
        )
        keep(target, made.getvalue())
    return {"kind": "npz", "path": str(target)}
