"""What a comparison compares: methods, data, images per class and seeds, as cells."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medistill import __version__
from medistill.core.task import Task
from medistill.distill import make_recipe
from medistill.distill.schedule import CANDIDATES
from medistill.errors import ConfigError
from medistill.ingest import load_cohort
from medistill.registry import NETWORKS, nearest
from medistill.studies.cell import COMMON_SCHEDULE, RANDOM, REAL
from medistill.studies.records import read_record

_TWO_CLASSES = Task.single_label(("0", "1"))
#: CPU seconds that training takes for every pixel passed through the ConvNet of width 32, measured on one core.
_SECONDS_A_PIXEL = 1.1e-6
_CHOOSING_STUDENTS = 2


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One method of a comparison.

    Args:
        method: ``auto``, a registered name, several joined by ``+``, or a baseline: ``random`` (as many random
            real images) or ``real`` (all of them).
        label: What the table calls it; the method where not given.
        settings: Per distiller, settings that differ from the defaults.
        share: Per distiller of a chain, its weight when the budget is divided.
        own_iterations: Whether it keeps its own iterations whatever the budget, for a method that more of them
            would harm; the table shows what it took.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    method: str
    label: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    own_iterations: bool = False

    @property
    def name(self) -> str:
        """Label of the table."""
        return self.label or self.method

    @property
    def baseline(self) -> bool:
        """Whether nothing is distilled."""
        return self.method in (RANDOM, REAL)

    def sections(self) -> Mapping[str, Mapping[str, Any]]:
        """Complete settings of every distiller of the method, in order.

        Raises:
            ConfigError: If a name or setting is unknown, or a share is not positive.
        """
        if self.baseline:
            if self.settings or self.share:
                raise ConfigError(f"methods.{self.name}: a baseline has no settings.")
            return {}
        steps = make_recipe(_TWO_CLASSES, method=self.method, settings=self.settings).steps
        names = [step.distiller for step in steps]
        for name, weight in self.share.items():
            if name not in names or weight <= 0:
                raise ConfigError(
                    f"methods.{self.name}.share.{name}: expected a weight above 0 of one of {', '.join(names)}."
                )
        return {step.distiller: step.settings for step in steps}


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What is compared, and how.

    Args:
        methods: Contestants and baselines.
        ipc: Images per class.
        seeds: Public seeds; each distils and trains anew.
        networks: Registered networks of the students.
        students: Networks trained for each cell, schedule and kind of label.
        budget_seconds: CPU seconds that every distillation may take; ``None`` leaves the iterations as they are.
        real_epochs: Epochs of the baseline of all real images.
        draws: Bootstrap draws.
        show_real: Show images of methods that start from real images; for data that may be shown only.

    Raises:
        ConfigError: With every problem.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    methods: tuple[Contestant, ...]
    ipc: tuple[int, ...] = (1, 10)
    seeds: tuple[int, ...] = (0,)
    networks: tuple[str, ...] = ("convnet",)
    students: int = 3
    budget_seconds: float | None = None
    real_epochs: int = 8
    draws: int = 1000
    show_real: bool = False

    def __post_init__(self) -> None:
        problems = []
        names = [contestant.name for contestant in self.methods]
        if not names or len(set(names)) < len(names):
            problems.append("methods: expected at least one, each with a label of its own.")
        problems += [
            f"networks: unknown network {name!r}.{nearest(name, NETWORKS.names())}"
            for name in self.networks
            if name not in NETWORKS.names()
        ]
        for what in ("ipc", "seeds", "networks"):
            if not getattr(self, what) or len(set(getattr(self, what))) < len(getattr(self, what)):
                problems.append(f"{what}: expected at least one value, and each once.")
        if min((*self.ipc, self.students, self.real_epochs)) < 1 or self.draws < 100:
            problems.append("Expected ipc, students and real_epochs >= 1 and draws >= 100.")
        if self.budget_seconds is not None and self.budget_seconds <= 0:
            problems.append("budget_seconds: expected more than 0.")
        for contestant in self.methods:
            try:
                contestant.sections()
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ComparisonConfig:
        """Plain values of a YAML file as a configuration; a method may be its name alone.

        Raises:
            ConfigError: With every problem.
        """
        methods = values.get("methods")
        if isinstance(methods, list):
            methods = [{"method": entry} if isinstance(entry, str) else entry for entry in methods]
        return read_record(cls, {**values, "methods": methods})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One distillation with its students.

    Args:
        data: Name of the data.
        cohort: Folder of the cohort.
        size: Side length in pixels.
        contestant: What distils.
        ipc: Images per class; 0 for all real images.
        seed: Public seed.
        digest: What the cohort holds, as a hash.
    """

    data: str
    cohort: Path
    size: int
    contestant: Contestant
    ipc: int
    seed: int
    digest: str

    def request(self, config: ComparisonConfig) -> dict[str, Any]:
        """Everything the cell's process needs, except what iterations cost."""
        kept = self.contestant.baseline or self.contestant.own_iterations
        budget = None if kept else config.budget_seconds
        return {
            "kind": "cell",
            "version": __version__,
            "data": self.digest,
            "size": self.size,
            "method": self.contestant.method,
            "settings": {name: dict(values) for name, values in self.contestant.settings.items()},
            "share": dict(self.contestant.share),
            "ipc": self.ipc,
            "seed": self.seed,
            "networks": list(config.networks),
            "students": config.students,
            "draws": config.draws,
            "budget_seconds": budget,
            "real_epochs": config.real_epochs,
        }

    def name(self, config: ComparisonConfig) -> str:
        """Name of the cell's files."""
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.data}-{self.contestant.name}".lower()).strip("-")
        return f"{slug}-{self.ipc}-{self.seed}-{_digest(self.request(config))}"

    def probes(self, config: ComparisonConfig) -> dict[str, dict[str, Any]]:
        """What must be timed first, by distiller: those of the method that count iterations."""
        if config.budget_seconds is None or self.contestant.own_iterations:
            return {}
        return {
            name: {
                "kind": "probe",
                "version": __version__,
                "data": self.digest,
                "size": self.size,
                "method": name,
                "settings": {key: value for key, value in settings.items() if key != "iterations"},
                "ipc": self.ipc,
                "budget_seconds": config.budget_seconds,
            }
            for name, settings in self.contestant.sections().items()
            if "iterations" in settings
        }


def plan_cells(config: ComparisonConfig, data: Mapping[str, tuple[Path, int]]) -> tuple[Cell, ...]:
    """Every cell of a comparison, in the order of the table.

    Args:
        config: What is compared.
        data: Name to the folder of a cohort and the side length of its images.
    """
    cells = []
    for name, (cohort, size) in data.items():
        digest = content_digest(cohort)
        for contestant in config.methods:
            for ipc in (0,) if contestant.method == REAL else config.ipc:
                cells += [
                    Cell(
                        data=name,
                        cohort=cohort,
                        size=size,
                        contestant=contestant,
                        ipc=ipc,
                        seed=seed,
                        digest=digest,
                    )
                    for seed in config.seeds
                ]
    return tuple(cells)


def estimate_seconds(cell: Cell, config: ComparisonConfig) -> float:
    """CPU seconds that a cell should take; without a budget the distillation itself is not counted."""
    cohort = load_cohort(cell.cohort)
    pixels = float(cell.size ** (len(cohort.profile["shape"]) - 1))
    if cell.contestant.method == REAL:
        passes = len(cohort.split("train")) * config.real_epochs * config.students
        return passes * pixels * _SECONDS_A_PIXEL * len(config.networks)
    images = cell.ipc * cohort.task.n_classes
    choosing = _CHOOSING_STUDENTS * sum(schedule.epochs for schedule in CANDIDATES)
    students = 4 * config.students * COMMON_SCHEDULE.epochs
    trained = images * (choosing + students) * pixels * _SECONDS_A_PIXEL * len(config.networks)
    return trained + (0.0 if cell.contestant.baseline else config.budget_seconds or 0.0)


def probe_name(probe: Mapping[str, Any]) -> str:
    """Name of a probe's file."""
    return f"{probe['method']}-{probe['ipc']}-{_digest(probe)}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def content_digest(cohort: Path) -> str:
    """Hash of what a cohort holds: its profile and its manifest, which carries a hash of every image."""
    load_cohort(cohort)
    digest = hashlib.sha256()
    for name in ("profile.json", "manifest.csv"):
        digest.update((cohort / name).read_bytes())
    return digest.hexdigest()
