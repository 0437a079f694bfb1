"""What every file of the repository keeps to: style, types, layers, names, and no trace of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CITATION.cff"),
    *("medistill", "pipelines", "tests", "configs", "notebooks"),
}
# A folder of one machine: somebody's home, or where this checkout happens to lie.
MACHINE = re.compile(r"(?<![\w.-])/(?:home|root|Users|work|nfs|scratch)/[A-Za-z0-9_.-]+")


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool that is installed beside this Python."""
    beside = Path(sys.executable).with_name(name)
    command = str(beside) if beside.exists() else shutil.which(name)
    assert command, f"{name} is not installed; `uv run pytest` installs it"
    return subprocess.run([command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)],
    ids=" ".join,
)
def test_the_tool_finds_nothing(command: tuple[str, ...]) -> None:
    done = tool(*command)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def own_files() -> list[Path]:
    """Files that are tracked, or would be; without git, what lies in the fixed folders."""
    listed = tool_or_nothing("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed:
        return [REPOSITORY / name for name in listed if (REPOSITORY / name).is_file()]
    fixed = [path for name in TOP_LEVEL for path in (REPOSITORY / name,) if path.exists()]
    inner = [path for folder in fixed if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    return [path for path in [*fixed, *inner] if path.is_file() and "__pycache__" not in path.parts]


def tool_or_nothing(*command: str) -> list[str]:
    found = shutil.which(command[0])
    if found is None or not (REPOSITORY / ".git").exists():
        return []
    done = subprocess.run([found, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def test_there_are_files_to_look_at() -> None:
    names = {str(path.relative_to(REPOSITORY)) for path in own_files()}
    assert {"pyproject.toml", "README.md", "medistill/cli/app.py", "tests/test_quality.py"} <= names


def test_no_file_is_a_dumping_ground() -> None:
    found = [path.name for path in own_files() if path.stem.strip("_") in {"utils", "helpers", "common", "misc"}]
    assert found == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = []
    for path in own_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        hits = MACHINE.findall(text) if path != Path(__file__) else []
        found += [f"{path.relative_to(REPOSITORY)}: {hit}" for hit in hits]
        if str(REPOSITORY) in text:
            found.append(f"{path.relative_to(REPOSITORY)}: this checkout")
    assert found == []


def test_a_folder_of_one_machine_would_be_found() -> None:
    text = "open('/" + "home/doe/data.csv')"
    assert MACHINE.search(text)
    assert not MACHINE.search("a relative docs/home/page and https://example.org/home/page")


def test_the_top_level_holds_only_what_belongs_there() -> None:
    tracked = tool_or_nothing("git", "ls-files")
    if not tracked:
        pytest.skip("not a git checkout, so what is tracked is not known")
    top = {name.split("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
