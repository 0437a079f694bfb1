"""Predicting on files: the very numbers of the cohort, decisions, patients by number, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner, Result

from medistill.cli import app
from medistill.core.cohort import Split
from medistill.core.task import Task
from medistill.diagnose import DiagnosticModel, load_model, predict_files
from medistill.diagnose.predict import decide, pooled, predictions_csv
from medistill.errors import ConfigError, SourceError
from medistill.evaluate.metrics import task_metrics
from tests.diagnose.conftest import Hospital


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["-q", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(model_folder: Path, hospital: Hospital, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predicted") / "predictions.csv"
    result = invoke("predict", model_folder, hospital.held_back, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict[str, str]]:
    with written.open() as file:
        return list(csv.DictReader(file))


def probabilities(rows: list[dict[str, str]], model: DiagnosticModel) -> np.ndarray:
    return np.array([[float(row[f"probability:{name}"]) for name in model.task.class_names] for row in rows])


def places(rows: list[dict[str, str]], hospital: Hospital) -> list[int]:
    """Places of the rows in the cohort's test split."""
    names = [Path(row["name"]).as_posix() for row in rows]
    return [hospital.instance_of[name] for name in names]


def test_a_file_gives_the_numbers_that_the_cohort_gives(
    rows: list[dict[str, str]], model: DiagnosticModel, hospital: Hospital
) -> None:
    assert model.preprocessing.stated
    assert (model.preprocessing.stored, model.preprocessing.intensity) == (32, "percentile")
    test = hospital.cohort.split(Split.TEST).images(16)
    assert len(rows) == len(test)
    expected = model.probabilities(test.images)[places(rows, hospital)]
    np.testing.assert_allclose(probabilities(rows, model), expected.numpy(), atol=2e-6)


def test_the_auroc_of_the_file_is_that_of_evaluate(
    rows: list[dict[str, str]], model: DiagnosticModel, hospital: Hospital
) -> None:
    test = hospital.cohort.split(Split.TEST).images(16)
    targets = test.targets[places(rows, hospital)].double().numpy()
    found = probabilities(rows, model)
    ours = task_metrics(model.task.kind, found, targets, np.ones((1, len(found))), thresholds=())["auroc"][0]
    assert ours == pytest.approx(np.mean([roc_auc_score(t, p) for t, p in zip(targets.T, found.T, strict=True)]))


def test_patients_are_numbered_as_they_appear_and_never_named(
    rows: list[dict[str, str]], written: Path, hospital: Hospital
) -> None:
    patients = hospital.cohort.split(Split.TEST).instances
    truth = [patients[place].patient for place in places(rows, hospital)]
    order = {name: number for number, name in enumerate(dict.fromkeys(truth), start=1)}
    assert [int(row["patient"]) for row in rows] == [order[name] for name in truth]
    assert [int(row["file"]) for row in rows] == list(range(1, len(rows) + 1))
    with_names_away = written.read_text()
    for row in rows:
        with_names_away = with_names_away.replace(row["name"], "")
    assert not [value for value in hospital.identifiers | set(truth) if value in with_names_away]


def test_patient_rows_are_means_over_their_images(
    model_folder: Path, model: DiagnosticModel, rows: list[dict[str, str]], hospital: Hospital
) -> None:
    result = invoke("predict", model_folder, hospital.held_back, "--by", "patient")
    found = list(csv.DictReader(io.StringIO(result.stdout)))
    numbers, answers = np.array([int(row["patient"]) for row in rows]), probabilities(rows, model)
    assert [int(row["patient"]) for row in found] == sorted(set(numbers.tolist()))
    for row in found:
        own = numbers == int(row["patient"])
        assert int(row["images"]) == own.sum()
        shares = [float(row[f"probability:{name}"]) for name in model.task.class_names]
        np.testing.assert_allclose(shares, answers[own].mean(0), atol=2e-6)
        assert row["decision"] == model.task.class_names[int(np.argmax(shares))]


def test_a_bad_file_is_a_row_and_the_rest_is_predicted(
    model_folder: Path, hospital: Hospital, tmp_path: Path
) -> None:
    good = hospital.held_back / min(hospital.instance_of)
    bad, cut = tmp_path / "letter.dcm", tmp_path / "cut.dcm"
    bad.write_text("Dear colleague")
    cut.write_bytes(good.read_bytes()[:-800])
    out = tmp_path / "p.json"
    result = invoke("predict", model_folder, bad, good, cut, tmp_path / "absent.dcm", "--out", out)
    assert result.exit_code == 0, result.output
    values = json.loads(out.read_text())
    assert [row["status"] for row in values["images"]] == ["NOT_DICOM", "OK", "TRUNCATED", "READ_ERROR"]
    assert [row["file"] for row in values["images"]] == [1, 2, 3, 4]
    assert values["patients"][0]["patient"] == 1
    assert sum(values["images"][1]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert "letter" not in result.output


def test_nothing_predicted_is_a_failure_that_says_so_and_still_lists_the_rows(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.dcm").write_text("nothing")
    result = invoke("predict", model_folder, tmp_path / "a.dcm", "--out", tmp_path / "p.csv")
    assert result.exit_code == 2
    assert "None of 1 files could be predicted: 1 NOT_DICOM" in result.stderr
    assert "a.dcm" not in result.stderr
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2


def test_every_frame_is_an_image_and_patients_without_a_name_are_told_apart(
    model: DiagnosticModel, hospital: Hospital, tmp_path: Path
) -> None:
    import pydicom

    source = pydicom.dcmread(hospital.held_back / min(hospital.instance_of))
    for number in range(2):
        nameless = source.copy()
        nameless.PatientID, nameless.StudyInstanceUID = "", f"1.2.{number}"
        nameless.SOPInstanceUID = f"1.2.3.{number}"
        nameless.save_as(tmp_path / f"{number}.dcm")
    found = predict_files(model, [tmp_path])
    assert [image.patient for image in found.images] == [1, 2]
    assert found.images[0].probabilities == found.images[1].probabilities


def test_pictures_are_drawn_on_request(model_folder: Path, hospital: Hospital, tmp_path: Path) -> None:
    from PIL import Image

    file = hospital.held_back / min(hospital.instance_of)
    result = invoke("predict", model_folder, file, "--explain", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["00001.png"]
    with Image.open(tmp_path / "pictures" / "00001.png") as drawn:
        assert (drawn.mode, drawn.size) == ("RGB", (512, 256))
    again = invoke("predict", model_folder, file, "--explain", tmp_path / "pictures")
    assert again.exit_code == 2
    assert "not empty" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("model", "absent"), "does not exist"),
        (("model", "scans", "--out", "p.txt"), "end in .csv or .json"),
        (("scans", "scans"), "Expected a model folder"),
        (("model", "scans", "scans"), "one folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: tuple[str, ...], what: str, model_folder: Path, hospital: Hospital
) -> None:
    where = {"model": model_folder, "scans": hospital.held_back}
    result = invoke("predict", *(where.get(name, name) for name in arguments))
    assert result.exit_code == 2
    assert what in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_unknown_pool_and_an_empty_folder_are_refused(model: DiagnosticModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mean, max, vote"):
        predict_files(model, [tmp_path], pool="median")
    with pytest.raises(SourceError, match="no file"):
        predict_files(model, [tmp_path])


TWO, THREE, MANY = (
    Task.single_label(("no", "yes")),
    Task.single_label(("a", "b", "c")),
    Task.multilabel(("a", "b", "c")),
)


def test_decisions() -> None:
    assert decide(TWO, (0.6, 0.4), (0.3,)) == "yes"
    assert decide(TWO, (0.6, 0.4), (0.5,)) == "no"
    assert decide(THREE, (0.2, 0.5, 0.3), ()) == "b"
    assert decide(MANY, (0.2, 0.5, 0.9), (0.1, 0.6, 0.5)) == "a;c"
    assert decide(MANY, (0.2, 0.5, 0.4), (0.5, 0.6, 0.5)) == ";"


def test_patients_from_images() -> None:
    two = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    np.testing.assert_allclose(pooled(TWO, two, ["no", "yes", "no"], "mean"), [0.6, 0.4])
    np.testing.assert_allclose(pooled(TWO, two, ["no", "yes", "no"], "max"), [0.2, 0.8])
    np.testing.assert_allclose(pooled(TWO, two, ["no", "yes", "no"], "vote"), [2 / 3, 1 / 3])
    three = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(pooled(THREE, three, ["a", "c"], "max"), np.array([0.5, 0.3, 0.8]) / 1.6)
    np.testing.assert_allclose(pooled(MANY, three, ["a;b", ";"], "vote"), [0.5, 0.5, 0])
    np.testing.assert_allclose(pooled(MANY, three, ["a", "c"], "max"), [0.5, 0.3, 0.8])


def test_volumes_and_colour_are_read_as_their_shape_says(model: DiagnosticModel, tmp_path: Path) -> None:
    """A model of volumes takes the folder of a series, and not its slices one by one."""
    from medistill.diagnose.preprocessing import Preprocessing
    from medistill.diagnose.reading import open_files

    cubes = Preprocessing.of_release({}, (1, 8, 8, 8))
    assert (cubes.volumes, cubes.colour, cubes.stored, cubes.stated) == ("cubes", "grey", 256, False)
    assert Preprocessing.of_release({}, (3, 8, 8)).colour == "rgb"
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match="takes volumes"):
        open_files([tmp_path / "a", tmp_path / "b"], cubes)


def test_a_series_becomes_one_volume(shared_data: Path, model: DiagnosticModel) -> None:
    from medistill.diagnose.preprocessing import Preprocessing
    from medistill.diagnose.reading import ReadImage, open_files, read_images
    from medistill.ingest.geometry import Fit
    from medistill.ingest.intensity import Policy
    from medistill.ingest.sources.series import decode_series

    folder = shared_data / "dicom" / "series"
    settings = replace(Preprocessing.of_release({}, (1, 8, 8, 8)), stored=16)
    (found,) = [one for item in read_images(open_files([folder], settings), settings) for one in item]
    assert isinstance(found, ReadImage)
    (volume,) = decode_series(tuple(sorted(path for path in folder.iterdir() if path.is_file())), Policy.VOI)
    assert np.array_equal(found.pixels, volume.pixels(16, Fit.PAD))
    assert settings.tensor(found.pixels).shape == (1, 1, 8, 8, 8)


def test_the_table_survives_odd_class_names(model: DiagnosticModel, hospital: Hospital) -> None:
    found = predict_files(model, [hospital.held_back / min(hospital.instance_of)])
    odd = replace(found, task=replace(found.task, class_names=('a,"b', "c\nd", "e")))
    (row,) = csv.DictReader(io.StringIO(predictions_csv(odd)))
    assert row['probability:a,"b'] == f"{found.images[0].probabilities[0]:.6f}"


def test_a_model_says_what_it_cannot_take(model: DiagnosticModel) -> None:
    from medistill.errors import DataError

    with pytest.raises(DataError, match=r"\(n, 1, 16, 16\)"):
        model.probabilities(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("change", ["weights", "field", "version", "temperature", "network", "gone"])
def test_a_damaged_or_strange_model_is_refused(change: str, model_folder: Path, tmp_path: Path) -> None:
    from medistill.errors import MedistillError

    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    values = json.loads((folder / "model.json").read_text())
    if change == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\0")
    elif change == "gone":
        (folder / "model.safetensors").unlink()
    else:
        odd = {
            "field": {"students": "many"},
            "version": {"schema_version": 99},
            "temperature": {"calibration": {**values["calibration"], "temperature": -1}},
            "network": {"network": "os:system"},
        }[change]
        (folder / "model.json").write_text(json.dumps({**values, **odd}))
    with pytest.raises(MedistillError) as refused:
        load_model(folder)
    assert str(tmp_path) not in str(refused.value)
