"""The public face: pinned names, all documented, types in the stub, and nothing heavy on import."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import medistill

NAMES = [
    "AuditReport",
    "Budget",
    "Cohort",
    "ConfigError",
    "DiagnosticReport",
    "DistilledSet",
    "Estimate",
    "ImageSet",
    "Ledger",
    "MedistillError",
    "OpenCurator",
    "PhantomConfig",
    "PrivacyStatement",
    "PrivateCurator",
    "Progress",
    "Recipe",
    "Schedule",
    "Split",
    "Task",
    "TerminalProgress",
    "Verdict",
    "__version__",
    "cohort_summary",
    "contact_sheet",
    "load_cohort",
    "load_config",
    "load_model",
    "load_release",
    "predict_files",
    "prepare_cpu",
    "run",
    "train_on_release",
    "verify_release",
    "write_phantom",
]
PACKAGE = Path(medistill.__file__).parent
SMALL = """
source: {kind: phantom, patients: 60, size: 48}
ingest:
  size: 32
  ocr: never
  fractions: {train: 0.4, validation: 0.2, holdout: 0.2, test: 0.2}
distill:
  ipc: 1
  size: 16
  settings:
    distribution_matching: {networks: 2, iterations: 20}
    kernel_ridge: {iterations: 5, real_batch: 24, pool: 2}
audit: {profile: quick}
evaluate: {seeds: 1, real_epochs: 1, draws: 100}
release: {force_with_reason: a phantom hides nobody}
"""


def test_the_public_names_are_pinned_and_alphabetical() -> None:
    assert medistill.__all__ == NAMES
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(medistill, name)
    assert value.__name__ == name
    assert value.__doc__
    assert len(value.__doc__.split()) > 3


def test_no_name_hides_a_package_or_module() -> None:
    inside = {path.stem for path in PACKAGE.iterdir()}
    assert not inside & (set(NAMES) - {"__version__"})


def test_the_stub_gives_every_name_the_type_of_what_it_resolves_to() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = {
        alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == medistill._HOMES
    listed = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert [ast.literal_eval(value) for value in listed] == [NAMES]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'medistill' has no attribute 'distil'"):
        medistill.distil  # noqa: B018
    assert set(NAMES) <= set(dir(medistill))


@pytest.mark.parametrize(
    "statement",
    [
        "import medistill; medistill.__version__",
        "from medistill import MedistillError, TerminalProgress, load_cohort, write_phantom",
        "import sys; sys.argv = ['medistill', '--help']\n"
        "from medistill.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass",
    ],
)
def test_torch_is_not_imported_where_it_is_not_needed(statement: str) -> None:
    check = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_example_of_the_docstring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medistill.__doc__
    block = medistill.__doc__.split("::\n", 1)[1].split("\nThe map", 1)[0]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "phantom.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(textwrap.dedent(block), "<example>", "exec"), {})
    assert (tmp_path / "runs" / "first-model" / "model.safetensors").exists()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3
