"""What leaves the hospital: a sealed folder, the gate before it and the check after it."""

from medistill.release.folder import write_release
from medistill.release.gate import check_gate
from medistill.release.signature import SigningKey, load_signing_key, write_key_pair
from medistill.release.verify import Release, VerifiedRelease, load_release, verify_release

__all__ = [
    "Release",
    "SigningKey",
    "VerifiedRelease",
    "check_gate",
    "load_release",
    "load_signing_key",
    "verify_release",
    "write_key_pair",
    "write_release",
]
