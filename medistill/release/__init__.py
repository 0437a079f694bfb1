"""What leaves the hospital: a sealed folder, the gate before it and the check after it."""

from medistill.release.folder import write_release
from medistill.release.gate import check_gate
from medistill.release.verify import Release, VerifiedRelease, load_release, verify_release

__all__ = ["Release", "VerifiedRelease", "check_gate", "load_release", "verify_release", "write_release"]
