"""Strict YAML to frozen records.

All problems of a file are reported at once, each with its dotted path, what was found and the nearest known name.
Nothing in YAML is evaluated; in paths, ``$NAME`` stands for an environment variable and a relative path is
relative to the current folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from medistill.audit import AuditPolicy
from medistill.core.reports import Verdict
from medistill.distill import resolve_method
from medistill.distill.runner import make_distiller
from medistill.errors import ConfigError
from medistill.evaluate import EvaluationConfig
from medistill.ingest import IngestConfig
from medistill.ingest.phantom import PhantomConfig
from medistill.registry import nearest


def _expand(value: object) -> object:
    if not isinstance(value, (str, Path)):
        return value
    expanded = os.path.expanduser(os.path.expandvars(str(value)))
    missing = re.findall(r"\$\{?(\w+)", expanded)
    if missing:
        raise ValueError(f"the environment variable {missing[0]} is not set")
    return expanded


PathField = Annotated[Path, BeforeValidator(_expand)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FolderSection(_Section):
    """DICOM files in a folder tree."""

    kind: Literal["folder"]
    path: PathField
    labels: PathField


class ImageFolderSection(_Section):
    """PNG or JPEG images in a folder or zip; classes from subfolders or a CSV."""

    kind: Literal["image_folder"]
    path: PathField
    labels: PathField | None = None


class NpzSection(_Section):
    """Arrays in an npz; patients and splits from a CSV."""

    kind: Literal["npz"]
    path: PathField
    labels: PathField | None = None


class PhantomSection(_Section):
    """The synthetic gastric X-ray cohort, written as DICOM into the run folder."""

    kind: Literal["phantom"]
    patients: int = Field(default=PhantomConfig().patients, ge=1)
    size: int = Field(default=PhantomConfig().size, ge=32)
    seed: int = Field(default=0, ge=0)
    difficulty: float = Field(default=PhantomConfig().difficulty, ge=0, le=1)


SourceSection = Annotated[
    FolderSection | ImageFolderSection | NpzSection | PhantomSection, Field(discriminator="kind")
]


class DistillSection(_Section):
    """What to distil and how.

    ``settings`` holds, per distiller, what differs from its defaults.
    """

    method: str = "auto"
    ipc: int = Field(default=10, ge=1)
    size: int = Field(default=64, ge=16, le=1024)
    settings: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> DistillSection:
        from medistill.core.task import Task  # noqa: PLC0415

        names = resolve_method(self.method, Task.single_label(("0", "1")), self.ipc).distillers
        for section, settings in self.settings.items():
            if section not in names:
                raise ConfigError(f"settings.{section}: not part of {'+'.join(names)}.{nearest(section, names)}")
            make_distiller(section, settings)
        return self


class ReleaseSection(_Section):
    """When a release may be written, and under which licence.

    ``accept`` lists the audit verdicts that pass the gate; ``force_with_reason`` releases anyway, and the reason
    stands on the card and on the first page of the report.
    """

    accept: frozenset[Verdict] = frozenset({Verdict.PASS})
    force_with_reason: Annotated[str | None, AfterValidator(lambda text: text or None)] = None
    licence: str = ""


class RunConfig(_Section):
    """One run: the five verbs in order."""

    output: PathField
    seed: int = Field(default=0, ge=0)
    source: SourceSection
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    distill: DistillSection = Field(default_factory=DistillSection)
    audit: AuditPolicy = Field(default_factory=AuditPolicy)
    evaluate: EvaluationConfig = Field(default_factory=EvaluationConfig)
    release: ReleaseSection = Field(default_factory=ReleaseSection)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides, and validate.

    Raises:
        ConfigError: If the file cannot be read, or with every problem of its content.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path.name}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" at line {line + 1}"
        raise ConfigError(f"The configuration {path.name} is not valid YAML{where}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {path.name} holds no sections; expected 'source:', 'distill:', …")
    for override in overrides:
        _override(values, override)
    return parse_config(values, name=path.name)


def parse_config(values: Mapping[str, Any], *, name: str = "configuration") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: With every problem, one a line.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem(dict(entry)) for entry in error.errors()]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{count} in {name}:\n{lines}") from None


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"Expected --set a.b=c, got {override!r}.")
    *parents, last = path.split(".")
    here = values
    for parent in parents:
        child = here.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {path}: {parent!r} is a value, not a section.")
        here = child
    here[last] = yaml.safe_load(text)


def _problem(entry: dict[str, Any]) -> str:
    parts = list(entry["loc"])
    if parts[0:1] == ["source"] and len(parts) > 2:
        del parts[1]  # the kind, which pydantic puts between the section and its field
    location = [str(part) for part in parts]
    path = ".".join(location) or "(top level)"
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: unknown.{nearest(location[-1], _known_names(entry['loc']))}"
    if entry["type"] == "missing":
        return f"{path}: missing."
    message = str(entry["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    found = entry.get("input")
    shown = f" Found {found!r}." if isinstance(found, (int, float, bool)) or _is_word(found) else ""
    return f"{path}: {message}.{shown}"


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,40}", value) is not None


def _known_names(location: Sequence[Any]) -> list[str]:
    """Names allowed where an unknown one was found."""
    here: Any = RunConfig
    for part in location[:-1]:
        fields = getattr(here, "model_fields", None) or getattr(here, "__dataclass_fields__", {})
        if part in fields:
            here = fields[part].annotation if hasattr(fields[part], "annotation") else fields[part].type
        else:
            candidates = [kind for kind in get_args(here) if _kind_of(kind) == part]
            here = candidates[0] if candidates else here
    fields = getattr(here, "model_fields", None) or getattr(here, "__dataclass_fields__", {})
    return list(fields)


def _kind_of(section: Any) -> str:
    annotation = section.model_fields["kind"].annotation
    return str(get_args(annotation)[0])
