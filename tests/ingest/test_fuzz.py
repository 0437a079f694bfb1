"""Damaged files: whatever the bytes, the reader survives, answers in time and accounts for every file."""

from __future__ import annotations

import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_files

from medistill.ingest.burned_in import Screen, TextPolicy
from medistill.ingest.frames import decode_dicom
from medistill.ingest.geometry import Fit
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import Limits, isolated
from medistill.ingest.quarantine import REASON_CODES, Rejected
from medistill.ingest.reading import Content, Item, Reader, Work
from tests.ingest.conftest import DATA, KEY

LIMITS = Limits(seconds=20, memory_mb=1024)
LARGEST = 400_000
READER = Reader(
    decode=decode_dicom,
    keys=("sop", "file", "patient"),
    pseudonymiser=Pseudonymiser(KEY),
    size=32,
    fit=Fit.PAD,
    policy=Policy.VOI,
    screen=Screen(policy=TextPolicy.ALLOW),
    defaced=True,
)


def seeds() -> list[bytes]:
    """Real files: those that come with pydicom, and more where MEDISTILL_DATA has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = [Path(path) for path in get_testdata_files("*.dcm") if "cache" not in path]
    paths += sorted((DATA / "dicom").rglob("*")) if DATA.is_dir() else []
    contents = [path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= LARGEST]
    assert len(contents) > 20
    return contents


def mutate(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """One of the things that happen to files, or that an attacker does to them."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(max(1, len(data)))
        near = chance.randrange(max(1, min(2000, len(data))))
        match chance.randrange(8):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[near : near + 1] = bytes([chance.randrange(256)])
            case 2:
                data[near : near + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + chance.randrange(1, 200)]
            case 5:
                data[near:near] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 64)))
            case 6:
                data[at:] = other[chance.randrange(max(1, len(other))) :]
            case 7:
                data[near : near + 2] = bytes([chance.choice(b"ACDFILOPSTUW"), chance.choice(b"ABDEFHIMNQSTW")])
    return bytes(data)


def weigh(work: Work) -> Iterator[tuple[list[Any], int]]:
    """What the reader says, and the largest memory of this process so far in MB."""
    found: list[Any] = []
    for result in READER(work):
        if isinstance(result, Rejected):
            found.append(result.code)
        elif not isinstance(result, Content):
            reading, pixels = result
            assert pixels.shape == (32, 32)
            assert pixels.dtype == np.uint16
            found.append(reading.uid)
    yield found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def mutants(count: int, seed: int) -> Iterator[Work]:
    chance, contents = random.Random(seed), seeds()
    for number in range(count):
        content = mutate(chance.choice(contents), chance.choice(contents), chance)
        yield Work(item=Item(ordinal=number, name=str(number), payload=content))


def attack(count: int, seed: int = 0) -> Counter[str]:
    """Read mutants; returns how often each answer was given."""
    answers: dict[int, list[Any]] = {}
    codes: Counter[str] = Counter()
    heaviest, longest, last = 0, 0.0, time.monotonic()
    for outcome in isolated(weigh, mutants(count, seed), jobs=2, limits=LIMITS):
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if outcome.result is not None:
            found, weight = outcome.result
            answers[outcome.item.item.ordinal] = found
            heaviest = max(heaviest, weight)
        elif outcome.failure:
            answers[outcome.item.item.ordinal] = [outcome.failure]
    assert sorted(answers) == list(range(count))
    for found in answers.values():
        assert found
        rejected = [answer for answer in found if answer in REASON_CODES]
        codes.update(rejected or ["read"])
    assert heaviest < LIMITS.memory_mb + 200
    assert longest < LIMITS.seconds + 10
    print(f"{count} mutants: {dict(codes.most_common())}, heaviest {heaviest} MB, longest wait {longest:.1f} s")
    return codes


def test_damaged_files_are_accounted_for() -> None:
    codes = attack(400)
    assert codes["read"] > 20
    assert len(codes) > 5


@pytest.mark.long
def test_ten_thousand_damaged_files() -> None:
    codes = attack(10_000, seed=1)
    assert codes["CODEC_CRASH"] + codes["TIMEOUT"] + codes["OOM_LIMIT"] < 200
