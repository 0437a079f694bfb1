"""What tests share: real data where it is present, and small made-up image sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: two threads on two busy cores wait for each other

import numpy as np
import pytest
import torch

from medistill.core.images import ImageSet
from medistill.core.task import Task
from tests.nurseries import forking

REPOSITORY = Path(__file__).resolve().parent.parent
# Files that take longest, longest first. A worker takes whole files: one begun last would be waited for.
LONGEST = (
    *("test_notebooks", "test_workflow", "test_commands", "test_kinds", "test_compare_distillers", "test_export"),
    *("test_reference", "test_evaluate", "test_text_policies", "test_private_cli"),
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.option.loadscopereorder = False  # files in the order below, not by their number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; their tests and all other files stay in order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole default suite; none for chosen tests, whose printing is to be seen."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
    return 0 if chosen or "not benchmark" not in config.option.markexpr else min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real, openly licensed images; the test is skipped where it is absent."""
    folder = Path(os.environ.get("MEDISTILL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real images are absent: set MEDISTILL_DATA to their folder")
    return folder


@pytest.fixture(scope="module", autouse=True)
def nurseries() -> Iterator[None]:
    """Reading processes are forked from one that has imported everything; a module may say otherwise."""
    from medistill.ingest import isolation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation, "subprocess", forking())
        yield


@pytest.fixture(scope="module")
def short_schedules() -> Iterator[None]:
    """Two short schedules in place of those that are compared on validation patients, which take most of a run."""
    from medistill.core.distilled import Schedule
    from medistill.distill.schedule import choose_schedule

    short = (Schedule(epochs=20, learning_rate=0.01), Schedule(epochs=30, learning_rate=0.02))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choose_schedule.__kwdefaults__, "candidates", short)
        yield


def pseudonym(number: int) -> str:
    """A well-formed pseudonym."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    digits = []
    for _ in range(16):
        number, digit = divmod(number, 32)
        digits.append(alphabet[digit])
    return "".join(digits)


def blobs(
    patients: int = 40, *, per_patient: int = 2, size: int = 16, classes: int = 2, seed: int = 0, first: int = 0
) -> ImageSet:
    """Images with a class-specific bright stripe, a patient-specific texture and noise."""
    generator = np.random.default_rng(seed)
    images, labels, names = [], [], []
    grid = np.linspace(0, 1, size)
    for patient in range(patients):
        label = patient % classes
        texture = generator.normal(0, 0.08, (size, size))
        stripe = np.exp(-(((grid - (label + 0.5) / classes) / 0.12) ** 2))[:, None] * np.ones(size)
        for _ in range(per_patient):
            image = 0.3 + 0.35 * stripe + texture + generator.normal(0, 0.05, (size, size))
            images.append(np.clip(image, 0, 1))
            labels.append(label)
            names.append(pseudonym(first + patient))
    task = Task.single_label(tuple(f"class{c}" for c in range(classes)))
    return ImageSet(
        images=torch.tensor(np.array(images), dtype=torch.float32)[:, None],
        targets=torch.nn.functional.one_hot(torch.tensor(labels), classes).float(),
        patients=tuple(names),
        task=task,
    )
