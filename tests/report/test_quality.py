"""The quality page: every count against the manifest read anew, every pixel figure against numpy on all pixels."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from scipy.stats import chi2_contingency
from sklearn.metrics import roc_auc_score
from test_report_page import Page

from medistill.core.cohort import Cohort, Instance, Split
from medistill.core.task import Task
from medistill.errors import DataError, OutputError, SourceError
from medistill.ingest import IngestConfig, ingest
from medistill.ingest.phantom import PhantomConfig, write_phantom
from medistill.ingest.quarantine import REASON_CODES
from medistill.report.contact_sheet import contact_sheet, stacked_sheets
from medistill.report.plots import outline
from medistill.report.quality import checks, counting, page, pixels, records
from medistill.report.quality.counting import inspect_cohort
from medistill.report.quality.page import write_quality
from medistill.report.quality.pixels import measure_intensity, sampled_instances
from medistill.report.quality.records import BINS, Quality
from medistill.report.quality.terminal import quality_lines

KEY = bytes(range(32))
CLASSES = ("no_gastritis", "gastritis", "outside")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom cohort in which five films were cut, one file is empty and one is no image."""
    base = tmp_path_factory.mktemp("Quokkasson")
    write_phantom(base / "phantom", PhantomConfig(patients=40, size=64, seed=3))
    scans = base / "phantom" / "dicom"
    films = sorted(path for path in scans.rglob("*") if path.is_file())
    for film in films[:5]:
        film.write_bytes(film.read_bytes()[:-1500])
    (scans / "Quokkasson.txt").write_text("Quokkasson")
    (scans / "empty").write_bytes(b"")
    config = IngestConfig(size=32, ocr="never", classes=CLASSES)
    ingest(scans, base / "cohort", key=KEY, labels=base / "phantom" / "labels.csv", config=config, jobs=1)
    return base / "cohort"


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quality(folder: Path) -> Quality:
    return inspect_cohort(folder)


@pytest.fixture(scope="module")
def stored(folder: Path) -> np.ndarray:
    shards = sorted((folder / "shards").iterdir())
    return np.concatenate([load_file(shard)["pixels"] for shard in shards])


@pytest.fixture(scope="module")
def written(folder: Path, quality: Quality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "new"
    assert write_quality(quality, folder, out) == out / "inspect.html"
    return out


def test_files_and_quarantine(quality: Quality, rows: list[dict[str, str]]) -> None:
    codes = Counter(row["outcome"] for row in rows if row["outcome"] != "ACCEPTED")
    assert {reason.code: reason.files for reason in quality.quarantine} == codes
    assert codes["TRUNCATED"] + codes["NO_PIXELS"] == 5
    assert codes["NOT_DICOM"] == 2
    assert quality.rejected == codes.total() == sum(reason.files for reason in quality.quarantine)
    assert quality.files == len({row["ordinal"] for row in rows}) == quality.accepted + quality.rejected
    cut = next(reason for reason in quality.quarantine if reason.code == "TRUNCATED")
    details = Counter(row["detail"] for row in rows if row["outcome"] == "TRUNCATED")
    assert (cut.detail, cut.detail_files) == details.most_common(1)[0]
    assert cut.sentence == REASON_CODES["TRUNCATED"]


def test_images_and_patients_per_split_and_class(quality: Quality, rows: list[dict[str, str]]) -> None:
    accepted = [row for row in rows if row["outcome"] == "ACCEPTED"]
    for part in (*quality.splits, quality.whole):
        mine = [row for row in accepted if part.name in (row["split"], "all")]
        assert part.total.images == len(mine)
        assert part.total.patients == len({row["patient"] for row in mine})
        for label, count in part.classes.items():
            own = [row["patient"] for row in mine if row["label"] == label]
            assert (count.images, count.patients) == (len(own), len(set(own)))


def test_attributes(quality: Quality, rows: list[dict[str, str]]) -> None:
    accepted = [row for row in rows if row["outcome"] == "ACCEPTED"]
    for attribute in quality.attributes:
        found = Counter()
        for value in {row[attribute.name] for row in accepted}:
            mine = [row for row in accepted if row[attribute.name] == value]
            named = "not given" if not value else "site" if attribute.name == "site" else value
            found[named, len(mine), len({row["patient"] for row in mine})] += 1
        stated = Counter(
            (re.sub(r"site \d+", "site", value.name), value.total.images, value.total.patients)
            for value in attribute.values
        )
        assert stated == found
    bands = next(attribute for attribute in quality.attributes if attribute.name == "age_band")
    assert [value.name for value in bands.values] == sorted(value.name for value in bands.values)


def test_images_per_patient(quality: Quality, rows: list[dict[str, str]]) -> None:
    each = Counter(row["patient"] for row in rows if row["outcome"] == "ACCEPTED")
    found = quality.per_patient
    assert (found.minimum, found.maximum) == (min(each.values()), max(each.values()))
    assert found.median == np.median(list(each.values()))
    assert found.histogram == Counter(each.values())


def test_histograms_are_those_of_all_pixels(quality: Quality, stored: np.ndarray, rows) -> None:
    labels = np.array([row["label"] for row in sorted_by_row(rows)])
    for level in (*quality.intensity.classes, quality.intensity.overall):
        mine = stored[labels == level.name] if level.name else stored
        counts, _ = np.histogram(mine, bins=BINS, range=(0, 65536))
        np.testing.assert_allclose(level.histogram, counts / mine.size, atol=1e-12)
        assert level.black == pytest.approx((mine == 0).mean())
        assert level.white == pytest.approx((mine == 65535).mean())
        means = (mine / 65535).mean((1, 2, 3))
        deviations = (mine / 65535).std((1, 2, 3))
        np.testing.assert_allclose(level.brightness, np.percentile(means, (5, 50, 95)), atol=1e-5)
        np.testing.assert_allclose(level.contrast, np.percentile(deviations, (5, 50, 95)), atol=1e-5)
    assert quality.intensity.sampled == quality.intensity.images == len(stored)


def sorted_by_row(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted((row for row in rows if row["outcome"] == "ACCEPTED"), key=lambda row: int(row["row"]))


def test_shortcuts_are_aurocs_over_patients(quality: Quality, stored: np.ndarray, rows) -> None:
    means = (stored / 65535).mean((1, 2, 3))
    for shortcut in quality.intensity.shortcuts:
        if shortcut.measure != "brightness":
            continue
        values: dict[tuple[bool, str], list[float]] = {}
        for row, mean in zip(sorted_by_row(rows), means, strict=True):
            values.setdefault((row["label"] == shortcut.name, row["patient"]), []).append(float(mean))
        truth = [inside for inside, _ in values]
        area = roc_auc_score(truth, [np.mean(found) for found in values.values()])
        assert shortcut.auroc == pytest.approx(max(area, 1 - area), abs=1e-6)


def test_json_round_trip(quality: Quality) -> None:
    text = json.dumps(quality.to_json(), allow_nan=False)
    assert Quality.from_json(json.loads(text)) == quality
    with pytest.raises(DataError, match="another"):
        Quality.from_json({**quality.to_json(), "schema_version": 99})
    with pytest.raises(DataError, match="incomplete"):
        Quality.from_json({"kind": "medistill quality", "schema_version": 1})


def test_same_seed_gives_the_same_bytes(quality: Quality, folder: Path, written: Path, tmp_path: Path) -> None:
    assert inspect_cohort(folder) == quality
    write_quality(quality, folder, tmp_path / "again")
    for name in ("inspect.html", "contact_sheet.png", "quality.json"):
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def shown_text(quality: Quality, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(quality_lines(quality))
    return console.file.getvalue()


def test_nothing_written_names_a_patient_or_a_place(
    written: Path, quality: Quality, rows: list[dict[str, str]], folder: Path
) -> None:
    page = (written / "inspect.html").read_text(encoding="utf-8")
    pictures_out = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    figures = (written / "quality.json").read_text(encoding="utf-8")
    secret = {row[column] for row in rows for column in ("uid", "patient", "study", "site", "pixel_key")} - {""}
    assert len(secret) > 100
    for text in (pictures_out, figures, shown_text(quality, 100)):
        assert not [value for value in secret if value in text]
        assert "Quokkasson" not in text
        assert str(folder.parent) not in text
        assert not re.search(r"\b(?=\w*[A-Z])[A-Z2-7]{16}\b", text), "looks like a pseudonym"
    assert b"Quokkasson" not in (written / "contact_sheet.png").read_bytes()


def test_files_are_readable_by_their_owner_only(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["contact_sheet.png", "inspect.html", "quality.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()} == {0o600}
    assert stat.S_IMODE(written.stat().st_mode) == 0o700


def test_page_is_whole_and_needs_nothing_else(written: Path, quality: Quality) -> None:
    page = Page((written / "inspect.html").read_text(encoding="utf-8"))
    assert not page.open
    assert not page.of("script", "iframe", "object")
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.of("img"))
    assert {link["href"][1:] for link in page.of("a")} <= {attrs.get("id") for _, attrs in page.tags}
    assert "Stays in the hospital." in page.words
    for warned in quality.warnings:
        assert warned.title in page.words
    for reason in quality.quarantine:
        assert reason.sentence in page.words
    assert re.search(rf"Patients {quality.whole.total.patients} Images {quality.whole.total.images} ", page.words)


def test_page_shows_real_images_of_distinct_patients(written: Path, stored: np.ndarray, rows) -> None:
    page = (written / "inspect.html").read_text(encoding="utf-8")
    shown = re.findall(
        r'<img src="data:image/png;base64,([^"]+)" alt="[^"]*row (\d+) · \w+"><figcaption>\d+ · \w+</figc', page
    )
    patients = [row["patient"] for row in sorted_by_row(rows)]
    assert len(shown) == 3 * 12
    for picture, row in shown:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        np.testing.assert_allclose(image, stored[int(row), 0] / 257, atol=0.51)
    first_class = [patients[int(row)] for _, row in shown[:12]]
    assert len(set(first_class)) == 12


def test_contact_sheet_has_a_tile_for_each_image(written: Path, stored: np.ndarray) -> None:
    sheet = np.asarray(Image.open(written / "contact_sheet.png").convert("L"))
    tile, found = 3 * 32, 0  # small images are enlarged three times
    enlarged = {np.kron(picture, np.ones((3, 3), np.uint8)).tobytes() for picture in as_bytes(stored)}
    for top in range(sheet.shape[0] - tile + 1):
        for left in range(6, sheet.shape[1] - tile + 1, tile + 6):
            found += np.ascontiguousarray(sheet[top : top + tile, left : left + tile]).tobytes() in enlarged
    assert found == 3 * 12


def as_bytes(stored: np.ndarray) -> np.ndarray:
    return (np.float32(255) * (stored[:, 0].astype(np.float32) / 65535)).round().astype(np.uint8)


@pytest.mark.parametrize("width", [80, 120])
def test_terminal(quality: Quality, width: int) -> None:
    text = shown_text(quality, width)
    whole = quality.whole.total
    assert f"{whole.images} images of {whole.patients} patients from {quality.files} files" in text
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for reason in quality.quarantine:
        assert re.search(rf"{reason.code} +{reason.files} ", text)
    for warned in quality.warnings:
        assert f"! {warned.title}" in " ".join(text.split())


def test_release_folders_and_unwritable_places_are_refused(quality: Quality, folder: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    for name in ("card.json", "SHA256SUMS"):
        (release / name).touch()
    for out in (release, release / "images"):
        with pytest.raises(OutputError, match="release"):
            write_quality(quality, folder, out)
    assert sorted(path.name for path in release.iterdir()) == ["SHA256SUMS", "card.json"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="writable") as caught:
        write_quality(quality, folder, tmp_path / "file" / "out")
    assert str(tmp_path) not in str(caught.value)


def test_the_cohorts_own_folder_is_the_default_and_stays_a_cohort(folder: Path, quality: Quality) -> None:
    page = write_quality(quality, folder)
    try:
        assert page.parent == folder
        assert inspect_cohort(folder) == quality
    finally:
        for name in ("inspect.html", "contact_sheet.png", "quality.json"):
            os.unlink(folder / name)


def test_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cohort"):
        inspect_cohort(tmp_path)


# --- made-up cohorts -------------------------------------------------------------------------------------------


class Store:
    """Makes pixels when asked and remembers how much was asked for at once."""

    def __init__(self, make) -> None:
        self.make, self.largest, self.read_in_all = make, 0, 0

    def read(self, rows: Sequence[int]) -> np.ndarray:
        block = np.stack([self.make(row) for row in rows]).astype(np.uint16)
        self.largest, self.read_in_all = max(self.largest, block.nbytes), self.read_in_all + len(rows)
        return block


def name(number: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    return "".join(letters[(number >> (5 * place)) & 31] for place in range(16))


def made_cohort(count: int, make, *, names=("well", "sick"), label=None, **attributes) -> Cohort:
    """One patient per image; every fourth image is of the second class unless ``label`` says otherwise."""
    label = label or (lambda row: names[row % 4 == 0])
    instances = tuple(
        Instance(
            uid=f"2.25.{row + 1}",
            patient=name(row + 1),
            label=label(row),
            split=list(Split)[row % 4],
            row=row,
            **{key: value(row) for key, value in attributes.items()},
        )
        for row in range(count)
    )
    return Cohort(instances=instances, task=Task.single_label(names), profile={}, store=Store(make))


def noise(row: int, shape=(1, 16, 16), low=0, high=65536) -> np.ndarray:
    return np.random.default_rng(row).integers(low, high, shape)


def test_large_cohorts_are_sampled_evenly_in_constant_memory() -> None:
    cohort = made_cohort(20_000, lambda row: np.full((1, 512, 512), row % 4 * 20_000), names=("well", "sick"))
    found = measure_intensity(cohort, seed=1, most=300)
    assert (found.sampled, found.images, cohort.store.read_in_all) == (300, 20_000, 300)
    assert cohort.store.largest <= 8 * 2**20
    assert [level.images for level in found.classes] == [150, 150]
    assert found.constant == 300
    # all classes weighted as in the cohort: 3 of 4 images are well, the black ones are the others
    assert found.overall.black == pytest.approx(0.25)
    assert found.classes[1].black == 1.0
    assert found.overall.brightness[1] == pytest.approx(2 / 3 * 60_000 / 65535, abs=0.11)


def test_weighted_percentiles() -> None:
    values = np.random.default_rng(0).normal(size=101)
    np.testing.assert_allclose(pixels._percentiles(values), np.percentile(values, (5, 50, 95)))
    weights = np.random.default_rng(1).integers(1, 30, 101).astype(float)
    repeated = np.repeat(values, (weights * 100).astype(int))
    np.testing.assert_allclose(
        pixels._percentiles(values, weights), np.percentile(repeated, (5, 50, 95)), atol=0.05
    )
    assert pixels._percentiles(values[:1]) == (values[0],) * 3
    assert pixels._percentiles(values[:0]) == (0.0, 0.0, 0.0)


def test_sample_is_deterministic_and_leaves_no_room_unused() -> None:
    cohort = made_cohort(1000, noise, label=lambda row: "sick" if row < 10 else "well")
    chosen = [i.row for i in sampled_instances(cohort, seed=5, most=100)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert sum(row < 10 for row in chosen) == 10
    assert chosen == [i.row for i in sampled_instances(cohort, seed=5, most=100)]
    assert chosen != [i.row for i in sampled_instances(cohort, seed=6, most=100)]


def test_faulty_images_are_found() -> None:
    def make(row: int) -> np.ndarray:
        image = noise(row)
        if row == 3:
            image[:] = 777
        if row == 5:
            image[:] = 0
            image[0, 0, 0] = 65535
        if row == 7:
            image[:, :12] = 65535
        return image

    found = measure_intensity(made_cohort(40, make))
    assert (found.constant, found.empty, found.overexposed) == (1, 1, 1)
    assert [(item.row, item.what) for item in found.unusual[:3]] == [
        (3, "one grey level"),
        (5, "almost empty"),
        (7, "over-exposed"),
    ]
    assert len({item.row for item in found.unusual}) == len(found.unusual) == 3 + 12
    means = {row: noise(row).mean() for row in range(40) if row not in (3, 5, 7)}
    darkest = sorted(means, key=means.__getitem__)
    assert [item.row for item in found.unusual if item.what == "dark"] == darkest[:4]
    assert [item.row for item in found.unusual if item.what == "bright"] == darkest[::-1][:4]


def test_lookalikes_under_two_patients() -> None:
    """A copy that was darkened and disturbed is found; another image is not, nor one of the same patient."""

    def make(row: int) -> np.ndarray:
        if row in (9, 12):
            disturbed = noise(5, (1, 64, 64), 0, 60_000) * 0.8 + noise(row, (1, 64, 64), 0, 1500)
            return disturbed.astype(np.uint16)
        return noise(row, (1, 64, 64), 0, 60_000)

    cohort = made_cohort(40, make)
    instances = list(cohort.instances)
    instances[12] = replace(instances[12], patient=instances[9].patient, split=instances[9].split)
    found = measure_intensity(replace(cohort, instances=tuple(instances))).lookalikes
    assert {pair[:2] for pair in found.pairs} == {(5, 9), (5, 12)}
    assert found.across_patients == 2
    assert found.across_splits == 0  # rows 5 and 9 are in one split
    for one, other, alike in found.pairs:
        small = [make(row)[0].reshape(32, 2, 32, 2).mean((1, 3)).ravel() for row in (one, other)]
        assert alike == pytest.approx(np.corrcoef(*small)[0, 1], abs=1e-4)


def test_volumes_show_their_middle_slice() -> None:
    cohort = made_cohort(8, lambda row: noise(row, (1, 5, 12, 10)))
    found = measure_intensity(cohort)
    every = np.stack([noise(row, (1, 5, 12, 10)) for row in range(8)])
    assert found.overall.brightness[1] == pytest.approx(np.median((every / 65535).mean((1, 2, 3, 4))), abs=1e-5)
    shown = page._thumbnails(cohort.store, [6])
    np.testing.assert_allclose(shown[0, 0], every[6, 0, 2] / 65535, atol=1e-6)


def test_many_lookalikes_are_counted_and_the_closest_kept() -> None:
    def make(row: int) -> np.ndarray:
        return noise(0, (1, 32, 32), 0, 60_000) + noise(row, (1, 32, 32), 0, 100 + row)

    found = measure_intensity(made_cohort(600, make)).lookalikes
    images = np.stack([make(row).ravel() for row in range(600)])
    alike = np.corrcoef(images)
    upper = np.triu(alike > pixels.LOOKALIKE, 1)
    assert found.across_patients == upper.sum() == 600 * 599 // 2
    assert found.across_splits == sum(upper[i, j] for i in range(600) for j in range(i + 1, 600) if (i - j) % 4)
    best = np.argsort(-np.where(upper, alike, 0), axis=None)[: len(found.pairs)]
    assert [pair[2] for pair in found.pairs] == pytest.approx(alike.ravel()[best], abs=1e-4)


def test_a_file_that_gave_some_of_its_images(folder: Path, tmp_path: Path) -> None:
    """One rejected frame of an accepted file is in quarantine, but the file is not."""
    copy = tmp_path / "cohort"
    shutil.copytree(folder, copy)
    manifest = (copy / "manifest.csv").read_text(encoding="utf-8").splitlines()
    accepted = next(line for line in csv.DictReader(manifest) if line["outcome"] == "ACCEPTED")
    columns = manifest[0].split(",")
    values = {"ordinal": accepted["ordinal"], "frame": "2", "outcome": "CODEC_FAIL"}
    manifest.append(",".join(values.get(column, "") for column in columns))
    (copy / "manifest.csv").write_text("\n".join(manifest) + "\n", encoding="utf-8")
    before, after = inspect_cohort(folder), inspect_cohort(copy)
    assert (after.files, after.accepted, after.rejected) == (before.files, before.accepted, before.rejected)
    assert {"CODEC_FAIL"} == {r.code for r in after.quarantine} - {r.code for r in before.quarantine}
    assert after.warnings == before.warnings


def test_association_is_cramers_v_and_near_zero_without_one() -> None:
    table = np.array([[30.0, 5.0], [4.0, 61.0]])
    plain = np.sqrt(chi2_contingency(table, correction=False).statistic / table.sum())
    assert counting._cramers_v(table) == pytest.approx(plain, abs=0.02)
    assert counting._cramers_v(np.array([[50.0, 0.0], [0.0, 50.0]])) == pytest.approx(1.0, abs=0.01)
    assert counting._cramers_v(np.array([[25.0, 25.0], [25.0, 25.0]])) == 0.0
    assert counting._cramers_v(np.array([[25.0, 25.0]])) == 0.0
    assert counting._cramers_v(np.zeros((0, 2))) == 0.0
    alone = np.eye(2)[np.arange(100) % 2]  # a hundred sites with one patient each say nothing
    assert counting._cramers_v(alone) < 0.3


def judged(quality: Quality, cohort: Cohort, **changed) -> set[str]:
    """Titles of the warnings a made-up cohort would get."""
    parts = {
        "whole": counting._part("all", cohort.instances, cohort.task),
        "splits": tuple(counting._part(split, cohort.split(split).instances, cohort.task) for split in Split),
        "attributes": tuple(counting._attribute(a, cohort) for a in counting._ATTRIBUTES),
        "duplicates": counting._duplicates(cohort),
        "intensity": measure_intensity(cohort),
        "classes": cohort.task.class_names,
        "files": len(cohort),
        "accepted": len(cohort),
        "rejected": 0,
        "quarantine": (),
        "flags": {},
        **changed,
    }
    return {warned.title for warned in checks.judged(replace(quality, **parts)).warnings}


PLAIN = {
    "sex": lambda row: "FM"[row // 4 % 2],
    "site": lambda row: name(900_000 + row // 8 % 2),
    "modality": lambda row: "CR",
}


def test_a_plain_large_cohort_has_no_warning(quality: Quality) -> None:
    cohort = made_cohort(640, lambda row: noise(row, (1, 8, 8)), label=every_other, **PLAIN)
    assert judged(quality, cohort) == set()


def test_patients_of_several_classes_are_counted_once(quality: Quality) -> None:
    """Class a is at one site only, and who shows it shows b and c too; b is at both sites."""
    cohort = made_cohort(640, lambda row: noise(row, (1, 8, 8)), label=every_other, **PLAIN)
    joint = [
        replace(i, label="a;b;c" if i.row // 16 % 2 else "b", site=name(900_000 + i.row // 16 % 2))
        for i in cohort.instances
    ]
    cohort = replace(cohort, instances=tuple(joint), task=Task.multilabel(("a", "b", "c")))
    site = counting._attribute("site", cohort)
    assert site.association == pytest.approx(1, abs=0.01)
    assert counting._attribute("sex", cohort).association < 0.1
    assert [checks._only_value(site, label) for label in "abc"] == [True, False, True]
    assert "A class with one site only" in judged(quality, cohort)


def every_other(row: int) -> str:
    return ("well", "sick")[row // 16 % 2]


@pytest.mark.parametrize(
    ("title", "changed"),
    [
        ("A class with one site only", {"site": lambda row: name(900_000 + (row // 16 % 2) * (1 + row // 4 % 2))}),
        (
            "The class goes with the sex",
            {"sex": lambda row: "FM"[row // 16 % 2] if row // 4 % 4 else "FM"[1 - row // 16 % 2]},
        ),
        ("Several modalities", {"modality": lambda row: ("CR", "DX")[row // 4 % 2]}),
        ("Patients of one sex only", {"sex": lambda row: ("F", "")[row // 4 % 2]}),
    ],
)
def test_warnings_about_attributes(quality: Quality, title: str, changed) -> None:
    cohort = made_cohort(640, lambda row: noise(row, (1, 8, 8)), label=every_other, **{**PLAIN, **changed})
    assert judged(quality, cohort) == {title}


def test_warning_about_brightness(quality: Quality) -> None:
    def make(row: int) -> np.ndarray:
        return noise(row, (1, 8, 8)) // 2 + (10_000 if every_other(row) == "sick" else 0)

    cohort = made_cohort(640, make, label=every_other, **PLAIN)
    assert judged(quality, cohort) == {"Brightness alone gives the class away"}


def test_warnings_about_numbers(quality: Quality) -> None:
    reason = records.Reason(code="NOT_DICOM", sentence=REASON_CODES["NOT_DICOM"], files=200)
    cohort = made_cohort(
        120, lambda row: noise(row, (1, 8, 8)), label=lambda row: ("a", "b")[row < 3], names=("a", "b")
    )
    titles = judged(quality, cohort, files=330, rejected=200, quarantine=(reason,), flags={"patient_is_study": 2})
    assert titles == {
        "Too few patients for an audit that concludes",
        "Small splits",
        "A class is missing from a split",
        "Many files were kept out",
        "Files unaccounted for",
        "Patients that were assumed",
    }


def test_the_same_picture_twice(quality: Quality) -> None:
    cohort = made_cohort(656, lambda row: noise(row % 652, (1, 8, 8)), label=every_other, **PLAIN)
    instances = list(cohort.instances)
    for row in (0, 652):  # one picture, two patients of one split
        instances[row] = replace(instances[row], pixel_key=name(800_077))
    for row in (1, 2):  # another, one patient, two classes
        instances[row] = replace(
            instances[row],
            pixel_key=name(800_078),
            patient=name(2),
            split=Split.TEST,
            label=("well", "sick")[row - 1],
        )
    doubled = replace(cohort, instances=tuple(instances))
    found = counting._duplicates(doubled)
    assert (found.images, found.groups, found.across_patients, found.across_classes) == (2, 2, 1, 1)
    titles = judged(quality, doubled)
    assert {"The same picture under two classes", "The same picture under two patients"} <= titles
    pairs = {pair[:2] for pair in measure_intensity(doubled).lookalikes.pairs}
    assert pairs == {(1, 653), (2, 654), (3, 655)}, "a pair with one key is a duplicate, not a lookalike"


def test_real_films_published_twice_are_found() -> None:
    """One case of a public collection stands in it under two patients, compressed anew."""
    base = Path(os.environ.get("MEDISTILL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "covid_cxr"
    if not base.is_dir():
        pytest.skip("real files not found: set MEDISTILL_DATA")
    paths = sorted((base / "images").glob("p*.png"))
    patients = {stem: number for number, stem in enumerate(sorted({path.stem[:4] for path in paths}))}

    def make(row: int) -> np.ndarray:
        grey = Image.open(paths[row]).convert("L").resize((128, 128))
        return np.asarray(grey, dtype=np.uint16)[None] * 257

    cohort = made_cohort(len(paths), make)
    instances = tuple(
        replace(i, patient=name(1 + patients[paths[i.row].stem[:4]]), split=Split.TRAIN) for i in cohort.instances
    )
    found = measure_intensity(replace(cohort, instances=instances)).lookalikes
    named = {(paths[one].stem, paths[other].stem) for one, other, _ in found.pairs}
    assert {(f"p097_0{i}", f"p178_0{i + 1}") for i in range(1, 5)} <= named


# --- pieces ------------------------------------------------------------------------------------------------------


def test_outline_is_a_closed_step_curve() -> None:
    assert outline([0.5, 1.0], top=1.0) == "M0 100V50H1V0H2V100Z"
    assert outline([3.0], top=1.0) == "M0 100V0H1V100Z"
    assert outline([0.0, 0.0], top=0.0) == "M0 100H2Z"


def test_stacked_sheets_hold_each_sheet_under_its_title() -> None:
    import torch

    one, two = torch.rand(3, 1, 100, 100), torch.rand(5, 1, 100, 100)
    stacked = np.asarray(Image.open(io.BytesIO(stacked_sheets({"a": (one, ()), "b": (two, ())}, columns=4))))
    sheets = [np.asarray(Image.open(io.BytesIO(contact_sheet(images, columns=4)))) for images in (one, two)]
    assert stacked.shape == (sum(len(sheet) + 26 for sheet in sheets), sheets[1].shape[1])
    np.testing.assert_array_equal(stacked[26 : 26 + len(sheets[0]), : sheets[0].shape[1]], sheets[0])
    np.testing.assert_array_equal(stacked[-len(sheets[1]) :], sheets[1])
    with pytest.raises(DataError, match="group"):
        stacked_sheets({}, columns=3)
