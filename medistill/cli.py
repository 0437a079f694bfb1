"""The command line: one verb after the other, ``medistill VERB --help`` for each.

Exit codes: 0 done, 1 failed, 2 usage or input, 3 gate not passed, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import shutil
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from medistill import __version__
from medistill.cpu import prepare_cpu
from medistill.errors import ConfigError, MedistillError, OutputError
from medistill.progress import Progress, TerminalProgress

if TYPE_CHECKING:
    from medistill.core.cohort import Cohort

Parameters = ParamSpec("Parameters")

app = typer.Typer(
    name="medistill",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn medical images that may not be shared into a small synthetic *release* that trains a diagnostic "
    "model, with a privacy statement that can be checked.\n\n"
    "Start with `medistill demo`, then `medistill run CONFIG`.",
)
_options = {"quiet": False, "debug": False}


class Listing(StrEnum):
    """What ``medistill list`` can list."""

    DISTILLERS = "distillers"
    ATTACKS = "attacks"
    NETWORKS = "networks"
    SOURCES = "sources"


class SourceKind(StrEnum):
    """What ``medistill ingest`` reads."""

    FOLDER = "folder"
    IMAGE_FOLDER = "image_folder"
    NPZ = "npz"


def _guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """One clear line and the right exit code for everything that can go wrong."""

    @functools.wraps(command)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, SystemExit):
            raise
        except BaseException as error:
            if _options["debug"] and not isinstance(error, KeyboardInterrupt):
                raise
            message, code = _explain(error)
            typer.echo(message, err=True)
            raise typer.Exit(code) from None

    return guarded


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, MedistillError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: nothing was half-written; finished stages and checkpoints are kept.", 130
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "error: the disk is full. Nothing was half-written; free some space and run the command again.", 2
    if isinstance(error, PermissionError):
        return "error: a file or folder may not be read or written with your permissions.", 2
    where = _innermost(error)
    return f"error: unexpected {type(error).__name__} in {where}. Run with --debug for the traceback.", 1


def _innermost(error: BaseException) -> str:
    """Module and line of ours nearest to where it happened; the message itself could quote a patient."""
    found, trace = "medistill", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("medistill"):
            found = f"{name} line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _progress() -> Progress:
    return TerminalProgress(quiet=_options["quiet"])


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks; they can quote patient data.")] = False,
) -> None:
    """Options before the verb."""
    _options.update(quiet=quiet, debug=debug)


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("medistill-demo"),
    patients: Annotated[int, typer.Option(min=60, help="Phantom patients.")] = 400,
) -> None:
    """Show the whole job on a synthetic gastric X-ray cohort, in about two minutes.

    Example: `medistill demo --out medistill-demo`
    """
    from medistill.workflow import demo_config

    _run(demo_config(out, patients=patients))


@app.command()
@_guarded
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

    result = run_config(config, progress=_progress())
    if not result.ran:
        typer.echo("Nothing to do: every stage is unchanged.")
    for line in result.lines:
        typer.echo(line)
    typer.echo(f"Report: {result.report}")


@app.command()
@_guarded
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
    summary = write_phantom(out, config, progress=_progress(), jobs=None)
    typer.echo(f"{summary.images} images of {summary.patients} patients in {out}")


@app.command()
@_guarded
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
        images, out, table=table, label_column=label_column, label_names=names, progress=_progress(), jobs=None
    )
    typer.echo(f"{summary.images} images of {summary.patients} patients in {out}")


def _pair(entry: str) -> tuple[str, str]:
    value, separator, name = entry.partition("=")
    if not separator:
        raise ConfigError(f"Expected --label-name VALUE=NAME, got {entry!r}.")
    return value, name


@app.command()
@_guarded
def ingest(
    source: Annotated[Path, typer.Argument(help="What to read.")],
    out: Annotated[Path, typer.Option(help="New cohort folder.")],
    labels: Annotated[Path | None, typer.Option(help="CSV keyed by SOPInstanceUID, PatientID or file.")] = None,
    kind: Annotated[SourceKind, typer.Option(help="What the source is.")] = SourceKind.FOLDER,
    key: Annotated[
        Path | None, typer.Option(help="Secret key of the pseudonyms; made if absent. Keep it inside.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Stored side length in pixels.")] = 256,
    label_column: Annotated[str, typer.Option(help="Column of the CSV that holds the label.")] = "label",
    classes: Annotated[str, typer.Option(help="Order of the classes: NEGATIVE,POSITIVE for two.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
) -> None:
    """Turn images into a de-identified cohort, split by patient; bad files go to quarantine with a reason.

    Example: `medistill ingest dicom --labels labels.csv --classes normal,pneumonia --out cohort`
    """
    from medistill.ingest import IngestConfig, load_or_create_key
    from medistill.ingest import ingest as ingest_source
    from medistill.registry import SOURCES

    opened = SOURCES.load(kind.value)(source)
    len(opened)  # a missing source is reported before anything is made
    cohort = ingest_source(
        opened,
        out,
        key=load_or_create_key(key or out.with_name(f"{out.name}.key")),
        labels=labels,
        config=IngestConfig(
            size=size, label_column=label_column, classes=tuple(classes.split(",")) if classes else None, seed=seed
        ),
        private_notes=out.with_name(f"{out.name}.quarantine.private.csv"),
        progress=_progress(),
        jobs=None,
    )
    for name, counts in cohort.counts().items():
        typer.echo(f"{name:<11} {counts['images']:>7} images of {counts['patients']:>6} patients")


@app.command()
@_guarded
def distill(
    cohort: Annotated[Path, typer.Argument(help="Cohort folder made by ingest.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    method: Annotated[str, typer.Option(help="auto, a distiller, or several joined by +.")] = "auto",
    ipc: Annotated[int, typer.Option(min=1, help="Images per class.")] = 10,
    size: Annotated[int, typer.Option(min=16, help="Side length in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="DISTILLER.NAME=VALUE", help="Change a setting; repeatable."),
    ] = None,
) -> None:
    """Distil the train patients of a cohort into a few synthetic images with soft labels.

    Interrupted, the same command goes on from its checkpoint.

    Example: `medistill distill cohort --method auto --ipc 10 --out run`
    """
    from medistill.config import check_settings
    from medistill.distill import distill as distil
    from medistill.distill import resolve_method
    from medistill.privacy.curator import OpenCurator
    from medistill.workflow import remember_cohort, save_run_distilled

    if (out / "distilled").exists():
        raise OutputError(
            "The run folder holds a distilled set already. Choose a new one, so that its audit stays with it."
        )
    real = _cohort(cohort)
    chosen = resolve_method(method, real.task, ipc)
    typer.echo(f"{' + '.join(chosen.distillers)}: {chosen.why}", err=True)
    result = distil(
        OpenCurator(real.split("train").images(size)),
        method=method,
        ipc=ipc,
        seed=seed,
        settings=check_settings(method, _settings(settings or [])),
        validation=real.split("validation").images(size),
        folder=out / "checkpoints",
        progress=_progress(),
    )
    for stale in ("audit.json", "diagnosis.json"):
        (out / stale).unlink(missing_ok=True)
    save_run_distilled(out, result.distilled, result.snapshots)
    remember_cohort(out, real)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    typer.echo(f"{len(result.distilled)} images of {size} px in {out}")


def _settings(entries: list[str]) -> dict[str, dict[str, Any]]:
    from medistill.config import parse_value

    settings: dict[str, dict[str, Any]] = {}
    for entry in entries:
        path, separator, text = entry.partition("=")
        distiller, dot, name = path.partition(".")
        if not (separator and dot):
            raise ConfigError(f"Expected --set DISTILLER.NAME=VALUE, got {entry!r}.")
        settings.setdefault(distiller, {})[name] = parse_value(text, option=f"--set {path}")
    return settings


def _cohort(path: Path) -> Cohort:
    from medistill.ingest import load_cohort

    return load_cohort(path)


@app.command()
@_guarded
def audit(
    run: Annotated[Path, typer.Argument(help="Run folder made by distill.")],
    cohort: Annotated[Path, typer.Option(help="Cohort it was distilled from.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Attack a distilled set, with a positive and a negative control beside every attack.

    Only the verdict PASS exits 0; every other verdict exits 3.

    Example: `medistill audit run --cohort cohort`
    """
    import json

    from medistill.audit import audit as attack
    from medistill.core.reports import Verdict
    from medistill.release.tensors import load_distilled
    from medistill.workflow import require_cohort, write_text

    distilled = load_distilled(run / "distilled")
    real, size = _cohort(cohort), distilled.images.shape[-1]
    require_cohort(run, real)
    report = attack(
        distilled,
        train=real.split("train").images(size),
        holdout=real.split("holdout").images(size),
        reference=real.split("validation").images(size),
        seed=seed,
        folder=run / "checkpoints",
        progress=_progress(),
    )
    write_text(run / "audit.json", json.dumps(report.to_json(), indent=2) + "\n")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for outcome in report.outcomes:
        typer.echo(f"{outcome.attack}: {outcome.verdict.value}. {outcome.summary}")
        for control in outcome.controls:
            typer.echo(f"  {'ok    ' if control.passed else 'FAILED'} {control.name}: {control.observed}")
    typer.echo(f"Verdict: {report.verdict.value}")
    if report.verdict is not Verdict.PASS:
        raise typer.Exit(3)


@app.command()
@_guarded
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder made by distill.")],
    cohort: Annotated[Path, typer.Option(help="Cohort it was distilled from.")],
    seeds: Annotated[int, typer.Option(min=1, help="Networks per arm.")] = 3,
    network: Annotated[str, typer.Option(help="See `medistill list networks`.")] = "convnet",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compare training on the distilled set with training on real images, on patients held out.

    Example: `medistill evaluate run --cohort cohort --seeds 3`
    """
    import json

    from medistill.evaluate import EvaluationConfig
    from medistill.evaluate import evaluate as compare
    from medistill.release.tensors import load_distilled
    from medistill.workflow import require_cohort, write_text

    distilled = load_distilled(run / "distilled")
    real, size = _cohort(cohort), distilled.images.shape[-1]
    require_cohort(run, real)
    report = compare(
        distilled,
        train=real.split("train").images(size),
        validation=real.split("validation").images(size),
        tests={name: real.split(name).images(size) for name in ("test", "holdout")},
        config=EvaluationConfig(seeds=seeds, network=network),
        seed=seed,
        progress=_progress(),
    )
    write_text(run / "diagnosis.json", json.dumps(report.to_json(), indent=2) + "\n")
    for arm in report.arms:
        typer.echo(f"{arm.split:<8} {arm.arm:<15} {arm.images:>6} images  AUROC {arm.metrics['auroc']}")


@app.command()
@_guarded
def release(
    run: Annotated[Path, typer.Argument(help="Run folder with distilled/, audit.json and diagnosis.json.")],
    out: Annotated[Path, typer.Option(help="New release folder.")],
    cohort: Annotated[Path | None, typer.Option(help="Cohort, for the data-flow part of the report.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the release, for example CC-BY-4.0.")] = "",
    force_with_reason: Annotated[
        str | None, typer.Option(help="Release although the gate was not passed; the reason is printed on it.")
    ] = None,
) -> None:
    """Seal a release folder, if the audit passed.

    Example: `medistill release run --cohort cohort --out release`
    """
    from medistill.core.reports import Verdict
    from medistill.release.folder import write_release
    from medistill.release.gate import check_gate
    from medistill.release.tensors import load_distilled
    from medistill.workflow import cohort_summary, load_audit, load_diagnosis, load_snapshots

    distilled = load_distilled(run / "distilled")
    report = load_audit(run)
    check_gate(report, accept=frozenset({Verdict.PASS}), forced_reason=force_with_reason)
    write_release(
        out,
        distilled=distilled,
        audit=report,
        diagnosis=load_diagnosis(run),
        cohort=cohort_summary(_cohort(cohort)) if cohort else None,
        snapshots=load_snapshots(run),
        commands=("medistill ingest …", "medistill distill …", "medistill audit …", "medistill evaluate …"),
        forced_reason=force_with_reason,
        licence=licence or None,
    )
    typer.echo(f"Sealed {out}; report: {out / 'report.html'}")


@app.command()
@_guarded
def train(
    release: Annotated[Path, typer.Argument(help="Release folder.")],
    out: Annotated[Path, typer.Option(help="New model folder.")],
    network: Annotated[str, typer.Option(help="See `medistill list networks`.")] = "convnet",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a diagnostic model on a release, after verifying its seal.

    Example: `medistill train release --out model`
    """
    from medistill.diagnose import train_on_release

    train_on_release(release, out, network=network, seed=seed, progress=_progress())
    typer.echo(f"Model in {out}")


@app.command()
@_guarded
def verify(release: Annotated[Path, typer.Argument(help="Release folder.")]) -> None:
    """Check that a release is complete and unchanged, and print its privacy statement.

    Example: `medistill verify release`
    """
    from medistill.release.verify import verify_release

    verified = verify_release(release)
    typer.echo(f"Unchanged: {verified.files} files, {verified.bytes} bytes.")
    typer.echo(verified.privacy)
    typer.echo(f"Audit verdict: {verified.verdict}")


@app.command(name="list")
@_guarded
def list_names(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List what is registered under a kind.

    Example: `medistill list distillers`
    """
    from medistill import registry

    for entry in (registry.DISTILLERS, registry.ATTACKS, registry.NETWORKS, registry.SOURCES):
        if entry.kind == what.value:
            typer.echo("\n".join(entry.names()))


@app.command()
@_guarded
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


def main() -> None:
    """Entry point of ``medistill`` and ``python -m medistill``."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    prepare_cpu()
    app()
