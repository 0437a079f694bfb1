"""``distilled.dcm``: all images of a release in one DICOM file, for viewers and archives.

A multi-frame secondary capture without a patient. Frame ``i`` is row ``i`` of ``labels.csv``; of volumes, every
slice is a frame: first those of the first volume, then those of the second. Pixels are the images rounded to 8
bits, as in the pictures; exact values are in ``images.safetensors``. UIDs follow from the set's fingerprint: the
same set gives the same file, and two sets are never taken for one.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medistill.core.distilled import DistilledSet

DICOM_FILE = "distilled.dcm"
_IMPLEMENTATION = "MEDISTILL"
_DESCRIPTION = "Synthetic training images made by dataset distillation; not an examination of a patient"
_VOLUME_AXES = 5


def dicom_bytes(distilled: DistilledSet) -> bytes:
    """The file; the same set gives the same bytes.

    Privacy:
        Holds the images and no word of the data owner, a patient or a time.
    """
    from pydicom.dataset import Dataset, FileMetaDataset  # noqa: PLC0415
    from pydicom.uid import UID, ExplicitVRLittleEndian  # noqa: PLC0415

    dataset = Dataset()
    frames = _frames(distilled.images)
    uids, kind = _uids(distilled), _storage_class(frames)
    for values in (_identity(uids), _origin(distilled), _pixels(frames)):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB"
    dataset.SOPClassUID = UID(kind)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(kind)
    meta.MediaStorageSOPInstanceUID = UID(uids["instance"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_uid("implementation"))
    meta.ImplementationVersionName = _IMPLEMENTATION
    dataset.file_meta = meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def frames_note(distilled: DistilledSet) -> str:
    """Which frame shows which image, in one sentence."""
    if distilled.images.ndim != _VOLUME_AXES:
        return "frame i is row i of labels.csv, both counted from 1"
    depth = distilled.images.shape[2]
    return f"every volume is {depth} frames, one per slice of its first axis, in the order of labels.csv"


def _frames(images: Tensor) -> NDArray[np.uint8]:
    """Shape ``(frames, h, w)``, or ``(frames, h, w, 3)`` for three channels; other channels as their mean."""
    if images.ndim == _VOLUME_AXES:
        images = images.movedim(2, 1).flatten(0, 1)
    levels = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    if levels.shape[1] == 3:
        return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())
    grey = levels[:, 0] if levels.shape[1] == 1 else levels.float().mean(1).round().to(torch.uint8)
    return np.ascontiguousarray(grey.numpy())


def _storage_class(frames: NDArray[np.uint8]) -> str:
    from pydicom import uid  # noqa: PLC0415

    coloured = frames.ndim == 4
    return str(
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage
        if coloured
        else uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    )


def _uids(distilled: DistilledSet) -> dict[str, str]:
    content = [distilled.fingerprint(), distilled.task.to_json(), distilled.recipe.version, _DESCRIPTION]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {name: _uid(f"{digest}/{name}") for name in ("study", "series", "instance")}


def _uid(name: str) -> str:
    """A UID under 2.25, from a UUID that follows from a name."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'medistill/{name}').int}"


def _identity(uids: dict[str, str]) -> dict[str, Any]:
    empty = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
    return {
        **dict.fromkeys((*empty, "AccessionNumber", "ReferringPhysicianName"), ""),
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPInstanceUID": uids["instance"],
        "StudyInstanceUID": uids["study"],
        "SeriesInstanceUID": uids["series"],
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "Synthetic images; there is no patient",
        "PatientOrientation": "",
        "Laterality": "",
    }


def _origin(distilled: DistilledSet) -> dict[str, Any]:
    made = f"Dataset distillation with medistill {distilled.recipe.version}: {distilled.recipe.method}."
    return {
        "Modality": "OT",
        "ConversionType": "SYN",
        "ImageType": ["DERIVED", "SECONDARY"],
        "SyntheticData": "YES",
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "Manufacturer": "medistill",
        "SoftwareVersions": distilled.recipe.version[:64],
        "SeriesDescription": "Distilled images (synthetic)",
        "DerivationDescription": f"{_DESCRIPTION}. {made}"[:1024],
        "ImageComments": "Not for diagnosis. Made to train a network, not to be read.",
    }


def _pixels(frames: NDArray[np.uint8]) -> dict[str, Any]:
    coloured = frames.ndim == 4
    content = frames.tobytes()
    colours: dict[str, Any] = (
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        if coloured
        else {
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "PresentationLUTShape": "IDENTITY",
            "RescaleIntercept": 0,
            "RescaleSlope": 1,
            "RescaleType": "US",
        }
    )
    return {
        **colours,
        "NumberOfFrames": len(frames),
        "FrameIncrementPointer": 0x00182001,
        "PageNumberVector": list(range(1, len(frames) + 1)),
        "Rows": frames.shape[1],
        "Columns": frames.shape[2],
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": content + b"\0" * (len(content) % 2),
    }
