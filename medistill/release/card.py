"""``card.json`` for programs and ``README.md`` for a stranger: what a release is, states and cannot do."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from medistill.core.distilled import DistilledSet
from medistill.core.reports import AuditReport, DiagnosticReport
from medistill.core.task import TaskKind
from medistill.release.dicom_export import frames_note
from medistill.release.preprocessing import preprocessing
from medistill.report.disclosure import (
    NOT_COVERED_NOTE,
    ROUNDING_NOTE,
    public_audit,
    public_cohort,
    public_commands,
    public_diagnosis,
)
from medistill.report.png import MIDDLE_SLICES
from medistill.report.wording import guarantee_meaning, one_line, three_lines, warnings_of

_VOLUME_AXES = 5
CARD_FILE = "card.json"
#: Tells the Hugging Face hub and ``datasets`` where the pictures are.
_FRONT = "---\nconfigs:\n- config_name: default\n  data_dir: images\n---\n\n"
SCHEMA_VERSION = 1
DEFAULT_NAME = "Distilled image release"

_INTENDED = (
    "Training and comparing models for the diagnosis named here, for research and teaching.",
    "Repeating a published result without access to the original images.",
)
_LIMITS = (
    "Not for diagnosis, treatment or triage of a patient; no regulator has approved it.",
    "The images are made to train a network, not to be read: they need not look like anatomy.",
    "A model trained on them inherits the population, the devices and the label errors of one data owner.",
    "The guarantee and the audit speak of this release alone; further releases of the same patients add up.",
    "Classes with few patients are less well served and may be less well protected where nothing is proved.",
)


def build_card(
    *,
    distilled: DistilledSet,
    audit: AuditReport | None,
    diagnosis: DiagnosticReport | None,
    cohort: Mapping[str, Any] | None,
    commands: tuple[str, ...],
    forced_reason: str | None,
    name: str,
    licence: str | None,
    versions: Mapping[str, str],
    profile: Mapping[str, Any] | None = None,
    signer: str | None = None,
    published: str | None = None,
) -> dict[str, Any]:
    """The card as strict plain values.

    Args:
        distilled: What is released.
        audit: What an audit concluded.
        diagnosis: Arms side by side.
        cohort: Summary of the cohort.
        commands: Commands that make the release again.
        forced_reason: Why it is released without regard to the gate.
        name: Title.
        licence: In the data owner's words.
        versions: Of what else shaped the bytes.
        profile: Settings of the cohort's images, where there is no summary.
        signer: Fingerprint of the key that signs the release.
        published: Day of publication.

    Privacy:
        Reads counts and measurements made on real patients. Every count is rounded down to tens; no pseudonym
        or path enters, and what the copy alarm measured on the closest patient has two decimals.
    """
    what, guaranteed, measured = three_lines(distilled, audit, diagnosis)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": one_line(name),
        "summary": {"what": what, "guaranteed": guaranteed, "measured": measured},
        "warnings": [f"{w.title}. {w.text}" for w in warnings_of(distilled, audit, forced_reason)],
        "task": distilled.task.to_json(),
        "ipc": distilled.ipc,
        "images": _images(distilled),
        "dicom_frames": frames_note(distilled),
        "preprocessing": preprocessing(distilled.images, (cohort or {}).get("profile") or profile),
        "method": distilled.recipe.method,
        "recipe_fingerprint": distilled.recipe.fingerprint(),
        "privacy": {
            "statement": distilled.privacy.to_json(),
            "sentence": one_line(distilled.privacy.sentence),
            "meaning": guarantee_meaning(distilled.privacy),
        },
        "audit": None if audit is None else _figures(public_audit(audit)),
        "diagnosis": None if diagnosis is None else _figures(public_diagnosis(diagnosis, released=len(distilled))),
        "cohort": None if cohort is None else public_cohort(cohort),
        "counts_note": f"{ROUNDING_NOTE} {NOT_COVERED_NOTE}",
        "intended_use": list(_INTENDED),
        "limits": list(_LIMITS),
        "real_and_synthetic": real_and_synthetic(distilled),
        "licence": licence,
        "published": published,
        "signature": None if signer is None else {"algorithm": "Ed25519", "fingerprint": signer},
        "fingerprint": distilled.fingerprint(),
        "medistill_version": distilled.recipe.version,
        "versions": dict(versions),
        "commands": list(public_commands(commands)),
        "forced_reason": forced_reason,
    }


def _figures(value: Any) -> Any:
    """Measured figures to six digits, of which no interval is narrow enough to need more."""
    if isinstance(value, dict):
        return {key: _figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_figures(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def real_and_synthetic(distilled: DistilledSet) -> dict[str, str]:
    """What in a release stems from a patient and what was computed."""
    if distilled.recipe.starts_from_real:
        images = "At least one image began as, or is, a patient's image. Treat the release as patient data."
    elif math.isinf(distilled.privacy.epsilon):
        images = (
            "Computed, beginning without any patient's image. They were fitted to real patients' images and may "
            "carry information about them."
        )
    else:
        images = (
            "Computed, beginning without any patient's image, from answers about real patients that "
            "were protected as the privacy statement says."
        )
    return {
        "images": images,
        "soft_labels": "Computed together with the images; they are not the diagnoses of patients.",
        "measurements": NOT_COVERED_NOTE,
    }


def readme(card: Mapping[str, Any]) -> str:
    """The card in words, for somebody who has never heard of medistill."""
    summary = card["summary"]
    warnings = "".join(f"> **Warning.** {_markdown(text)}\n>\n" for text in card["warnings"])
    limits = "\n".join(f"- {text}" for text in card["limits"])
    uses = "\n".join(f"- {text}" for text in card["intended_use"])
    licence = _markdown(
        card["licence"] or "not stated by the data owner; ask before you use or pass on the images."
    )
    return f"""{_FRONT}# {_markdown(card["name"])}

{_markdown(summary["what"])}

{warnings.removesuffix(">" + chr(10))}
## Check it

`medistill` is the Python package that wrote this folder (version {card["medistill_version"]}).

```
medistill verify PATH{" --key OWNER.pub" if card["signature"] else ""}
```

{_signature_note(card)}

## Load it

```python
from medistill import load_release
release = load_release("PATH")              # this folder; every file is checked first
image, soft_label = release[0]
```

Without medistill: `safetensors.torch.load_file("images.safetensors")` gives `images` (in 0 to 1), `soft_labels`
and `hard_labels`; `recipe.json` names the classes and how long to train. 8-bit pictures with labels:
`datasets.load_dataset("PATH")`, or `mlcroissant.Dataset("PATH/croissant.json")`.\
{_labels_note(card)}{_views_note(card)}

## Train and predict

```
medistill train PATH --out MODEL
medistill predict MODEL FILE.dcm
```

{_markdown(card["preprocessing"]["sentence"])} An image that is to be diagnosed must be made the same way;
the settings are in `card.json` under `preprocessing`.

## What is guaranteed

{_markdown(summary["guaranteed"])}

{_markdown(card["privacy"]["meaning"])}

## What was measured

{_markdown(summary["measured"])}

{card["counts_note"]}

## What is real and what is not

- Images: {card["real_and_synthetic"]["images"]}
- Soft labels: {card["real_and_synthetic"]["soft_labels"]}

## For what

{uses}

## Limits

{limits}

## Files

| file | holds |
|---|---|
| `images.safetensors` | exact images, soft labels, hard labels; labels of crops where there are any |
| `recipe.json` | how they were made, how to train on them, the privacy statement |
| `labels.csv`, `images/` | the same for looking at: one 8-bit picture per row{_pictures_note(card)} |
| `images/metadata.csv` | the labels beside the pictures, as Hugging Face `datasets` looks for them |
| `distilled.dcm` | the pictures as one DICOM file without a patient: {card["dicom_frames"]} |
| `card.json` | this page for programs, with all figures |
| `croissant.json` | this page for catalogues of data sets (Croissant 1.0 with RAI), with every file's digest |
| `report.html` | the full report; open it in any browser, no network needed |
| `SHA256SUMS` | digests of all files: `sha256sum -c SHA256SUMS` or `medistill verify PATH` |
{_signature_files(card)}
## Licence

{licence}
"""


def _signature_note(card: Mapping[str, Any]) -> str:
    if card["signature"] is None:
        return (
            "This release is not signed: the digests show damage and careless changes, not who made the folder. "
            "Compare\nthe digest of `SHA256SUMS` with one that the owner gave you another way."
        )
    return (
        f"This release is signed (Ed25519) with the key\n`{card['signature']['fingerprint']}`.\n"
        "The key in this folder shows that the folder is of one piece; that it is the owner's key you must learn "
        "elsewhere.\nTake `OWNER.pub` or this fingerprint from the owner, not from whoever passed the folder on.\n"
        "Without medistill, in this folder: `sha256sum -c SHA256SUMS`, then\n"
        "`openssl pkeyutl -verify -pubin -inkey OWNER.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig`."
    )


def _signature_files(card: Mapping[str, Any]) -> str:
    if card["signature"] is None:
        return ""
    return "| `signer.pub`, `SHA256SUMS.sig` | the public key, and the signature over `SHA256SUMS` |\n"


def _labels_note(card: Mapping[str, Any]) -> str:
    if card["task"]["kind"] != TaskKind.MULTILABEL:
        return ""
    return (
        "\n\nAn image may show several classes: soft labels are in 0 to 1 for each class on its own, and the loss "
        "is binary\ncross-entropy. `hard_labels` is the class an image was made for."
    )


def _views_note(card: Mapping[str, Any]) -> str:
    views = card["images"].get("views")
    if not views:
        return ""
    what = ""
    if views.get("mosaic"):
        what = (
            "\nThey do not overlap: the image is a mosaic of smaller images. `load_release` gives each of them, "
            f"enlarged, with its\nown label: {views['count'] * card['images']['count']} pairs."
        )
    return (
        f"\n\nStudents learn from {views['count']} crops of every image, each with a soft label of its own.{what} "
        "`view_boxes` has the shape\n(crop, image, corners): the low corner, then the high corner, in the order "
        "of the image's axes, as shares of\nthe side; `view_soft_labels` has (crop, image, class). In epoch e a "
        f"student sees crop e modulo {views['count']} of each image,\nenlarged to the whole side; its logits are "
        f"divided by `view_temperature` ({views['temperature']:g}) before the loss, which "
        "is\ntaken times its square."
    )


def _pictures_note(card: Mapping[str, Any]) -> str:
    shown = card["images"].get("pictures_show")
    return f"; of each volume {shown}" if shown else ""


def _views(distilled: DistilledSet) -> dict[str, Any]:
    if distilled.views is None:
        return {}
    views = distilled.views
    mosaic = {"mosaic": True} if views.are_tiles else {}
    return {"views": {"count": len(views), "temperature": views.temperature, **mosaic}}


def _images(distilled: DistilledSet) -> dict[str, Any]:
    classes = distilled.hard_labels.tolist()
    return {
        "count": len(distilled),
        "per_class": {name: classes.count(i) for i, name in enumerate(distilled.task.class_names)},
        "shape": list(distilled.images.shape[1:]),
        "range": [0, 1],
        **_views(distilled),
        **({"pictures_show": MIDDLE_SLICES} if distilled.images.ndim == _VOLUME_AXES else {}),
    }


def _markdown(text: str) -> str:
    """Text from outside that cannot become markup."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(one_line(text), quote=False))
