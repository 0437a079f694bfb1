"""The DICOM file of a release, stored in a real Orthanc and fetched back."""

from __future__ import annotations

import io
import json

import numpy as np
import pydicom
import pytest

from medistill.ingest.sources.dicomweb import DicomWebSource, retrieve
from medistill.release.dicom_export import dicom_bytes
from tests.ingest.pacs.archive import USER, Orthanc
from tests.report.example_release import THREE, TWO, distilled_set


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_an_archive_takes_the_distilled_images_and_gives_them_back(orthanc: Orthanc, kind: str) -> None:
    distilled = distilled_set(TWO, ipc=3) if kind == "grey" else distilled_set(THREE, ipc=2, channels=3)
    content = dicom_bytes(distilled)
    sent = pydicom.dcmread(io.BytesIO(content))
    answer = json.loads(orthanc.request("/instances", content))
    try:
        assert answer["Status"] == "Success"
        assert orthanc.request(f"/instances/{answer['ID']}/file") == content
        preview = orthanc.request(f"/instances/{answer['ID']}/frames/{sent.NumberOfFrames - 1}/preview")
        assert preview.startswith(b"\x89PNG")  # the archive itself can draw the last frame

        source = DicomWebSource(orthanc.url, user=USER, pause=0.01, studies=[str(sent.StudyInstanceUID)])
        (item,) = source.items()
        fetched = pydicom.dcmread(io.BytesIO(retrieve(item.payload)))
        assert np.array_equal(fetched.pixel_array, sent.pixel_array)
        assert fetched.to_json_dict() == sent.to_json_dict()
    finally:
        orthanc.request(f"/instances/{answer['ID']}", method="DELETE")
