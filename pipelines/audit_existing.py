"""Audit images that somebody else made from a cohort: a GAN's or a diffusion model's output, or any other folder.

Example::

    python pipelines/audit_existing.py synthetic synthetic.csv --cohort runs/cohort --size 64 --out their-audit

``synthetic.csv`` has a column ``file`` and either ``label`` or one column of probabilities for every class. The
cohort must be divided as it was when the images were made: its train patients are those they were made from. The
audit page shows patients' images beside the closest ones and stays inside.

Exit codes: 0 the audit passed, 1 failed, 2 usage or input, 3 any other verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medistill import MedistillError, Split, TerminalProgress, Verdict, __version__, load_cohort, prepare_cpu
from medistill.audit import AuditPolicy, attributes_of, audit_images, outcome_lines, read_pictures, write_audit


def main(
    pictures: Annotated[Path, typer.Argument(help="Folder of PNG or JPEG images.")],
    table: Annotated[Path, typer.Argument(help="CSV: file, and label or one column a class.")],
    cohort: Annotated[Path, typer.Option(help="Cohort that the images were made from.")],
    size: Annotated[int, typer.Option(min=8, help="Side length at which images are compared.")],
    out: Annotated[Path, typer.Option(help="New folder for audit.json and audit.html.")],
    profile: Annotated[str, typer.Option(help="quick, default or full.")] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Attack somebody else's images, with positive and negative controls beside every attack.

    Example: python pipelines/audit_existing.py synthetic synthetic.csv --cohort cohort --size 64 --out their-audit
    """
    try:
        verdict = audit_existing(pictures, table, cohort, size, out, AuditPolicy(profile=profile), seed)
    except MedistillError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    if verdict is not Verdict.PASS:
        raise typer.Exit(3)


def audit_existing(
    pictures: Path, table: Path, cohort: Path, size: int, out: Path, policy: AuditPolicy, seed: int
) -> Verdict:
    """Read the images, attack them, and write what was found."""
    real = load_cohort(cohort)
    names = {"train": Split.TRAIN, "holdout": Split.HOLDOUT, "reference": Split.VALIDATION}
    parts = {part: real.split(name).images(size) for part, name in names.items()}
    release = read_pictures(pictures, table, task=real.task, image_shape=tuple(parts["train"].images.shape[1:]))
    known = attributes_of(real)
    report = audit_images(
        release, **parts, attributes=known, policy=policy, seed=seed, progress=TerminalProgress()
    )
    out.mkdir(parents=True, exist_ok=True)
    write_audit(out, report, release, statement=None, **parts, version=__version__)
    for line in outcome_lines(report):
        print(line)
    print(f"Page for the data protection officer (stays inside): {out / 'audit.html'}")
    print(f"Verdict: {report.verdict.value}")
    return report.verdict


if __name__ == "__main__":
    prepare_cpu()
    typer.run(main)
