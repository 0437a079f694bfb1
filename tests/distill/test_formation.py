"""Mosaics: several smaller images in the place of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from medistill.audit.copy_alarm import CopyAlarm
from medistill.core.distilled import ViewLabels
from medistill.core.images import averaged
from medistill.distill import distill, resolve_method
from medistill.distill.formation import labels_of_tiles
from medistill.distill.kernel_ridge import KernelRidge
from medistill.errors import ConfigError
from medistill.privacy.curator import OpenCurator
from medistill.release.card import build_card, readme
from medistill.release.tensors import load_distilled, save_distilled
from medistill.release.verify import Release
from medistill.report.page import render_report
from medistill.training.views import mosaics, pictures, random_boxes, tile_boxes, tiles
from tests.conftest import blobs

QUICK: dict[str, dict[str, Any]] = {
    "distribution_matching": {"iterations": 20, "networks": 2, "width": 8},
    "kernel_ridge": {"iterations": 8, "pool": 2, "uses": 2, "advance": 2, "max_age": 4, "width": 8},
}


def quick(**more: Any) -> dict[str, dict[str, Any]]:
    return {name: {**settings, "formation": 2, **more} for name, settings in QUICK.items()}


@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (1, 3, 8, 12), (1, 1, 8, 8, 8)])
def test_tiles_are_the_enlarged_quarters(shape: tuple[int, ...]) -> None:
    images, axes = torch.rand(shape), len(shape) - 2
    found = tiles(images, 2)
    assert found.shape == (shape[0] * 2**axes, *shape[1:])
    half = [side // 2 for side in shape[2:]]
    mode = "bilinear" if axes == 2 else "trilinear"
    for number, place in enumerate(torch.cartesian_prod(*[torch.arange(2)] * axes).tolist()):
        part = [slice(p * h, (p + 1) * h) for p, h in zip(place, half, strict=True)]
        cut = images[(slice(None), slice(None), *part)]
        naive = F.interpolate(cut, size=shape[2:], mode=mode, align_corners=False)
        inner = (slice(None), slice(None), *(slice(1, -1) for _ in half))  # at a seam the neighbour shines through
        torch.testing.assert_close(found[number :: 2**axes][inner], naive[inner], atol=1e-5, rtol=0)


def test_mosaics_hold_their_images() -> None:
    images = torch.rand(8, 1, 1, 1).expand(8, 1, 10, 10).contiguous()
    laid = mosaics(images, 2)
    assert laid.shape == (2, 1, 10, 10)
    torch.testing.assert_close(tiles(laid, 2)[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2])
    assert mosaics(torch.rand(4, 1, 7, 9), 2).shape == (1, 1, 7, 9)


def test_views_that_overlap_are_no_tiles() -> None:
    labels = torch.full((4, 3, 2), 0.5)
    boxes = tile_boxes(2, 2)[:, None].expand(-1, 3, -1)
    assert ViewLabels(boxes=boxes, soft_labels=labels, temperature=1.0).are_tiles
    crops = random_boxes(12, 2, torch.Generator().manual_seed(0), smallest=0.3).view(4, 3, 4)
    assert not ViewLabels(boxes=crops, soft_labels=labels, temperature=1.0).are_tiles
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 4)
    assert not ViewLabels(boxes=whole, soft_labels=labels[:1], temperature=1.0).are_tiles


def test_a_mosaic_is_released_with_the_labels_of_its_tiles(tmp_path: Path) -> None:
    data = blobs(patients=12)
    made = distill(
        OpenCurator(data), method="distribution_matching+kernel_ridge", ipc=2, settings=quick(), looks=1
    ).distilled
    assert len(made.images) == 4
    assert made.views is not None
    assert made.views.are_tiles
    assert made.views.soft_labels.shape == (4, 4, 2)
    torch.testing.assert_close(made.soft_labels, made.views.soft_labels.mean(0))
    assert (made.views.soft_labels.std(0) > 0).any()  # learned, each on its own
    save_distilled(tmp_path, made)
    again = load_distilled(tmp_path)
    assert pictures(again.images, again.views).shape == (16, 1, 16, 16)
    torch.testing.assert_close(pictures(again.images, again.views), tiles(made.images, 2))
    items = Release(again, {})
    assert len(items) == 16
    image, label = items[5]  # the second tile of the second image
    torch.testing.assert_close(image, tiles(made.images, 2)[5])
    assert torch.equal(label, made.views.soft_labels[1, 1])


def test_labels_of_tiles_come_from_the_distiller_before() -> None:
    data = blobs(patients=12)
    settings = {"kernel_ridge": quick()["kernel_ridge"]}
    first = distill(OpenCurator(data), method="kernel_ridge", ipc=1, settings=settings, looks=1).distilled
    assert first.views is not None
    from_tiles = labels_of_tiles(first, 2)  # type: ignore[arg-type]
    assert torch.equal(from_tiles[1::4], first.views.soft_labels[1])
    assert torch.equal(labels_of_tiles(first, 1), first.soft_labels)  # type: ignore[arg-type]


def test_a_copy_in_a_tile_is_found() -> None:
    """An audit that looked at whole mosaics would not see a patient in one of their tiles."""
    data, others = blobs(patients=40, size=32), blobs(patients=40, size=32, seed=5, first=100)
    mosaic = mosaics(data.images[:8:2], 2)
    views = ViewLabels(boxes=tile_boxes(2, 2)[:, None], soft_labels=torch.full((4, 1, 2), 0.5), temperature=1.0)
    search = CopyAlarm().within(data, others.images).search
    whole = search(mosaic)
    seen = search(pictures(mosaic, views))
    assert whole.correlation.max() < seen.correlation.min()
    assert list(seen.patients) == list(data.patients[:8:2])


def test_a_real_start_lays_real_images_side_by_side() -> None:
    data = blobs(patients=40)
    unchanged = {"iterations": 1, "formation": 2, "init": "real", "rate": 1e-9}
    settings = {"kernel_ridge": {**QUICK["kernel_ridge"], **unchanged}}
    made = distill(OpenCurator(data), method="kernel_ridge", ipc=1, settings=settings, looks=1).distilled
    assert made.recipe.starts_from_real
    small = averaged(pictures(made.images, made.views), plane=8, solid=8).flatten(1)
    of_data = averaged(data.images, plane=8, solid=8).flatten(1)
    correlation = torch.corrcoef(torch.cat([small, of_data]))[: len(small), len(small) :]
    assert correlation.max(1).values.min() > 0.95
    assert [int(data.classes[i]) for i in correlation.argmax(1)] == [0] * 4 + [1] * 4


def test_the_automatic_choice_makes_mosaics_where_tiles_still_show_something() -> None:
    task = blobs(patients=4).task
    assert resolve_method("auto", task, 10, image_shape=(1, 28, 28)).settings["kernel_ridge"]["formation"] == 2
    assert resolve_method("auto", task, 10, image_shape=(1, 16, 16)).settings["kernel_ridge"]["formation"] == 1
    named = resolve_method("distribution_matching+kernel_ridge", task, 10, image_shape=(1, 28, 28))
    assert not named.settings  # published defaults


def test_impossible_formations_are_refused() -> None:
    with pytest.raises(ConfigError, match="formation"):
        KernelRidge(formation=0)


def test_card_and_page_say_that_images_are_mosaics() -> None:
    data = blobs(patients=12)
    settings = {"kernel_ridge": quick()["kernel_ridge"]}
    made = distill(OpenCurator(data), method="kernel_ridge", ipc=1, settings=settings, looks=1).distilled
    plain = replace(made, views=None)
    nothing: dict[str, Any] = {"audit": None, "diagnosis": None, "cohort": None}
    more: dict[str, Any] = {
        "commands": (),
        "forced_reason": None,
        "name": "Release",
        "licence": None,
        "versions": {},
    }
    pages = [render_report(distilled=one, **nothing) for one in (made, plain)]
    cards = [readme(build_card(distilled=one, **nothing, **more)) for one in (made, plain)]
    assert ["mosaic of 4 smaller ones" in page for page in pages] == [True, False]
    assert ["the image is a mosaic" in card for card in cards] == [True, False]
