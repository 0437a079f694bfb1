"""Training on somebody's release: what comes out, from what only, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medistill.core.task import Task
from medistill.diagnose import load_model, model, train, train_on_release
from medistill.diagnose.model import model_files
from medistill.errors import ConfigError, OutputError, ReleaseError
from medistill.networks.convnet import ConvNet
from medistill.training.fit import predict
from tests.diagnose.conftest import noise, sealed
from tests.report.example_release import OPEN, distilled_set


@pytest.fixture(scope="module")
def trained(made_up: Path) -> Path:
    return train_on_release(made_up, made_up.parent / "model")


def description(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "model.json").read_text())
    return found


def test_a_model_is_weights_and_a_description(trained: Path) -> None:
    assert sorted(file.name for file in trained.iterdir()) == ["model.json", "model.safetensors"]
    found, distilled = description(trained), distilled_set(ipc=6)
    assert (found["schema_version"], found["network"], found["students"]) == (2, "convnet", 1)
    assert found["task"] == {"kind": "binary", "class_names": ["no finding", "pneumonia"]}
    assert found["preprocessing"]["image_shape"] == [1, 16, 16]
    assert found["preprocessing"]["stated"] is False
    origin = found["origin"]
    assert origin["schedule"]["epochs"] == 40
    assert origin["privacy"] == OPEN.to_json()
    assert origin["recipe"] == distilled.recipe.fingerprint()
    assert origin["release"] == distilled.fingerprint()


def test_the_weights_fit_the_network_and_tell_the_classes_apart(trained: Path) -> None:
    distilled = distilled_set(ipc=6)
    network = ConvNet(distilled.task, (1, 16, 16))
    weights = load_file(trained / "model.safetensors")
    prefix = "members.0."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    decided = predict(network, distilled.images, kind=distilled.task.kind).argmax(1)
    agreement = description(trained)["origin"]["agreement_with_release"]
    assert agreement == pytest.approx(float((decided == distilled.hard_labels).float().mean()))
    assert agreement >= 0.9


def test_a_model_is_read_as_it_was_written(trained: Path) -> None:
    again = model_files(load_model(trained))
    assert {name: (trained / name).read_bytes() for name in again} == again


def test_an_ensemble_is_the_mean_of_tempered_answers(model_folder: Path) -> None:
    loaded = load_model(model_folder)
    images, temperature = noise(3, loaded.preprocessing.image_shape), loaded.calibration.temperature
    with torch.no_grad():
        answers = [(member(images) / temperature).softmax(1) for member in loaded.ensemble.members]
    assert len(answers) == 2
    assert not torch.allclose(answers[0], answers[1])
    torch.testing.assert_close(loaded.probabilities(images), torch.stack(answers).mean(0))


def test_the_first_student_is_the_single_one(made_up: Path, trained: Path, tmp_path: Path) -> None:
    two = train_on_release(made_up, tmp_path / "two", students=2, calibration="none")
    first, alone = (load_file(folder / "model.safetensors") for folder in (two, trained))
    assert all(torch.equal(first[name], alone[name]) for name in alone if name.startswith("members.0."))
    assert description(two)["calibration"]["temperature"] == 1.0
    assert description(two)["calibration"]["source"] == "none"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    made_up: Path, trained: Path, tmp_path: Path
) -> None:
    again = train_on_release(made_up, tmp_path / "again")
    other = train_on_release(made_up, tmp_path / "other", seed=1, calibration="none")
    for name in ("model.safetensors", "model.json"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()
        assert (other / name).read_bytes() != (trained / name).read_bytes()


def test_training_does_not_touch_the_callers_randomness(made_up: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train_on_release(made_up, tmp_path / "model", calibration="none")
    assert torch.equal(torch.rand(3), expected)


def test_several_findings_in_an_image(tmp_path: Path) -> None:
    made = distilled_set(("a", "b", "c"), ipc=2)
    made = replace(
        made,
        task=Task.multilabel(("a", "b", "c")),
        soft_labels=torch.rand(6, 3, generator=torch.Generator().manual_seed(0)),
        schedule=replace(made.schedule, epochs=5),
    )
    loaded = load_model(train_on_release(sealed(tmp_path / "release", made), tmp_path / "model"))
    assert loaded.calibration.thresholds == (0.5,) * 3
    answers = loaded.probabilities(made.images)
    assert bool(((answers > 0) & (answers < 1)).all())
    assert not torch.allclose(answers.sum(1), torch.ones(6), atol=1e-3)


@pytest.mark.parametrize("name", ["images.safetensors", "card.json", "images/0000.png"])
def test_a_changed_release_is_refused(name: str, made_up: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(made_up, tmp_path / "release"))
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
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained before looking at the output"))
    (tmp_path / "kept.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(OutputError, match="not empty"):
            train_on_release(made_up, out)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_an_empty_output_folder_is_taken(made_up: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert (train_on_release(made_up, tmp_path / "model", calibration="none") / "model.json").is_file()


def test_an_unknown_network_is_refused_with_the_nearest(made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'convnet'"):
        train_on_release(made_up, tmp_path / "model", network="convent")


@pytest.mark.parametrize("odd", [{"students": 0}, {"calibration": "isotonic"}])
def test_odd_settings_are_refused(odd: dict[str, object], made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="students and calibration"):
        train_on_release(made_up, tmp_path / "model", **odd)


def test_an_interruption_leaves_nothing(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "sync_folder", interrupt)
    monkeypatch.setattr(model, "write_durably", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_on_release(made_up, tmp_path / "model", calibration="none")
    assert list(tmp_path.iterdir()) == []
