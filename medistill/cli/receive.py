"""The receiving side: verify a release, train on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medistill.cli.app import app, guarded, progress


@app.command()
@guarded
def train(
    release: Annotated[Path, typer.Argument(help="Release folder.")],
    out: Annotated[Path, typer.Option(help="New model folder.")],
    network: Annotated[str, typer.Option(help="See `medistill list networks`.")] = "convnet",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train a diagnostic model on a release, after verifying its seal.

    Example: `medistill train release --out model`
    """
    from medistill.core.compute import Compute
    from medistill.diagnose import train_on_release

    compute = Compute(device=device)
    train_on_release(release, out, network=network, seed=seed, compute=compute, progress=progress())
    typer.echo(f"Model in {out}")


@app.command()
@guarded
def verify(release: Annotated[Path, typer.Argument(help="Release folder.")]) -> None:
    """Check that a release is complete and unchanged, and print its privacy statement.

    Example: `medistill verify release`
    """
    from medistill.release.verify import verify_release

    verified = verify_release(release)
    typer.echo(f"Unchanged: {verified.files} files, {verified.bytes} bytes.")
    typer.echo(verified.privacy)
    typer.echo(f"Audit verdict: {verified.verdict}")
