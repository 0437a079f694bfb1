from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medistill.core.cohort import Instance, Split
from medistill.core.task import Task
from medistill.errors import DataError, OutputError, SourceError
from medistill.ingest.cache import Accepted, atomic_folder, load_cohort, write_cohort
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.quarantine import Rejected
from tests.ingest.conftest import KEY

SECRET = Pseudonymiser(KEY)
TASK = Task.single_label(("a", "b"))


def write(out: Path, count: int = 501) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 65536, (count, 8, 8), dtype=np.uint16)

    def outcomes() -> Iterator[tuple[Accepted, np.ndarray] | Rejected]:
        yield Rejected(ordinal=0, code="NO_LABEL")
        for row, image in enumerate(pixels[1:][::-1]):
            instance = Instance(
                uid=SECRET.uid(str(row)),
                patient=SECRET.patient("", str(row)),
                label="a",
                split=Split.TRAIN,
                row=row,
            )
            yield Accepted(ordinal=row + 1, flags=("colour",), instance=instance), image[None]

    with atomic_folder(out) as folder:
        assert write_cohort(folder, outcomes(), {"task": TASK.to_json()}) == count - 1
    return pixels[1:][::-1]


def test_round_trip(tmp_path: Path) -> None:
    expected = write(tmp_path / "cohort", 1002)
    cohort = load_cohort(tmp_path / "cohort")
    assert (len(cohort), cohort.task) == (1001, TASK)
    rows = [1000, 3, 499, 500, 3, 0]
    np.testing.assert_array_equal(cohort.store.read(rows)[:, 0], expected[rows])
    np.testing.assert_array_equal(cohort.store.read(range(1001))[:, 0], expected)
    assert cohort.store.read([]).shape == (0, 1, 8, 8)
    with pytest.raises(DataError):
        cohort.store.read([1001])
    names = sorted(path.relative_to(tmp_path / "cohort").as_posix() for path in (tmp_path / "cohort").rglob("*.*"))
    assert names == ["manifest.csv", "profile.json", *(f"shards/0000{n}.safetensors" for n in range(3))]


def test_full_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path / "cohort")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    write(tmp_path / "cohort", 3)
    assert stat.S_IMODE((tmp_path / "cohort").stat().st_mode) == 0o700
    assert len(load_cohort(tmp_path / "cohort")) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_after_an_interruption(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "deep" / "out") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert not list((tmp_path / "deep").iterdir())


def test_full_disk_is_explained(tmp_path: Path) -> None:
    import errno

    with pytest.raises(OutputError, match="disk is full"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "secret path")
    assert not list(tmp_path.iterdir())


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found none"):
        load_cohort(tmp_path)
    (tmp_path / "profile.json").write_text(json.dumps({"kind": "else"}))
    with pytest.raises(SourceError, match="another kind"):
        load_cohort(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cohort", 3)
    path = tmp_path / "cohort" / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(SourceError, match="newer"):
        load_cohort(tmp_path / "cohort")


@pytest.mark.parametrize("name", ["manifest.csv", "shards/00000.safetensors"])
def test_damage_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path / "cohort", 3)
    path = tmp_path / "cohort" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SourceError, match="damaged"):
        load_cohort(tmp_path / "cohort")
