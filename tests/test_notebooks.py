"""Every notebook runs, is the same as its paired text, and carries no output."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))
# Claims that a release cannot make, in either spelling.
FORBIDDEN = re.compile(r"\banonym\w*", re.IGNORECASE)


def _cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in jupytext.read(path).cells]


def _notebook(text: Path) -> nbformat.NotebookNode:
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def test_there_is_a_notebook_for_every_text() -> None:
    assert [path.stem for path in TEXTS] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    assert TEXTS


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


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_a_notebook_runs(text: Path, tmp_path: Path) -> None:
    notebook = _notebook(text)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "i"),
    }
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)
    shown = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "The gate was not passed" in shown
    assert "No formal privacy guarantee" in shown
    streams = [output.get("name") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "stderr" not in streams, "a cell wrote a warning"
    assert not list(tmp_path.glob("medistill-*")), "the notebook leaves its temporary folder behind"
