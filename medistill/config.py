"""Strict YAML to frozen records.

All problems of a file are reported at once, each with its dotted path, what was found and the nearest known name.
Nothing in YAML is evaluated; in paths, ``$NAME`` stands for an environment variable and a relative path is
relative to the current folder.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from medistill.audit import AuditPolicy
from medistill.core.compute import Compute
from medistill.core.guarantee import EPSILON_RANGE, LARGEST_DELTA, MOST_RUNS
from medistill.core.reports import Verdict
from medistill.core.task import Task
from medistill.distill import resolve_method
from medistill.distill.runner import LOOKS, PRIVATE_METHODS, make_distiller
from medistill.errors import ConfigError
from medistill.evaluate import EvaluationConfig
from medistill.ingest import IngestConfig
from medistill.ingest.phantom import PhantomConfig
from medistill.ingest.reading import Source
from medistill.ingest.sources import open_source
from medistill.registry import DISTILLERS, nearest

#: Sections that are checked as a whole once their values are legal.
_IDENTIFYING = frozenset({"patients", "studies", "series"})
_SHARED = ("seed", "ingest", "privacy", "distill", "audit", "evaluate")
_RECORDS = ("ingest", "audit", "evaluate", "compute")
_Problem = tuple[str, str]


class _SeveralError(ValueError):
    """Several problems of one value, each with its path below that value."""

    def __init__(self, problems: Sequence[_Problem]) -> None:
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))
        self.problems = tuple(problems)


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


class _SourceSection(_Section):
    """What every source of images has."""

    def open(self, volumes: str) -> Source:
        """The source that this section describes."""
        options = self.model_dump(exclude={"kind", "labels", "path", "url", "host"})
        where = next(getattr(self, name) for name in ("path", "url", "host") if hasattr(self, name))
        return open_source(getattr(self, "kind"), where, volumes=volumes, options=options)  # noqa: B009


class FolderSection(_SourceSection):
    """DICOM files in a folder tree."""

    kind: Literal["folder"]
    path: PathField
    labels: PathField


class ArchiveSection(_SourceSection):
    """DICOM files in a zip or tar archive, which is not unpacked."""

    kind: Literal["archive"]
    path: PathField
    labels: PathField


class DicomdirSection(_SourceSection):
    """A medium with a DICOMDIR."""

    kind: Literal["dicomdir"]
    path: PathField
    labels: PathField


class NiftiSection(_SourceSection):
    """NIfTI files."""

    kind: Literal["nifti"]
    path: PathField
    labels: PathField


class _PacsSection(_SourceSection):
    """What is wanted of a PACS, and how its certificate is checked."""

    labels: PathField
    studies: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    date: str = ""
    modalities: tuple[str, ...] = ()
    ca_bundle: PathField | None = None
    client_certificate: PathField | None = None
    client_key: PathField | None = None
    retries: int = Field(default=5, ge=0)
    pause: float = Field(default=1.0, ge=0)
    timeout: float = Field(default=30.0, gt=0)


class DicomWebSection(_PacsSection):
    """A DICOMweb service; secrets come from files or the environment."""

    kind: Literal["dicomweb"]
    url: str
    user: str = ""
    password_file: PathField | None = None
    token_file: PathField | None = None
    allow_http: bool = False


class DimseSection(_PacsSection):
    """A PACS that speaks DIMSE."""

    kind: Literal["dimse"]
    host: str
    port: int = Field(default=104, ge=1, le=65535)
    called_aet: str = "ANY-SCP"
    calling_aet: str = "MEDISTILL"
    method: Literal["get", "move"] = "get"
    move_port: int = Field(default=0, ge=0, le=65535)
    move_address: str = ""
    tls: bool = False
    spool: PathField | None = None


class ImageFolderSection(_SourceSection):
    """PNG or JPEG images in a folder or zip; classes from subfolders or a CSV."""

    kind: Literal["image_folder"]
    path: PathField
    labels: PathField | None = None


class NpzSection(_SourceSection):
    """Arrays in an npz; patients and splits from a CSV."""

    kind: Literal["npz"]
    path: PathField
    labels: PathField | None = None


class PhantomSection(_Section):
    """The synthetic gastric X-ray cohort, written as DICOM into the run folder."""

    kind: Literal["phantom"]
    patients: int = Field(default=PhantomConfig().patients, ge=1, le=99_999)
    size: int = Field(default=PhantomConfig().size, ge=48, le=4096)
    seed: int = Field(default=0, ge=0)
    difficulty: float = Field(default=PhantomConfig().difficulty, ge=0, le=1)


SourceSection = Annotated[
    FolderSection
    | ArchiveSection
    | DicomdirSection
    | DicomWebSection
    | DimseSection
    | NiftiSection
    | ImageFolderSection
    | NpzSection
    | PhantomSection,
    Field(discriminator="kind"),
]


class PrivacySection(_Section):
    """What may be learned of one patient from the release.

    ``delta: auto`` follows from the next power of ten of the number of patients. ``lifetime`` is the epsilon that
    all releases of the cohort may spend together, fixed when its ledger is made; ``ledger`` names the ledger where
    several cohorts hold the same patients. With ``expected_runs`` above 1 a random number of runs is made, so many
    on average, each with settings drawn from the ``candidates``, and the best on validation patients is kept; all
    of it stays within ``epsilon``.
    """

    epsilon: float = Field(ge=EPSILON_RANGE[0], le=EPSILON_RANGE[1])
    delta: Annotated[float | None, BeforeValidator(lambda found: None if found == "auto" else found)] = Field(
        default=None, gt=0, le=LARGEST_DELTA
    )
    lifetime: float | None = Field(default=None, ge=EPSILON_RANGE[0], le=EPSILON_RANGE[1])
    ledger: PathField | None = None
    expected_runs: float = Field(default=1.0, ge=1, le=MOST_RUNS)
    candidates: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    @field_serializer("delta")
    def _auto(self, delta: float | None) -> float | str:
        return "auto" if delta is None else delta


class DistillSection(_Section):
    """What to distil and how.

    The images of every distiller are looked at ``looks`` times as they form; after ``patience`` looks without a
    better validation AUROC it is stopped (``0``: never). ``settings`` holds, per distiller, what differs from its
    defaults.
    """

    method: str = "auto"
    ipc: int = Field(default=10, ge=1)
    size: int = Field(default=64, ge=16, le=1024)
    looks: int = Field(default=LOOKS, ge=1)
    patience: int = Field(default=0, ge=0)
    settings: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        resolve_method(method, _ANY_TASK, 1)
        return method

    @field_validator("settings")
    @classmethod
    def _known_settings(
        cls, settings: Mapping[str, Mapping[str, Any]], info: ValidationInfo
    ) -> Mapping[str, Mapping[str, Any]]:
        return _typed_settings(info.data.get("method"), settings)


_ANY_TASK = Task.single_label(("0", "1"))


def check_settings(
    method: str, settings: Mapping[str, Mapping[str, Any]], *, private: bool = False
) -> dict[str, dict[str, Any]]:
    """Settings of a method's distillers, each value turned into the type of its setting.

    Args:
        method: ``auto`` or names of distillers.
        settings: By distiller.
        private: Whether ``auto`` is that of differential privacy.

    Raises:
        ConfigError: With every unknown distiller or setting and every value that is not legal.
    """
    resolve_method(method, _ANY_TASK, 1)
    try:
        typed = _typed_settings(method, settings)
        _check_parts(method, settings, private=private)
        return typed
    except _SeveralError as error:
        raise ConfigError(" ".join(f"{path}: {message}" for path, message in error.problems)) from None


def _typed_settings(method: str | None, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """As :func:`check_settings`; ``None`` stands for a method that is a problem itself."""
    chosen = resolve_method(method, _ANY_TASK, 1).distillers if method else tuple(DISTILLERS.names())
    # Whether those of private methods fit is seen on the whole configuration.
    names = (*chosen, *PRIVATE_METHODS) if method == "auto" else chosen
    problems: list[_Problem] = []
    typed: dict[str, dict[str, Any]] = {}
    for section, values in settings.items():
        if section in names:
            typed[section] = _typed_distiller(section, values, problems)
        else:
            problems.append((section, f"not part of {'+'.join(chosen)}.{nearest(section, names)}"))
    if problems:
        raise _SeveralError(problems)
    return typed


def _check_parts(method: str, settings: Mapping[str, Any], *, private: bool) -> None:
    """Refuse settings of distillers that ``auto`` does not choose, with or without differential privacy."""
    chosen = resolve_method(method, _ANY_TASK, 1, private=private).distillers
    names = PRIVATE_METHODS if private and method == "auto" else chosen
    problems = [(s, f"not part of {'+'.join(chosen)}.{nearest(s, names)}") for s in settings if s not in names]
    if problems:
        raise _SeveralError(problems)


def _typed_distiller(name: str, values: Mapping[str, Any], problems: list[_Problem]) -> dict[str, Any]:
    factory = DISTILLERS.load(name)
    if not is_dataclass(factory):
        make_distiller(name, values)
        return dict(values)
    known = list(factory.__dataclass_fields__)
    problems += [(f"{name}.{key}", f"unknown.{nearest(key, known)}") for key in values if key not in known]
    kept = {key: value for key, value in values.items() if key in known}
    try:
        made = TypeAdapter(factory).validate_python(kept)
    except ValidationError as error:
        problems += [
            (".".join((name, *map(str, entry["loc"]))), _message(dict(entry))) for entry in error.errors()
        ]
        return kept
    return {key: getattr(made, key) for key in kept}


def _day(found: object) -> object:
    """YAML reads an unquoted day as a date."""
    if isinstance(found, str):
        try:
            found = date.fromisoformat(found)
        except ValueError:
            raise ValueError("expected a day as YYYY-MM-DD") from None
    return found.isoformat() if isinstance(found, date) else found


class ReleaseSection(_Section):
    """When a release may be written, and under which licence.

    ``accept`` lists the audit verdicts that pass the gate; ``force_with_reason`` releases anyway, and the reason
    stands on the card and on the first page of the report. ``sign_with`` names a private key made by ``medistill
    keygen``; ``published`` is the day that stands in ``croissant.json``, as ``"2026-01-31"``.
    """

    accept: frozenset[Verdict] = frozenset({Verdict.PASS})
    force_with_reason: Annotated[str | None, AfterValidator(lambda text: text or None)] = None
    licence: str = ""
    sign_with: PathField | None = None
    published: Annotated[str | None, BeforeValidator(_day)] = None

    @field_serializer("accept")
    def _in_order(self, accept: frozenset[Verdict]) -> list[str]:
        return sorted(verdict.value for verdict in accept)


class RunConfig(_Section):
    """One run: the five verbs in order."""

    output: PathField
    seed: int = Field(default=0, ge=0)
    compute: Compute = Field(default_factory=Compute)
    source: SourceSection
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    privacy: PrivacySection | None = None
    distill: DistillSection = Field(default_factory=DistillSection)
    audit: AuditPolicy = Field(default_factory=AuditPolicy)
    evaluate: EvaluationConfig = Field(default_factory=EvaluationConfig)
    release: ReleaseSection = Field(default_factory=ReleaseSection)

    @field_validator("distill")
    @classmethod
    def _fits_privacy(cls, distill: DistillSection, info: ValidationInfo) -> DistillSection:
        if "privacy" not in info.data:  # a problem itself
            return distill
        private = info.data["privacy"] is not None
        if private and distill.patience:
            raise _SeveralError([("patience", "expected 0 with privacy: no validation patient may be looked at")])
        try:
            _check_parts(distill.method, distill.settings, private=private)
        except _SeveralError as error:
            raise _SeveralError([(f"settings.{path}", message) for path, message in error.problems]) from None
        return distill

    @model_validator(mode="after")
    def _fit_candidates(self) -> Self:
        candidates = self.privacy.candidates if self.privacy else ()
        problems: list[_Problem] = []
        if self.privacy and candidates and not self.privacy.expected_runs > 1:
            problems.append(("privacy.expected_runs", "expected above 1, as repeated runs choose from candidates"))
        for number, settings in enumerate(candidates):
            try:
                _typed_settings(self.distill.method, settings)
                _check_parts(self.distill.method, settings, private=True)
            except _SeveralError as error:
                problems += [(f"privacy.candidates.{number}.{path}", words) for path, words in error.problems]
        if problems:
            raise _SeveralError(problems)
        return self

    @field_validator("evaluate", mode="before")
    @classmethod
    def _one_network(cls, values: object) -> object:
        """One name in place of a list."""
        if isinstance(values, dict) and isinstance(values.get("networks"), str):
            return {**values, "networks": [values["networks"]]}
        return values


def shareable(config: RunConfig) -> str:
    """What of a configuration differs from the defaults and may leave, as YAML: no path, no address, no key.

    Of the source only its kind is said, unless the images are made by a program.
    """
    values = json.loads(config.model_dump_json())
    plain = RunConfig(output=config.output, source=config.source)
    usual = json.loads(plain.model_dump_json())
    told = {name: _changed(values[name], usual[name]) for name in _SHARED if values[name] != usual[name]}
    source = values["source"] if isinstance(config.source, PhantomSection) else {"kind": values["source"]["kind"]}
    return yaml.safe_dump({"source": source, **told}, sort_keys=False, allow_unicode=True).rstrip()


def _changed(values: Any, usual: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(usual, dict):
        return values
    return {name: _changed(value, usual.get(name)) for name, value in values.items() if value != usual.get(name)}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides, and validate.

    Raises:
        ConfigError: If the file cannot be read, or with every problem of its content.
    """
    values = read_yaml(path)
    for override in overrides:
        _override(values, override)
    return parse_config(values, name=path.name)


def read_yaml(path: Path) -> dict[str, Any]:
    """Names and values of a YAML file.

    Raises:
        ConfigError: If the file cannot be read, or holds something else.
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
    return values


def parse_config(values: Mapping[str, Any], *, name: str = "configuration") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: With every problem, one a line.
    """
    problems: list[str] = []
    left: Any = copy.deepcopy(dict(values))
    while True:
        try:
            config = RunConfig.model_validate(left)
            break
        except ValidationError as error:
            entries: list[dict[str, Any]] = [dict(entry) for entry in error.errors()]
        found = [line for entry in entries for line in _lines(entry) if line not in problems]
        problems += found
        if not found or not _set_aside(left, [tuple(entry["loc"]) for entry in entries]):
            break
    if not problems:
        return config
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise ConfigError(f"{count} in {name}:\n" + "\n".join(f"  {problem}" for problem in problems))


def _set_aside(values: dict[str, Any], locations: Sequence[tuple[Any, ...]]) -> bool:
    """Take bad values out of records, so that what is only checked on a whole record is looked at too."""
    taken = False
    for section, *inner in (location for location in locations if location[:1] and location[0] in _RECORDS):
        if inner and isinstance(values.get(section), dict):
            taken |= values[section].pop(inner[0], None) is not None
    return taken


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
    here[last] = parse_value(text, option=f"--set {path}")


def parse_value(text: str, *, option: str) -> Any:
    """The YAML value of a command-line option.

    Raises:
        ConfigError: If it is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: the value is not valid YAML.") from error


def _lines(entry: dict[str, Any]) -> list[str]:
    """Problems behind one entry of pydantic, each with its dotted path."""
    cause = entry.get("ctx", {}).get("error")
    if isinstance(cause, _SeveralError):
        above = ".".join(map(str, entry["loc"]))
        return [f"{above}.{path}".lstrip(".") + f": {message}" for path, message in cause.problems]
    return [_problem(entry)]


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
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [_kind_of(section) for section in get_args(get_args(SourceSection)[0])]
        tag = entry["ctx"].get("tag")
        found = "missing." if tag is None else f"unknown.{nearest(str(tag), kinds)}"
        return f"{path}.kind: {found} Known: {', '.join(kinds)}."
    if parts[0] == "source" and _IDENTIFYING & set(parts):
        entry = {**entry, "input": None}
    return f"{path}: {_message(entry)}"


def _message(entry: dict[str, Any]) -> str:
    message = str(entry["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    found = entry.get("input")
    shown = f" Found {found!r}." if isinstance(found, (int, float, bool)) or _is_word(found) else ""
    return f"{message}.{shown}" if not message.endswith("?") else message


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,40}", value) is not None


def _known_names(location: Sequence[Any]) -> list[str]:
    """Names allowed where an unknown one was found."""
    here: Any = RunConfig
    for part in location[:-1]:
        if part in _fields(here):
            hint = get_type_hints(here)[part]
            here = (
                next((kind for kind in get_args(hint) if kind is not NoneType), hint) if _optional(hint) else hint
            )
        else:
            candidates = [kind for kind in get_args(here) if _kind_of(kind) == part]
            here = candidates[0] if candidates else here
    return _fields(here)


def _optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _fields(record: Any) -> list[str]:
    return list(getattr(record, "model_fields", None) or getattr(record, "__dataclass_fields__", {}))


def _kind_of(section: Any) -> str:
    annotation = section.model_fields["kind"].annotation
    return str(get_args(annotation)[0])
