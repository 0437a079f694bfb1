"""How the images formed: what a run folder keeps of it, and what of that a report shows."""

from __future__ import annotations

import base64
import csv
import re
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_release import PRIVATE, THREE, TWO, audit_report, distilled_set, look, moments, snapshots
from PIL import Image

from medistill.core.distilled import DistilledSet, Schedule
from medistill.distill import distill, runner, watch
from medistill.distill.watch import Look, eight_bit, shown_images
from medistill.errors import DataError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import OpenCurator
from medistill.report.forming import FormingSheet, load_moments
from medistill.report.page import render_report
from tests.conftest import blobs
from tests.contracts.test_distillers import NAMES, QUICK


def test_the_first_images_of_every_class_stand_for_all() -> None:
    assert shown_images(torch.arange(3).repeat_interleave(5)) == [0, 1, 5, 6, 10, 11]
    assert shown_images(torch.arange(8)) == [0, 1, 2, 3, 4, 5]
    assert shown_images(torch.tensor([1, 0, 1, 1])) == [1, 0, 2, 3]
    assert shown_images(torch.tensor([0] * 9 + [1])) == [0, 1, 2, 3, 4, 9]


def test_a_row_per_look_and_an_earlier_distillation_leaves_none(tmp_path: Path) -> None:
    distilled = distilled_set(TWO, ipc=2)
    first, *later = moments(distilled, 3)
    earlier = FormingSheet(tmp_path)
    for step in (10, 20, 30, 40):
        earlier(look(first.pictures, step))
    sheet = FormingSheet(tmp_path)
    sheet(replace(first, validation_auroc=None))
    one = Image.open(BytesIO((tmp_path / "sheet.png").read_bytes()))
    for more in later:
        sheet(more)
    three = Image.open(BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert (three.width, three.height) == (one.width, 3 * one.height)
    rows = list(csv.DictReader((tmp_path / "looks.csv").read_text().splitlines()))
    assert [(row["step"], row["validation_auroc"]) for row in rows] == [
        ("60", ""),
        ("120", "0.7500"),
        ("180", "0.7500"),
    ]
    assert rows[1]["cpu_seconds"] == "12.0"
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "looks.csv", "moments.safetensors"}


def test_moments_end_with_the_released_images_or_are_of_another_set(tmp_path: Path) -> None:
    distilled = distilled_set(TWO)
    kept = moments(distilled, 4, auroc=None)
    sheet, after = FormingSheet(tmp_path), look(255 - kept[0].pictures, 660)
    for one in (*kept, after):  # the last look was of worse images, which early stopping gave up
        sheet(one)
    found = load_moments(tmp_path, distilled)
    assert [(one.distiller, one.step, one.validation_auroc) for one in found] == [
        ("kernel_ridge", step, None) for step in (60, 120, 180, 240)
    ]
    assert all(torch.equal(one.pictures, other.pictures) for one, other in zip(found, kept, strict=True))
    assert load_moments(tmp_path, replace(distilled, images=distilled.images.flip(3))) == ()
    assert load_moments(tmp_path / "absent", distilled) == ()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "coreset"])
def test_the_last_look_of_every_distiller_shows_what_is_released(name: str, tmp_path: Path) -> None:
    sheet = FormingSheet(tmp_path)
    settings = {name: QUICK[name]}
    done = distill(OpenCurator(blobs(patients=18)), method=name, ipc=2, settings=settings, observer=sheet)
    found = load_moments(tmp_path, done.distilled)
    assert len(found) >= 2
    assert found[-1].step == found[-1].steps
    assert not torch.equal(found[0].pictures, found[-1].pictures)
    assert all(early.cpu_seconds <= late.cpu_seconds for early, late in pairwise(found))


def test_an_interrupted_distillation_keeps_the_looks_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (Schedule(epochs=2, learning_rate=0.01),)
    monkeypatch.setattr(runner, "choose_schedule", partial(runner.choose_schedule, candidates=few))
    monkeypatch.setattr(watch, "_QUICK", few[0])
    method = "distribution_matching+kernel_ridge"
    how: dict[str, Any] = {
        "method": method,
        "ipc": 2,
        "settings": {step: QUICK[step] for step in method.split("+")},
        "validation": blobs(patients=4, seed=5, first=100),
        "network": partial(ConvNet, width=8),
    }
    curator = OpenCurator(blobs(patients=18))
    whole: list[Look] = []
    distill(curator, observer=whole.append, **how)

    def interrupt(seen: Look) -> None:
        if (seen.distiller, seen.step) == ("kernel_ridge", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(curator, observer=interrupt, folder=tmp_path, **how)
    resumed: list[Look] = []
    distill(curator, observer=resumed.append, folder=tmp_path, **how)
    assert len(whole) == 10
    assert [(one.distiller, one.step, one.steps, one.validation_auroc) for one in resumed] == [
        (one.distiller, one.step, one.steps, one.validation_auroc) for one in whole
    ]
    assert all(torch.equal(one.pictures, other.pictures) for one, other in zip(resumed, whole, strict=True))


# -- the report -------------------------------------------------------------------------------------------------


def page(distilled: DistilledSet, found: tuple[Look, ...], **changed: Any) -> str:
    return render_report(
        distilled=distilled,
        audit=audit_report(distilled),
        diagnosis=None,
        cohort=None,
        **{"snapshots": {"start": snapshots(distilled)["start"]}, **changed},
        moments=found,
    )


def way(source: str) -> list[tuple[str, Image.Image, str]]:
    """Caption, picture and description of every moment of a page."""
    part = source.split("<h3>How the images formed</h3>")[1].partition("</section>")[0]
    found = re.findall(
        r'<img src="data:image/(?:png|jpeg);base64,([^"]+)" alt="([^"]+)">\s*<span[^>]*>(.*?)</span>\s*</li>', part
    )
    assert len(found) == part.count("<li>")
    drawn = [Image.open(BytesIO(base64.b64decode(content))) for content, *_ in found]
    captions = [re.sub(r"<br>", "; ", re.sub(r"</?span[^>]*>", "", text)) for *_, text in found]
    return list(zip(captions, drawn, [alt for _, alt, _ in found], strict=True))


def test_six_moments_from_noise_to_the_release() -> None:
    distilled = distilled_set(THREE, ipc=5, size=64)
    rows = way(page(distilled, moments(distilled)))
    assert [caption for caption, *_ in rows] == [
        "before the first step",
        *(f"kernel ridge, step {step} of 600; validation AUROC 0.750" for step in (120, 240, 360, 480, 600)),
    ]
    assert all(one.format == "JPEG" for _, one, _ in rows)
    shown = shown_images(distilled.hard_labels)
    assert shown == [0, 1, 5, 6, 10, 11]
    for place, image in enumerate(distilled.images[shown]):
        left = place * 72
        tile = torch.tensor(list(rows[-1][1].crop((left, 0, left + 64, 64)).getdata())).view(64, 64) / 255
        assert float((tile - image[0]).abs().mean()) < 0.03
    said = "Images 1, 2 (made for normal), 6, 7 (made for benign lesion), 11, 12 (made for melanoma)"
    assert all(alt.startswith(said) for *_, alt in rows)


def test_small_pictures_are_exact() -> None:
    distilled = distilled_set(TWO, channels=3)
    source = page(distilled, moments(distilled))
    assert "first to last. From" in source
    assert "image/jpeg" not in source
    strip = way(source)[-1][1]
    assert strip.size == (6 * 16 + 5 * 2, 16)
    for place, i in enumerate(shown_images(distilled.hard_labels)):
        tile = np.asarray(strip.crop((18 * place, 0, 18 * place + 16, 16)))
        assert np.array_equal(tile, eight_bit(distilled.images[i]).permute(1, 2, 0))


def test_what_is_said_beside_them_follows_from_what_they_are() -> None:
    distilled = distilled_set(TWO)
    source = page(distilled, moments(distilled, 3))
    assert "began as noise, in which no patient had any part" in source
    assert "judged on patients" in source
    assert "Nothing more was spent" not in source
    assert "were not attacked on their own" in source
    private = distilled_set(TWO, privacy=PRIVATE)
    source = page(private, moments(private, 3, auroc=None), snapshots=None)
    assert "began as noise" not in source
    assert "judged on patients" not in source
    assert "Nothing more was spent" in source
    assert [caption for caption, *_ in way(source)] == [
        f"kernel ridge, step {step} of 600" for step in (60, 120, 180)
    ]


def test_nothing_is_shown_of_images_that_began_as_patients() -> None:
    distilled = distilled_set(TWO, init="real")
    source = page(distilled, moments(distilled))
    assert "the earlier the moment, the more of a patient" in source
    assert source.count("<img") == len(distilled)
    assert "were not attacked on their own" not in source


def test_moments_of_another_set_are_refused() -> None:
    with pytest.raises(DataError, match="moments of 6 images, got 4"):
        page(distilled_set(TWO), moments(distilled_set(TWO, ipc=2)))


def test_time_is_not_published() -> None:
    distilled = distilled_set(TWO)
    slower = tuple(replace(one, cpu_seconds=7 * one.cpu_seconds + 3) for one in moments(distilled))
    assert page(distilled, slower) == page(distilled, moments(distilled))
