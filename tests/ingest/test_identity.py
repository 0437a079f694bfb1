from __future__ import annotations

import base64
import hashlib
import hmac
import stat
from pathlib import Path

import numpy as np
import pytest

from medistill.core.cohort import AGE_BANDS, PSEUDONYM, REMAPPED_UID
from medistill.errors import ConfigError, OutputError, SourceError
from medistill.ingest.identity import Pseudonymiser, age_band, load_or_create_key


def test_patient_is_the_truncated_hmac(key: bytes) -> None:
    expected = base64.b32encode(hmac.new(key, b"patient|clinic a|x 1", hashlib.sha256).digest())[:16].decode()
    secret = Pseudonymiser(key)
    assert secret.patient(" Clinic  A", "x   1 ") == expected
    assert secret.patient("clinic b", "x 1") != expected
    assert Pseudonymiser(bytes(32)).patient("clinic a", "x 1") != expected


def test_forms(key: bytes) -> None:
    secret = Pseudonymiser(key)
    for value in (secret.patient("", "a"), secret.study("1.2"), secret.site("x"), secret.pixels(np.zeros(3))):
        assert PSEUDONYM.fullmatch(value)
    for number in range(200):
        assert REMAPPED_UID.fullmatch(secret.uid(f"1.2.{number}"))


def test_pixels_depend_on_shape_type_and_values(key: bytes) -> None:
    secret = Pseudonymiser(key)
    image = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert secret.pixels(image) == secret.pixels(image.astype(">u2")) == secret.pixels(np.asfortranarray(image))
    others = (image.reshape(3, 2), image.astype(np.uint8), image + np.uint16(1))
    assert len({secret.pixels(image), *(secret.pixels(other) for other in others)}) == 4


def test_key_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = load_or_create_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path) == key


def test_open_or_wrong_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    load_or_create_key(path)
    path.chmod(0o640)
    with pytest.raises(SourceError, match="chmod 600"):
        load_or_create_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(SourceError, match="32 bytes"):
        load_or_create_key(path)
    with pytest.raises(OutputError):
        load_or_create_key(tmp_path / "absent" / "key")
    with pytest.raises(ConfigError):
        Pseudonymiser(b"short")


def test_key_never_shown(key: bytes) -> None:
    assert repr(Pseudonymiser(key)) == "Pseudonymiser()"


@pytest.mark.parametrize(
    ("age", "birth", "study", "band"),
    [
        ("045Y", "", "", "40-49"),
        ("006M", "", "", "0-17"),
        ("010D", "", "", "0-17"),
        ("017Y", "", "", "0-17"),
        ("018Y", "", "", "18-29"),
        ("089Y", "", "", "80-89"),
        ("094Y", "", "", "90+"),
        ("", "19800615", "20200614", "30-39"),
        ("", "19800615", "20200615", "40-49"),
        ("", "1980", "20200615", ""),
        ("old", "", "", ""),
        ("999Y", "", "", ""),
    ],
)
def test_age_bands(age: str, birth: str, study: str, band: str) -> None:
    found = age_band(age=age, birth_date=birth, study_date=study)
    assert found == band
    assert found in AGE_BANDS
