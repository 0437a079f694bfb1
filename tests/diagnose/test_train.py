"""Training on somebody's release: what comes out, from what only, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medistill.core.distilled import Schedule
from medistill.diagnose import train, train_on_release
from medistill.errors import ConfigError, OutputError, ReleaseError
from medistill.networks.convnet import ConvNet
from medistill.release.folder import write_release
from medistill.training.fit import predict
from tests.report.example_release import OPEN, audit_report, distilled_set


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed release of twelve made-up images with a short schedule."""
    distilled = replace(distilled_set(ipc=6), schedule=Schedule(epochs=40, learning_rate=0.01))
    return write_release(
        tmp_path_factory.mktemp("release") / "release",
        distilled=distilled,
        audit=audit_report(distilled),
        diagnosis=None,
        cohort=None,
        snapshots=None,
        commands=(),
    )


@pytest.fixture(scope="module")
def model(release: Path) -> Path:
    return train_on_release(release, release.parent / "model")


def test_a_model_is_weights_and_a_description(model: Path) -> None:
    assert sorted(file.name for file in model.iterdir()) == ["model.json", "model.safetensors"]
    description = json.loads((model / "model.json").read_text())
    assert description["schema_version"] == 1
    assert description["network"] == "convnet"
    assert description["image_shape"] == [1, 16, 16]
    assert description["task"] == {"kind": "binary", "class_names": ["no finding", "pneumonia"]}
    assert description["schedule"]["epochs"] == 40
    assert description["privacy"] == OPEN.to_json()
    assert description["recipe"] == distilled_set(ipc=6).recipe.fingerprint()


def test_the_weights_fit_the_network_and_tell_the_classes_apart(model: Path) -> None:
    distilled = distilled_set(ipc=6)
    network = ConvNet(distilled.task, (1, 16, 16))
    network.load_state_dict(load_file(model / "model.safetensors"))
    decided = predict(network, distilled.images, kind=distilled.task.kind).argmax(1)
    agreement = json.loads((model / "model.json").read_text())["agreement_with_release"]
    assert agreement == pytest.approx(float((decided == distilled.hard_labels).float().mean()))
    assert agreement >= 0.9


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    release: Path, model: Path, tmp_path: Path
) -> None:
    again = train_on_release(release, tmp_path / "again")
    other = train_on_release(release, tmp_path / "other", seed=1)
    for name in ("model.safetensors", "model.json"):
        assert (again / name).read_bytes() == (model / name).read_bytes()
        assert (other / name).read_bytes() != (model / name).read_bytes()


def test_training_does_not_touch_the_callers_randomness(release: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train_on_release(release, tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["images.safetensors", "card.json", "images/0000.png"])
def test_a_changed_release_is_refused(name: str, release: Path, tmp_path: Path) -> None:
    import shutil

    changed = Path(shutil.copytree(release, tmp_path / "release"))
    content = bytearray((changed / name).read_bytes())
    content[-1] ^= 1
    (changed / name).write_bytes(bytes(content))
    with pytest.raises(ReleaseError, match=f"changed: {name}"):
        train_on_release(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="Not a release"):
        train_on_release(tmp_path, tmp_path / "model")


def test_an_output_that_is_not_empty_is_refused_before_training(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained before looking at the output"))
    (tmp_path / "kept.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(OutputError, match="not empty"):
            train_on_release(release, out)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_an_empty_output_folder_is_taken(release: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert (train_on_release(release, tmp_path / "model") / "model.json").is_file()


def test_an_unknown_network_is_refused_with_the_nearest(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'convnet'"):
        train_on_release(release, tmp_path / "model", network="convent")


def test_an_interruption_leaves_nothing(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_on_release(release, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
