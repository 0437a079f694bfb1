"""Every notebook runs, is the same as its paired text, and carries no output."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import matplotlib.font_manager  # noqa: F401 - makes the cache of fonts, which a kernel would speak of on stderr
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))
# Claims that a release cannot make, in either spelling.
FORBIDDEN = re.compile(r"\banonym\w*", re.IGNORECASE)
# What every run shows, whatever the noise: the sentences that a notebook is there for.
SHOWN = {
    "01_first_release": ("The gate was not passed", "No formal privacy guarantee"),
    "02_what_epsilon_buys": (
        "coreset needs patients' images themselves, which differential privacy does not allow.",
        "after epsilon 8, together: 8.99 of 10",
        "The cohort's lifetime budget does not allow it: together with 3 earlier reservations",
        "No formal privacy guarantee",
        "pairs have brackets that overlap, so nothing ranks them.",
    ),
    "03_reading_an_audit": (
        "with so few patients only an AUROC above",
        "9 of 9 released pictures are copies of a training patient's image.",
        "members found at a rate of 0.01 false alarms: cannot be resolved",
        "whole audit: INVALID",
        "The policy asks for a proved epsilon of at most 3; none is proved.",
        "The gate was not passed: FAIL",
        "The gate was not passed: NOT_ESTIMABLE",
        "The gate was not passed: INVALID",
        "verdict in the release: NOT_ESTIMABLE",
        "Released without regard to the gate.",
    ),
    "04_training_on_a_release": (
        "unchanged; signed by the key you gave",
        "changed: images.safetensors",
        "The release is signed by another key",
        "Not audited. No attack was run.",
        "files are read as the hospital read them: True",
        "not read: {'NOT_DICOM': 1}",
        "largest difference on your films",
        "Research only. Not a medical device.",
    ),
}
# Sheets of images and plots.
PICTURES = {
    "01_first_release": 4,
    "02_what_epsilon_buys": 3,
    "03_reading_an_audit": 4,
    "04_training_on_a_release": 3,
}
# What goes before a notebook: nothing that an earlier one named is left, and it works in a folder of its own.
FRESH = """
get_ipython().run_line_magic("reset", "-f")
import os, tempfile
os.chdir({folder!r})
tempfile.tempdir = os.environ["TMPDIR"] = {folder!r}
del os, tempfile
"""


def _cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in jupytext.read(path).cells]


def _notebook(text: Path) -> nbformat.NotebookNode:
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def test_there_is_a_notebook_for_every_text() -> None:
    assert [path.stem for path in TEXTS] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    assert [path.stem for path in TEXTS] == sorted(SHOWN) == sorted(PICTURES)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_text_and_notebook_are_in_sync(text: Path) -> None:
    assert jupytext.read(text).metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert _cells(text) == _cells(text.with_suffix(".ipynb")), "run `jupytext --sync` on the notebook"


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_no_output_is_kept(text: Path) -> None:
    code = [cell for cell in _notebook(text).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_the_words_claim_no_more_than_holds(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    assert not FORBIDDEN.search(content)
    assert "guarantee" in content
    assert "measurement" in content


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks: each would spend seconds on importing torch alone."""
    manager = AsyncKernelManager(kernel_name="python3")
    folder = tmp_path_factory.mktemp("ipython")
    run_sync(manager.start_kernel)(env={**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder)})
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_a_notebook_runs(text: Path, tmp_path: Path, kernel: AsyncKernelManager) -> None:
    notebook = _notebook(text)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FRESH.format(folder=str(tmp_path))))
    client = NotebookClient(notebook, timeout=600, km=kernel)
    client.execute()
    client.kc.stop_channels()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("text", "") for output in outputs)
    assert [sentence for sentence in SHOWN[text.stem] if sentence not in shown] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[text.stem]
    errors = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    assert not errors, "a cell wrote a warning"
    assert not list(tmp_path.glob("medistill-*")), "the notebook leaves its temporary folder behind"
