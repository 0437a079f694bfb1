"""What a receiver does first: check that a release is whole and unchanged, then load it.

A verified release is the one that was sealed. It says nothing about who sealed it, nor whether what the card
claims is true; that needs a signature, or a digest of ``SHA256SUMS`` received another way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from medistill.core.distilled import DistilledSet
from medistill.core.reports import Verdict
from medistill.errors import ReleaseError
from medistill.release.card import CARD_FILE
from medistill.release.seal import SEAL_FILE, parse_seal
from medistill.release.tensors import IMAGES_FILE, RECIPE_FILE, load_distilled, parse_json
from medistill.training.views import picture_labels, pictures

_NEEDED = (IMAGES_FILE, RECIPE_FILE, CARD_FILE)


@dataclass(frozen=True, kw_only=True)
class VerifiedRelease:
    """A release folder that is whole and unchanged since it was sealed.

    Args:
        files: Number of files, the seal included.
        bytes: Their size in all.
        privacy: What the release states as its guarantee, in one sentence.
        verdict: What the audit in its card concluded; ``None`` where it was not audited.
        seal: SHA-256 of ``SHA256SUMS``: one short value that stands for the whole folder.
    """

    files: int
    bytes: int
    privacy: str
    verdict: Verdict | None
    seal: str


class Release(Dataset[tuple[Tensor, Tensor]]):
    """A verified release as a dataset of ``(image, soft_label)`` pairs.

    Where the images are mosaics, a pair is a tile in the size of the whole image, with its own label.

    Args:
        distilled: Images and labels, with recipe, schedule and privacy statement.
        card: What ``card.json`` holds.
    """

    def __init__(self, distilled: DistilledSet, card: Mapping[str, Any]) -> None:
        self.distilled = distilled
        self.card = card
        self._images = pictures(distilled.images, distilled.views)
        self._labels = picture_labels(distilled.soft_labels, distilled.views)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], self._labels[index]


def verify_release(path: Path) -> VerifiedRelease:
    """Check every byte of a release folder.

    Args:
        path: The folder.

    Returns:
        What was checked and what the release says of itself.

    Raises:
        ReleaseError: If the folder is no release, or with all problems at once: files changed, missing or added,
            links, names that lead out of the folder, a malformed seal.
    """
    release, verified = _checked(path)
    del release
    return verified


def load_release(path: Path) -> Release:
    """Verify a release folder, then load it.

    Args:
        path: The folder.

    Returns:
        A dataset of ``(image, soft_label)``, ready for a ``DataLoader``.

    Raises:
        ReleaseError: As :func:`verify_release`.
    """
    release, _ = _checked(Path(path))
    return release


def _checked(path: Path) -> tuple[Release, VerifiedRelease]:
    digests, sealed, problems = _read_seal(path)
    present: dict[str, int] = {}
    for name, entry in _walk(path):
        problem = _entry_problem(name, entry, digests)
        if problem:
            problems.append(problem)
        elif entry.is_file(follow_symlinks=False):
            present[name] = entry.stat(follow_symlinks=False).st_size
    problems += [f"missing: {name}" for name in sorted({*digests, *_NEEDED} - present.keys())]
    problems += [
        f"changed: {name}" for name in sorted(digests.keys() & present.keys()) if not _holds(path, name, digests)
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ReleaseError(f"The release is not as it was sealed:\n{listed}\nDo not use it; fetch it again.")
    card = parse_json((path / CARD_FILE).read_bytes(), name=CARD_FILE)
    distilled = load_distilled(path)
    verified = VerifiedRelease(
        files=len(present),
        bytes=sum(present.values()),
        privacy=distilled.privacy.sentence,
        verdict=_verdict(card, distilled),
        seal=hashlib.sha256(sealed).hexdigest(),
    )
    return Release(distilled, card), verified


def _read_seal(path: Path) -> tuple[dict[str, str], bytes, list[str]]:
    place = path / SEAL_FILE
    if not path.is_dir() or place.is_symlink() or not place.is_file():
        raise ReleaseError(f"Not a release: expected a folder with a plain file {SEAL_FILE}.")
    content = place.read_bytes()
    digests, problems = parse_seal(content)
    return digests, content, list(problems)


def _walk(path: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below a folder with its relative name; links are named, never followed."""
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            yield name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/")


def _entry_problem(name: str, entry: os.DirEntry[str], digests: Mapping[str, str]) -> str:
    if entry.is_symlink():
        return f"a link, not a file: {name!a}"
    if entry.is_dir(follow_symlinks=False):
        known = any(sealed.startswith(f"{name}/") for sealed in digests)
        return "" if known else f"added folder: {name!a}"
    if not entry.is_file(follow_symlinks=False):
        return f"not a plain file: {name!a}"
    return "" if name in digests or name == SEAL_FILE else f"added: {name!a}"


def _holds(path: Path, name: str, digests: Mapping[str, str]) -> bool:
    with (path / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digests[name]


def _verdict(card: Mapping[str, Any], distilled: DistilledSet) -> Verdict | None:
    """The card's verdict, after checking that the card speaks of this set."""
    try:
        audit, privacy = card["audit"], card["privacy"]["statement"]
        verdict = None if audit is None else Verdict(audit["verdict"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"Expected {CARD_FILE} to hold privacy and audit; a field is missing or odd."
        ) from error
    if privacy != distilled.privacy.to_json():
        raise ReleaseError(f"{CARD_FILE} and {RECIPE_FILE} state different guarantees. Do not use the release.")
    return verdict
