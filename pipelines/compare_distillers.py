"""Every distiller side by side: data x method x images per class x network x seed, with intervals and costs.

Example::

    python pipelines/compare_distillers.py configs/compare_distillers.yaml --jobs 2

The configuration names cohorts (or sources, which are ingested when they are used first), methods with their
settings, and the CPU seconds that each distillation may take. Every cell runs in a process of its own and leaves
one file, so that an interrupted comparison goes on where it was. The folder stays inside: it holds the cohorts.

Exit codes: 0 done, 1 a cell failed (the table says so), 2 usage or input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medistill import MedistillError, TerminalProgress, prepare_cpu
from medistill.studies import ComparisonConfig, cohort_of, compare, estimate_seconds, plan_cells, read_study

# What --quick changes: enough to see every step work, too little for figures that are of use.
QUICK = {"ipc": [1], "seeds": [0], "students": 1, "budget_seconds": 5, "draws": 100, "real_epochs": 1}


def main(
    config: Annotated[Path, typer.Argument(help="YAML file, like configs/compare_distillers.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results, not the one in the file.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; more than cores distorts the times.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells again that failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells with an estimate, run none.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the figures are of no use.")] = False,
) -> None:
    """Compare distillers under one protocol and one budget.

    Example: python pipelines/compare_distillers.py configs/compare_distillers.yaml --jobs 2
    """
    show = TerminalProgress()
    try:
        folder, sections, values = read_study(config, "data")
        compared = ComparisonConfig.from_values({**values, **(QUICK if quick else {})})
        folder = out or folder
        data = {
            name: cohort_of(f"data.{name}", section, folder / "data" / name, show)
            for name, section in sections.items()
        }
        if dry_run:
            cells = plan_cells(compared, data)
            seconds = [estimate_seconds(cell, compared) for cell in cells]
            for cell, needed in zip(cells, seconds, strict=True):
                count = f"{cell.ipc} per class" if cell.ipc else "all images"
                typer.echo(f"{cell.data}  {cell.contestant.name}  {count}  seed {cell.seed}  about {needed:.0f} s")
            typer.echo(f"{len(cells)} cells, about {sum(seconds) / 60 / jobs:.0f} minutes with --jobs {jobs}")
            return
        found = compare(compared, data, folder, jobs=jobs, retry=retry, progress=show)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    for row in found.rows:
        auroc = row.estimate()
        count, failed = row.ipc or "all", f"  {row.failed} FAILED: {row.error}" if row.failed else ""
        measured = f"AUROC {auroc}  {row.cpu_seconds:.1f} CPU s  {row.peak_rss_mb} MB" if auroc else ""
        typer.echo(f"{row.data}  {count:>3}  {row.method:<32}{row.network}  {measured}{failed}")
    typer.echo(f"Wrote {found.page.with_suffix('.csv').name}, .json and .html beside the cells.")
    if any(row.failed for row in found.rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    prepare_cpu()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
