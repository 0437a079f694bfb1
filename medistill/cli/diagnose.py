"""The receiving side: train on a release, predict on files, export the model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medistill.cli.app import app, guarded, progress

if TYPE_CHECKING:
    from torch import Tensor


class Calibration(StrEnum):
    """How a model's temperature is found."""

    AUTO = "auto"
    NONE = "none"


class Pool(StrEnum):
    """How the images of a patient are put together."""

    MEAN = "mean"
    MAX = "max"
    VOTE = "vote"


class Row(StrEnum):
    """What a row of the CSV is."""

    IMAGE = "image"
    PATIENT = "patient"


class Format(StrEnum):
    """What a model is exported to."""

    ONNX = "onnx"
    MONAI_BUNDLE = "monai-bundle"


_DEVICE = typer.Option(help="cpu, cuda or cuda:N.")


@app.command()
@guarded
def train(
    release: Annotated[Path, typer.Argument(help="Release folder.")],
    out: Annotated[Path, typer.Option(help="New model folder.")],
    network: Annotated[str, typer.Option(help="See `medistill list networks`.")] = "convnet",
    students: Annotated[int, typer.Option(min=1, max=100, help="Networks whose answers are averaged.")] = 1,
    calibration: Annotated[
        Calibration,
        typer.Option(help="auto: by the data owner, or else by cross-fitting on the release; none: as trained."),
    ] = Calibration.AUTO,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, _DEVICE] = "cpu",
) -> None:
    """Train a diagnostic model on a release, after verifying its seal.

    The model folder holds all that `medistill predict` needs: weights, preprocessing, calibration, and what
    released images look like.

    Example: `medistill train release --out model`

    Example: `medistill train release --network resnet --students 3 --out model`
    """
    from medistill.core.compute import Compute
    from medistill.diagnose import load_model, train_on_release

    shown = progress()
    train_on_release(
        release,
        out,
        network=network,
        students=students,
        calibration=calibration.value,
        seed=seed,
        compute=Compute(device=device),
        progress=shown,
    )
    model = load_model(out)
    for line in _remarks(model.calibration.source, model.calibration.temperature, model.preprocessing.stated):
        shown.say(line)
    typer.echo(f"Model in {out}")


def _remarks(source: str, temperature: float, stated: bool) -> list[str]:
    found = {
        "release": f"Calibration: temperature {temperature:.3g}, found by the data owner on real patients.",
        "cross_fit": f"Calibration: temperature {temperature:.3g}, cross-fitted on released images; no real "
        "patient is behind it.",
        "none": "Calibration: none, probabilities are as trained.",
    }
    unstated = "The release does not say how its images were made; files are read by the defaults of ingestion."
    return [found[source], *([] if stated else [unstated])]


@app.command()
@guarded
def predict(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    files: Annotated[list[Path], typer.Argument(help="DICOM files, or one folder or archive of them.")],
    out: Annotated[
        Path | None, typer.Option(help="New or replaced .csv or .json file. [default: CSV to the terminal]")
    ] = None,
    by: Annotated[Row, typer.Option(help="Rows of the CSV; JSON holds both.")] = Row.IMAGE,
    pool: Annotated[Pool, typer.Option(help="How a patient's images are put together.")] = Pool.MEAN,
    explain: Annotated[
        Path | None, typer.Option(help="New folder for one picture per image: where the model looks (occlusion).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that read files.")] = 1,
    device: Annotated[str, _DEVICE] = "cpu",
) -> None:
    """Predict on DICOM files: calibrated probabilities, decisions, and which images are unlike the release's.

    Patients are numbered in order of appearance; no identifier is written. File names stand in the output file
    only. A file that cannot be read is a row with a reason code; the exit code is 2 only if nothing could be
    predicted. Research only, not a medical device.

    Example: `medistill predict model scans/ --out predictions.csv`

    Example: `medistill predict model scans/ --by patient --pool max --out patients.csv`

    Example: `medistill predict model first.dcm second.dcm --out predictions.json --explain pictures`
    """
    from medistill.core.compute import Compute
    from medistill.diagnose import load_model, predict_files
    from medistill.diagnose.explain import explain as draw
    from medistill.diagnose.model import require_new
    from medistill.diagnose.predict import predictions_csv, predictions_json, write_predictions
    from medistill.errors import ConfigError, SourceError

    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ConfigError("Expected --out to end in .csv or .json; found another ending.")
    if explain is not None:
        require_new(explain)
    shown, compute = progress(), Compute(device=device)
    loaded = load_model(model)
    pictures: dict[int, Tensor] | None = {} if explain is not None else None
    found = predict_files(
        loaded, files, pool=pool.value, compute=compute, jobs=jobs, pictures=pictures, progress=shown
    )
    as_json = out is not None and out.suffix.lower() == ".json"
    text = predictions_json(found, loaded) if as_json else predictions_csv(found, by_patient=by is Row.PATIENT)
    if out is not None:
        write_predictions(out, text)
    else:
        typer.echo(text, nl=False)
    if explain is not None and pictures:
        draw(loaded, found, pictures, explain, compute=compute, progress=shown)
    refused = ", ".join(f"{count} {code}" for code, count in found.refused.items())
    if not found.read:
        raise SourceError(f"None of {len(found.images)} files could be predicted: {refused}.")
    odd = sum(image.out_of_distribution for image in found.read)
    shown.say(
        f"{len(found.read)} images of {len(found.patients)} patients; {odd} unlike the release's images"
        + (f"; not read: {refused}." if refused else ".")
    )


@app.command()
@guarded
def export(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="New .onnx file, or new folder of the bundle.")],
    format: Annotated[Format, typer.Option(help="What is written.")] = Format.ONNX,
) -> None:
    """Export a model to ONNX, or to a bundle that MONAI's tools load and run; checked before it appears.

    Example: `medistill export model --format onnx --out model.onnx`

    Example: `medistill export model --format monai-bundle --out bundle`
    """
    from medistill.diagnose import load_model

    loaded = load_model(model)
    if format is Format.ONNX:
        from medistill.diagnose.onnx_file import export_onnx

        difference = export_onnx(loaded, out)
        typer.echo(f"ONNX in {out}; largest difference of a probability from torch: {difference:.2g}")
        return
    from medistill.diagnose.bundle import export_bundle

    export_bundle(loaded, out)
    typer.echo(f"MONAI bundle in {out}")
