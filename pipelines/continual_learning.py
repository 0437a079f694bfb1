"""Class-incremental learning on distilled memory: hospitals join one after another, nobody's data is seen twice.

Example::

    python pipelines/continual_learning.py configs/continual_learning.yaml --jobs 2

The classes of several cohorts make one task and arrive in steps, in an order drawn from each seed. Each step
distils its classes once; after it a network is trained from scratch on the memory of all classes so far and must
tell them all apart. Beside it stand real memories of the same size, all real images, and a network that is trained
on without any memory. This measures recognition across sites and modalities, not a diagnosis within one of them.

Finished cells and memories are kept, so that an interrupted run goes on where it was. The folder stays inside: it
holds the cohorts and the memories of real images.

Exit codes: 0 done, 1 failed, 2 usage or input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medistill import MedistillError, TerminalProgress, prepare_cpu
from medistill.studies import ContinualConfig, cohort_of, learn_continually, read_study

# What --quick changes: enough to see every step work, too little for figures that are of use.
QUICK = {
    "seeds": [0],
    "ipc": 2,
    "epochs": 5,
    "real_epochs": 1,
    "draws": 100,
    "settings": {
        "distribution_matching": {"networks": 1, "iterations": 5},
        "kernel_ridge": {"iterations": 3, "real_batch": 16, "pool": 2},
    },
}


def main(
    config: Annotated[Path, typer.Argument(help="YAML file, like configs/continual_learning.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results, not the one in the file.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the figures are of no use.")] = False,
) -> None:
    """Learn classes one step after another from distilled memory.

    Example: python pipelines/continual_learning.py configs/continual_learning.yaml --jobs 2
    """
    show = TerminalProgress()
    try:
        folder, sections, values = read_study(config, "sites")
        if quick:
            values |= QUICK if values.get("method", "auto") == "auto" else {**QUICK, "settings": {}}
        learned, folder = ContinualConfig.from_values(values), out or folder
        sites = {
            name: cohort_of(f"sites.{name}", section, folder / "data" / name, show)
            for name, section in sections.items()
        }
        curves = learn_continually(learned, sites, folder, jobs=jobs, progress=show)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    for curve in curves:
        typer.echo(
            f"{curve.steps:>2} steps  {curve.arm:<10} accuracy: mean of steps {curve.average_accuracy}, "
            f"at the end {curve.accuracy[-1]}  forgetting {curve.forgetting}  trained on {curve.images[-1]}"
        )
    typer.echo("Wrote continual.csv, .json and .html beside the cells.")


if __name__ == "__main__":
    prepare_cpu()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
