"""Who sealed a release: an Ed25519 signature over the bytes of ``SHA256SUMS``.

A signed release holds ``signer.pub``, the public key, which is sealed like every other file, and beside the seal
``SHA256SUMS.sig``, the 64 bytes of the signature. Both can be checked without medistill::

    openssl pkeyutl -verify -pubin -inkey signer.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig

A public key that travels with what it signed says that the folder is of one piece, not whose it is. For that the
receiver takes the key, or its fingerprint, from somewhere else: the owner's web page, a letter, a telephone call.
The fingerprint is the SHA-256 of the key in the form ``openssl pkey -pubin -in signer.pub -outform DER`` prints.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medistill.errors import ConfigError, OutputError, ReleaseError
from medistill.release.durable import output_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNER_FILE = "signer.pub"
#: Environment variable with the passphrase of a private key, where it has one.
PASSPHRASE = "MEDISTILL_KEY_PASSPHRASE"  # noqa: S105 - the name of the variable, not its content
SIGNATURE_BYTES = 64

_LARGEST_KEY = 8192


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A private key that was read and can sign.

    Args:
        public: The public key in PEM form, as it stands in ``signer.pub``.
        fingerprint: 64 hexadecimal digits that stand for the public key.
    """

    public: bytes
    fingerprint: str
    _private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"SigningKey(fingerprint={self.fingerprint!r})"

    def sign(self, seal: bytes) -> bytes:
        """The signature of a seal; the same key and seal give the same bytes."""
        return self._private.sign(seal)


@dataclass(frozen=True, kw_only=True)
class VerifyingKey:
    """A public key.

    Args:
        fingerprint: 64 hexadecimal digits that stand for it.
    """

    fingerprint: str
    _public: Ed25519PublicKey

    def verifies(self, seal: bytes, signature: bytes) -> bool:
        """Whether the signature of a seal was made with the private half of this key."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

        try:
            self._public.verify(signature, seal)
        except InvalidSignature:
            return False
        return True


def write_key_pair(name: Path, *, passphrase: str | None = None) -> str:
    """Make a key pair for signing releases: ``NAME.key`` stays secret, ``NAME.pub`` is published.

    Args:
        name: Path of both files without their endings.
        passphrase: Encrypts the private key, where given.

    Returns:
        The fingerprint of the public key.

    Raises:
        OutputError: If one of the files exists already or cannot be written; then none is left behind.
    """
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    private = Ed25519PrivateKey.generate()
    locked: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    )
    secret = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    public, fingerprint = _described(private.public_key())
    _write_pair(Path(f"{name}.key"), secret, Path(f"{name}.pub"), public)
    return fingerprint


def _write_pair(private: Path, secret: bytes, published: Path, public: bytes) -> None:
    for path in (private, published):
        if path.exists() or path.is_symlink():
            raise OutputError(
                f"Expected {path.name} to be new; it exists. A key is never overwritten: choose another name."
            )
    written: list[Path] = []
    with output_errors(private):
        try:
            for path, content, mode in ((private, secret, 0o600), (published, public, 0o644)):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
                written.append(path)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def load_signing_key(path: Path, *, passphrase: str | None = None) -> SigningKey:
    """Read a private key made by :func:`write_key_pair` or by ``openssl genpkey -algorithm ed25519``.

    Args:
        path: The file.
        passphrase: Where the key is encrypted; the environment variable :data:`PASSPHRASE` otherwise.

    Raises:
        ConfigError: If the file cannot be read, is open to other users, is no Ed25519 key, or needs another
            passphrase.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    content = _read_secret(path)
    word = passphrase or os.environ.get(PASSPHRASE) or None
    encrypted = b"ENCRYPTED" in content
    if encrypted and word is None:
        raise ConfigError(f"The signing key is encrypted; expected its passphrase in the variable {PASSPHRASE}.")
    try:
        key = load_pem_private_key(content, password=word.encode() if encrypted and word else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        remedy = f"Is the passphrase in {PASSPHRASE} the right one?" if encrypted else _REMEDY
        raise ConfigError(f"Expected a private key in PEM form (PKCS8); it cannot be read. {remedy}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"Expected an Ed25519 private key, found one of another kind. {_REMEDY}")
    public, fingerprint = _described(key.public_key())
    return SigningKey(public=public, fingerprint=fingerprint, _private=key)


_REMEDY = "Make one with `medistill keygen --out NAME` and name NAME.key."


def _read_secret(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_LARGEST_KEY)
    except OSError as error:
        reason = error.strerror or "the operating system refused"
        raise ConfigError(f"The signing key cannot be read: {reason}. {_REMEDY}") from error
    if os.name != "nt" and mode & 0o077:
        raise ConfigError(
            f"The signing key is open to other users (mode {mode:04o}); expected 0600. "
            "Close it with `chmod 600`, and make a new one if somebody may have read it."
        )
    return content


def parse_public_key(content: bytes, *, what: str) -> VerifyingKey:
    """Read a public key without trusting it.

    Args:
        content: PEM.
        what: What it is called in a message.

    Raises:
        ReleaseError: If it is no Ed25519 public key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    try:
        key = load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ReleaseError(f"Expected {what} to be a public key in PEM form; it cannot be read.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ReleaseError(f"Expected {what} to be an Ed25519 public key; it is of another kind.")
    return VerifyingKey(fingerprint=_described(key)[1], _public=key)


def load_public_key(path: Path) -> VerifyingKey:
    """Read the public key that the owner of a release published.

    Raises:
        ConfigError: If the file cannot be read, or is no Ed25519 public key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_KEY)
    except OSError as error:
        reason = error.strerror or "the operating system refused"
        raise ConfigError(f"The public key cannot be read: {reason}. Name the .pub file of the owner.") from error
    try:
        return parse_public_key(content, what="the file named as key")
    except ReleaseError as error:
        raise ConfigError(f"{error} Name the .pub file of the release's owner.") from error


def _described(key: Ed25519PublicKey) -> tuple[bytes, str]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415

    plain = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), hashlib.sha256(plain).hexdigest()
