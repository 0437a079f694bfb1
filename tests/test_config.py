"""Configurations: every problem at once, each with its path and the nearest name; what is shipped loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medistill.audit import AuditPolicy
from medistill.config import check_settings, load_config, parse_config, shareable
from medistill.core.reports import Verdict
from medistill.errors import ConfigError
from medistill.evaluate import EvaluationConfig
from tests.conftest import REPOSITORY

PHANTOM = {"output": "run", "source": {"kind": "phantom"}}


def problems(changes: dict[str, Any]) -> list[str]:
    """Lines of the error for a configuration that is right but for the changes."""
    with pytest.raises(ConfigError) as caught:
        parse_config({**PHANTOM, **changes}, name="run.yaml")
    head, *lines = str(caught.value).split("\n")
    plural = "" if len(lines) == 1 else "s"
    assert head == f"{len(lines)} problem{plural} in run.yaml:"
    assert caught.value.exit_code == 2
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("changes", "path", "nearest"),
    [
        ({"sede": 1}, "sede", "seed"),
        ({"distil": {}}, "distil", "distill"),
        ({"source": {"kind": "phantom", "patient": 3}}, "source.patient", "patients"),
        ({"source": {"kind": "folder", "path": "a", "labels": "b", "pth": "c"}}, "source.pth", "path"),
        ({"source": {"kind": "npz", "path": "a", "lables": "b"}}, "source.lables", "labels"),
        ({"ingest": {"siez": 3}}, "ingest.siez", "size"),
        ({"ingest": {"fractions": {"trian": 0.5}}}, "ingest.fractions.trian", "train"),
        ({"distill": {"ipcs": 2}}, "distill.ipcs", "ipc"),
        ({"audit": {"aurocs": 1}}, "audit.aurocs", "auroc_high"),
        ({"evaluate": {"seed": 1}}, "evaluate.seed", "seeds"),
        ({"release": {"licens": "x"}}, "release.licens", "licence"),
    ],
)
def test_unknown_key_is_named_with_its_path_and_the_nearest(
    changes: dict[str, Any], path: str, nearest: str
) -> None:
    assert problems(changes) == [f"{path}: unknown. Did you mean {nearest!r}?"]


def test_key_that_resembles_nothing_gets_no_suggestion() -> None:
    assert problems({"audit": {"zzz": 1}}) == ["audit.zzz: unknown."]


def test_all_problems_are_listed_at_once() -> None:
    found = problems(
        {
            "sede": 1,
            "source": {"kind": "folder", "labels": 3},
            "ingest": {"siez": 3, "size": 4, "fractions": {"trian": 0.5}},
            "distill": {"ipc": 0, "method": "kernl_ridge", "settings": {"kernel_ridge": {"rat": 1, "pool": 0.5}}},
            "audit": {"alpha": 7, "fprs": ["often"]},
            "evaluate": {"arms": ["reel"], "seeds": "three"},
            "release": {"accept": ["PASSED"]},
        }
    )
    paths = sorted(line.split(":")[0] for line in found)
    assert paths == [
        "audit",
        "audit.fprs.0",
        "distill.ipc",
        "distill.method",
        "distill.settings.kernel_ridge.pool",
        "distill.settings.kernel_ridge.rat",
        "evaluate",
        "evaluate.seeds",
        "ingest",
        "ingest.fractions.trian",
        "ingest.siez",
        "release.accept.0",
        "sede",
        "source.labels",
        "source.path",
    ]


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({})
    assert [line.strip() for line in str(caught.value).split("\n")[1:]] == ["output: missing.", "source: missing."]
    assert problems({"source": {"kind": "folder"}}) == ["source.path: missing.", "source.labels: missing."]


def test_unknown_and_missing_source_kind_name_the_known_ones() -> None:
    known = "Known: folder, archive, dicomdir, dicomweb, dimse, nifti, image_folder, npz, phantom."
    assert problems({"source": {"kind": "fodler", "path": "x"}}) == [
        f"source.kind: unknown. Did you mean 'folder'? {known}"
    ]
    assert problems({"source": {"path": "x"}}) == [f"source.kind: missing. {known}"]


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"source": "phantom"}, "source", "dictionary"),
        ({"ingest": None}, "ingest", "dictionary"),
        ({"ingest": {"size": "abc"}}, "ingest.size", "'abc'"),
        ({"ingest": {"classes": 3}}, "ingest.classes", "tuple"),
        ({"distill": {"ipc": 2.5}}, "distill.ipc", "2.5"),
        ({"distill": {"settings": {"kernel_ridge": {"iterations": "many"}}}}, None, "integer"),
        ({"evaluate": {"arms": "real"}}, "evaluate.arms", "tuple"),
        ({"release": {"accept": ["OK"]}}, "release.accept.0", "'NOT_ESTIMABLE'"),
    ],
)
def test_wrong_type_says_what_was_expected(changes: dict[str, Any], path: str | None, words: str) -> None:
    (line,) = problems(changes)
    assert line.startswith(f"{path or 'distill.settings.kernel_ridge.iterations'}: ")
    assert words in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed: Input should be greater than or equal to 0. Found -1."),
        ({"source": {"kind": "phantom", "size": 40}}, "source.size: Input should be greater than or equal to 48"),
        ({"source": {"kind": "phantom", "difficulty": 2}}, "source.difficulty: Input should be less than"),
        ({"ingest": {"size": 3}}, "expected size from 8 to 4096, got 3"),
        ({"ingest": {"fit": "squeeze"}}, "expected fit to be one of pad, crop, stretch, got 'squeeze'"),
        (
            {"ingest": {"fractions": {"train": 0.9}}},
            "ingest.fractions: Split fractions: expected fractions to add",
        ),
        ({"distill": {"ipc": 0}}, "distill.ipc: Input should be greater than or equal to 1. Found 0."),
        ({"distill": {"settings": {"kernel_ridge": {"confidence": 2}}}}, "Expected confidence in (0.5, 1), got 2"),
        ({"evaluate": {"seeds": 0}}, "evaluate: Expected seeds >= 1"),
        ({"evaluate": {"arms": ["reel"]}}, "Unknown arms reel. Did you mean 'real'?"),
        ({"evaluate": {"arms": []}}, "Expected at least one of the arms"),
        ({"evaluate": {"networks": "convnt"}}, "Unknown network 'convnt'. Did you mean 'convnet'?"),
        ({"evaluate": {"network": "convnet"}}, "evaluate.network: unknown. Did you mean 'networks'?"),
    ],
)
def test_value_out_of_range_says_what_is_legal(changes: dict[str, Any], words: str) -> None:
    (line,) = problems(changes)
    assert words in line


@pytest.mark.parametrize(
    "policy",
    [
        {"auroc_high": 1.0},
        {"auroc_high": 0.4},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"fprs": (0.0,)},
        {"fewest_patients": 0},
    ],
)
def test_policy_that_nothing_could_fail_or_pass_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(policy))):
        AuditPolicy(**policy)


def test_unknown_distiller_names_the_nearest() -> None:
    (line,) = problems({"distill": {"method": "distribution_matching+kernl_ridge"}})
    assert line.startswith("distill.method: Unknown distillers 'kernl_ridge'. Did you mean 'kernel_ridge'?")


def test_unknown_distiller_setting_names_the_nearest() -> None:
    found = problems({"distill": {"settings": {"kernel_ridge": {"iteration": 3}, "soft_label": {}}}})
    assert found[0] == "distill.settings.kernel_ridge.iteration: unknown. Did you mean 'iterations'?"
    assert found[1].startswith("distill.settings.soft_label: not part of distribution_matching+kernel_ridge.")


def test_settings_of_the_command_line_are_checked_in_the_same_way() -> None:
    assert check_settings("auto", {"kernel_ridge": {"rate": "1e-3"}}) == {"kernel_ridge": {"rate": 0.001}}
    with pytest.raises(ConfigError, match=r"kernel_ridge\.iterations: .*integer.* soft_label: not part of"):
        check_settings("auto", {"kernel_ridge": {"iterations": "many"}, "soft_label": {}})


# -- files and overrides ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text("output: run\nsource:\n  kind: phantom\n")
    return path


def test_overrides_reach_every_section(file: Path) -> None:
    config = load_config(
        file,
        [
            "seed=4",
            "source.patients=70",
            "distill.ipc=3",
            "distill.settings.kernel_ridge.rate=1e-3",
            "ingest.fractions={train: 0.4, validation: 0.2, holdout: 0.2, test: 0.2}",
            "audit.alpha=5e-2",
            "release.accept=[PASS, NOT_ESTIMABLE]",
        ],
    )
    assert (config.seed, config.source.patients, config.distill.ipc) == (4, 70, 3)
    assert config.distill.settings == {"kernel_ridge": {"rate": 0.001}}
    assert type(config.distill.settings["kernel_ridge"]["rate"]) is float
    assert config.ingest.fractions.holdout == 0.2
    assert config.audit.alpha == 0.05
    assert config.release.accept == {Verdict.PASS, Verdict.NOT_ESTIMABLE}


def test_what_may_be_shared_of_a_configuration_makes_the_same_run_elsewhere() -> None:
    source = {"kind": "folder", "path": "/secret/films", "labels": "/secret/labels.csv"}
    changes = {
        "output": "/secret/run",
        "seed": 3,
        "ingest": {"size": 64, "fractions": {"train": 0.5, "validation": 0.2, "holdout": 0.2, "test": 0.1}},
        "distill": {"method": "kernel_ridge", "ipc": 2, "settings": {"kernel_ridge": {"iterations": 7}}},
        "evaluate": {"seeds": 1},
        "release": {"sign_with": "/secret/hospital.key", "licence": "CC0-1.0"},
    }
    config = parse_config({"source": source, **changes}, name="run.yaml")
    told = shareable(config)
    assert "secret" not in told
    values = yaml.safe_load(told)
    assert values["source"] == {"kind": "folder"}
    again = parse_config({**values, "source": source, "output": "elsewhere"}, name="run.yaml")
    for name in ("seed", "ingest", "distill", "audit", "evaluate", "privacy"):
        assert getattr(again, name) == getattr(config, name), name
    phantom = {"kind": "phantom", "patients": 70}
    made_up = shareable(parse_config({**PHANTOM, "source": phantom}, name="run.yaml"))
    assert yaml.safe_load(made_up)["source"]["patients"] == 70


def test_scientific_notation_in_a_file_is_a_number(file: Path) -> None:
    file.write_text(file.read_text() + "distill:\n  settings: {kernel_ridge: {rate: 1e-3}}\n")
    assert load_config(file).distill.settings["kernel_ridge"]["rate"] == 0.001


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.ipc", "Expected --set a.b=c"),
        ("=3", "Expected --set a.b=c"),
        ("output.deep=3", "'output' is a value, not a section"),
        ("distill.ipcs=3", "distill.ipcs: unknown. Did you mean 'ipc'?"),
        ("distill.ipc=[1", "--set distill.ipc: the value is not valid YAML"),
    ],
)
def test_bad_override_is_explained(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert words in str(caught.value)


def test_yaml_syntax_error_names_the_line(file: Path) -> None:
    file.write_text("output: run\nsource:\n  kind: [phantom\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"my\.yaml is not valid YAML at line 4"):
        load_config(file)


def test_yaml_is_never_evaluated(file: Path) -> None:
    file.write_text("output: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML at line 1"):
        load_config(file)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "word"])
def test_file_without_sections_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no sections"):
        load_config(file)


def test_missing_file_and_folder_are_refused_without_their_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="Cannot read the configuration") as caught:
            load_config(path)
        assert str(tmp_path.parent) not in str(caught.value)


def test_environment_variables_stand_in_paths_and_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/somewhere")
    config = parse_config({"output": "run", "source": {"kind": "npz", "path": "${SOME_FOLDER}/a.npz"}})
    assert config.source.path == Path("/somewhere/a.npz")
    monkeypatch.delenv("SOME_FOLDER")
    assert problems({"source": {"kind": "npz", "path": "$SOME_FOLDER/a.npz"}}) == [
        "source.path: the environment variable SOME_FOLDER is not set."
    ]


# -- what is shipped -------------------------------------------------------------------------------------------


#: Read by their pipelines and by the audit, and tested with them.
STUDIES = {
    *("compare_distillers.yaml", "compare_pediatric.yaml", "compare_retinamnist.yaml"),
    *("continual_learning.yaml", "epsilon_sweep.yaml", "policy.yaml"),
}
SHIPPED = [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if path.name not in STUDIES]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDISTILL_DATA", "/data")
    config = load_config(path)
    assert config.release.licence


def test_shipped_configurations_exist() -> None:
    names = {path.name for path in (REPOSITORY / "configs").iterdir()}
    assert names >= {"phantom.yaml", "pediatric_cxr.yaml", "pneumoniamnist.yaml"}


def test_the_phantom_configuration_is_the_demo() -> None:
    from medistill.workflow import demo_config

    assert load_config(REPOSITORY / "configs" / "phantom.yaml") == demo_config(Path("medistill-demo"))


def test_defaults_are_those_of_the_records() -> None:
    config = parse_config(PHANTOM)
    assert config.audit == AuditPolicy()
    assert config.evaluate == EvaluationConfig()
    assert config.release.accept == {Verdict.PASS}
