"""From a folder of DICOM files to a sealed release: the five verbs, one visible call each.

Example::

    python pipelines/hospital_release.py DICOM --labels labels.csv --out runs/release --ipc 10

For people who want to change a step: edit the call. Where settings alone are enough, ``medistill run CONFIG`` does
the same from a YAML file and skips what is unchanged.

Beside the release appears ``<out>-private`` with the cohort, its secret key, the names of quarantined files and
checkpoints. It never leaves the hospital. Interrupted, the same command goes on from the checkpoints.

Exit codes: 0 done, 1 failed, 2 usage or input, 3 gate not passed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import medistill
from medistill import ConfigError, MedistillError, OpenCurator, Split, TerminalProgress, Verdict, cohort_summary
from medistill.audit import AuditPolicy, attributes_of, audit
from medistill.distill import distill
from medistill.evaluate import EvaluationConfig, evaluate
from medistill.ingest import IngestConfig, ingest, load_or_create_key
from medistill.release import check_gate, verify_release, write_release

SEED = 0
# What --quick changes: enough to see every step work, too little for images that are of use.
QUICK = {
    "distribution_matching": {"networks": 3, "iterations": 60},
    "kernel_ridge": {"iterations": 15, "real_batch": 48, "pool": 3},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asked for; the options of :func:`main` say what each is."""

    dicom: Path
    labels: Path
    out: Path
    classes: tuple[str, ...] | None
    ipc: int
    size: int
    licence: str | None
    reason: str | None
    quick: bool


def hospital_release(s: Settings, private: Path, show: TerminalProgress) -> None:
    """Ingest, distil, audit, evaluate, release."""
    # Ingest: DICOM becomes a pseudonymised cohort, divided by patient.
    cohort = ingest(
        s.dicom,
        private / "cohort",
        key=load_or_create_key(private / "cohort.key"),
        labels=s.labels,
        config=IngestConfig(classes=s.classes),
        private_notes=private / "quarantine.csv",
        progress=show,
    )
    train, validation, holdout, test = (cohort.split(name).images(s.size) for name in Split)

    # Distil: the train patients become a few synthetic images. What the curator guarantees goes with them.
    curator, kept, settings = OpenCurator(train), private / "checkpoints", QUICK if s.quick else None
    made = distill(
        curator, ipc=s.ipc, seed=SEED, settings=settings, validation=validation, folder=kept, progress=show
    )

    # Audit: attacks on patients, each beside its controls. A measurement, never a guarantee.
    parts = {"train": train, "holdout": holdout, "reference": validation}
    policy = AuditPolicy(profile="quick" if s.quick else "default")
    stored = {"folder": kept, "controls": private / "controls", "attributes": attributes_of(cohort)}
    report = audit(made.distilled, **parts, policy=policy, seed=SEED, **stored, progress=show)
    show.say(f"audit: {report.verdict.value}")

    # Evaluate: what the images are worth beside real ones, on patients on whom nothing was chosen.
    tests, config = {"test": test, "holdout": holdout}, EvaluationConfig(seeds=1 if s.quick else 3)
    diagnosis = evaluate(
        made.distilled, train=train, validation=validation, tests=tests, config=config, seed=SEED, progress=show
    )

    # Release: through the gate, then sealed.
    check_gate(report, accept=frozenset({Verdict.PASS}), forced_reason=s.reason)
    write_release(
        s.out,
        distilled=made.distilled,
        audit=report,
        diagnosis=diagnosis,
        cohort=cohort_summary(cohort),
        snapshots=made.snapshots,
        commands=("python pipelines/hospital_release.py …",),
        forced_reason=s.reason,
        licence=s.licence,
    )


def open_private(out: Path) -> Path:
    """The folder that stays inside; the cohort of an earlier call is made again under the same key."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("--out: expected a new or empty folder, found something there. Choose another name.")
    private = out.with_name(f"{out.name}-private")
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(private / "cohort", ignore_errors=True)
    return private


def main(
    dicom: Annotated[Path, typer.Argument(help="Folder of DICOM files.")],
    labels: Annotated[Path, typer.Option(help="CSV keyed by SOPInstanceUID, PatientID or file, with a label.")],
    out: Annotated[Path, typer.Option(help="New folder of the release.")],
    classes: Annotated[str, typer.Option(help="Order of the classes: NEGATIVE,POSITIVE for two.")] = "",
    ipc: Annotated[int, typer.Option(min=1, help="Images per class.")] = 10,
    size: Annotated[int, typer.Option(min=16, help="Side length of the released images in pixels.")] = 64,
    licence: Annotated[str, typer.Option(help="Licence of the release, for example CC-BY-4.0.")] = "",
    force_with_reason: Annotated[str, typer.Option(help="Release although the gate was not passed.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the images are of no use.")] = False,
) -> None:
    """Turn DICOM files into a sealed release.

    Example: python pipelines/hospital_release.py DICOM --labels labels.csv --out runs/release --ipc 10
    """
    order, reason = tuple(classes.split(",")) if classes else None, force_with_reason or None
    s = Settings(
        dicom=dicom, labels=labels, out=out, classes=order, ipc=ipc, size=size,
        licence=licence or None, reason=reason, quick=quick,
    )  # fmt: skip
    try:
        hospital_release(s, open_private(out), TerminalProgress())
        verified = verify_release(out)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"Sealed {out}: {verified.files} files, audit {verified.verdict}. {verified.privacy}")


if __name__ == "__main__":
    medistill.prepare_cpu()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
