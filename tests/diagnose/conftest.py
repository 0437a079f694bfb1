"""A phantom cohort, a quick release of its training patients, a model, and the films of patients held back."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from medistill.core.cohort import Cohort, Split
from medistill.core.distilled import DistilledSet, Schedule
from medistill.diagnose import DiagnosticModel, load_model, train_on_release
from medistill.distill import distill
from medistill.ingest import IngestConfig, ingest
from medistill.ingest.phantom import PhantomConfig, write_phantom
from medistill.ingest.sources.folder import scan
from medistill.privacy.curator import OpenCurator
from medistill.release.folder import write_release
from medistill.release.verify import Release, load_release
from medistill.workflow import cohort_summary
from tests.report.example_release import distilled_set


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """Cohort, release and the held-back files with their places in the cohort's test split."""

    cohort: Cohort
    release: Path
    held_back: Path
    instance_of: Mapping[str, int]
    identifiers: frozenset[str]


def sealed(out: Path, distilled: DistilledSet, cohort: Cohort | None = None) -> Path:
    return write_release(
        out,
        distilled=distilled,
        audit=None,
        diagnosis=None,
        cohort=None if cohort is None else cohort_summary(cohort),
        snapshots=None,
        commands=(),
    )


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    place = tmp_path_factory.mktemp("hospital")
    write_phantom(place / "phantom", PhantomConfig(patients=30, size=48, seed=5, difficulty=0.0), jobs=1)
    dicom = place / "phantom" / "dicom"
    cohort = ingest(
        dicom,
        place / "cohort",
        key=bytes(32),
        labels=place / "phantom" / "labels.csv",
        config=IngestConfig(size=32, intensity="percentile", classes=("outside", "no_gastritis", "gastritis")),
        jobs=1,
    )
    made = distill(OpenCurator(cohort.split(Split.TRAIN).images(16)), method="coreset", ipc=6, looks=1).distilled
    made = replace(made, schedule=Schedule(epochs=25, learning_rate=0.02))
    names = scan(dicom)
    held_back, instance_of = place / "held_back", {}
    test = {instance.row: number for number, instance in enumerate(cohort.split(Split.TEST).instances)}
    with (place / "cohort" / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            if row["outcome"] == "ACCEPTED" and int(row["row"]) in test:
                name = names[int(row["ordinal"])]
                (held_back / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(dicom / name, held_back / name)
                instance_of[name] = test[int(row["row"])]
    import pydicom

    headers = [pydicom.dcmread(held_back / name, stop_before_pixels=True) for name in instance_of]
    return Hospital(
        cohort=cohort,
        release=sealed(place / "release", made, cohort),
        held_back=held_back,
        instance_of=instance_of,
        identifiers=frozenset(
            str(value) for h in headers for value in (h.PatientID, h.PatientName, h.StudyInstanceUID)
        ),
    )


@pytest.fixture(scope="session")
def model_folder(hospital: Hospital) -> Path:
    return train_on_release(hospital.release, hospital.release.parent / "model", students=2)


@pytest.fixture(scope="session")
def model(model_folder: Path) -> DiagnosticModel:
    return load_model(model_folder)


@pytest.fixture(scope="session")
def release(hospital: Hospital) -> Release:
    return load_release(hospital.release)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed release of twelve made-up images with a short schedule, and nothing said of a cohort."""
    distilled = replace(distilled_set(ipc=6), schedule=Schedule(epochs=40, learning_rate=0.01))
    return sealed(tmp_path_factory.mktemp("made_up") / "release", distilled)


def noise(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
