"""What an installation can do, and how to mend what it cannot."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_REQUIRED = ("torch", "torchvision", "monai", "opacus", "pydicom", "SimpleITK", "scikit-learn", "imagecodecs")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: What was looked at.
        found: What was found.
        ok: Whether it is as it should be.
        remedy: What to do, or empty.
    """

    what: str
    found: str
    ok: bool
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Look at Python, the libraries, the torch and torchvision builds, the codecs and the GPU."""
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding(what="Python", found=python, ok=sys.version_info >= (3, 11))]
    for name in _REQUIRED:
        try:
            findings.append(Finding(what=name, found=version(name), ok=True))
        except PackageNotFoundError:
            remedy = f"Install it: pip install {name}"
            findings.append(Finding(what=name, found="not installed", ok=False, remedy=remedy))
    return [*findings, _torchvision(), _codecs(), _device()]


def _torchvision() -> Finding:
    try:
        importlib.import_module("torchvision.ops").nms  # noqa: B018 - fails where the builds differ
    except (ImportError, RuntimeError, AttributeError):
        return Finding(
            what="torch and torchvision",
            found="different builds",
            ok=False,
            remedy="Install both from the same index: pip install --force-reinstall torch torchvision",
        )
    return Finding(what="torch and torchvision", found="same build", ok=True)


def _codecs() -> Finding:
    try:
        imagecodecs = importlib.import_module("imagecodecs")
    except ImportError:
        return Finding(what="codecs", found="none", ok=False, remedy="pip install imagecodecs")
    wanted = {"JPEG": "JPEG8", "JPEG lossless": "LJPEG", "JPEG-LS": "JPEGLS", "JPEG 2000": "JPEG2K"}
    missing = [name for name, flag in wanted.items() if not getattr(imagecodecs, flag).available]
    found = "all" if not missing else f"missing {', '.join(missing)}"
    return Finding(what="DICOM codecs", found=found, ok=not missing)


def _device() -> Finding:
    torch = importlib.import_module("torch")
    found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; everything runs on the CPU"
    return Finding(what="GPU", found=found, ok=True)
