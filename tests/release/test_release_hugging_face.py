"""The folder as it is, read by Hugging Face ``datasets`` without a network."""

import json
import os
import subprocess
import sys

import pytest
from example_release import THREE, distilled_set

from medistill.release.folder import write_release

READ = """
import json, socket, sys

def refuse(*args):
    raise AssertionError("asked the network")

socket.socket.connect = socket.getaddrinfo = refuse
import datasets
import numpy as np

datasets.disable_progress_bars()
release, cache = sys.argv[1:]
found = []
for how in ({"path": release}, {"path": "imagefolder", "data_dir": release + "/images"}):
    split = datasets.load_dataset(**how, cache_dir=cache, split="train")
    rows = [{**row, "image": np.asarray(row["image"]).tolist()} for row in split]
    found.append({"columns": split.column_names, "rows": rows})
print(json.dumps(found))
"""


def test_images_and_labels_in_one_line(tmp_path):
    pytest.importorskip("datasets")
    distilled = distilled_set(THREE, ipc=2, channels=3)
    nothing = {"audit": None, "diagnosis": None, "cohort": None, "snapshots": None, "commands": ()}
    release = write_release(tmp_path / "release", distilled=distilled, **nothing)
    before = sorted(release.rglob("*"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(release), str(tmp_path / "cache")],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    whole, pictures = json.loads(done.stdout.splitlines()[-1])
    assert whole == pictures
    assert whole["columns"] == ["image", "class", "label", *(f"soft_label:{name}" for name in THREE)]
    assert len(whole["rows"]) == 6
    for i, row in enumerate(whole["rows"]):
        assert row["label"] == int(distilled.hard_labels[i])
        assert row["class"] == THREE[row["label"]]
        shares = [row[f"soft_label:{name}"] for name in THREE]
        assert shares == pytest.approx(distilled.soft_labels[i].tolist(), abs=1e-6)
        levels = (distilled.images[i] * 255).round().byte().permute(1, 2, 0)
        assert row["image"] == levels.tolist()
    assert sorted(release.rglob("*")) == before
