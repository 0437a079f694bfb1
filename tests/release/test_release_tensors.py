import errno
import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from example_release import PRIVATE, THREE, TWO, distilled_set
from safetensors.torch import load_file, save_file

from medistill.core.distilled import Step, ViewLabels
from medistill.errors import DataError, OutputError, ReleaseError
from medistill.release import durable
from medistill.release.card import build_card, readme
from medistill.release.tensors import load_distilled, save_distilled


def test_round_trip(tmp_path):
    for distilled in (distilled_set(TWO, ipc=2), distilled_set(THREE, ipc=1, channels=3, privacy=PRIVATE)):
        save_distilled(tmp_path / "run", distilled)
        loaded = load_distilled(tmp_path / "run")
        for name in ("images", "soft_labels", "hard_labels"):
            assert torch.equal(getattr(loaded, name), getattr(distilled, name))
        for name in ("ipc", "task", "recipe", "schedule", "privacy"):
            assert getattr(loaded, name) == getattr(distilled, name)
        assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [
            "images.safetensors",
            "recipe.json",
        ]


def test_other_precision_is_written_as_documented(tmp_path):
    distilled = distilled_set(TWO, ipc=2)
    save_distilled(
        tmp_path,
        replace(distilled, images=distilled.images.double(), hard_labels=distilled.hard_labels.int()),
    )
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "images.safetensors").items()}
    assert dtypes == {"images": torch.float32, "soft_labels": torch.float32, "hard_labels": torch.int64}


def test_json_is_strict_and_repeatable(tmp_path):
    for name in ("a", "b"):
        save_distilled(tmp_path / name, distilled_set(TWO, ipc=2))
    first, second = ((tmp_path / name / "recipe.json").read_bytes() for name in ("a", "b"))
    assert first == second
    assert json.loads(first)["privacy"]["epsilon"] is None


def test_setting_that_is_not_plain_is_refused(tmp_path):
    distilled = distilled_set(TWO, ipc=2)
    for odd in (torch.zeros(2), float("inf")):
        recipe = replace(distilled.recipe, steps=(Step(distiller="x", settings={"a": odd}),))
        with pytest.raises(DataError, match="plain, finite"):
            save_distilled(tmp_path, replace(distilled, recipe=recipe))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_earlier_set(tmp_path, monkeypatch):
    earlier = distilled_set(TWO, ipc=2)
    save_distilled(tmp_path, earlier)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    with pytest.raises(OutputError, match="disk is full"):
        save_distilled(tmp_path, distilled_set(THREE, ipc=2))
    assert load_distilled(tmp_path).task == earlier.task
    assert len(list(tmp_path.iterdir())) == 2


def changed(folder, edit):
    """Apply an edit to the values of recipe.json."""
    path = folder / "recipe.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(schema_version=2), "newer medistill"),
        (lambda v: v.update(schema_version=0), "which no medistill wrote"),
        (lambda v: v.pop("schema_version"), "schema_version"),
        (lambda v: v.update(schema_version=True), "schema_version"),
        (lambda v: v.pop("privacy"), "exactly"),
        (lambda v: v.update(extra=1), "exactly"),
        (lambda v: v.update(ipc=5), "Expected 10 images"),
        (lambda v: v.update(ipc=[]), "missing or odd"),
        (lambda v: v["task"].pop("kind"), "missing or odd"),
        (lambda v: v["task"].update(class_names=["a"]), "invariant"),
        (lambda v: v["schedule"].update(optimizer="lbfgs"), "optimizer"),
        (lambda v: v["schedule"].update(unknown=1), "missing or odd"),
        (lambda v: v["privacy"].update(epsilon=1.0), "reason"),
        (lambda v: v["privacy"].update(accountants="PLD"), "missing or odd"),
        (lambda v: v["recipe"].update(steps=[]), "at least one"),
        (lambda v: v.update(images_sha256="0" * 64), "is not the file"),
    ],
)
def test_damaged_recipe(tmp_path, edit, message):
    save_distilled(tmp_path, distilled_set(TWO, ipc=2))
    changed(tmp_path, edit)
    with pytest.raises(ReleaseError, match=message):
        load_distilled(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema_version": 1, "schema_version": 1}', '{"a": NaN}', "[" * 99999]
)
def test_recipe_that_is_not_strict_json(tmp_path, text):
    save_distilled(tmp_path, distilled_set(TWO, ipc=2))
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"recipe\.json"):
        load_distilled(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("recipe.json", "folder with a distilled set"), ("images.safetensors", "Expected a readable")],
)
def test_missing_file(tmp_path, name, message):
    save_distilled(tmp_path, distilled_set(TWO, ipc=2))
    (tmp_path / name).unlink()
    with pytest.raises(ReleaseError, match=message):
        load_distilled(tmp_path)


def with_tensors(folder, content):
    (folder / "images.safetensors").write_bytes(content)
    changed(folder, lambda v: v.update(images_sha256=hashlib.sha256(content).hexdigest()))


@pytest.mark.parametrize("content", [b"", b"\x80\x04]q\x00.", b"\xff" * 64])
def test_tensors_that_are_not_safetensors(tmp_path, content):
    save_distilled(tmp_path, distilled_set(TWO, ipc=2))
    with_tensors(tmp_path, content)
    with pytest.raises(ReleaseError, match="safetensors form"):
        load_distilled(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("soft_labels"), "Expected the tensors"),
        (lambda t: t.update(patients=torch.zeros(4)), "Expected the tensors"),
        (lambda t: t.update(images=t["images"].double()), "Expected the tensors"),
        (lambda t: t.update(images=t["images"] + 1), r"\[0, 1\]"),
        (lambda t: t.update(images=t["images"] * float("nan")), "finite"),
        (lambda t: t.update(images=t["images"].flatten(1)), "4 or 5 axes"),
        (lambda t: t.update(hard_labels=t["hard_labels"] + 5), "classes of the task"),
        (lambda t: t.update(soft_labels=torch.tensor([[2.0, -1.0]] * 4)), "soft_labels >= 0"),
        (lambda t: t.update(soft_labels=t["soft_labels"] / 2), "sum to 1"),
    ],
)
def test_tensors_that_break_an_invariant(tmp_path, edit, message):
    save_distilled(tmp_path, distilled_set(TWO, ipc=2))
    tensors = load_file(tmp_path / "images.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "other")
    with_tensors(tmp_path, (tmp_path / "other").read_bytes())
    with pytest.raises(ReleaseError, match=message):
        load_distilled(tmp_path)


def with_views(distilled, *, views=3):
    generator = torch.Generator().manual_seed(2)
    low = torch.rand(views, len(distilled), 2, generator=generator) / 2
    labels = torch.rand(views, len(distilled), distilled.task.n_classes, generator=generator).softmax(2)
    made = ViewLabels(boxes=torch.cat([low, low + 0.4], 2), soft_labels=labels, temperature=1.7)
    return replace(distilled, views=made)


def test_views_round_trip_and_are_part_of_the_fingerprint(tmp_path):
    plain = distilled_set(TWO, ipc=2)
    distilled = with_views(plain)
    save_distilled(tmp_path, distilled)
    loaded = load_distilled(tmp_path)
    assert torch.equal(loaded.views.boxes, distilled.views.boxes)
    assert torch.equal(loaded.views.soft_labels, distilled.views.soft_labels)
    assert loaded.views.temperature == 1.7
    assert loaded.fingerprint() == distilled.fingerprint()
    others = [
        replace(distilled.views, temperature=1.8),
        replace(distilled.views, boxes=distilled.views.boxes / 2),
        replace(distilled.views, soft_labels=distilled.views.soft_labels.flip(2)),
        None,
    ]
    found = {replace(distilled, views=views).fingerprint() for views in others} | {distilled.fingerprint()}
    assert len(found) == 5


def test_a_set_without_views_is_written_and_named_as_before(tmp_path):
    plain = distilled_set(TWO, ipc=2)
    save_distilled(tmp_path, plain)
    assert set(load_file(tmp_path / "images.safetensors")) == {"images", "soft_labels", "hard_labels"}
    digest = hashlib.sha256(plain.recipe.fingerprint().encode())
    for tensor in (plain.images, plain.soft_labels, plain.hard_labels):
        digest.update(tensor.numpy().tobytes())
    assert plain.fingerprint() == digest.hexdigest()
    assert load_distilled(tmp_path).views is None


def test_views_of_other_images_are_refused():
    distilled = with_views(distilled_set(TWO, ipc=2))
    with pytest.raises(DataError, match="every view"):
        replace(distilled_set(TWO, ipc=3), views=distilled.views)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("view_boxes"), "Expected the tensors"),
        (lambda t: t.update(view_boxes=t["view_boxes"].double()), "Expected the tensors"),
        (lambda t: t.update(view_boxes=t["view_boxes"] * 3), r"\[0, 1\]"),
        (lambda t: t.update(view_soft_labels=t["view_soft_labels"] - 1), r"\[0, 1\]"),
        (lambda t: t.update(view_temperature=t["view_temperature"] * 0), "temperature"),
        (lambda t: t.update(view_temperature=t["view_temperature"].repeat(2)), "missing or odd"),
    ],
)
def test_views_that_break_an_invariant(tmp_path, edit, message):
    save_distilled(tmp_path, with_views(distilled_set(TWO, ipc=2)))
    tensors = load_file(tmp_path / "images.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "other")
    with_tensors(tmp_path, (tmp_path / "other").read_bytes())
    with pytest.raises(ReleaseError, match=message):
        load_distilled(tmp_path)


def test_the_card_says_how_views_are_used():
    distilled = with_views(distilled_set(TWO, ipc=2))
    parts = {"audit": None, "diagnosis": None, "cohort": None, "commands": (), "forced_reason": None}
    parts |= {"name": "A release", "licence": None, "versions": {}}
    card = build_card(distilled=distilled, **parts)
    assert card["images"]["views"] == {"count": len(distilled.views), "temperature": 1.7}
    text = readme(card)
    for name in ("`view_boxes`", "`view_soft_labels`", "`view_temperature` (1.7)", "low corner, then the high"):
        assert name in text
    assert f"crop e modulo {len(distilled.views)}" in text
    assert "view_" not in readme(build_card(distilled=replace(distilled, views=None), **parts))
