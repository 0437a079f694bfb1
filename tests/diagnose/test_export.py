"""Models handed on: ONNX against onnxruntime, a bundle against MONAI's own tools."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from medistill.cli import app
from medistill.diagnose import DiagnosticModel, predict_files
from medistill.diagnose.transform import FolderEvaluator, files_below
from medistill.errors import ConfigError, DataError, OutputError
from tests.diagnose.conftest import Hospital, noise

#: What MONAI's schema of 2024-07-25 asks of ``metadata.json``: kinds of the keys it knows, and those it requires.
#: https://project-monai.github.io/schema/meta_schema_20240725.json, the same file as the address in the bundle.
KINDS = {
    **dict.fromkeys(("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task"), "string"),
    **dict.fromkeys(("description", "authors", "copyright", "data_source", "data_type", "intended_use"), "string"),
    **dict.fromkeys(("image_classes", "label_classes", "pred_classes"), "string"),
    **dict.fromkeys(("changelog", "required_packages_version", "eval_metrics", "supported_apps"), "object"),
}
REQUIRED = (
    *(
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
    ),
    *("description", "authors", "copyright", "network_data_format"),
)
TENSOR_KINDS = {
    **dict.fromkeys(("type", "format", "dtype"), "string"),
    **{"num_channels": "integer", "is_patch_data": "boolean", "channel_def": "object"},
}
TENSOR_REQUIRED = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range")
#: What the text of the bundle specification asks of a tensor beyond the schema.
TENSOR_SPECIFIED = ("is_patch_data", "channel_def")


def kinds(names: dict[str, str]) -> dict[str, Any]:
    return {name: {"type": kind} for name, kind in names.items()}


def monai_schema() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": list(TENSOR_REQUIRED),
        "properties": {
            **kinds(TENSOR_KINDS),
            "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
            "value_range": {"type": "array", "items": {"type": "number"}},
        },
    }
    results = {"type": "object", "additionalProperties": tensor}
    form = {
        "type": "object",
        "required": ["inputs", "outputs"],
        "properties": {"inputs": results, "outputs": results},
    }
    return {
        "$schema": "https://json-schema.org/draft/2019-09/schema",
        "type": "object",
        "required": list(REQUIRED),
        "properties": {
            **kinds(KINDS),
            "references": {"type": "array", "items": {"type": "string"}},
            "network_data_format": form,
        },
    }


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["-q", *map(str, arguments)])


def test_onnx_gives_the_same_probabilities_in_any_batch(
    model: DiagnosticModel, model_folder: Path, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    result = invoke("export", model_folder, "--out", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    assert float(result.stdout.rpartition(" ")[2]) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        images = noise(count, model.preprocessing.image_shape, seed=count)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, model.probabilities(images).numpy(), atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["preprocessing"]) == model.preprocessing.to_json()
    assert json.loads(told["task"])["class_names"] == list(model.task.class_names)
    assert told["weights_sha256"] == model.digest
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    assert str(Path.home()).encode() not in (tmp_path / "model.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_onnx_that_differs_is_not_written(
    model: DiagnosticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medistill.diagnose import onnx_file

    monkeypatch.setattr(onnx_file, "_converted", lambda _: b"")
    monkeypatch.setattr(onnx_file, "_difference", lambda *_: float("nan"))
    with pytest.raises(DataError, match="differs from torch"):
        onnx_file.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        onnx_file.export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"end in \.onnx"):
        onnx_file.export_onnx(model, tmp_path / "model.pb")


@pytest.fixture(scope="module")
def bundle(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    result = invoke("export", model_folder, "--format", "monai-bundle", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_a_bundle_has_the_files_of_the_specification(bundle: Path, model: DiagnosticModel) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        *("configs/metadata.json", "configs/inference.json", "models/model.pt", "models/model.safetensors"),
        *("docs/README.md", "LICENSE"),
    }
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, model.ensemble.state_dict()[name]) for name, value in state.items())
    assert invoke("export", bundle, "--format", "monai-bundle", "--out", bundle).exit_code == 2


@pytest.mark.filterwarnings("ignore:No hash value provided")
def test_the_metadata_has_all_that_monais_schema_asks(bundle: Path, tmp_path: Path) -> None:
    from monai import bundle as monai_bundle

    jsonschema = pytest.importorskip("jsonschema")
    metadata = bundle / "configs" / "metadata.json"
    values = json.loads(metadata.read_text())
    assert values["schema"].endswith("/meta_schema_20240725.json")
    assert set(values) == {*KINDS, *REQUIRED, "references", "name", "optional_packages_version"}
    assert all(value.strip() for name, value in values.items() if KINDS.get(name) == "string")
    tensors = [
        *values["network_data_format"]["inputs"].values(),
        *values["network_data_format"]["outputs"].values(),
    ]
    assert all({*TENSOR_REQUIRED, *TENSOR_SPECIFIED} <= set(tensor) for tensor in tensors)
    for tensor in tensors:
        assert len(tensor["channel_def"]) == tensor["num_channels"]
    schema, checked = tmp_path / "schema.json", jsonschema.Draft201909Validator(monai_schema())
    schema.write_text(json.dumps(monai_schema()))
    monai_bundle.verify_metadata(meta_file=str(metadata), filepath=str(schema))
    assert checked.is_valid(values)
    for name in REQUIRED:
        assert not checked.is_valid({key: value for key, value in values.items() if key != name})
    for name in (*KINDS, "references"):
        assert not checked.is_valid({**values, name: 7})


@pytest.mark.filterwarnings("ignore")  # of MONAI's own
def test_monai_verifies_loads_and_runs_the_bundle(
    bundle: Path, model: DiagnosticModel, hospital: Hospital, tmp_path: Path
) -> None:
    from monai import bundle as monai_bundle

    metadata, inference = bundle / "configs" / "metadata.json", bundle / "configs" / "inference.json"
    monai_bundle.verify_net_in_out(
        net_id="network_def", meta_file=str(metadata), config_file=str(inference), device="cpu"
    )
    network = monai_bundle.load(bundle.name, bundle_dir=bundle.parent, workflow_type="inference", device="cpu")
    images = noise(3, model.preprocessing.image_shape)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), model.probabilities(images))

    parser = monai_bundle.ConfigParser()
    parser.read_config(str(inference))
    assert list(parser["network_def"]["class_names"]) == list(model.task.class_names)

    inputs = tmp_path / "input"
    inputs.mkdir()
    chosen = [hospital.held_back / name for name in sorted(hospital.instance_of)[:2]]
    for number, path in enumerate(chosen):
        shutil.copy(path, inputs / f"{number}.dcm")
    out = tmp_path / "predictions.csv"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--meta_file", "configs/metadata.json", "--dataset_dir", str(inputs), "--output", str(out)]
    ran = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)  # as its README says
    assert ran.returncode == 0, ran.stderr
    with out.open() as file:
        found = [
            [float(row[f"probability:{name}"]) for name in model.task.class_names] for row in csv.DictReader(file)
        ]
    expected = [image.probabilities for image in predict_files(model, chosen).images]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    workflow = monai_bundle.ConfigWorkflow(config_file=str(inference), workflow_type="inference")
    workflow.initialize()
    assert workflow.check_properties() == []


def test_a_bundle_without_images_says_where_they_go(bundle: Path, model: DiagnosticModel, tmp_path: Path) -> None:
    evaluator = FolderEvaluator(
        network=model.ensemble,
        weights=str(bundle / "models" / "model.pt"),
        dataset=[],
        inferer=lambda images, network: network(images),
        class_names=model.task.class_names,
        device="cpu",
        output=str(tmp_path / "predictions.csv"),
    )
    assert files_below(tmp_path / "absent") == []
    with pytest.raises(DataError, match="Put them into `input`"):
        evaluator.run()
    assert not list(tmp_path.iterdir())
