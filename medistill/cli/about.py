"""What is registered, whether the installation works, the version."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from medistill import __version__
from medistill.cli.app import app, guarded


class Listing(StrEnum):
    """What ``medistill list`` can list."""

    DISTILLERS = "distillers"
    ATTACKS = "attacks"
    NETWORKS = "networks"
    SOURCES = "sources"


@app.command(name="list")
@guarded
def list_names(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List what is registered under a kind.

    Example: `medistill list distillers`
    """
    from medistill import registry

    for entry in (registry.DISTILLERS, registry.ATTACKS, registry.NETWORKS, registry.SOURCES):
        if entry.kind == what.value:
            typer.echo("\n".join(entry.names()))


@app.command()
@guarded
def doctor() -> None:
    """Check the installation and say how to mend it.

    Example: `medistill doctor`
    """
    from medistill.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        typer.echo(f"{'ok     ' if finding.ok else 'PROBLEM'} {finding.what}: {finding.found}")
        if finding.remedy:
            typer.echo(f"        {finding.remedy}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version.

    Example: `medistill version`
    """
    typer.echo(__version__)
