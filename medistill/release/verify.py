"""What a receiver does first: check that a release is whole and unchanged, then load it.

A verified release is the one that was sealed. Who sealed it is known only where the seal is signed and the
receiver has the owner's public key, or a digest of ``SHA256SUMS``, from somewhere else. Nothing here says whether
what the card claims is true.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from medistill.core.distilled import DistilledSet
from medistill.core.reports import Verdict
from medistill.errors import ReleaseError
from medistill.release.card import CARD_FILE
from medistill.release.seal import LARGEST_SEAL, SEAL_FILE, SIGNATURE_FILE, parse_seal
from medistill.release.signature import SIGNATURE_BYTES, SIGNER_FILE, load_public_key, parse_public_key
from medistill.release.tensors import IMAGES_FILE, RECIPE_FILE, load_distilled, parse_json
from medistill.training.views import picture_labels, pictures

_NEEDED = (IMAGES_FILE, RECIPE_FILE, CARD_FILE)
_MOST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class VerifiedRelease:
    """A release folder that is whole and unchanged since it was sealed.

    Args:
        files: Number of files, the seal included.
        bytes: Their size in all.
        privacy: What the release states as its guarantee, in one sentence.
        verdict: What the audit in its card concluded; ``None`` where it was not audited.
        seal: SHA-256 of ``SHA256SUMS``: one short value that stands for the whole folder.
        signed_by: Fingerprint of the key that signed the seal; ``None`` where it is not signed.
        known_key: Whether that is the key the receiver gave. Otherwise it is whatever key lay in the folder, and
            its owner must be checked.
    """

    files: int
    bytes: int
    privacy: str
    verdict: Verdict | None
    seal: str
    signed_by: str | None = None
    known_key: bool = False


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


def verify_release(path: Path, *, key: Path | None = None) -> VerifiedRelease:
    """Check every byte of a release folder, and its signature where there is one.

    Args:
        path: The folder.
        key: Public key of the release's owner, received apart from the folder; a release that it did not sign is
            refused. Without it, a signature is checked against the key in the folder.

    Returns:
        What was checked and what the release says of itself.

    Raises:
        ReleaseError: If the folder is no release, or with all problems at once: files changed, missing or added,
            links, names that lead out of the folder, a malformed seal; or if the signature is missing, wrong, or
            of another key.
        ConfigError: If ``key`` cannot be read.
    """
    release, verified = _checked(Path(path), key)
    del release
    return verified


def load_release(path: Path, *, key: Path | None = None) -> Release:
    """Verify a release folder, then load it.

    Args:
        path: The folder.
        key: As :func:`verify_release`.

    Returns:
        A dataset of ``(image, soft_label)``, ready for a ``DataLoader``.

    Raises:
        ReleaseError: As :func:`verify_release`.
        ConfigError: If ``key`` cannot be read.
    """
    release, _ = _checked(Path(path), key)
    return release


def _checked(path: Path, key: Path | None) -> tuple[Release, VerifiedRelease]:
    digests, sealed, problems = _read_seal(path)
    sizes = _check_files(path, digests, problems)
    signed_by = _check_signature(path, sealed, signed=SIGNATURE_FILE in sizes, key=key)
    card = parse_json((path / CARD_FILE).read_bytes(), name=CARD_FILE)
    distilled = load_distilled(path)
    _require_same_signer(card, signed_by)
    verified = VerifiedRelease(
        files=len(sizes),
        bytes=sum(sizes.values()),
        privacy=distilled.privacy.sentence,
        verdict=_verdict(card, distilled),
        seal=hashlib.sha256(sealed).hexdigest(),
        signed_by=signed_by,
        known_key=key is not None,
    )
    return Release(distilled, card), verified


def _check_files(path: Path, digests: Mapping[str, str], problems: list[str]) -> dict[str, int]:
    """Size of every file by name, after every one of them was found as it was sealed."""
    present: dict[str, int] = {}
    folders = _folders(digests)
    for name, entry in _walk(path, folders):
        problem = _entry_problem(name, entry, digests, folders)
        if problem:
            problems.append(problem)
        elif entry.is_file(follow_symlinks=False):
            present[name] = entry.stat(follow_symlinks=False).st_size
    problems += [f"missing: {name}" for name in sorted({*digests, *_NEEDED} - present.keys())]
    problems += [
        f"changed: {name}" for name in sorted(digests.keys() & present.keys()) if not _holds(path, name, digests)
    ]
    if problems:
        more = len(problems) - _MOST_LINES
        shown = [*problems[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]
        listed = "\n".join(f"  - {problem}" for problem in shown)
        raise ReleaseError(f"The release is not as it was sealed:\n{listed}\nDo not use it; fetch it again.")
    return present


def _read_seal(path: Path) -> tuple[dict[str, str], bytes, list[str]]:
    place = path / SEAL_FILE
    if not path.is_dir() or place.is_symlink() or not place.is_file():
        raise ReleaseError(f"Not a release: expected a folder with a plain file {SEAL_FILE}.")
    with place.open("rb") as file:
        content = file.read(LARGEST_SEAL + 1)
    if len(content) > LARGEST_SEAL:
        raise ReleaseError(
            f"{SEAL_FILE} is larger than {LARGEST_SEAL} bytes, more than any release needs. "
            "Do not use the folder; fetch it again."
        )
    digests, problems = parse_seal(content)
    return digests, content, list(problems)


def _check_signature(path: Path, sealed: bytes, *, signed: bool, key: Path | None) -> str | None:
    """Fingerprint of the key that signed the seal; ``None`` where nobody claims to have signed it."""
    given = None if key is None else load_public_key(key)
    signer = path / SIGNER_FILE
    if not signed or not signer.is_file():
        if signed or signer.is_file():
            gone = SIGNER_FILE if signed else SIGNATURE_FILE
            raise ReleaseError(f"The release was signed, but {gone} is gone. Do not use it; fetch it again.")
        if given is not None:
            raise ReleaseError(
                "The release is not signed; expected a signature of the key given. Ask the owner for a signed one."
            )
        return None
    enclosed = parse_public_key(signer.read_bytes(), what=SIGNER_FILE)
    if given is not None and given.fingerprint != enclosed.fingerprint:
        raise ReleaseError(
            f"The release is signed by another key: found {enclosed.fingerprint}, expected {given.fingerprint}. "
            "Do not use it; ask the owner of the key given."
        )
    with (path / SIGNATURE_FILE).open("rb") as file:
        signature = file.read(SIGNATURE_BYTES + 1)
    if not (given or enclosed).verifies(sealed, signature):
        raise ReleaseError(
            f"{SIGNATURE_FILE} is not the signature of this {SEAL_FILE} by the key {enclosed.fingerprint}: one of "
            "them was changed or damaged. Do not use the release; fetch it again."
        )
    return enclosed.fingerprint


def _require_same_signer(card: Mapping[str, Any], signed_by: str | None) -> None:
    """The card says who signs; a release that was stripped of its signature still says that it had one."""
    stated = card.get("signature")
    found = stated.get("fingerprint") if isinstance(stated, Mapping) else None
    if found != signed_by:
        raise ReleaseError(
            f"{CARD_FILE} states {found or 'no key'!a} as signer; the folder is signed by "
            f"{signed_by or 'no key'}. Do not use it; fetch it again."
        )


def _walk(path: Path, folders: frozenset[str], prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below a folder with its relative name; links and unknown folders are named, never followed."""
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            yield name, entry
            if entry.is_dir(follow_symlinks=False) and name in folders:
                yield from _walk(Path(entry.path), folders, f"{name}/")


def _folders(digests: Mapping[str, str]) -> frozenset[str]:
    """Folders that a sealed file lies in."""
    return frozenset(parent.as_posix() for name in digests for parent in PurePosixPath(name).parents)


def _entry_problem(name: str, entry: os.DirEntry[str], digests: Mapping[str, str], folders: frozenset[str]) -> str:
    if entry.is_symlink():
        return f"a link, not a file: {name!a}"
    if entry.is_dir(follow_symlinks=False):
        return "" if name in folders else f"added folder: {name!a}"
    if not entry.is_file(follow_symlinks=False):
        return f"not a plain file: {name!a}"
    return "" if name in digests or name in (SEAL_FILE, SIGNATURE_FILE) else f"added: {name!a}"


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
