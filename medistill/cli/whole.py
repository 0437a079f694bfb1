"""The whole job in one command, and cohorts to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medistill.cli.app import app, guarded, progress
from medistill.errors import ConfigError


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("medistill-demo"),
    patients: Annotated[int, typer.Option(min=60, help="Phantom patients.")] = 400,
) -> None:
    """Show the whole job on a synthetic gastric X-ray cohort, in about three minutes.

    Example: `medistill demo --out medistill-demo`
    """
    from medistill.workflow import demo_config

    _run(demo_config(out, patients=patients))
    release, model = out / "release", out / "model"
    typer.echo(
        "What whoever receives the release does next, here on films of patients who took no part:\n"
        f"  medistill verify {release}\n"
        f"  medistill train {release} --network ridge_convnet --out {model}\n"
        f"  medistill phantom {out / 'others'} --patients 12 --seed 99 --size 96\n"
        f"  medistill predict {model} {out / 'others' / 'dicom'} --out {out / 'predictions.csv'}"
    )


@app.command()
@guarded
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the configuration and stop.")] = False,
) -> None:
    """Run ingest, distill, audit, evaluate and release as a configuration says.

    Unchanged stages are not run again; an interrupted run goes on where it was.

    Example: `medistill run configs/phantom.yaml --set distill.ipc=1`
    """
    from medistill.config import load_config

    parsed = load_config(config, overrides or [])
    if dry_run:
        typer.echo("The configuration is valid.")
        return
    _run(parsed)


def _run(config: Any) -> None:
    from medistill.workflow import run as run_config

    result = run_config(config, progress=progress())
    if not result.ran:
        typer.echo("Nothing to do: every stage is unchanged.")
    for line in result.lines:
        typer.echo(line)
    typer.echo(f"Report: {result.report}")


@app.command()
@guarded
def phantom(
    out: Annotated[Path, typer.Argument(help="New folder for DICOM files, labels.csv and ground_truth.json.")],
    patients: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int, typer.Option(min=48, help="Side length in pixels.")] = 256,
) -> None:
    """Write a synthetic double-contrast gastric X-ray cohort as DICOM, the same bytes for the same seed.

    Example: `medistill phantom phantom-cohort --patients 50 --seed 1`
    """
    from medistill.ingest.phantom import PhantomConfig, write_phantom

    config = PhantomConfig(patients=patients, seed=seed, size=size)
    summary = write_phantom(out, config, progress=progress(), jobs=None)
    typer.echo(f"{summary.images} images of {summary.patients} patients in {out}")


@app.command()
@guarded
def wrap(
    images: Annotated[Path, typer.Argument(help="Folder or zip of PNG or JPEG images, or an npz.")],
    out: Annotated[Path, typer.Option(help="New folder for DICOM files and labels.csv.")],
    table: Annotated[Path | None, typer.Option(help="CSV with file, patient_id and label columns.")] = None,
    label_column: Annotated[str, typer.Option(help="Column of the CSV that holds the label.")] = "label",
    label_name: Annotated[
        list[str] | None, typer.Option(metavar="VALUE=NAME", help="Name for a label value; repeatable.")
    ] = None,
) -> None:
    """Wrap ordinary images as DICOM Computed Radiography files, for data that is not DICOM yet.

    Example: `medistill wrap images.zip --table metadata.csv --label-name 0=normal --label-name 1=ill --out dicom`
    """
    from medistill.ingest.wrap import wrap_images

    names = dict(_pair(entry) for entry in label_name or [])
    summary = wrap_images(
        images, out, table=table, label_column=label_column, label_names=names, progress=progress(), jobs=None
    )
    typer.echo(f"{summary.images} images of {summary.patients} patients in {out}")


def _pair(entry: str) -> tuple[str, str]:
    value, separator, name = entry.partition("=")
    if not separator:
        raise ConfigError(f"Expected --label-name VALUE=NAME, got {entry!r}.")
    return value, name
