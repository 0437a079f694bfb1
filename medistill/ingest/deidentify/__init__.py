"""DICOM files without identity: rebuilt from an allowlist, then searched for everything their source said.

>>> from medistill.ingest.deidentify import default_profile
>>> "PixelSpacing" in default_profile().retained()["CT"]
True
"""

from medistill.ingest.deidentify.folder import Deidentifier, Summary, deidentify_folder
from medistill.ingest.deidentify.profile import Options, Profile, default_profile, load_profile
from medistill.ingest.deidentify.rebuild import Rebuilt, deidentify, rebuild
from medistill.ingest.deidentify.verify import Survivor, check, survivors
from medistill.ingest.deidentify.writing import encode

__all__ = [
    "Deidentifier",
    "Options",
    "Profile",
    "Rebuilt",
    "Summary",
    "Survivor",
    "check",
    "default_profile",
    "deidentify",
    "deidentify_folder",
    "encode",
    "load_profile",
    "rebuild",
    "survivors",
]
