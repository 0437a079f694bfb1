"""Profiles are strict, hold no free text, and keep nothing that the basic profile of PS3.15 removes unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from medistill.errors import ConfigError
from medistill.ingest.decode import read_dataset
from medistill.ingest.deidentify import deidentify, load_profile
from medistill.ingest.deidentify.profile import KINDS, Rule
from tests.ingest.deidentify.planting import CLASSES, Names, base, plant

#: What is kept although the basic profile removes or empties it, by option of PS3.15 Annex E.
RETAINED = {
    "modified dates": {
        "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "StudyTime", "SeriesTime", "AcquisitionTime",
        "ContentTime", "AcquisitionDateTime", "FrameReferenceDateTime", "FrameAcquisitionDateTime",
        "RadiopharmaceuticalStartTime", "RadiopharmaceuticalStopTime", "RadiopharmaceuticalStartDateTime",
        "RadiopharmaceuticalStopDateTime",
    },
    "patient characteristics": {"PatientSex", "PatientAge", "PatientSize", "PatientWeight"},
    "clean descriptors": {"StudyDescription", "SeriesDescription", "ProtocolName"},
    "modified references (U* of the table)": {"ReferencedImageSequence", "SourceImageSequence"},
}  # fmt: skip
FREE = {"LT", "ST", "UT", "UC", "UR", "PN", "AE", "UN", "OB"}


def _rules(rules):
    for tag, rule in rules.items():
        yield tag, rule
        yield from _rules(rule.items)


def _all_rules(profile) -> list[tuple[int, Rule]]:
    return [pair for iod in profile.iods.values() for pair in _rules(iod.rules)]


def test_nothing_is_kept_that_the_basic_profile_removes(profile) -> None:
    table = pytest.importorskip(
        "dicomanonymizer.dicom_anonymization_databases.dicomfields_2026c", reason="needs dicom-anonymizer"
    )
    removed = {
        tag[0] << 16 | tag[1]
        for name in (
            "D_TAGS",
            "Z_TAGS",
            "X_TAGS",
            "Z_D_TAGS",
            "X_Z_TAGS",
            "X_D_TAGS",
            "X_Z_D_TAGS",
            "X_Z_U_STAR_TAGS",
        )
        for tag in getattr(table, name)
        if len(tag) == 2
    }
    remapped = {tag[0] << 16 | tag[1] for tag in table.U_TAGS if len(tag) == 2}
    assert len(removed) > 500
    replaced = {"pseudonym", "empty", "fixed"}
    retained = set().union(*RETAINED.values())
    kept = {
        keyword_for_tag(tag) for tag, rule in _all_rules(profile) if tag in removed and rule.kind not in replaced
    }
    assert kept == retained
    assert all(rule.kind == "uid" for tag, rule in _all_rules(profile) if tag in remapped)


def test_every_rule_fits_its_attribute(profile) -> None:
    for tag, rule in _all_rules(profile):
        assert rule.kind in KINDS
        assert rule.vr == dictionary_VR(tag)
        if rule.vr in FREE:
            assert rule.kind in ("pseudonym", "empty"), keyword_for_tag(tag)
        if rule.kind in ("number", "integer"):
            assert rule.low < rule.high < 1e12
        if rule.kind == "terms":
            assert rule.terms


@pytest.mark.parametrize("iod", CLASSES)
def test_every_kind_of_image_is_supported(iod, profile) -> None:
    assert profile.iods[CLASSES[iod]].name == iod


def test_a_profile_can_be_narrowed(tmp_path: Path, secret) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "extends: default\nname: narrow\niods: [CT]\noptions: {keep_dates: false, keep_words: false}\n"
        "drop: [Manufacturer, PixelSpacing]\nadd: {CT: {PatientWeight: number 0.3 400}}\n"
    )
    profile = load_profile(path)
    assert {iod.name for iod in profile.iods.values()} == {"CT"}
    source = base("CT", Names(1))
    source.PatientWeight, source.SeriesDescription = "71", "CT chest"
    out = deidentify(source, secret, profile)
    assert out.PatientWeight == 71
    assert "Manufacturer" not in out
    assert "PixelSpacing" not in out
    assert "SeriesDescription" not in out
    assert not out.StudyDate
    assert out.LongitudinalTemporalInformationModified == "REMOVED"
    codes = {item.CodeValue for item in out.DeidentificationMethodCodeSequence}
    assert codes == {"113100", "113108"}
    assert profile.fingerprint != load_profile().fingerprint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a", "mapping"),
        ("extends: other", "extends"),
        ("extends: default\nspare: 1", "spare"),
        ("extends: default\niods: [XX]", "iods"),
        ("extends: default\ndrop: [Nonsense]", "Nonsense"),
        ("extends: default\noptions: {age_limit: 95}", "age_limit"),
        ("extends: default\noptions: {age_limit: yes}", "age_limit"),
        ("extends: default\noptions: {spare: 1}", "options.spare"),
        ("extends: default\nadd: {CT: {ImageComments: terms A B}}", "terms cannot be used"),
        ("extends: default\nadd: {CT: {PatientComments: keep}}", "unknown rule keep"),
        ("extends: default\nadd: {CT: {AccessionNumber: integer 0 9}}", "integer cannot be used"),
        ("extends: default\nadd: {CT: {KVP: number low high}}", "two limits"),
        ("iods: {}\nmodules: {}", "at least one"),
        ("iods: {CT: {classes: [Nonsense], use: [missing]}}", "missing"),
        ("a: [", "no valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_profile(path)


def test_a_missing_profile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.yaml")


@pytest.mark.parametrize("iod", CLASSES)
def test_no_attribute_outside_of_the_profile_is_written(iod, secret, profile) -> None:
    out = deidentify(read_dataset(plant(iod).payload), secret, profile, screened=True)
    own = {
        "SOPClassUID", "SOPInstanceUID", "PatientIdentityRemoved", "DeidentificationMethod", "PixelData",
        "DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified", "BurnedInAnnotation",
    }  # fmt: skip
    listed = set(profile.iods[CLASSES[iod]].rules) | {tag_for_keyword(keyword) for keyword in own}
    assert set(out.keys()) <= listed
