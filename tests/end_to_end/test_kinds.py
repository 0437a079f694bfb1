"""Colour, volumes and several findings per image, from the source to a receiver's model, as typed by a user."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner, Result

from medistill.cli import app
from medistill.core.cohort import Cohort
from medistill.core.distilled import Schedule
from medistill.core.images import resized
from medistill.core.reports import DiagnosticReport
from medistill.core.task import TaskKind
from medistill.diagnose import outliers
from medistill.distill.schedule import choose_schedule
from medistill.ingest import load_cohort
from medistill.release.verify import Release, load_release

QUICK = (
    *("--set", "distribution_matching.networks=2", "--set", "distribution_matching.iterations=30"),
    *("--set", "distribution_matching.width=8", "--set", "distribution_matching.rate=5e-2"),
    *("--method", "distribution_matching", "--looks", "1"),
)
REASON = "Made-up images harm nobody."
FINDINGS = ("effusion", "mass", "nodule")


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """One thread, one short schedule of training in place of the candidates, and few pictures behind a flag."""
    short = (Schedule(epochs=10, learning_rate=0.02),)
    with threadpool_limits(1), pytest.MonkeyPatch.context() as patch:
        patch.setitem(choose_schedule.__kwdefaults__, "candidates", short)
        patch.setattr(outliers, "REFERENCES", 64)
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["-q", *map(str, arguments)])


class Kind:
    """The folders of one run of all verbs, and what is in them."""

    def __init__(self, place: Path, source: Path, *ingest: object) -> None:
        self.place = place
        sized = ("--size", 16)
        steps = {
            "ingest": [source, "--out", place / "cohort", *sized, "--own-patients", "--jobs", 1, *ingest],
            "distill": [place / "cohort", "--out", place / "run", "--ipc", 1, *sized, *QUICK],
            "audit": [place / "run", "--cohort", place / "cohort", "--profile", "quick"],
            "evaluate": [place / "run", "--cohort", place / "cohort", "--seeds", 1],
            "release": [
                *(place / "run", "--cohort", place / "cohort", "--out", place / "release"),
                *("--force-with-reason", REASON),
            ],
            "verify": [place / "release"],
            "train": [place / "release", "--out", place / "model"],
        }
        for verb, arguments in steps.items():
            result = invoke(verb, *arguments)
            assert result.exit_code in ((0, 3) if verb == "audit" else (0,)), f"{verb}: {result.output}"

    @property
    def cohort(self) -> Cohort:
        return load_cohort(self.place / "cohort")

    @property
    def release(self) -> Release:
        return load_release(self.place / "release")

    @property
    def diagnosis(self) -> DiagnosticReport:
        return DiagnosticReport.from_json(self.json("run/diagnosis.json"))

    def json(self, name: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.place / name).read_text(encoding="utf-8"))
        return found

    def text(self, name: str) -> str:
        return (self.place / name).read_text(encoding="utf-8")

    def picture(self) -> tuple[str, tuple[int, int]]:
        """Mode and size of the first picture."""
        with Image.open(self.place / "release" / "images" / "0000.png") as drawn:
            return drawn.mode, drawn.size

    def auroc(self, arm: str) -> float:
        (found,) = (a for a in self.diagnosis.arms if (a.arm, a.split) == (arm, "test"))
        return found.metrics["auroc"].value


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(90, 25, shape).clip(0, 255)


# -- colour ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """Three classes that differ in the colour of a disc of the same luminance."""
    place = tmp_path_factory.mktemp("colour")
    labels = np.arange(90) % 3
    images = noise((90, 20, 20, 3), 0)
    discs = np.array([(200, 40, 60), (20, 125, 60), (60, 60, 250)])
    images[:, 6:14, 6:14] = discs[labels][:, None, None]
    arrays = {"images": images.astype(np.uint8), "label": labels}
    np.savez(place / "fundus.npz", **arrays)
    return Kind(place, place / "fundus.npz")


def test_colour_stays_in_the_cohort(colour: Kind) -> None:
    images = colour.cohort.images(16)
    assert colour.cohort.profile["config"]["colour"] == "rgb"
    assert images.images.shape == (90, 3, 16, 16)
    middle = images.images[:, :, 8, 8] * 255
    assert middle[images.classes == 0][0].round().tolist() == [200, 40, 60]
    assert colour.cohort.task.kind is TaskKind.MULTICLASS


def test_colour_reaches_the_receiver(colour: Kind) -> None:
    assert colour.release.distilled.images.shape == (3, 3, 16, 16)
    assert colour.picture() == ("RGB", (16, 16))
    red, green, blue = colour.release.distilled.images[0][:, 6:10, 6:10].mean((1, 2)).tolist()
    assert red > max(green, blue)  # the class is that of the red disc
    assert colour.json("model/model.json")["preprocessing"]["image_shape"] == [3, 16, 16]
    assert colour.auroc("real") > 0.9
    assert "Colour</th><td>kept" in colour.text("release/report.html")


def test_every_class_has_its_own_auroc(colour: Kind) -> None:
    arm = colour.diagnosis.arms[0]
    assert list(arm.class_auroc) == ["0", "1", "2"]
    mean = sum(estimate.value for estimate in arm.class_auroc.values()) / 3
    assert mean == pytest.approx(arm.metrics["auroc"].value)
    assert "AUROC of every class against all others" in colour.text("release/report.html")


# -- volumes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """Two classes that differ in where along the first axis a slab lies: no middle slice tells them apart."""
    place = tmp_path_factory.mktemp("solid")
    labels = np.arange(80) % 2
    volumes = noise((80, 16, 16, 16), 1)
    for volume, label in zip(volumes, labels, strict=True):
        volume[1 : 5 if not label else 1] = 220
        volume[11 : 15 if label else 11] = 220
    np.savez(place / "organ.npz", images=volumes.astype(np.uint8), label=labels)
    return Kind(place, place / "organ.npz", "--volumes", "cubes", "--classes", "0,1")


def test_volumes_are_stored_as_they_are_and_read_at_any_size(solid: Kind) -> None:
    with np.load(solid.place / "organ.npz") as archive:
        raw = torch.from_numpy(archive["images"].astype(np.float32)) / 255
    images = solid.cohort.images(16).images
    assert images.shape == (80, 1, 16, 16, 16)
    torch.testing.assert_close(images[:, 0], raw, atol=1e-6, rtol=0)
    halved = solid.cohort.images(8).images
    torch.testing.assert_close(halved, resized(raw[:, None], 8), atol=1e-5, rtol=0)


def test_volumes_reach_the_receiver(solid: Kind) -> None:
    first, second = solid.release.distilled.images[:, 0]
    assert first.shape == (16, 16, 16)
    assert first[2:4].mean() > second[2:4].mean()
    assert first[12:14].mean() < second[12:14].mean()
    assert solid.json("model/model.json")["preprocessing"]["image_shape"] == [1, 16, 16, 16]
    assert solid.auroc("real") > 0.9


def test_pictures_of_volumes_show_three_planes_and_say_so(solid: Kind) -> None:
    assert solid.picture() == ("L", (3 * 16 + 2, 16))
    assert "middle slices across its first, second and third axis" in solid.text("release/report.html")
    assert "middle slices" in solid.text("release/README.md")
    assert "synthetic volumes" in solid.text("release/README.md")


def test_attacks_on_volumes_have_working_controls(solid: Kind) -> None:
    outcomes = solid.json("run/audit.json")["outcomes"]
    assert isinstance(outcomes, list)
    positive = [c for o in outcomes for c in o["controls"] if c["name"].startswith("positive")]
    edited = sum(o["attack"] == "edited_copies" for o in outcomes)  # small volumes may not let edits be recognised
    assert len(positive) == 4 + edited
    assert [control["observed"] for control in positive if not control["passed"]] == []


# -- several findings per image --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """Films with any of three bright stripes, or none, and a table that joins their names."""
    place = tmp_path_factory.mktemp("joint")
    (place / "films").mkdir()
    rows: list[dict[str, str]] = []
    for number in range(100):
        shown = [finding for c, finding in enumerate(FINDINGS) if number >> c & 1]
        film = noise((20, 20), number)
        for finding in shown:
            top = 2 + 6 * FINDINGS.index(finding)
            film[top : top + 4] += 110
        name = f"{number:03d}.png"
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(place / "films" / name)
        joined = "|".join(reversed(shown)) if number % 2 else "; ".join(shown)
        rows.append({"file": name, "finding": joined or "None", "patient_id": f"P{number}"})
    with (place / "findings.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ("file", "finding", "patient_id"))
        table.writeheader()
        table.writerows(rows)
    return Kind(
        *(place, place / "films", "--labels", place / "findings.csv", "--label-column", "finding"),
        *("--multilabel", "--no-class", "none"),
    )


def test_findings_become_a_multi_hot_target(joint: Kind) -> None:
    cohort = joint.cohort
    assert (cohort.task.kind, cohort.task.class_names) == (TaskKind.MULTILABEL, FINDINGS)
    images = cohort.images(16)
    stripes = torch.stack([images.images[:, 0, 2 + 5 * c : 4 + 5 * c].mean((1, 2)) for c in range(3)], dim=1)
    assert torch.equal(images.targets, (stripes > 0.55).float())
    assert images.targets.sum(1).unique().tolist() == [0, 1, 2, 3]
    for part in cohort.counts().values():
        assert all(part["images"] > part[finding] > 0 for finding in FINDINGS)


def test_findings_reach_the_receiver(joint: Kind) -> None:
    assert joint.release.distilled.task.kind is TaskKind.MULTILABEL
    assert joint.json("release/card.json")["task"] == {"kind": "multilabel", "class_names": list(FINDINGS)}
    header = joint.text("release/labels.csv").splitlines()[0]
    assert header == "file,class,soft_label:effusion,soft_label:mass,soft_label:nodule"
    assert "An image may show several classes" in joint.text("release/README.md")
    assert "an image may show several" in joint.text("release/report.html")
    ninths = 9 * float(str(joint.json("model/model.json")["origin"]["agreement_with_release"]))
    assert ninths == pytest.approx(round(ninths), abs=1e-4)  # of 3 images times 3 findings


def test_findings_are_judged_one_by_one(joint: Kind) -> None:
    for arm in joint.diagnosis.arms:
        assert list(arm.class_auroc) == list(FINDINGS)
        mean = sum(estimate.value for estimate in arm.class_auroc.values()) / 3
        assert mean == pytest.approx(arm.metrics["auroc"].value)
    assert joint.auroc("real") > 0.85


def test_findings_are_counted_one_by_one(joint: Kind) -> None:
    result = invoke("inspect", joint.place / "cohort", "--out", joint.place / "quality", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    counts = {finding: part["images"] for finding, part in found["whole"]["classes"].items()}
    images = joint.cohort.images(16)
    assert counts == {name: int(n) for name, n in zip(FINDINGS, images.targets.sum(0).tolist(), strict=True)}
    median = float(images.images.mean((1, 2, 3)).median())
    assert found["intensity"]["overall"]["brightness"][1] == pytest.approx(median, abs=0.02)
