"""From a source to a cohort, and what can be seen of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from medistill.cli.app import app, guarded, progress, remember_command
from medistill.errors import ConfigError


class SourceKind(StrEnum):
    """What ``medistill ingest`` reads."""

    AUTO = "auto"
    FOLDER = "folder"
    ARCHIVE = "archive"
    DICOMDIR = "dicomdir"
    DICOMWEB = "dicomweb"
    DIMSE = "dimse"
    NIFTI = "nifti"
    IMAGE_FOLDER = "image_folder"
    NPZ = "npz"


class Engine(StrEnum):
    """Where the work is done."""

    LOCAL = "local"
    RAY = "ray"


class BurnedIn(StrEnum):
    """What is done about text in pixels."""

    REJECT = "reject"
    MASK = "mask"
    ALLOW = "allow"


class Colour(StrEnum):
    """What becomes of colour images."""

    AUTO = "auto"
    GREY = "grey"
    RGB = "rgb"


class Volumes(StrEnum):
    """What an image of a series is."""

    SLICES = "slices"
    CUBES = "cubes"


@app.command()
@guarded
def ingest(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder, archive, file, https://… or dimse://TITLE@host:port.")],
    out: Annotated[Path, typer.Option(help="New cohort folder.")],
    labels: Annotated[Path | None, typer.Option(help="CSV keyed by SOPInstanceUID, PatientID or file.")] = None,
    kind: Annotated[SourceKind, typer.Option(help="What the source is.")] = SourceKind.AUTO,
    key: Annotated[
        Path | None, typer.Option(help="Secret key of the pseudonyms; made if absent. Keep it inside.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Stored side length in pixels.")] = 256,
    label_column: Annotated[str, typer.Option(help="Column of the CSV that holds the label.")] = "label",
    classes: Annotated[str, typer.Option(help="Order of the classes: NEGATIVE,POSITIVE for two.")] = "",
    multilabel: Annotated[
        bool, typer.Option("--multilabel", help="A label holds any subset of the classes: effusion;mass.")
    ] = False,
    no_class: Annotated[
        str | None, typer.Option(help="With --multilabel: the label of images without any class, such as none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    volumes: Annotated[Volumes, typer.Option(help="Slices one by one, or one cube per series.")] = Volumes.SLICES,
    colour: Annotated[Colour, typer.Option(help="Keep colour; auto: for an npz of colour.")] = Colour.AUTO,
    burned_in: Annotated[BurnedIn, typer.Option(help="Images with text in their pixels.")] = BurnedIn.REJECT,
    defaced: Annotated[bool, typer.Option("--defaced", help="Take CT and MR of heads: they are defaced.")] = False,
    own_patients: Annotated[
        bool, typer.Option("--own-patients", help="Take studies without patient for patients of their own.")
    ] = False,
    accept_partial: Annotated[
        bool, typer.Option("--accept-partial", help="Go on without images that a PACS did not send.")
    ] = False,
    study: Annotated[list[str] | None, typer.Option(help="PACS: Study Instance UID; repeatable.")] = None,
    series: Annotated[list[str] | None, typer.Option(help="PACS: Series Instance UID; repeatable.")] = None,
    date: Annotated[str, typer.Option(help="PACS: study date, 20240101-20241231.")] = "",
    modality: Annotated[list[str] | None, typer.Option(help="PACS: modality, CR; repeatable.")] = None,
    connect: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="PACS: user, token_file, ca_bundle, calling_aet, …; repeatable."),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="This machine, or a Ray cluster.")] = Engine.LOCAL,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
) -> None:
    """Turn images into a de-identified cohort, split by patient; bad files go to quarantine with a reason.

    Whatever stops it, the same command goes on where it was. The key, `OUT.key`, and the list of quarantined
    files, `OUT.quarantine.private.csv`, lie beside the cohort and stay in the hospital.

    Example: `medistill ingest dicom --labels labels.csv --classes normal,pneumonia --out cohort`

    Example: `medistill ingest films --labels findings.csv --multilabel --no-class none --out cohort`

    Example: `medistill ingest https://pacs/dicom-web --modality CR --date 20240101- --labels l.csv --out cohort`
    """
    from medistill.ingest import IngestConfig, load_or_create_key
    from medistill.ingest import ingest as ingest_source
    from medistill.ingest.sources import open_source

    wanted = {"studies": study, "series": series, "date": date, "modalities": modality}
    options = {**{name: value for name, value in wanted.items() if value}, **_connection(connect or [])}
    opened = open_source(kind.value, source, volumes=volumes.value, options=options)
    len(opened)  # a missing source is reported before anything is made
    cohort = ingest_source(
        opened,
        out,
        key=load_or_create_key(key or out.with_name(f"{out.name}.key")),
        labels=labels,
        config=IngestConfig(
            size=size,
            label_column=label_column,
            classes=tuple(classes.split(",")) if classes else None,
            labels="multilabel" if multilabel else "single",
            no_class=no_class,
            seed=seed,
            volumes=volumes.value,
            colour=colour.value,
            burned_in=burned_in.value,
            heads="defaced" if defaced else "reject",
            missing_patient="own" if own_patients else "reject",
            accept_partial=accept_partial,
        ),
        private_notes=out.with_name(f"{out.name}.quarantine.private.csv"),
        progress=progress(),
        jobs=jobs,
        engine=engine.value,
    )
    remember_command(context, out)
    for name, counts in cohort.counts().items():
        typer.echo(f"{name:<11} {counts['images']:>7} images of {counts['patients']:>6} patients")


@app.command()
@guarded
def deidentify(
    source: Annotated[str, typer.Argument(help="Folder, archive or DICOMDIR of DICOM files.")],
    out: Annotated[Path, typer.Option(help="New folder for the files and manifest.csv.")],
    key: Annotated[
        Path | None, typer.Option(help="Secret key of the pseudonyms; made if absent. Keep it inside.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="YAML that says what else is kept or dropped.")] = None,
    burned_in: Annotated[BurnedIn, typer.Option(help="Images with text in their pixels.")] = BurnedIn.REJECT,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
) -> None:
    """Write de-identified DICOM: each file rebuilt from a list of what may stay, then searched for what may not.

    The key, `OUT.key`, and the list of files left out, `OUT.quarantine.private.csv`, lie beside the folder and
    stay in the hospital.

    Example: `medistill deidentify scans --out clean`
    """
    from medistill.ingest import load_or_create_key
    from medistill.ingest.deidentify import deidentify_folder, load_profile
    from medistill.ingest.quarantine import REASON_CODES, count_codes
    from medistill.ingest.sources import open_source

    opened = open_source("auto", source)
    len(opened)  # a missing source is reported before anything is made
    summary = deidentify_folder(
        opened,
        out,
        key=load_or_create_key(key or out.with_name(f"{out.name}.key")),
        profile=load_profile(profile) if profile else None,
        burned_in=burned_in.value,
        notes=out.with_name(f"{out.name}.quarantine.private.csv"),
        progress=progress(),
        jobs=jobs,
    )
    typer.echo(f"{summary.written} files of {summary.patients} patients in {out}")
    for code, count in count_codes(summary.rejected).items():
        typer.echo(f"  {count:6d} {code:18s} {REASON_CODES[code]}")


@app.command()
@guarded
def inspect(
    cohort: Annotated[Path, typer.Argument(help="Cohort folder made by ingest.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page; the cohort's own by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed looks at other images.")] = 0,
) -> None:
    """Show what is in a cohort: counts, pictures, grey levels, and what could mislead a model.

    Writes `inspect.html`, `contact_sheet.png` and `quality.json`, readable by you only. They show patients'
    images: they stay in the hospital.

    Example: `medistill inspect cohort --out cohort-quality`
    """
    import json

    from rich.console import Console

    from medistill.report.quality import inspect_cohort, quality_lines, write_quality

    quality = inspect_cohort(cohort, seed=seed)
    page = write_quality(quality, cohort, out)
    if as_json:
        typer.echo(json.dumps(quality.to_json(), indent=2))
    else:
        Console().print(quality_lines(quality))
    typer.echo(f"Page: {page}", err=as_json)


def _connection(entries: list[str]) -> dict[str, Any]:
    """Settings of a connection; numbers and yes or no as YAML reads them."""
    from medistill.config import parse_value

    found: dict[str, Any] = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator:
            raise ConfigError("Expected --connect NAME=VALUE; found another form.")
        value = parse_value(text, option=f"--connect {name}")
        path = name.endswith(("_file", "_bundle", "_certificate", "_key")) or name == "spool"
        found[name] = Path(text) if path else value
    return found
