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

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from compare_distillers import cohort_of

from medistill import ConfigError, MedistillError, TerminalProgress
from medistill.studies import ContinualConfig, learn_continually

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


def without_patients(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A section whose images come from a MedMNIST file: every image a patient of its own, volumes projected."""
    values = dict(section)
    if "medmnist" not in values:
        return values
    source, target = Path(os.path.expandvars(str(values.pop("medmnist")))), folder / "images.npz"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with np.load(source, allow_pickle=False) as archive:
                parts = {
                    s: (archive[f"{s}_images"], archive[f"{s}_labels"].ravel()) for s in ("train", "val", "test")
                }
        except (OSError, KeyError, ValueError):
            raise ConfigError("medmnist: expected a readable .npz of MedMNIST.") from None
        images = np.concatenate([found for found, _ in parts.values()])
        if images.ndim == 4 and images.shape[-1] != 3:
            images = images.astype(np.float32).mean(1).round().astype(np.uint8)
        labels = np.concatenate([found for _, found in parts.values()]).astype(str)
        splits = np.repeat(list(parts), [len(found) for found, _ in parts.values()])
        patients = np.arange(len(images)).astype(str)
        np.savez_compressed(target, images=images, labels=labels, split=splits, patient_id=patients)
    return {**values, "source": {"kind": "npz", "path": str(target)}}


def read(path: Path, *, quick: bool) -> tuple[Path, Mapping[str, Any], ContinualConfig]:
    """Output folder, sites, and what is learned."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(f"The configuration {path.name} cannot be read as YAML.") from None
    if not isinstance(values, dict) or not isinstance(values.get("sites"), dict) or "output" not in values:
        raise ConfigError("The configuration needs output and sites (name: section).")
    learned = {key: value for key, value in values.items() if key not in ("output", "sites")}
    if quick:
        learned |= QUICK if learned.get("method", "auto") == "auto" else {**QUICK, "settings": {}}
    return Path(values["output"]), values["sites"], ContinualConfig.from_values(learned)


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
        folder, sections, learned = read(config, quick=quick)
        folder = out or folder
        sites = {}
        for name, section in sections.items():
            own = folder / "data" / name
            sites[name] = cohort_of(name, without_patients(section, own), own, show)
        curves = learn_continually(learned, sites, folder, jobs=jobs, progress=show)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    for curve in curves:
        typer.echo(
            f"{curve.steps:>2} steps  {curve.arm:<10} accuracy: mean of steps {curve.average_accuracy}, "
            f"at the end {curve.accuracy[-1]}  forgetting {curve.forgetting}  {curve.images[-1]} images"
        )
    typer.echo("Wrote continual.csv, .json and .html beside the cells.")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
