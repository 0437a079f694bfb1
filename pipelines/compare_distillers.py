"""Every distiller side by side: data x method x images per class x network x seed, with intervals and costs.

Example::

    python pipelines/compare_distillers.py configs/compare_distillers.yaml --jobs 2

The configuration names cohorts (or sources, which are ingested when they are used first), methods with their
settings, and the CPU seconds that each distillation may take. Every cell runs in a process of its own and leaves
one file, so that an interrupted comparison goes on where it was. The folder stays inside: it holds the cohorts.

Exit codes: 0 done, 1 a cell failed (the table says so), 2 usage or input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from medistill import ConfigError, MedistillError, PhantomConfig, TerminalProgress, load_config, write_phantom
from medistill.ingest import ingest, load_or_create_key
from medistill.studies import (
    ComparisonConfig,
    compare,
    estimate_seconds,
    plan_cells,
)

# What --quick changes: enough to see every step work, too little for figures that are of use.
QUICK = {"ipc": [1], "seeds": [0], "students": 1, "budget_seconds": 5, "draws": 100, "real_epochs": 1}


def cohort_of(name: str, section: Mapping[str, Any], folder: Path, show: TerminalProgress) -> tuple[Path, int]:
    """The cohort of one data section: the one it names, or its source ingested; and the side length of images."""
    unknown = set(section) - {"cohort", "size", "source", "ingest"}
    if unknown or ("cohort" in section) == ("source" in section):
        raise ConfigError(f"data.{name}: expected cohort and size, or source, ingest and size.")
    size = int(section.get("size", 64))
    if "cohort" in section:
        return Path(section["cohort"]), size
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The strict reader of `medistill run` reads the source too; the file says later what was ingested.
    parts = {"source": section["source"], "ingest": {"size": size, **section.get("ingest", {})}}
    written = yaml.safe_dump({"output": str(folder), **parts, "distill": {"size": size}}, sort_keys=False)
    if (folder / "cohort").exists():
        if (folder / "source.yaml").read_text(encoding="utf-8") != written:
            raise ConfigError(f"data.{name}: another source was ingested under this name. Choose another name.")
        return folder / "cohort", size
    (folder / "source.yaml").write_text(written, encoding="utf-8")
    config = load_config(folder / "source.yaml")
    if config.source.kind == "phantom":
        made = PhantomConfig(**config.source.model_dump(exclude={"kind"}))
        write_phantom(folder / "phantom", made, progress=show)
        source, labels = folder / "phantom" / "dicom", folder / "phantom" / "labels.csv"
    else:
        source, labels = config.source.open(config.ingest.volumes), config.source.labels
    ingest(
        source,
        folder / "cohort",
        key=load_or_create_key(folder / "cohort.key"),
        labels=labels,
        config=config.ingest,
        private_notes=folder / "quarantine.private.csv",
        progress=show,
    )
    return folder / "cohort", size


def read(path: Path, *, quick: bool) -> tuple[Path, Mapping[str, Any], ComparisonConfig]:
    """Output folder, data sections, and what is compared."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(f"The configuration {path.name} cannot be read as YAML.") from None
    missing = {"output", "data", "methods"} - set(values if isinstance(values, dict) else ())
    if missing or not isinstance(values["data"], dict) or not values["data"]:
        raise ConfigError("The configuration needs output, data (name: section) and methods.")
    compared = {key: value for key, value in values.items() if key not in ("output", "data")}
    return (
        Path(values["output"]),
        values["data"],
        ComparisonConfig.from_values({**compared, **(QUICK if quick else {})}),
    )


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
        folder, sections, compared = read(config, quick=quick)
        folder = out or folder
        data = {name: cohort_of(name, part, folder / "data" / name, show) for name, part in sections.items()}
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
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
