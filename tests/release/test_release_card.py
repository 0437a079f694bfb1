"""What a stranger reads and a program needs: the card, its preprocessing, and the size of the folder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from example_release import (
    PRIVATE,
    TWO,
    audit_report,
    cohort_summary,
    diagnostic_report,
    distilled_set,
    estimate,
    full_diagnostic_report,
    moments,
    snapshots,
)
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from medistill.cli import app
from medistill.config import parse_config
from medistill.core.cohort import Split
from medistill.distill.formation import formed
from medistill.errors import ConfigError
from medistill.ingest import IngestConfig, ingest, load_cohort
from medistill.ingest.sources import open_source
from medistill.progress import Progress
from medistill.release.folder import write_release
from medistill.release.preprocessing import preprocessing
from medistill.release.signature import load_signing_key, write_key_pair
from medistill.release.tensors import save_distilled
from medistill.release.verify import load_release, verify_release
from medistill.report.png import picture
from medistill.workflow import _Run, load_profile, remember_cohort, run
from tests.ingest.conftest import make_dicom

NOTHING = {"audit": None, "diagnosis": None, "cohort": None, "snapshots": None, "commands": ()}
SETTINGS = {
    "size": 32,
    "fit": "crop",
    "intensity": "percentile",
    "colour": "grey",
    "volumes": "slices",
    "burned_in": "mask",
}


def card_of(out):
    return json.loads((out / "card.json").read_text())


def full(out, distilled, **more):
    return write_release(
        out,
        distilled=distilled,
        audit=audit_report(distilled),
        cohort=cohort_summary(distilled),
        snapshots=snapshots(distilled),
        commands=("medistill run configs/phantom.yaml",),
        **{"diagnosis": diagnostic_report(distilled), **more},
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_twenty_images_of_64_pixels_are_small(tmp_path, channels):
    """Of noise, which no format makes smaller; with two networks in every arm and how the images formed."""
    write_key_pair(tmp_path / "k")
    distilled = distilled_set(TWO, ipc=10, size=64, channels=channels)
    noise = torch.rand(distilled.images.shape, generator=torch.Generator().manual_seed(0))
    distilled = replace(distilled, images=noise)
    out = full(
        tmp_path / "release",
        distilled,
        diagnosis=full_diagnostic_report(distilled),
        signing_key=load_signing_key(tmp_path / "k.key"),
        moments=moments(distilled),
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert verify_release(out).bytes == size
    assert size <= 2_000_000
    page = (out / "report.html").read_text()
    assert len(page) < 400_000
    assert page.count("<li>\n      <img") == 6
    assert ("its pictures are compressed" in page) == (channels == 3)
    exact = load_file(out / "images.safetensors")["images"]
    assert torch.equal(exact, noise)
    for path, image in zip(sorted((out / "images").glob("*.png")), exact, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), picture(image))


def test_figures_of_the_card_have_six_digits_and_small_parts_stand_on_a_line(tmp_path):
    distilled = distilled_set(TWO, ipc=1)
    diagnosis = diagnostic_report(distilled)
    arm = replace(diagnosis.arms[0], metrics={"auroc": estimate(2 / 3), "ece": estimate(1.23456789e-7, 0)})
    out = full(tmp_path / "release", distilled, diagnosis=replace(diagnosis, arms=(arm,)))
    found = card_of(out)["diagnosis"]["arms"][0]["metrics"]
    assert (found["auroc"]["value"], found["ece"]["value"]) == (0.666667, 1.23457e-07)
    lines = (out / "card.json").read_text().splitlines()
    assert f'"auroc": {json.dumps(found["auroc"], sort_keys=True)},' in map(str.strip, lines)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    one, two = (full(tmp_path / name, distilled_set(TWO, ipc=3, privacy=PRIVATE)) for name in ("one", "two"))
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    assert len(names) == 16
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_the_readme_says_what_a_stranger_must_know(tmp_path):
    out = full(tmp_path / "release", distilled_set(TWO, ipc=3, privacy=PRIVATE), licence="CC BY 4.0")
    text = re.sub(r"\s+", " ", (out / "README.md").read_text())
    for said in (
        "medistill verify PATH",
        "This release is not signed",
        "medistill train PATH --out MODEL",
        "medistill predict MODEL FILE.dcm",
        "brought to 64 pixels a side (its shape kept, with black borders), then to 16.",
        "What is real and what is not",
        "Not for diagnosis",
        "research and teaching",
        "`distilled.dcm`",
        "`croissant.json`",
        "CC BY 4.0",
        "Take any one patient",
    ):
        assert said in text, said
    assert "anonym" not in text.lower()


def test_the_readme_says_how_many_images_a_mosaic_holds(tmp_path):
    plain = distilled_set(TWO, ipc=2)
    labels = plain.soft_labels.repeat_interleave(4, dim=0)
    made = formed(plain.images, labels, plain.hard_labels, formation=2)
    assert made.views is not None
    mosaic = replace(plain, soft_labels=made.soft_labels, views=made.views)
    out = write_release(tmp_path / "release", distilled=mosaic, **NOTHING)
    assert "16 pairs" in (out / "README.md").read_text()
    assert len(load_release(out)) == 16


# -- preprocessing ----------------------------------------------------------------------------------------------


def test_the_cohorts_summary_says_how_images_were_made(tmp_path):
    found = card_of(full(tmp_path / "release", distilled_set(TWO, ipc=1)))["preprocessing"]
    assert found["cohort"] == {"size": 64, "fit": "pad", "intensity": "voi"}
    assert found["shape"] == [1, 16, 16]
    assert found["stated"] is False  # the summary of these tests has three of six settings


def test_without_a_summary_the_profile_says_it(tmp_path):
    out = write_release(tmp_path / "release", distilled=distilled_set(TWO, ipc=1), profile=SETTINGS, **NOTHING)
    found = card_of(out)["preprocessing"]
    assert (found["stated"], found["cohort"]) == (True, SETTINGS)
    assert "between percentiles of its own values" in found["sentence"]
    assert found["sentence"] in (out / "README.md").read_text()
    assert card_of(out)["cohort"] is None


def test_a_release_that_cannot_say_it_admits_that(tmp_path):
    out = write_release(tmp_path / "release", distilled=distilled_set(TWO, ipc=1), **NOTHING)
    found = card_of(out)["preprocessing"]
    assert (found["stated"], found["cohort"]) == (False, {})
    assert "does not state" in found["sentence"]
    assert "does not state" in (out / "README.md").read_text()


def test_nothing_but_settings_passes():
    profile = {
        "config": {**SETTINGS, "seed": 7, "label_column": "finding of ward 7"},
        "counts": {"files": 12},
        "source": "x",
    }
    found = preprocessing(torch.zeros(2, 1, 4, 4, 4), profile)
    assert found["cohort"] == SETTINGS
    assert "volume" in found["sentence"]
    assert "ward" not in json.dumps(found)


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A run folder with a distilled set, as after `medistill distill`, made from a small cohort."""
    tmp_path = tmp_path_factory.mktemp("made")
    rng = torch.Generator().manual_seed(0)
    (tmp_path / "scans").mkdir()
    for i in range(16):
        pixels = torch.randint(0, 4096, (24, 20), generator=rng).numpy().astype("uint16")
        make_dicom(tmp_path / "scans" / f"{i}.dcm", pixels, PatientID=f"P{i}", StudyInstanceUID=f"1.2.4.{i + 1}")
    table = "PatientID,label\n" + "".join(f"P{i},{'ab'[i % 2]}\n" for i in range(16))
    (tmp_path / "labels.csv").write_text(table)
    config = IngestConfig(size=16, fit="crop", intensity="none", burned_in="allow")
    source, key = open_source("folder", tmp_path / "scans"), bytes(range(32))
    ingest(source, tmp_path / "cohort", key=key, labels=tmp_path / "labels.csv", config=config, jobs=1)
    save_distilled(tmp_path / "run" / "distilled", distilled_set(("a", "b"), ipc=1))
    remember_cohort(tmp_path / "run", load_cohort(tmp_path / "cohort"))
    return tmp_path


@pytest.fixture(name="place")
def _place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["-q", *map(str, arguments)])


def test_a_run_remembers_how_its_images_were_made(place):
    """`medistill release` without --cohort, and signed."""
    write_key_pair(place / "k")
    command = ["release", place / "run", "--out", place / "release", "--force-with-reason", "Noise."]
    made = invoke(*command, "--sign", place / "k.key", "--published", "2026-01-31")
    assert made.exit_code == 0, made.output
    card = card_of(place / "release")
    assert card["cohort"] is None
    assert card["published"] == "2026-01-31"
    assert card["preprocessing"]["stated"]
    assert card["preprocessing"]["cohort"] == {
        **{"size": 16, "fit": "crop", "intensity": "none"},
        **{"colour": "grey", "volumes": "slices", "burned_in": "allow"},
    }
    assert load_profile(place / "run") == card["preprocessing"]["cohort"]
    verified = verify_release(place / "release", key=place / "k.pub")
    assert f"Signed by the key {verified.signed_by}" in made.stdout
    assert load_file(place / "release" / "images.safetensors")["images"].shape == (2, 1, 16, 16)
    assert len(load_cohort(place / "cohort").split(Split.TRAIN)) > 0


def test_release_refuses_a_key_that_cannot_sign_and_writes_nothing(place):
    (place / "bad.key").write_text("no key")
    (place / "bad.key").chmod(0o600)
    command = ["release", place / "run", "--out", place / "release", "--force-with-reason", "Noise."]
    made = invoke(*command, "--sign", place / "bad.key")
    assert (made.exit_code, made.stdout) == (2, "")
    assert "private key in PEM form" in made.stderr
    assert not (place / "release").exists()


# -- configuration ----------------------------------------------------------------------------------------------


def test_a_run_with_a_bad_key_stops_before_anything_is_done(tmp_path):
    values = {"output": str(tmp_path / "out"), "source": {"kind": "phantom", "patients": 10}}
    config = parse_config({**values, "release": {"sign_with": str(tmp_path / "absent.key")}})
    with pytest.raises(ConfigError, match="signing key cannot be read"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_a_configured_key_signs_what_a_run_releases(place):
    write_key_pair(place / "k")
    shutil.copytree(place / "cohort", place / "run" / "cohort")
    section = {"sign_with": str(place / "k.key"), "force_with_reason": "Noise.", "published": "2026-01-31"}
    config = parse_config({"output": str(place / "run"), "source": {"kind": "phantom"}, "release": section})
    stages = _Run(config=config, progress=Progress(), jobs=1)
    stages.release()
    assert verify_release(place / "run" / "release", key=place / "k.pub").known_key
    stages.digests.update(audit="x", evaluate="y")
    assert stages.release_inputs()["signer"] == load_signing_key(place / "k.key").fingerprint
    card = card_of(place / "run" / "release")
    assert card["preprocessing"]["cohort"] == card_settings(card) != {}


def card_settings(card):
    """The same settings from the summary of the cohort."""
    return {name: card["cohort"]["profile"][name] for name in SETTINGS}


def test_a_day_in_yaml_is_a_day(tmp_path):
    from datetime import date

    values = {"output": str(tmp_path / "out"), "source": {"kind": "phantom"}}
    for day in ("2026-01-31", date(2026, 1, 31)):
        assert parse_config({**values, "release": {"published": day}}).release.published == "2026-01-31"
    with pytest.raises(ConfigError, match=r"release\.published"):
        parse_config({**values, "release": {"published": "soon"}})
