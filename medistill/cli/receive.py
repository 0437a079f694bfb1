"""The receiving side: verify a release; keys to sign one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medistill.cli.app import app, guarded


@app.command()
@guarded
def verify(
    release: Annotated[Path, typer.Argument(help="Release folder.")],
    key: Annotated[
        Path | None,
        typer.Option(help="Public key of the owner, received apart from the folder.", metavar="NAME.pub"),
    ] = None,
) -> None:
    """Check that a release is complete, unchanged and rightly signed, and print its privacy statement.

    Without --key a signature is checked against the key in the folder, which anybody could have put there. With
    --key a release that this key did not sign is refused.

    Example: `medistill verify release --key hospital.pub`
    """
    from medistill.release.verify import verify_release

    verified = verify_release(release, key=key)
    typer.echo(f"Unchanged: {verified.files} files, {verified.bytes} bytes.")
    typer.echo(_signed(verified.signed_by, known=verified.known_key))
    typer.echo(verified.privacy)
    typer.echo(f"Audit verdict: {verified.verdict}")


def _signed(signed_by: str | None, *, known: bool) -> str:
    if signed_by is None:
        return "Not signed: this shows damage, not who made the folder."
    if known:
        return f"Signed by the key you gave: {signed_by}"
    return f"Signed by key {signed_by}, whose owner you must check."


@app.command()
@guarded
def keygen(
    out: Annotated[Path, typer.Option(help="Where to write NAME.key and NAME.pub.", metavar="NAME")],
) -> None:
    """Make an Ed25519 key pair for signing releases.

    NAME.key stays secret: mode 0600, and encrypted where MEDISTILL_KEY_PASSPHRASE holds a passphrase. NAME.pub, or
    the fingerprint printed here, is what receivers get, by another way than the release.

    Example: `medistill keygen --out hospital`
    """
    import os

    from medistill.release.signature import PASSPHRASE, write_key_pair

    passphrase = os.environ.get(PASSPHRASE) or None
    fingerprint = write_key_pair(out, passphrase=passphrase)
    kept = "encrypted" if passphrase else f"not encrypted; set {PASSPHRASE} to encrypt one"
    typer.echo(f"Secret: {out}.key ({kept})")
    typer.echo(f"Public: {out}.pub, fingerprint {fingerprint}")
