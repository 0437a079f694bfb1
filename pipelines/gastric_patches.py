"""Gastritis from double-contrast X-rays by patches, distilled into three images (Li et al. 2020).

Example::

    python pipelines/gastric_patches.py configs/gastric_patches.yaml --out runs/gastric
    python pipelines/gastric_patches.py configs/pediatric_patches.yaml --stride 32 --out runs/pediatric

Radiographs are cut into overlapping patches of three classes: without the finding, with it, and outside the organ.
All patches of the training patients become three images. A network trained on them alone judges the patches of a
test patient; patches outside are discarded, and the share of positive ones, against a threshold chosen on
validation patients, is the diagnosis. Beside it stand networks trained on all real patches and on three of them.

Where the organ is, is read from masks: ``--regions`` with one ``<SOPInstanceUID>.png`` a DICOM file, drawn by hand
or by a program; the phantom brings its own. Without masks an ellipse in the middle of the film stands in. Masks
label patches for training; a diagnosis needs none. Of the configuration, ``ingest.size`` is the side of a
radiograph and ``distill.size`` that of a patch.

Beside the result appears ``<out>-private`` with the cohort, its key and checkpoints. It never leaves the hospital.
Interrupted, the same command goes on from the checkpoints.

Exit codes: 0 done, 1 failed, 2 usage or input.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import medistill
from medistill.distill import distill
from medistill.evaluate import PatchSplit, evaluate_patients, render_patients
from medistill.ingest import PatchGrid, central_regions, cut_patches, ingest, load_or_create_key, load_regions

SHOWN = ("diagnostic_sensitivity", "specificity", "harmonic_mean", "auroc")
TRAIN, VALIDATION, TEST = medistill.Split.TRAIN, medistill.Split.VALIDATION, medistill.Split.TEST
# What --quick changes, beside choosing no schedule: enough to see steps work, too little for images of use.
QUICK: dict[str, dict[str, dict[str, Any]]] = {
    "soft_label": {"soft_label": {"iterations": 8, "unroll": 4, "batch_per_class": 8}},
    "auto": {
        "distribution_matching": {"networks": 1, "iterations": 10},
        "kernel_ridge": {"iterations": 8, "real_batch": 48, "pool": 2},
    },
}
QUICK_EVALUATION = {"seeds": 1, "random_draws": 1, "real_epochs": 1, "draws": 200}


def read_radiographs(config: Any, private: Path, masks: Path | None, show: medistill.Progress) -> dict[str, Any]:
    """Radiographs of every split, and where the organ is on them."""
    shutil.rmtree(private / "cohort", ignore_errors=True)
    if config.source.kind == "phantom":
        folder, made = private / "phantom", config.source.model_dump(exclude={"kind"})
        shutil.rmtree(folder, ignore_errors=True)
        medistill.write_phantom(folder, medistill.PhantomConfig(**made), regions=True, progress=show, jobs=None)
        source, labels, masks = folder / "dicom", folder / "labels.csv", folder / "regions"
        key = hashlib.sha256(f"phantom/{config.seed}".encode()).digest()  # a phantom hides nobody
    else:
        source, labels = config.source.open(config.ingest.volumes), config.source.labels
        key = load_or_create_key(private / "cohort.key")
    cohort = ingest(source, private / "cohort", key=key, labels=labels, config=config.ingest, progress=show)
    size, read = config.ingest.size, {}
    for name in (TRAIN, VALIDATION, TEST):
        part = cohort.split(name)
        organ = load_regions(masks, part, key=key, size=size) if masks else central_regions(len(part), size)
        read[name] = part.images(size), organ
    return read


def diagnose(
    config: Any, private: Path, masks: Path | None, grid: PatchGrid, quick: bool, show: medistill.Progress
) -> tuple[Any, Any]:
    """Cut, distil, diagnose: the distilled sets by method, and the report."""
    read = read_radiographs(config, private, masks, show)

    # Cut: labelled patches to train and choose on, and every patch of the patients who are to be diagnosed.
    classes = (*read[TRAIN][0].task.class_names[:2], "outside")
    train, choose_on = (cut_patches(*read[name], grid=grid, classes=classes) for name in (TRAIN, VALIDATION))
    validation, test = (PatchSplit.of(read[name][0], grid=grid, classes=classes) for name in (VALIDATION, TEST))
    show.say(f"{len(train)} training patches: {dict(zip(classes, train.targets.sum(0).tolist(), strict=True))}")

    # Distil: all of them become one image a class, by the method of the configuration and by the default one.
    made, section = {}, config.distill
    for method, settings in {"auto": {}, section.method: section.settings}.items():
        made[method] = distill(
            medistill.OpenCurator(train), method=method, ipc=section.ipc, seed=config.seed,
            validation=None if quick else choose_on,
            settings=QUICK.get(method, {}) if quick else settings, folder=private / "checkpoints",
            progress=show,
        ).distilled  # fmt: skip

    # Diagnose: nothing is chosen on test patients.
    effort = {name: getattr(config.evaluate, name) for name in ("seeds", "real_epochs", "draws")}
    report = evaluate_patients(
        made, train=train, choose_on=choose_on, validation=validation, test=test, seed=config.seed, progress=show,
        **(QUICK_EVALUATION if quick else effort),
    )  # fmt: skip
    return made, report


def main(
    configuration: Annotated[Path, typer.Argument(help="YAML file, for example configs/gastric_patches.yaml.")],
    out: Annotated[Path, typer.Option(help="New folder of the result.")],
    stride: Annotated[int, typer.Option(min=0, help="Distance of patches; 0: half a patch.")] = 0,
    regions: Annotated[
        Path | None, typer.Option(help="Masks, one <SOPInstanceUID>.png for each DICOM file.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: --set distill.ipc=2")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the images are of no use.")] = False,
) -> None:
    """Diagnose patients from patches, with networks trained on three synthetic ones.

    Example: python pipelines/gastric_patches.py configs/gastric_patches.yaml --out runs/gastric
    """
    private = out.with_name(f"{out.name}-private")
    try:
        config = medistill.load_config(configuration, change or [])
        if out.exists():
            raise medistill.ConfigError(
                "--out: expected a new folder, found something there. Choose another name."
            )
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
        grid = PatchGrid(patch=config.distill.size, stride=stride or config.distill.size // 2)
        made, report = diagnose(config, private, regions, grid, quick, medistill.TerminalProgress())
    except medistill.MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    out.mkdir(parents=True)
    (out / "result.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    (out / "result.html").write_text(render_patients(report, made, metrics=SHOWN), encoding="utf-8")
    for arm in report.arms:
        figures = "  ".join(f"{name} {arm.metrics[name]}" for name in SHOWN)
        typer.echo(f"{arm.arm:<16} {arm.images:>6} images  {figures}")


if __name__ == "__main__":
    medistill.prepare_cpu()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
