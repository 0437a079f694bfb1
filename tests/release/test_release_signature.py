"""Who sealed a release: keys, signatures, and everything about them that is refused."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from example_release import TWO, audit_report, distilled_set
from typer.testing import CliRunner

from medistill.cli import app
from medistill.errors import ConfigError, OutputError, ReleaseError
from medistill.release import signature
from medistill.release.folder import write_release
from medistill.release.seal import LARGEST_SEAL, seal
from medistill.release.signature import load_public_key, load_signing_key, write_key_pair
from medistill.release.verify import load_release, verify_release


def write(out, key=None):
    distilled = distilled_set(TWO, ipc=2)
    return write_release(
        out,
        distilled=distilled,
        audit=audit_report(distilled),
        diagnosis=None,
        cohort=None,
        snapshots=None,
        commands=(),
        signing_key=key,
    )


@pytest.fixture(scope="module", name="keys")
def _keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("owner", "other"):
        write_key_pair(folder / name)
    return folder


@pytest.fixture(scope="module", name="original")
def _original(tmp_path_factory, keys):
    return write(tmp_path_factory.mktemp("signed") / "release", load_signing_key(keys / "owner.key"))


@pytest.fixture(name="release")
def _release(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "release"))


def reseal(release, key=None):
    unsealed = ("SHA256SUMS", "SHA256SUMS.sig")
    files = {
        p.relative_to(release).as_posix(): p.read_bytes()
        for p in release.rglob("*")
        if p.is_file() and p.name not in unsealed
    }
    (release / "SHA256SUMS").write_bytes(seal(files))
    if key is not None:
        (release / "SHA256SUMS.sig").write_bytes(key.sign(seal(files)))


# -- keys -------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_pem_files_and_the_secret_one_is_closed(tmp_path):
    fingerprint = write_key_pair(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    private = serialization.load_pem_private_key((tmp_path / "a.key").read_bytes(), password=None)
    public = serialization.load_pem_public_key((tmp_path / "a.pub").read_bytes())
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    assert private.public_key().public_bytes_raw() == public.public_bytes_raw()
    assert b"BEGIN PRIVATE KEY" in (tmp_path / "a.key").read_bytes()
    assert load_signing_key(tmp_path / "a.key").fingerprint == fingerprint
    assert load_public_key(tmp_path / "a.pub").fingerprint == fingerprint
    assert write_key_pair(tmp_path / "b") != fingerprint


def test_the_secret_is_not_shown(keys):
    key = load_signing_key(keys / "owner.key")
    assert repr(key) == f"SigningKey(fingerprint={key.fingerprint!r})"


@pytest.mark.parametrize("there", ["a.key", "a.pub"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_key_is_never_overwritten(tmp_path, there, kind):
    if kind == "file":
        (tmp_path / there).write_text("precious")
    else:
        (tmp_path / there).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=f"Expected {there} to be new"):
        write_key_pair(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert kind != "file" or (tmp_path / there).read_text() == "precious"


def test_half_a_pair_is_not_left(tmp_path, monkeypatch):
    calls = iter((None, OSError(28, "No space left on device")))

    def fsync(descriptor):
        problem = next(calls)
        if problem:
            raise problem

    monkeypatch.setattr(signature.os, "fsync", fsync)
    with pytest.raises(OutputError, match="disk is full"):
        write_key_pair(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match=r"Cannot write a\.key"):
        write_key_pair(tmp_path / "absent" / "a")


def test_a_passphrase_locks_the_key(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDISTILL_KEY_PASSPHRASE", raising=False)
    fingerprint = write_key_pair(tmp_path / "a", passphrase="correct horse")
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / "a.key").read_bytes()
    with pytest.raises(ConfigError, match="expected its passphrase in the variable MEDISTILL_KEY_PASSPHRASE"):
        load_signing_key(tmp_path / "a.key")
    with pytest.raises(ConfigError, match="the right one") as caught:
        load_signing_key(tmp_path / "a.key", passphrase="wrong horse")
    assert "wrong horse" not in str(caught.value)
    monkeypatch.setenv("MEDISTILL_KEY_PASSPHRASE", "correct horse")
    assert load_signing_key(tmp_path / "a.key").fingerprint == fingerprint


def test_a_passphrase_for_a_key_without_one_is_not_needed(keys, monkeypatch):
    monkeypatch.setenv("MEDISTILL_KEY_PASSPHRASE", "anything")
    assert load_signing_key(keys / "owner.key").fingerprint


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_open_to_others_is_refused(keys, tmp_path, mode):
    shutil.copy(keys / "owner.key", tmp_path / "k.key")
    (tmp_path / "k.key").chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        load_signing_key(tmp_path / "k.key")


def test_other_keys_are_refused(tmp_path, keys):
    elliptic = ec.generate_private_key(ec.SECP256R1())
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    forms = {
        "another kind": elliptic.private_bytes(*pem),
        "cannot be read": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "private key in PEM form": (keys / "owner.pub").read_bytes(),
    }
    for message, content in forms.items():
        path = tmp_path / "k.key"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=message):
            load_signing_key(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_signing_key(tmp_path / "absent.key")
    with pytest.raises(ConfigError, match="No such file"):
        load_public_key(tmp_path / "absent.pub")
    with pytest.raises(ConfigError, match=r"Name the \.pub file"):
        load_public_key(keys / "owner.key")


# -- signatures -------------------------------------------------------------------------------------------------


def test_a_signed_release_says_so(original, keys):
    fingerprint = load_public_key(keys / "owner.pub").fingerprint
    alone, known = verify_release(original), verify_release(original, key=keys / "owner.pub")
    assert (alone.signed_by, alone.known_key) == (fingerprint, False)
    assert (known.signed_by, known.known_key) == (fingerprint, True)
    loaded = load_release(original, key=keys / "owner.pub")
    assert loaded.card["signature"] == {"algorithm": "Ed25519", "fingerprint": fingerprint}
    assert fingerprint in (original / "README.md").read_text()
    assert (original / "signer.pub").read_bytes() == (keys / "owner.pub").read_bytes()


def test_the_signature_is_that_of_the_sums_by_an_independent_program(original):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "signer.pub", "-rawin"]
    check += ["-in", "SHA256SUMS", "-sigfile", "SHA256SUMS.sig"]
    if subprocess.run(["openssl", "version"], capture_output=True, check=True).stdout < b"OpenSSL 3":
        pytest.skip("needs openssl 3")
    done = subprocess.run(check, cwd=original, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    der = ["openssl", "pkey", "-pubin", "-in", "signer.pub", "-outform", "DER"]
    plain = subprocess.run(der, cwd=original, capture_output=True, check=True).stdout
    assert signature.hashlib.sha256(plain).hexdigest() == verify_release(original).signed_by


def test_the_same_run_and_key_give_the_same_bytes(original, keys, tmp_path):
    again = write(tmp_path / "again", load_signing_key(keys / "owner.key"))
    names = sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert Path("SHA256SUMS.sig") in names
    for name in names:
        assert (original / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["images.safetensors", "card.json", "signer.pub", "distilled.dcm", "README.md"])
def test_a_changed_byte(release, keys, name, given):
    content = bytearray((release / name).read_bytes())
    content[len(content) // 2] ^= 1
    (release / name).write_bytes(content)
    with pytest.raises(ReleaseError, match=f"changed: {name}"):
        verify_release(release, key=keys / "owner.pub" if given else None)


def test_a_resealed_change_breaks_the_signature(release):
    (release / "README.md").write_text("Epsilon is 0.1.")
    reseal(release)
    with pytest.raises(ReleaseError, match="is not the signature of this SHA256SUMS"):
        verify_release(release)


@pytest.mark.parametrize("position", [0, 31, 32, 63])
def test_a_changed_signature(release, position):
    content = bytearray((release / "SHA256SUMS.sig").read_bytes())
    content[position] ^= 1
    (release / "SHA256SUMS.sig").write_bytes(content)
    with pytest.raises(ReleaseError, match="is not the signature"):
        verify_release(release)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 1_000_000])
def test_a_signature_of_another_length(release, content):
    (release / "SHA256SUMS.sig").write_bytes(content)
    with pytest.raises(ReleaseError, match="is not the signature"):
        verify_release(release)


def test_a_longer_signature_that_begins_rightly(release):
    with (release / "SHA256SUMS.sig").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ReleaseError, match="is not the signature"):
        verify_release(release)


def test_a_signature_by_another_key(release, keys):
    key = load_signing_key(keys / "other.key")
    (release / "SHA256SUMS.sig").write_bytes(key.sign((release / "SHA256SUMS").read_bytes()))
    with pytest.raises(ReleaseError, match="is not the signature"):
        verify_release(release)


def test_a_release_signed_anew_by_somebody_else(keys, tmp_path):
    theirs = write(tmp_path / "theirs", load_signing_key(keys / "other.key"))
    assert verify_release(theirs).signed_by == load_public_key(keys / "other.pub").fingerprint
    with pytest.raises(ReleaseError, match="signed by another key"):
        verify_release(theirs, key=keys / "owner.pub")
    with pytest.raises(ReleaseError, match="signed by another key"):
        load_release(theirs, key=keys / "owner.pub")


def test_a_key_exchanged_under_the_owners_card(release, keys):
    other = load_signing_key(keys / "other.key")
    (release / "signer.pub").write_bytes(other.public)
    reseal(release, other)
    with pytest.raises(ReleaseError, match=r"card\.json states"):
        verify_release(release)


@pytest.mark.parametrize("name", ["SHA256SUMS.sig", "signer.pub"])
def test_half_of_the_signature_is_gone(release, name):
    (release / name).unlink()
    if name == "signer.pub":
        reseal(release)
    with pytest.raises(ReleaseError, match=f"{name} is gone"):
        verify_release(release)


def test_a_stripped_signature_is_seen_by_the_card(release):
    (release / "SHA256SUMS.sig").unlink()
    (release / "signer.pub").unlink()
    reseal(release)
    with pytest.raises(ReleaseError, match=r"card\.json states '[0-9a-f]{64}' as signer; .* by no key"):
        verify_release(release)


def test_an_unsigned_release_is_refused_where_a_key_is_given(keys, tmp_path):
    plain = write(tmp_path / "plain")
    assert verify_release(plain).signed_by is None
    assert "This release is not signed" in (plain / "README.md").read_text()
    with pytest.raises(ReleaseError, match="is not signed"):
        verify_release(plain, key=keys / "owner.pub")


@pytest.mark.parametrize("content", [b"", b"x", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_an_enclosed_key_that_is_none(release, content):
    (release / "signer.pub").write_bytes(content)
    reseal(release)
    with pytest.raises(ReleaseError, match=r"signer\.pub to be a public key"):
        verify_release(release)


def test_an_enclosed_key_of_another_kind(release):
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (release / "signer.pub").write_bytes(public.public_bytes(*form))
    reseal(release)
    with pytest.raises(ReleaseError, match="of another kind"):
        verify_release(release)


def test_a_linked_signature(release, tmp_path):
    shutil.move(release / "SHA256SUMS.sig", tmp_path / "sig")
    (release / "SHA256SUMS.sig").symlink_to(tmp_path / "sig")
    with pytest.raises(ReleaseError, match=r"a link, not a file: 'SHA256SUMS\.sig'"):
        verify_release(release)


def test_a_folder_in_the_place_of_the_signature(release):
    (release / "SHA256SUMS.sig").unlink()
    (release / "SHA256SUMS.sig").mkdir()
    with pytest.raises(ReleaseError, match="added folder"):
        verify_release(release)


def test_an_added_or_removed_file_of_a_signed_release(release, keys):
    (release / "extra.txt").write_text("x")
    (release / "labels.csv").unlink()
    with pytest.raises(ReleaseError) as caught:
        verify_release(release, key=keys / "owner.pub")
    assert "added: 'extra.txt'" in str(caught.value)
    assert "missing: labels.csv" in str(caught.value)


def test_an_enormous_seal_is_not_read(release):
    with (release / "SHA256SUMS").open("ab") as file:
        file.truncate(LARGEST_SEAL + 1)
    with pytest.raises(ReleaseError, match="larger than"):
        verify_release(release)


def test_many_problems_are_not_all_listed(release):
    (release / "SHA256SUMS").write_text("nonsense\n" * 1000)
    with pytest.raises(ReleaseError, match=r"and \d{3,} more") as caught:
        verify_release(release)
    assert len(str(caught.value).splitlines()) < 30


def test_an_unknown_deep_folder_is_not_entered(release):
    deep = release / "x"
    for _ in range(400):
        deep = deep / "y"
    os.makedirs(deep)
    with pytest.raises(ReleaseError) as caught:
        verify_release(release)
    assert str(caught.value).count("added") == 1


# -- commands ---------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_keygen_and_verify_by_the_command_line(tmp_path, original, keys, monkeypatch):
    monkeypatch.delenv("MEDISTILL_KEY_PASSPHRASE", raising=False)
    made = invoke("keygen", "--out", tmp_path / "hospital")
    assert made.exit_code == 0, made.output
    fingerprint = load_public_key(tmp_path / "hospital.pub").fingerprint
    assert f"fingerprint {fingerprint}" in made.stdout
    assert "not encrypted" in made.stdout
    again = invoke("keygen", "--out", tmp_path / "hospital")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "never overwritten" in again.stderr

    signer = load_public_key(keys / "owner.pub").fingerprint
    alone = invoke("verify", original)
    assert alone.exit_code == 0
    assert f"Signed by key {signer}, whose owner you must check." in alone.stdout
    assert (
        f"Signed by the key you gave: {signer}" in invoke("verify", original, "--key", keys / "owner.pub").stdout
    )
    wrong = invoke("verify", original, "--key", tmp_path / "hospital.pub")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "signed by another key" in wrong.stderr
    plain = invoke("verify", write(tmp_path / "plain"))
    assert "Not signed" in plain.stdout


def test_keygen_encrypts_with_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDISTILL_KEY_PASSPHRASE", "correct horse")
    made = invoke("keygen", "--out", tmp_path / "hospital")
    assert made.exit_code == 0
    assert "encrypted" in made.stdout
    assert "correct horse" not in made.output
    assert b"ENCRYPTED" in (tmp_path / "hospital.key").read_bytes()
