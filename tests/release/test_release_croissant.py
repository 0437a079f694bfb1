"""``croissant.json`` is read without an error by the tool of its standard, and says the truth about the files."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from example_release import PRIVATE, THREE, TWO, audit_report, cohort_summary, diagnostic_report, distilled_set

from medistill.errors import DataError
from medistill.release.croissant import licence_address
from medistill.release.folder import write_release

UNLISTED = {"croissant.json", "SHA256SUMS", "SHA256SUMS.sig"}
HOSTILE = ("<script>alert(1)</script>", '[x](javascript:y), "quoted" {brace} ü/é')


def write(out, distilled, **changed):
    arguments = {
        "audit": audit_report(distilled),
        "diagnosis": diagnostic_report(distilled),
        "cohort": cohort_summary(distilled),
        "snapshots": None,
        "commands": (),
        "published": "2026-01-31",
        "licence": "CC BY 4.0",
    }
    return write_release(out, distilled=distilled, **{**arguments, **changed})


@pytest.fixture(scope="module", name="release")
def _release(tmp_path_factory):
    distilled = distilled_set(THREE, ipc=2, channels=3, privacy=PRIVATE)
    return write(tmp_path_factory.mktemp("croissant") / "release", distilled, name="Skin lesions")


def read(release):
    mlcroissant = pytest.importorskip("mlcroissant")
    return mlcroissant.Dataset(release / "croissant.json")


def test_the_standards_tool_finds_nothing(release):
    metadata = read(release).metadata
    assert metadata.ctx.issues.errors == set()
    assert metadata.ctx.issues.warnings == set()
    assert metadata.name == "Skin lesions"
    assert metadata.license == ["https://spdx.org/licenses/CC-BY-4.0"]
    assert metadata.date_published.date().isoformat() == "2026-01-31"
    assert "@misc{" in metadata.cite_as
    assert "6 synthetic images with soft labels" in metadata.description


def test_the_standards_tool_would_find_something(release, tmp_path):
    mlcroissant = pytest.importorskip("mlcroissant")
    values = json.loads((release / "croissant.json").read_text())
    del values["distribution"][0]["sha256"]
    (tmp_path / "croissant.json").write_text(json.dumps(values))
    with pytest.raises(mlcroissant.ValidationError, match="sha256"):
        mlcroissant.Dataset(tmp_path / "croissant.json")


def test_records_are_the_images_and_their_labels(release):
    expected = distilled_set(THREE, ipc=2, channels=3, privacy=PRIVATE)
    records = list(read(release).records("records"))
    assert len(records) == 6
    for i, record in enumerate(records):
        assert record["records/file_name"] == f"{i:04d}.png".encode()
        assert record["records/label"] == int(expected.hard_labels[i])
        assert record["records/class"].decode() == THREE[int(expected.hard_labels[i])]
        shares = [record[f"records/soft_label_{k}"] for k in range(3)]
        assert np.allclose(shares, expected.soft_labels[i].numpy(), atol=1e-6)
        levels = (expected.images[i] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(record["records/image"]), levels)


def test_the_tool_refuses_a_file_that_changed(release, tmp_path):
    changed = Path(shutil.copytree(release, tmp_path / "release"))
    table = changed / "images" / "metadata.csv"
    table.write_text(table.read_text().replace("melanoma", "benign"))
    with pytest.raises(Exception, match=r"Download\(images/metadata\.csv\)"):
        list(read(changed).records("records"))


def test_every_other_file_is_listed_with_its_digest_and_size(release):
    listed = json.loads((release / "croissant.json").read_text())["distribution"]
    objects = {entry["@id"]: entry for entry in listed if entry["@type"] == "cr:FileObject"}
    there = {p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()}
    assert objects.keys() == there - UNLISTED
    for name, entry in objects.items():
        content = (release / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["contentSize"] == f"{len(content)} B"
        assert entry["contentUrl"] == name


def test_what_it_says_of_people(release):
    metadata = read(release).metadata
    said = " ".join(metadata.personal_sensitive_information)
    assert PRIVATE.sentence in said
    assert "health data" in said
    assert "without any patient's image" in metadata.data_collection
    assert metadata.data_use_cases
    assert metadata.data_biases
    assert any("Not for diagnosis" in limit for limit in metadata.data_limitations)
    assert "its header states" in metadata.data_preprocessing_protocol[0]
    text = (release / "croissant.json").read_text()
    assert "anonym" not in text.lower()
    for exact in ("1987", "4321", "6361"):
        assert exact not in text


def test_a_patients_image_is_said_to_be_one(tmp_path):
    release = write(tmp_path / "release", distilled_set(TWO, ipc=2, init="real"))
    metadata = read(release).metadata
    for said in (metadata.data_collection, *metadata.personal_sensitive_information[:1], metadata.description):
        assert "Treat the release as patient data" in said


def test_without_day_and_licence_nothing_is_made_up(tmp_path):
    bare = {"audit": None, "diagnosis": None, "cohort": None, "published": None, "licence": None}
    metadata = read(write(tmp_path / "release", distilled_set(TWO, ipc=2), **bare)).metadata
    assert metadata.ctx.issues.errors == set()
    assert metadata.date_published is None
    assert metadata.license == ["Not stated by the data owner; ask before use."]
    assert "year" not in metadata.cite_as


@pytest.mark.parametrize("day", ["", "2026-1-31", "20260131", "2026-02-30", "yesterday"])
def test_a_day_that_is_none_is_refused(tmp_path, day):
    with pytest.raises(DataError, match="YYYY-MM-DD"):
        write(tmp_path / "release", distilled_set(TWO, ipc=1), published=day)
    assert list(tmp_path.iterdir()) == []


def test_odd_class_names_stay_readable(tmp_path):
    release = write(tmp_path / "release", distilled_set(HOSTILE, ipc=2), name='{x}, "y" \\ü')
    records = list(read(release).records("records"))
    assert [record["records/class"].decode() for record in records] == [HOSTILE[0]] * 2 + [HOSTILE[1]] * 2
    assert sum(records[0][f"records/soft_label_{k}"] for k in range(2)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("licence", "address"),
    [
        ("CC-BY-4.0", "https://spdx.org/licenses/CC-BY-4.0"),
        ("cc by nc 4.0", "https://spdx.org/licenses/CC-BY-NC-4.0"),
        ("CC0-1.0", "https://spdx.org/licenses/CC0-1.0"),
        ("Apache 2", "Apache 2"),
        ("Ask the\nhospital", "Ask the hospital"),
    ],
)
def test_licences(licence, address):
    assert licence_address(licence) == address
