"""Identifiers replaced under a secret key.

Pseudonyms are truncated HMAC-SHA256 values: without the key they cannot be found by trying all possible patient
numbers, as a plain hash could. The key stays in the hospital, outside the cohort, and is never logged.

Example:
    >>> Pseudonymiser(bytes(32)).patient("", " 12  34 ") == Pseudonymiser(bytes(32)).patient("", "12 34")
    True
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medistill.core.cohort import AGE_BANDS
from medistill.errors import ConfigError, OutputError, SourceError

KEY_BYTES = 32
_AGE = re.compile(r"(\d{3})([DWMY])")
_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def load_or_create_key(path: Path) -> bytes:
    """Read the secret key, or make a new one.

    Args:
        path: Key file; lies outside the cohort and is readable by its owner only.

    Returns:
        32 random bytes.

    Raises:
        SourceError: If the key is readable by others, or is not 32 bytes long.
        OutputError: If the key cannot be written.
    """
    path = Path(path)
    if path.exists():
        return _read_key(path)
    key = secrets.token_bytes(KEY_BYTES)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        os.link(unfinished, path)  # whole or not at all, and never over another
    except FileExistsError:
        return _read_key(path)
    except OSError:
        raise OutputError("The key file cannot be created. Choose a folder that exists and is writable.") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return key


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise SourceError("The key file cannot be read. Expected a file of 32 bytes owned by you.") from error
    if os.name == "posix" and mode & 0o077:
        raise SourceError(
            f"The key file is open to other users (mode {mode:04o}); expected 0600. "
            "Run `chmod 600` on it, and make a new key if others may have read it."
        )
    if len(key) != KEY_BYTES:
        raise SourceError(f"Expected a key file of {KEY_BYTES} bytes; found another length. Name another file.")
    return key


def normalise(identifier: str) -> str:
    """Identifier without outer spaces, with single inner spaces and without case."""
    return " ".join(identifier.split()).casefold()


@dataclass(frozen=True)
class Pseudonymiser:
    """Turns identifiers into pseudonyms under one key; the same input always gives the same pseudonym.

    Args:
        key: 32 secret bytes, see :func:`load_or_create_key`.

    Raises:
        ConfigError: If the key is not 32 bytes long.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ConfigError(f"Expected a key of {KEY_BYTES} bytes, got {len(self.key)}.")

    def digest(self, domain: str, value: str) -> bytes:
        """Full HMAC-SHA256 of a value; equal values of different domains give unrelated results."""
        message = f"{domain}|{value}".encode("utf-8", "surrogateescape")
        return hmac.new(self.key, message, hashlib.sha256).digest()

    def token(self, domain: str, value: str) -> str:
        """Pseudonym of 16 base32 characters (80 bits)."""
        return _short(self.digest(domain, value))

    def patient(self, issuer: str, patient_id: str) -> str:
        """Pseudonym of a patient; spaces at the ends, repeated spaces and case do not matter."""
        return self.token("patient", f"{normalise(issuer)}|{normalise(patient_id)}")

    def study(self, uid: str) -> str:
        """Pseudonym of a study."""
        return self.token("study", uid.strip())

    def site(self, name: str) -> str:
        """Pseudonym of a hospital or department."""
        return self.token("site", normalise(name))

    def pixels(self, array: NDArray[Any]) -> str:
        """Pseudonym of an image: equal for equal shape, type and values."""
        canonical = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        signer = hmac.new(self.key, f"pixels|{canonical.shape}|{canonical.dtype.str}|".encode(), hashlib.sha256)
        signer.update(canonical.data)
        return _short(signer.digest())

    def uid(self, uid: str) -> str:
        """Replacement UID under ``2.25.`` (PS3.5 B.2)."""
        return f"2.25.{uuid.UUID(bytes=self.digest('uid', uid.strip())[:16], version=4).int}"


def _short(digest: bytes) -> str:
    return base64.b32encode(digest).decode("ascii")[:16]


def age_band(*, age: str = "", birth_date: str = "", study_date: str = "") -> str:
    """Age band of a patient at the time of the study, from PatientAge or else from two dates.

    Args:
        age: PatientAge (0010,1010), for example ``"045Y"``.
        birth_date: PatientBirthDate as ``YYYYMMDD``.
        study_date: StudyDate as ``YYYYMMDD``.

    Returns:
        One of :data:`medistill.core.cohort.AGE_BANDS`; empty where the age is not known.
    """
    years = _years(age.strip().upper(), birth_date.strip(), study_date.strip())
    if years is None or not 0 <= years < 130:
        return ""
    if years < 18:
        return "0-17"
    if years >= 90:
        return "90+"
    return AGE_BANDS[2] if years < 30 else AGE_BANDS[int(years // 10)]


def _years(age: str, birth_date: str, study_date: str) -> float | None:
    if found := _AGE.fullmatch(age):
        return int(found[1]) * _YEARS[found[2]]
    born, studied = _DATE.fullmatch(birth_date), _DATE.fullmatch(study_date)
    if not born or not studied:
        return None
    birthday_passed = (studied[2], studied[3]) >= (born[2], born[3])
    return float(int(studied[1]) - int(born[1]) - (not birthday_passed))
