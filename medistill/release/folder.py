"""Write a release: one folder that is complete and sealed, or not there at all."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medistill.core.distilled import DistilledSet
from medistill.core.reports import AuditReport, DiagnosticReport
from medistill.errors import DataError, OutputError, PrivacyError
from medistill.release.card import CARD_FILE, DEFAULT_NAME, build_card, readme
from medistill.release.durable import output_errors, partial_name, sync_folder, write_durably
from medistill.release.seal import SEAL_FILE, seal
from medistill.release.tensors import distilled_files, json_bytes
from medistill.report.page import render_report
from medistill.report.png import encode, picture

# The decimals of a number (1/3 is 0.3333333333333333) have the alphabet of a pseudonym too, and are none.
_IDENTIFIER = re.compile(rb"(?<![A-Za-z0-9])(?<![0-9]\.)[A-Z2-7]{16}(?![A-Za-z0-9])|(?<![0-9.])2\.25\.[0-9]{6,}")
_PICTURE_DATA = re.compile(rb"data:image/png;base64,[A-Za-z0-9+/=]*")


def write_release(
    out: Path,
    *,
    distilled: DistilledSet,
    audit: AuditReport | None,
    diagnosis: DiagnosticReport | None,
    cohort: Mapping[str, Any] | None,
    snapshots: Mapping[str, Tensor] | None,
    commands: tuple[str, ...],
    forced_reason: str | None = None,
    name: str = DEFAULT_NAME,
    licence: str | None = None,
) -> Path:
    """Write what leaves the hospital.

    The folder appears under its name only when every file is on the disk; whatever interrupts leaves nothing. The
    same arguments give the same bytes.

    Args:
        out: Folder to make; may exist when it is empty.
        distilled: Images with labels, recipe, schedule and privacy statement.
        audit: What an audit of this very recipe concluded.
        diagnosis: Arms side by side.
        cohort: Summary of the cohort: ``splits``, ``quarantine`` and ``profile``.
        snapshots: Named stages of how the images formed, in order; never published for a set that starts from real
            images.
        commands: Commands that make this release again; absolute paths and addresses are masked.
        forced_reason: Why it is released without regard to the gate; a prominent warning.
        name: Title of the release.
        licence: Under which terms the images may be used, in the data owner's words.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder is not empty or not writable, or the disk is full.
        DataError: If the audit is of another recipe.
        PrivacyError: If something of the form of a pseudonym or a remapped UID would be published.

    Privacy:
        Reads measurements and counts of real patients. Counts are rounded down to tens; the text files are
        searched for pseudonyms before anything is written.
    """
    out = Path(out).absolute()
    _require_free(out)
    for what, report in (("audit", audit), ("evaluation", diagnosis)):
        if report is not None and report.release != distilled.fingerprint():
            raise DataError(
                f"Expected the {what} of this distilled set, got that of another. Run it on this set first."
            )
    files = _contents(
        distilled=distilled,
        audit=audit,
        diagnosis=diagnosis,
        cohort=cohort,
        commands=commands,
        forced_reason=forced_reason,
        name=name,
        licence=licence,
        snapshots=snapshots,
    )
    _refuse_identifiers(files, distilled.task.class_names)
    with output_errors(out):
        _publish(out, {**files, SEAL_FILE: seal(files)})
    return out


def _contents(*, snapshots: Mapping[str, Tensor] | None, **evidence: Any) -> dict[str, bytes]:
    distilled: DistilledSet = evidence["distilled"]
    evidence["versions"] = _versions()
    card = build_card(**evidence)
    return {
        **distilled_files(distilled),
        **{_picture_name(i): encode(picture(image)) for i, image in enumerate(distilled.images)},
        "labels.csv": _labels(distilled),
        CARD_FILE: json_bytes(card),
        "README.md": readme(card).encode(),
        "report.html": render_report(snapshots=snapshots, **evidence).encode(),
    }


def _versions() -> dict[str, str]:
    """What else shaped the bytes; the version of medistill is in the recipe."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def _picture_name(index: int) -> str:
    return f"images/{index:04d}.png"


def _labels(distilled: DistilledSet) -> bytes:
    names = distilled.task.class_names
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "class", *(f"soft_label:{name}" for name in names)])
    for i, (label, row) in enumerate(
        zip(distilled.hard_labels.tolist(), distilled.soft_labels.tolist(), strict=True)
    ):
        table.writerow([_picture_name(i), names[label], *(f"{share:.6f}" for share in row)])
    return text.getvalue().encode()


def _refuse_identifiers(files: Mapping[str, bytes], class_names: tuple[str, ...]) -> None:
    """Last look before anything leaves: no text file may hold a pseudonym or a remapped UID."""
    alike = [name.encode() for name in class_names if _IDENTIFIER.search(name.encode())]
    for name, content in files.items():
        if name.endswith((".png", ".safetensors")):
            continue
        text = _PICTURE_DATA.sub(b"", content)
        for class_name in alike:
            text = text.replace(class_name, b"")
        if _IDENTIFIER.search(text):
            raise PrivacyError(
                f"Refused to write a release: {name} would hold something of the form of a patient pseudonym or a "
                "remapped UID. Remove it from the recipe, the reason, the commands or the findings."
            )


def _require_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"Expected {out.name} to be a new folder; it is something else. Choose another name.")
    with output_errors(out):
        occupied = out.is_dir() and any(out.iterdir())
    if occupied:
        raise OutputError(
            f"Expected {out.name} to be new or empty; it holds files. Choose another name or move them away."
        )


def _publish(out: Path, files: Mapping[str, bytes]) -> None:
    """Write beside the target, force everything to the disk, then rename in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(out)
    try:
        for name, content in sorted(files.items()):
            write_durably(partial / name, content)
        for folder in {(partial / name).parent for name in files}:
            sync_folder(folder)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)
