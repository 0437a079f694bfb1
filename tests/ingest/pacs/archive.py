"""A real Orthanc on loopback, and the files that it is filled with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from tests.ingest.conftest import make_dicom

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", "orthanc", "orthanc-dicomweb")
USER, PASSWORD = "reader", "geheim-ß-77"
PATIENTS = 30
ROOT = "1.2.826.0.1.3680043.10.999"
#: pydicom's own files in nine transfer syntaxes.
SYNTAXES = {
    "MR_small.dcm": "MR",
    "MR_small_implicit.dcm": "MR",
    "MR_small_RLE.dcm": "MR",
    "MR_small_jp2klossless.dcm": "MR",
    "MR_small_jpeg_ls_lossless.dcm": "MR",
    "MR_small_bigendian.dcm": "MR",
    "JPEG2000.dcm": "NM",
    "JPEG-lossy.dcm": "NM",
    "SC_rgb_jpeg_gdcm.dcm": "OT",
    "SC_rgb_small_odd_jpeg.dcm": "OT",
    "SC_rgb_rle_2frame.dcm": "OT",
}


@dataclass(frozen=True)
class Stored:
    """One file of the archive."""

    path: Path
    study: str
    series: str
    sop: str
    date: str
    modality: str
    patient: str


def write_files(folder: Path) -> list[Stored]:
    """Patients with one study of one CR and sometimes one DX series; the last one holds all transfer syntaxes."""
    rng = np.random.default_rng(0)
    stored = []
    for patient in range(PATIENTS):
        for number in range(2 + patient % 3):
            modality, series = ("CR", 1) if number < 2 or patient % 2 else ("DX", 2)
            path = folder / f"{patient}-{number}.dcm"
            names = _names(patient, series, number)
            pixels = rng.integers(0, 4096, (24, 20)).astype(np.uint16)
            made = make_dicom(path, pixels, **names, Modality=modality, StudyDate=f"2020{patient // 3 + 1:02d}15")
            stored.append(_stored(path, made))
    for number, (name, modality) in enumerate(SYNTAXES.items()):
        path = folder / f"syntax-{number}.dcm"
        dataset = pydicom.dcmread(get_testdata_file(name))
        series = 1 + sorted({*SYNTAXES.values()}).index(modality)
        for keyword, value in {**_names(PATIENTS, series, number), "Modality": modality}.items():
            setattr(dataset, keyword, value)
        dataset.StudyDate = "20210101"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(path)
        stored.append(_stored(path, dataset))
    return stored


def _names(patient: int, series: int, number: int) -> dict[str, str]:
    study = f"{ROOT}.{patient + 1}"
    return {
        "PatientID": f"TEST{patient:03d}",
        "PatientName": f"TEST^{patient}",
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.{series}",
        "SOPInstanceUID": f"{study}.{series}.{number + 1}",
    }


def _stored(path: Path, dataset: Dataset) -> Stored:
    return Stored(
        path=path,
        study=dataset.StudyInstanceUID,
        series=dataset.SeriesInstanceUID,
        sop=dataset.SOPInstanceUID,
        date=dataset.StudyDate,
        modality=dataset.Modality,
        patient=dataset.PatientID,
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def require_orthanc() -> str:
    """Path of the program; installs it where that is possible, otherwise skips the test."""
    found = shutil.which("Orthanc")
    if (found is None or not PLUGIN.exists()) and shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (("apt-get", "update"), INSTALL):
            subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
        found = shutil.which("Orthanc")
    if found is None or not PLUGIN.exists():
        pytest.skip(f"Orthanc is absent and cannot be installed here: {' '.join(INSTALL)}")
    return found


@dataclass
class Orthanc:
    """One server process; its data stays over a restart."""

    folder: Path
    program: str
    http_port: int = field(default_factory=free_port)
    dicom_port: int = field(default_factory=free_port)
    move_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def configuration(self) -> dict[str, object]:
        return {
            "Name": "medistill-test",
            "StorageDirectory": str(self.folder / "DB"),
            "IndexDirectory": str(self.folder / "DB"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "DicomAet": "ORTHANC",
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomCheckModalityHost": True,
            "DicomModalities": {
                "medistill": {
                    "AET": "MEDISTILL",
                    "Host": "127.0.0.1",
                    "Port": self.move_port,
                    **{f"Allow{verb}": True for verb in ("Echo", "Find", "Get", "Move", "Store")},
                },
                "no-get": {"AET": "NOGET", "Host": "127.0.0.1", "Port": 1, "AllowFind": True, "AllowGet": False},
            },
            "OverwriteInstances": False,
            "SaveJobs": False,
            "SyncStorageArea": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }

    def start(self) -> None:
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(self.configuration()), encoding="utf-8")
        log = (self.folder / "orthanc.log").open("ab")
        with log:
            self.process = subprocess.Popen([self.program, str(path)], stdout=log, stderr=log)
        for _ in range(200):
            try:
                self.request("/system")
                socket.create_connection(("127.0.0.1", self.dicom_port), timeout=5).close()  # opens later
                return
            except OSError:
                time.sleep(0.1)
        self.kill()
        pytest.skip("Orthanc does not start here")

    def kill(self) -> None:
        """End the process at once; what it stored stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None

    def request(self, path: str, data: bytes | None = None, method: str | None = None) -> bytes:
        """One request to its own interface."""
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, f"http://127.0.0.1:{self.http_port}", USER, PASSWORD)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(manager)
        )
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=data, method=method)
        with opener.open(request, timeout=10) as response:
            return bytes(response.read())

    def fill(self, stored: list[Stored]) -> None:
        for one in stored:
            self.request("/instances", one.path.read_bytes())
