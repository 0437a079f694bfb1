"""Write a release: one folder that is complete and sealed, or not there at all."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medistill.core.distilled import DistilledSet
from medistill.core.reports import AuditReport, DiagnosticReport
from medistill.distill.watch import Look
from medistill.errors import DataError, OutputError, PrivacyError
from medistill.release.card import CARD_FILE, DEFAULT_NAME, build_card, readme
from medistill.release.croissant import CROISSANT_FILE, TABLE_FILE, croissant, soft_column
from medistill.release.dicom_export import DICOM_FILE, dicom_bytes
from medistill.release.durable import output_errors, partial_name, sync_folder, write_durably
from medistill.release.seal import SEAL_FILE, SIGNATURE_FILE, seal
from medistill.release.signature import SIGNER_FILE, SigningKey
from medistill.release.tensors import distilled_files, json_bytes
from medistill.report.page import render_report
from medistill.report.png import encode, picture

# The decimals of a number (1/3 is 0.3333333333333333) have the alphabet of a pseudonym too, and are none.
_IDENTIFIER = re.compile(rb"(?<![A-Za-z0-9])(?<![0-9]\.)[A-Z2-7]{16}(?![A-Za-z0-9])|(?<![0-9.])2\.25\.[0-9]{6,}")
# The UIDs in the DICOM file are made from the set, which has no field of a patient; a public key is random digits.
_NOT_TEXT = (".png", ".safetensors", ".dcm", ".pub")
_PICTURE_DATA = re.compile(rb"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]*")


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
    profile: Mapping[str, Any] | None = None,
    signing_key: SigningKey | None = None,
    published: str | None = None,
    moments: Sequence[Look] = (),
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
        profile: How the cohort's images were made, where there is no summary with a profile; a model trained on
            the release can only be applied to images made the same way.
        signing_key: Signs the release.
        published: Day of publication as ``YYYY-MM-DD``; left out where not given, for no clock is read.
        moments: Looks at the images as they formed, see :func:`medistill.report.forming.load_moments`; for the
            report, under the same condition as ``snapshots``.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder is not empty or not writable, or the disk is full.
        DataError: If the audit is of another recipe, or ``published`` is no day.
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
    _require_day(published)
    files = _contents(
        distilled=distilled,
        audit=audit,
        diagnosis=diagnosis,
        cohort=cohort,
        commands=commands,
        forced_reason=forced_reason,
        name=name,
        licence=licence,
        formed={"snapshots": snapshots, "moments": moments},
        stated={"profile": profile, "published": published},
        signing_key=signing_key,
    )
    _refuse_identifiers(files, distilled.task.class_names)
    sealed = seal(files)
    signature = {} if signing_key is None else {SIGNATURE_FILE: signing_key.sign(sealed)}
    with output_errors(out):
        _publish(out, {**files, SEAL_FILE: sealed, **signature})
    return out


def _contents(
    *,
    formed: Mapping[str, Any],
    stated: Mapping[str, Any],
    signing_key: SigningKey | None,
    **evidence: Any,
) -> dict[str, bytes]:
    distilled: DistilledSet = evidence["distilled"]
    evidence["versions"] = _versions()
    card = build_card(**evidence, **stated, signer=signing_key.fingerprint if signing_key else None)
    files = {
        **distilled_files(distilled),
        **{_picture_name(i): encode(picture(image)) for i, image in enumerate(distilled.images)},
        "labels.csv": _labels(distilled),
        TABLE_FILE: _table(distilled),
        DICOM_FILE: dicom_bytes(distilled),
        CARD_FILE: json_bytes(card),
        "README.md": readme(card).encode(),
        "report.html": render_report(**formed, **evidence).encode(),
        **({SIGNER_FILE: signing_key.public} if signing_key else {}),
    }
    described = croissant(card, files, fingerprint=distilled.fingerprint())
    return {**files, CROISSANT_FILE: json_bytes(described)}


def _versions() -> dict[str, str]:
    """What else shaped the bytes; the version of medistill is in the recipe."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def _picture_name(index: int) -> str:
    return f"images/{index:04d}.png"


def _labels(distilled: DistilledSet) -> bytes:
    names = distilled.task.class_names
    rows = [[_picture_name(i), names[label], *shares] for i, label, shares in _rows(distilled)]
    return _csv(["file", "class", *map(soft_column, names)], rows)


def _table(distilled: DistilledSet) -> bytes:
    """As labels.csv, with names relative to the pictures and the class as a number too."""
    names = distilled.task.class_names
    rows = [
        [_picture_name(i).removeprefix("images/"), names[label], str(label), *shares]
        for i, label, shares in _rows(distilled)
    ]
    return _csv(["file_name", "class", "label", *map(soft_column, names)], rows)


def _rows(distilled: DistilledSet) -> Iterator[tuple[int, int, list[str]]]:
    labels, soft_labels = distilled.hard_labels.tolist(), distilled.soft_labels.tolist()
    for i, (label, row) in enumerate(zip(labels, soft_labels, strict=True)):
        yield i, label, [f"{share:.6f}" for share in row]


def _csv(header: list[str], rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def _require_day(published: str | None) -> None:
    try:
        if published is not None and date.fromisoformat(published).isoformat() != published:
            raise ValueError
    except ValueError:
        raise DataError("Expected the day of publication as YYYY-MM-DD, got another form.") from None


def _refuse_identifiers(files: Mapping[str, bytes], class_names: tuple[str, ...]) -> None:
    """Last look before anything leaves: no text file may hold a pseudonym or a remapped UID."""
    alike = [name.encode() for name in class_names if _IDENTIFIER.search(name.encode())]
    for name, content in files.items():
        if name.endswith(_NOT_TEXT):
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
