"""How fast and how frugal files become squares of grey levels, beside other readers on the same files.

``uv run pytest -m benchmark -s tests/benchmarks/test_reading_speed.py``. Figures are files per second of processor
time on one core. The files are 1024 x 1024 computed radiographs, 12 bits in 16, MONOCHROME1, with a window and the
usual forty header elements. Ours does windowing and polarity, the others do not unless it says so. Peers that are
not installed are named and left out; the default decoders of pydicom for JPEG are ``pylibjpeg`` with
``pylibjpeg-libjpeg`` and ``pylibjpeg-openjpeg``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy import ndimage

from medistill.ingest.decode import silence
from medistill.ingest.frames import decode_dicom
from medistill.ingest.geometry import Fit, resize
from medistill.ingest.imagecodecs_plugin import LABEL
from medistill.ingest.intensity import Policy
from tests.ingest.conftest import make_dicom

pytestmark = pytest.mark.benchmark
SIDE, SIZE = 1024, 256
FILES = 24
ROUNDS = 5
ELEMENTS: dict[str, Any] = {
    "SpecificCharacterSet": "ISO_IR 100",
    "ImageType": ["DERIVED", "PRIMARY"],
    "StudyDate": "20200101",
    "SeriesDate": "20200101",
    "ContentDate": "20200101",
    "StudyTime": "101010",
    "SeriesTime": "101010",
    "ContentTime": "101010",
    "AccessionNumber": "1",
    "Manufacturer": "Maker",
    "InstitutionName": "Clinic",
    "ReferringPhysicianName": "Refers^A",
    "StationName": "S",
    "StudyDescription": "CHEST",
    "SeriesDescription": "PA",
    "ManufacturerModelName": "Model",
    "PatientName": "Synthetic^Test",
    "PatientBirthDate": "19600101",
    "PatientSex": "F",
    "PatientAge": "060Y",
    "BodyPartExamined": "CHEST",
    "KVP": "120",
    "DeviceSerialNumber": "1",
    "SoftwareVersions": "1",
    "ImagerPixelSpacing": [0.2, 0.2],
    "ExposureTime": 10,
    "Exposure": 5,
    "ViewPosition": "PA",
    "SeriesInstanceUID": "1.2.3.4",
    "StudyID": "1",
    "SeriesNumber": 1,
    "AcquisitionNumber": 1,
    "InstanceNumber": 1,
    "PatientOrientation": ["L", "F"],
    "BitsStored": 12,
    "HighBit": 11,
    "PhotometricInterpretation": "MONOCHROME1",
    "WindowCenter": "2048",
    "WindowWidth": "3000",
    "RescaleIntercept": "0",
    "RescaleSlope": "1",
}
SYNTAXES: dict[str, tuple[UID, Callable[[np.ndarray], bytes] | None]] = {
    "raw": (ExplicitVRLittleEndian, None),
    "RLE": (RLELossless, None),
    "JPEG-LS": (JPEGLSLossless, imagecodecs.jpegls_encode),
    "J2K": (JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k")),
    "JPEG lossless": (
        JPEGLosslessSV1,
        lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=1, bitspersample=12),
    ),
}
Reader = Callable[[Path], Any]


def radiograph(seed: int) -> np.ndarray:
    """Smooth shadows with sensor noise."""
    rng = np.random.default_rng(seed)
    shadow = ndimage.zoom(rng.normal(0, 1, (32, 32)), SIDE // 32, order=1)
    shadow = 3900 * (shadow - shadow.min()) / np.ptp(shadow)
    return np.clip(shadow + rng.normal(0, 8, (SIDE, SIDE)), 0, 4095).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, name: str) -> Path:
    syntax, encode = SYNTAXES[name]
    dataset = make_dicom(path, pixels, **ELEMENTS)
    if encode is not None:
        dataset.PixelData = encapsulate([encode(pixels)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == RLELossless:
        dataset.compress(RLELossless, encoding_plugin="pydicom")
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files of every syntax; fewer where decoding is slow."""
    folder = tmp_path_factory.mktemp("radiographs")
    counts = {"raw": FILES, "RLE": 4, "JPEG-LS": 4, "J2K": 2, "JPEG lossless": 4}
    return {
        name: [write(folder / name / f"{seed}.dcm", radiograph(seed), name) for seed in range(count)]
        for name, count in counts.items()
    }


def shrink(pixels: Any) -> np.ndarray:
    """What a user of another reader does: float32 and Pillow's anti-aliased triangle filter."""
    picture = Image.fromarray(np.asarray(pixels).astype(np.float32))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def ours(path: Path) -> Any:
    with silence():
        return [frame.pixels(SIZE, Fit.PAD) for frame in decode_dicom(path, Policy.VOI)]


def ours_by_percentiles(path: Path) -> Any:
    with silence():
        return [frame.pixels(SIZE, Fit.PAD) for frame in decode_dicom(path, Policy.PERCENTILE)]


def pydicom_pixels(dataset: Dataset) -> np.ndarray:
    """By pydicom's own plugins, the fastest one where there are several."""
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    plugins = [name for name in decoder.available_plugins if name != LABEL] if decoder.is_encapsulated else [""]
    if not plugins:
        raise ImportError("no decoder of pydicom's own is installed for this syntax")
    plugin = "pylibjpeg" if "pylibjpeg" in plugins else plugins[0]
    return np.asarray(decoder.as_array(dataset, decoding_plugin=plugin)[0])


def pydicom_raw(path: Path) -> Any:
    return shrink(pydicom_pixels(pydicom.dcmread(path)))


def pydicom_raw_our_resize(path: Path) -> Any:
    return resize(pydicom_pixels(pydicom.dcmread(path)), (SIZE, SIZE))


def pydicom_windowed(path: Path) -> Any:
    dataset = pydicom.dcmread(path)
    return shrink(4095 - apply_voi_lut(apply_modality_lut(pydicom_pixels(dataset), dataset), dataset))


def simpleitk(path: Path) -> Any:
    sitk = importlib.import_module("SimpleITK")
    return shrink(sitk.GetArrayViewFromImage(sitk.ReadImage(str(path)))[0])


@functools.cache
def monai_loader(reader: str) -> Any:
    transforms = importlib.import_module("monai.transforms")
    logging.getLogger("monai").setLevel(logging.ERROR)
    return transforms.LoadImage(reader=reader, image_only=True, ensure_channel_first=False)


def monai(path: Path, reader: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = monai_loader(reader)(str(path))
    return shrink(np.asarray(image).reshape(SIDE, SIDE))


def dicomsdl(path: Path) -> Any:
    return shrink(importlib.import_module("dicomsdl").open(str(path)).pixelData())


def dicomsdl_stored(path: Path) -> Any:
    return shrink(importlib.import_module("dicomsdl").open(str(path)).pixelData(storedvalue=True))


def dicomsdl_stored_our_resize(path: Path) -> Any:
    stored = importlib.import_module("dicomsdl").open(str(path)).pixelData(storedvalue=True)
    return resize(stored, (SIZE, SIZE))


PEERS: dict[str, Reader] = {
    "pydicom, no windowing": pydicom_raw,
    "pydicom, modality and VOI LUT": pydicom_windowed,
    "SimpleITK": simpleitk,
    "MONAI ITKReader": lambda path: monai(path, "ITKReader"),
    "MONAI PydicomReader": lambda path: monai(path, "PydicomReader"),
    "dicomsdl, rescaled": dicomsdl,
    "dicomsdl, stored values": dicomsdl_stored,
}
WITH_OUR_RESIZE: dict[str, Reader] = {
    "pydicom with our resize": pydicom_raw_our_resize,
    "dicomsdl, stored values, our resize": dicomsdl_stored_our_resize,
}
OURS: dict[str, Reader] = {"ours": ours, "ours, percentiles": ours_by_percentiles}
READERS = OURS | PEERS | WITH_OUR_RESIZE


def serve(name: str, paths: list[str]) -> None:
    """What the process of one reader does: read all files once a line of input, and say the files per second."""
    read, files = READERS[name], [Path(path) for path in paths]
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:  # libraries write to standard output too
        os.dup2(2, 1)
        try:
            read(files[0])
        except Exception as error:
            answers.write(f"error {type(error).__name__}\n")
            return
        answers.write("ready\n")
        for _ in sys.stdin:
            start = time.process_time()
            for file in files:
                read(file)
            answers.write(f"{len(files) / (time.process_time() - start)}\n")


def speeds(names: Iterable[str], paths: list[Path]) -> dict[str, float]:
    """Files per processor second, best of some rounds.

    Every reader has a process of its own, as a worker has; they take turns, so that a busy machine hurts all
    alike.
    """
    code = f"from {__name__} import serve; import sys; serve(sys.argv[1], sys.argv[2:])"
    best: dict[str, float] = {}
    with ExitStack() as stack:
        processes = {}
        for name in names:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, name, *map(str, paths)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            )
            answer = process.stdout.readline().strip()
            if answer == "ready":
                processes[name] = process
            else:
                print(f"  left out: {name} ({answer or f'its process ended with {process.wait()}'})")
        for _ in range(ROUNDS):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                best[name] = max(best.get(name, 0), float(process.stdout.readline()))
    return best


def show(title: str, found: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, rate in sorted(found.items(), key=lambda item: -item[1]):
        print(f"  {name:36} {rate:8.1f} files/s   ours is {found['ours'] / rate:5.2f} times as fast")


def test_plain_radiographs(radiographs: dict[str, list[Path]]) -> None:
    found = speeds(READERS, radiographs["raw"])
    show(f"{SIDE}² to {SIZE}², uncompressed", found)
    no_windowing = [name for name in PEERS if name in found and "LUT" not in name]
    assert found["ours"] >= 1.5 * max(found[name] for name in no_windowing)
    assert found["ours"] >= 6 * found["pydicom, modality and VOI LUT"]
    assert found["ours"] >= 1.5 * found["pydicom with our resize"]


@pytest.mark.parametrize(("name", "ratio"), [("RLE", 1.4), ("JPEG-LS", 1.4), ("J2K", 0.8), ("JPEG lossless", 2.0)])
def test_compressed_radiographs(radiographs: dict[str, list[Path]], name: str, ratio: float) -> None:
    found = speeds(["ours", *PEERS], radiographs[name])
    show(f"{SIDE}² to {SIZE}², {name}", found)
    if "pydicom, no windowing" not in found:
        pytest.skip("pydicom's default decoders for this syntax are not installed: nothing to compare with")
    assert found["ours"] >= ratio * found["pydicom, no windowing"]


_WORKER = """
import sys
from pathlib import Path
from medistill.ingest.decode import silence
from medistill.ingest.frames import decode_dicom
from medistill.ingest.geometry import Fit
from medistill.ingest.intensity import Policy

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

paths = [Path(name) for name in sys.argv[2:]]
for number in range(int(sys.argv[1])):
    with silence():
        for frame in decode_dicom(paths[number % len(paths)], Policy.VOI):
            frame.pixels(256, Fit.PAD)
    if number % 500 == 499 or number < 2:
        print(number + 1, peak(), flush=True)
"""


def resident(count: int, paths: list[Path]) -> Iterator[tuple[int, float]]:
    """Files read so far and the largest resident size of a worker until then, in MiB."""
    result = subprocess.run(
        [sys.executable, "-c", _WORKER, str(count), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    for line in result.stdout.splitlines():
        done, size = line.split()
        yield int(done), int(size) / 1024


def test_memory_of_a_worker_is_flat(radiographs: dict[str, list[Path]]) -> None:
    paths = radiographs["raw"] * 20 + [path for name in ("RLE", "JPEG-LS") for path in radiographs[name]]
    sizes = dict(resident(10_000, paths))
    print("\nlargest resident MiB after files:", {done: round(size) for done, size in sizes.items()})
    assert max(sizes.values()) <= 300
    assert sizes[10_000] - sizes[1_000] <= 5


def test_memory_of_a_long_file(tmp_path: Path, radiographs: dict[str, list[Path]]) -> None:
    """600 frames of 512 x 512 in 16 bits: 315 MB in the file."""
    frame = np.arange(512 * 512, dtype=np.uint16).reshape(512, 512) % 4096
    path = tmp_path / "long.dcm"
    dataset = make_dicom(path, frame, **(ELEMENTS | {"NumberOfFrames": 600}))
    dataset.PixelData = frame.tobytes() * 600
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    del dataset
    sizes = dict(resident(2, [radiographs["raw"][0], path]))
    print(f"\n{path.stat().st_size / 1e6:.0f} MB multi-frame file: {sizes[2] - sizes[1]:.1f} MiB more than before")
    assert path.stat().st_size > 314e6
    assert sizes[2] - sizes[1] <= 10
