"""A model as one ONNX file, checked against torch before it appears."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medistill import __version__
from medistill.diagnose.model import NOTICE, DiagnosticModel
from medistill.errors import ConfigError, DataError, OutputError
from medistill.release.durable import output_errors, replace_durably

OPSET = 18
#: Largest difference of a probability that is put up with.
TOLERANCE = 1e-4
_CHECKED = 5


def export_onnx(model: DiagnosticModel, out: Path) -> float:
    """Write the calibrated ensemble as ONNX: input ``images`` ``(n, c, …)``, output ``probabilities`` ``(n, k)``.

    The exported file is run by onnxruntime on images that it was not exported with, in a batch of another size,
    and refused if a probability differs from torch by more than 1e-4. Class names, preprocessing, calibration and
    the notice stand in the file's metadata as JSON texts; the out-of-distribution flag is not exported.

    Args:
        model: From :func:`medistill.diagnose.load_model`.
        out: New file that ends in ``.onnx``.

    Returns:
        Largest difference of a probability from torch.

    Raises:
        ConfigError: If the extra ``export`` is not installed or the name ends otherwise.
        OutputError: If the file exists or cannot be written.
        DataError: If the exported file does not give the same probabilities.
    """
    out = Path(out).absolute()
    if out.suffix.lower() != ".onnx":
        raise ConfigError("Expected --out to end in .onnx; found another ending.")
    if out.exists():
        raise OutputError(f"{out.name} exists. Choose another name or remove it.")
    content = _converted(model)
    difference = _difference(model, content)
    if not difference <= TOLERANCE:
        raise DataError(
            f"The exported network differs from torch by {difference:.2g}; expected at most {TOLERANCE:g}. "
            "Nothing was written. Install other versions of torch or onnxscript."
        )
    with output_errors(out):
        replace_durably(out, content)
    return difference


def _converted(model: DiagnosticModel) -> bytes:
    try:
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError(
            'ONNX needs packages that are not installed. Run `pip install "medistill[export]"`.'
        ) from None
    example = _images(model, 2)
    with _quiet(), tempfile.TemporaryDirectory() as place:
        program = torch.onnx.export(
            model.ensemble.cpu().eval(),
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim.AUTO}},
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert program is not None
        path = Path(place) / "model.onnx"
        program.save(path, external_data=False)
        found = onnx.load(path)
    onnx.checker.check_model(found, full_check=True)
    del found.metadata_props[:]
    for key, value in _metadata(model).items():
        entry = found.metadata_props.add()
        entry.key, entry.value = key, value
    found.producer_name, found.producer_version = "medistill", __version__
    found.doc_string = NOTICE
    for node in found.graph.node:  # where in whose file a line of code stands
        node.ClearField("doc_string")
        del node.metadata_props[:]
    content: bytes = found.SerializeToString()
    return content


def _metadata(model: DiagnosticModel) -> dict[str, str]:
    values: dict[str, Any] = {
        "medistill": __version__,
        "network": model.network,
        "task": model.task.to_json(),
        "preprocessing": model.preprocessing.to_json(),
        "pixels": "float32 in [0, 1], 0 black",
        "calibration": model.calibration.to_json(),
        "weights_sha256": model.digest,
        "origin": dict(model.origin),
        "notice": NOTICE,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _difference(model: DiagnosticModel, content: bytes) -> float:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    images = _images(model, _CHECKED)
    answers = torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])
    return float((answers - model.probabilities(images)).abs().max())


def _images(model: DiagnosticModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, *model.preprocessing.image_shape, generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about operators that it does not know are none for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
