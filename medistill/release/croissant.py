"""``croissant.json``: the release in the words of ML Commons Croissant 1.0, for search engines and data loaders.

It lists every file with its SHA-256 (but for itself, the seal and the signature, which are made after it),
describes one record per image with its labels, and says in the vocabulary for responsible AI (RAI 1.0) where the
images come from and what is known about the people behind them. ``mlcroissant.Dataset("croissant.json")`` reads
it.

Nothing in it comes from a clock: the date of publication is the owner's, or absent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from medistill.report.wording import one_line

CROISSANT_FILE = "croissant.json"
#: Beside the pictures, one row per picture; also what Hugging Face ``datasets`` looks for.
TABLE_FILE = "images/metadata.csv"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "equivalentProperty": "cr:equivalentProperty",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FORMATS = {
    ".png": "image/png",
    ".csv": "text/csv",
    ".json": "application/json",
    ".md": "text/markdown",
    ".html": "text/html",
    ".dcm": "application/dicom",
    ".pub": "application/x-pem-file",
    ".safetensors": "application/octet-stream",
}
_CREATIVE_COMMONS = re.compile(r"CC0-1\.0|CC-BY(?:-NC)?(?:-ND|-SA)?-4\.0")
_OWNER = {
    "@type": "sc:Organization",
    "name": "The data owner who released the images",
    "description": "medistill records no name of an institution; the owner's is where the release was obtained.",
}


def croissant(card: Mapping[str, Any], files: Mapping[str, bytes], *, fingerprint: str) -> dict[str, Any]:
    """The description as strict plain values; the same release gives the same values.

    Args:
        card: As of :func:`medistill.release.card.build_card`.
        files: Contents of the release's other files by name.
        fingerprint: Of the distilled set.

    Privacy:
        Says nothing beyond the card.
    """
    name = one_line(card["name"])
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "schema_version": card["schema_version"],
        "name": name,
        "description": " ".join([card["summary"]["what"], card["summary"]["guaranteed"], *card["warnings"]]),
        "identifier": f"sha256:{fingerprint}",
        "keywords": ["dataset distillation", "medical imaging", "synthetic images", *card["task"]["class_names"]],
        "license": licence_address(card["licence"]),
        "citeAs": _citation(name, fingerprint, card),
        "creator": _OWNER,
        **({"datePublished": card["published"]} if card["published"] else {}),
        "version": "1.0.0",
        "isLiveDataset": False,
        **_responsible(card),
        "distribution": [*_file_objects(files), _PICTURES],
        "recordSet": [_records(card)],
    }


def licence_address(licence: str | None) -> str:
    """A licence of Creative Commons as its address at SPDX; any other in the owner's words."""
    if licence is None:
        return "Not stated by the data owner; ask before use."
    short = re.sub(r"\s+", "-", licence.strip()).upper()
    return f"https://spdx.org/licenses/{short}" if _CREATIVE_COMMONS.fullmatch(short) else one_line(licence)


def _citation(name: str, fingerprint: str, card: Mapping[str, Any]) -> str:
    title = re.sub(r"[{}\\]", "", name)
    year = f", year = {{{card['published'][:4]}}}" if card["published"] else ""
    return (
        f"@misc{{medistill_{fingerprint[:12]}, title = {{{title}}}{year}, "
        f"note = {{Synthetic images made with medistill {card['medistill_version']}, fingerprint {fingerprint}}}}}"
    )


def _responsible(card: Mapping[str, Any]) -> dict[str, Any]:
    """What of the vocabulary for responsible AI applies to images that nobody took."""
    real = card["real_and_synthetic"]
    return {
        "rai:dataCollection": f"No image was collected. {real['images']} Method: {card['method']}.",
        "rai:dataCollectionType": ["Secondary Data Analysis", "Others"],
        "rai:dataPreprocessingProtocol": [card["preprocessing"]["sentence"]],
        "rai:dataAnnotationProtocol": [real["soft_labels"]],
        "rai:machineAnnotationTools": [f"medistill {card['medistill_version']}"],
        "rai:personalSensitiveInformation": [
            f"{real['images']} The originals are health data; no name, date, number or other field of a patient "
            "is part of the release.",
            f"{card['privacy']['sentence']} {card['privacy']['meaning']}",
            card["summary"]["measured"],
        ],
        "rai:dataUseCases": list(card["intended_use"]),
        "rai:dataLimitations": list(card["limits"]),
        "rai:dataBiases": [
            "Classes, devices and patient groups of one data owner; groups that were rare there are rarer still "
            "in what a model learns from these images."
        ],
        "rai:dataReleaseMaintenancePlan": "The sealed folder does not change; a correction is a new release.",
    }


def _file_objects(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{len(content)} B",
            "encodingFormat": _FORMATS["." + name.rpartition(".")[2]],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content in sorted(files.items())
    ]


_PICTURES: dict[str, Any] = {
    "@type": "cr:FileSet",
    "@id": "pictures",
    "name": "pictures",
    "description": "One 8-bit picture per image, for looking at; exact values are in images.safetensors.",
    "encodingFormat": "image/png",
    "includes": "images/*.png",
}


def _records(card: Mapping[str, Any]) -> dict[str, Any]:
    picture = {"fileSet": {"@id": "pictures"}}
    name = {
        **_field("file_name", "Name of the picture.", "sc:Text"),
        "source": {**picture, "extract": {"fileProperty": "filename"}},
        "references": _column("file_name"),
    }
    content = {
        **_field("image", _image_note(card), "sc:ImageObject"),
        "source": {**picture, "extract": {"fileProperty": "content"}},
    }
    labels = [
        _labelled("class", "Name of the class the image was made for.", "sc:Text", "class"),
        _labelled("label", "Number of that class, counted from 0.", "sc:Integer", "label"),
        *(
            _labelled(
                f"soft_label_{i}", f"Soft label of the class {one_line(name)}.", "sc:Float", soft_column(name)
            )
            for i, name in enumerate(card["task"]["class_names"])
        ),
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "records",
        "name": "records",
        "description": "One synthetic image with its labels.",
        "field": [name, content, *labels],
    }


def soft_column(class_name: str) -> str:
    """Name of a class's column of soft labels in the tables of a release."""
    return f"soft_label:{class_name}"


def _image_note(card: Mapping[str, Any]) -> str:
    shown = card["images"].get("pictures_show")
    return f"8-bit picture: {shown}." if shown else "8-bit picture of the image."


def _labelled(name: str, description: str, kind: str, column: str) -> dict[str, Any]:
    return {**_field(name, description, kind), "source": _column(column)}


def _field(name: str, description: str, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"records/{name}",
        "name": f"records/{name}",
        "description": description,
        "dataType": kind,
    }


def _column(name: str) -> dict[str, Any]:
    return {"fileObject": {"@id": TABLE_FILE}, "extract": {"column": name}}
