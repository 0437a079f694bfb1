import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_release import (
    PRIVATE,
    THREE,
    TWO,
    audit_report,
    cohort_summary,
    diagnostic_report,
    distilled_set,
    snapshots,
)
from PIL import Image

from medistill.core.reports import Verdict
from medistill.errors import DataError, OutputError, PrivacyError
from medistill.release import durable
from medistill.release.folder import write_release


def write(out: Path, distilled=None, **changed) -> Path:
    distilled = distilled or distilled_set(TWO, ipc=3)
    arguments = {
        "distilled": distilled,
        "audit": audit_report(distilled),
        "diagnosis": diagnostic_report(distilled),
        "cohort": cohort_summary(distilled),
        "snapshots": snapshots(distilled),
        "commands": ("medistill run configs/phantom.yaml",),
    }
    return write_release(out, **{**arguments, **changed})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_folder_holds_what_it_should(tmp_path):
    out = write(tmp_path / "release")
    assert sorted(contents(out)) == sorted(
        [
            *(
                "README.md",
                "SHA256SUMS",
                "card.json",
                "croissant.json",
                "distilled.dcm",
                "images.safetensors",
                "images/metadata.csv",
                "labels.csv",
                "recipe.json",
                "report.html",
            ),
            *(f"images/{i:04d}.png" for i in range(6)),
        ]
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_same_arguments_give_the_same_bytes(tmp_path):
    assert contents(write(tmp_path / "one")) == contents(write(tmp_path / "two"))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_seal_is_read_by_sha256sum(tmp_path):
    out = write(tmp_path / "release")
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(contents(out)) - 1
    names = [line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert names == sorted(names)


def test_labels_and_pictures_agree_with_the_tensors(tmp_path):
    distilled = distilled_set(THREE, ipc=2, channels=3)
    out = write(tmp_path / "release", distilled)
    rows = list(csv.DictReader(io.StringIO((out / "labels.csv").read_text())))
    assert [row["class"] for row in rows] == ["normal"] * 2 + ["benign lesion"] * 2 + ["melanoma"] * 2
    for i, row in enumerate(rows):
        shares = torch.tensor([float(row[f"soft_label:{name}"]) for name in THREE])
        assert torch.allclose(shares, distilled.soft_labels[i], atol=1e-6)
        picture = Image.open(out / row["file"])
        expected = (distilled.images[i] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert picture.tobytes() == expected.tobytes()


def test_card_says_what_a_stranger_must_know(tmp_path):
    distilled = distilled_set(TWO, ipc=3, privacy=PRIVATE)
    out = write(tmp_path / "release", distilled, name="Chest X-rays", licence="CC BY 4.0")
    card = json.loads((out / "card.json").read_text())
    assert card["schema_version"] == 1
    assert card["name"] == "Chest X-rays"
    assert card["task"] == {"kind": "binary", "class_names": list(TWO)}
    assert card["images"] == {
        "count": 6,
        "per_class": {"no finding": 3, "pneumonia": 3},
        "shape": [1, 16, 16],
        "range": [0, 1],
    }
    assert card["privacy"]["statement"] == PRIVATE.to_json()
    assert card["audit"]["verdict"] == "PASS"
    assert card["audit"]["outcomes"][1]["tpr_at_fpr"]["0.01"] is None
    assert len(card["diagnosis"]["arms"]) == 6
    assert card["medistill_version"] == "0.1.0"
    assert card["licence"] == "CC BY 4.0"
    assert card["forced_reason"] is None
    assert card["intended_use"]
    assert card["limits"]
    assert "without any patient's image" in card["real_and_synthetic"]["images"]
    assert card["warnings"] == []


def test_counts_in_the_card_are_rounded_and_it_says_so(tmp_path):
    out = write(tmp_path / "release")
    text = (out / "card.json").read_text() + (out / "README.md").read_text()
    for exact in ("1987", "4321", "217", "213", "403", "6361", "117"):
        assert re.search(rf"\b{exact}\b", text) is None
    assert text.count("rounded down to tens") == 2


def test_real_start_is_said_everywhere(tmp_path):
    out = write(tmp_path / "release", distilled_set(TWO, ipc=3, init="real"))
    for name in ("card.json", "README.md", "report.html"):
        assert "Treat the release as patient data" in re.sub(r"\s+", " ", (out / name).read_text())


def test_reason_for_release_against_the_gate_is_carried(tmp_path):
    distilled = distilled_set(TWO, ipc=3)
    out = write(
        tmp_path / "release",
        distilled,
        audit=audit_report(distilled, Verdict.FAIL),
        forced_reason="Phantoms only.",
    )
    assert json.loads((out / "card.json").read_text())["forced_reason"] == "Phantoms only."
    for name in ("README.md", "report.html"):
        assert "Phantoms only." in (out / name).read_text()


def test_nothing_measured_is_a_release_too(tmp_path):
    out = write(tmp_path / "release", audit=None, diagnosis=None, cohort=None, snapshots=None, commands=())
    card = json.loads((out / "card.json").read_text())
    assert card["audit"] is None
    assert any(text.startswith("Not audited") for text in card["warnings"])


def test_readme_is_read_by_a_stranger(tmp_path):
    hostile = ("<script>alert(1)</script>", "[x](javascript:y)")
    text = (write(tmp_path / "release", distilled_set(hostile, ipc=1)) / "README.md").read_text()
    assert "<script" not in text
    assert "[x](" not in text
    assert "anonym" not in text.lower()
    assert re.search(r"(?<!diagnostic )sensitivity", text.lower()) is None
    assert "load_release" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize("where", ["forced_reason", "commands", "name"])
@pytest.mark.parametrize("identifier", ["ABCDEFGHIJ234567", "2.25.123456789012"])
def test_pseudonyms_do_not_leave(tmp_path, where, identifier):
    value = (f"medistill {identifier}",) if where == "commands" else f"because of {identifier}."
    with pytest.raises(PrivacyError, match="pseudonym") as caught:
        write(tmp_path / "release", **{where: value})
    assert identifier not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_decimals_of_a_third_are_no_pseudonym(tmp_path):
    write(tmp_path / "release", forced_reason=f"shares of {1 / 3} and {2 / 3}.")
    assert (tmp_path / "release" / "card.json").exists()


def test_class_name_of_the_form_of_a_pseudonym_is_a_class_name(tmp_path):
    assert write(tmp_path / "release", distilled_set(("normal", "NEUROBLASTOMATAS"), ipc=1)).is_dir()


def test_audit_of_another_recipe_is_refused(tmp_path):
    distilled = distilled_set(TWO, ipc=3)
    with pytest.raises(DataError, match="another"):
        write(tmp_path / "release", distilled, audit=replace(audit_report(distilled), release="0" * 64))


def test_empty_folder_is_used_and_a_full_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (write(tmp_path / "empty") / "card.json").is_file()
    before = contents(tmp_path / "empty")
    with pytest.raises(OutputError, match="holds files"):
        write(tmp_path / "empty")
    assert contents(tmp_path / "empty") == before


def test_file_or_link_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="something else"):
            write(tmp_path / name)


def _fails_at(call: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the n-th ``fsync`` fail."""
    calls = iter(range(1000))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == call:
            raise error
        real(descriptor)

    monkeypatch.setattr(durable.os, "fsync", fsync)


@pytest.mark.parametrize("call", [0, 5, 12, 13])
def test_interruption_leaves_nothing(tmp_path, monkeypatch, call):
    _fails_at(call, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "release")
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_an_empty_folder_empty(tmp_path, monkeypatch):
    (tmp_path / "release").mkdir()
    _fails_at(3, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "release")
    assert list(tmp_path.rglob("*")) == [tmp_path / "release"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, code):
    _fails_at(4, OSError(code, os.strerror(code)), monkeypatch)
    with pytest.raises(OutputError, match="disk is full"):
        write(tmp_path / "release")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_told(tmp_path, monkeypatch):
    _fails_at(0, PermissionError(errno.EACCES, "Permission denied"), monkeypatch)
    with pytest.raises(OutputError, match="Permission denied"):
        write(tmp_path / "release")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "release")
