"""A whole run: ingest, distill, audit, evaluate, release; each stage kept, and run again only when needed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from medistill import __version__
from medistill.audit import Exposed, attributes_of, audit, require_patients, write_audit
from medistill.config import (
    DicomWebSection,
    DimseSection,
    PhantomSection,
    RunConfig,
    check_settings,
    parse_config,
    shareable,
)
from medistill.core.cohort import Cohort, Split
from medistill.core.distilled import DistilledSet
from medistill.core.images import ImageSet
from medistill.core.reports import AuditReport, DiagnosticReport
from medistill.core.task import Task
from medistill.distill import Distillation, Prospect, distill, distill_privately, foresee
from medistill.errors import DataError, OutputError, PrivacyError
from medistill.evaluate import evaluate
from medistill.evaluate.arms import CHOSEN_FROM_REAL
from medistill.ingest import ingest, load_cohort, load_or_create_key
from medistill.ingest.phantom import PhantomConfig, write_phantom
from medistill.ingest.reading import Source
from medistill.ingest.sources import open_source
from medistill.privacy import ledger as ledgers
from medistill.privacy.curator import OpenCurator
from medistill.privacy.ledger import LIFETIME, Ledger
from medistill.progress import Progress
from medistill.release.durable import output_errors, replace_durably
from medistill.release.folder import write_release
from medistill.release.gate import check_gate
from medistill.release.preprocessing import cohort_settings
from medistill.release.signature import SigningKey, load_signing_key
from medistill.release.tensors import load_distilled, save_distilled
from medistill.report.forming import FormingSheet, load_moments
from medistill.report.page import three_lines
from medistill.report.runs import RunRow, run_row
from medistill.seeds import derive_seed

_JUDGED = (Split.TEST, Split.HOLDOUT)
_MARK = "run.yaml"
_TRAINED_ON = "trained_on.sha256"
_MADE_FROM = "preprocessing.json"
_RESULTS = {
    "phantom": "phantom",
    "ingest": "cohort",
    "distill": "distilled",
    "audit": "audit.json",
    "evaluate": "diagnosis.json",
    "release": "release",
}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a run's results are, and what they say.

    Args:
        release: The sealed folder.
        report: Its one-page report.
        lines: What the report says, in three lines.
        ran: Stages that were run now; the others were unchanged.
    """

    release: Path
    report: Path
    lines: tuple[str, str, str]
    ran: tuple[str, ...]


def run(config: RunConfig, *, progress: Progress | None = None, jobs: int | None = None) -> RunResult:
    """Run the five verbs in order; a stage whose inputs and settings did not change is not run again.

    Args:
        config: What to do.
        progress: Shows how far it is.
        jobs: Processes for ingestion; all cores by default.

    Returns:
        Where the release is and what it says.

    Raises:
        MedistillError: With one clear message; finished stages are kept, the interrupted one leaves nothing but
            its checkpoints.
    """
    work = _Run(config=config, progress=progress or Progress(), jobs=jobs)
    work.open()
    work.stage("phantom", work.phantom_inputs(), work.write_phantom)
    work.stage("ingest", work.ingest_inputs(), work.ingest)
    work.stage("distill", work.distill_inputs(), work.distill)
    work.stage("audit", work.audit_inputs(), work.audit)
    work.stage("evaluate", work.evaluate_inputs(), work.evaluate)
    work.stage("release", work.release_inputs(), work.release)
    return work.result()


@dataclass(kw_only=True)
class _Run:
    """State of one run: where everything lies, and the images read so far."""

    config: RunConfig
    progress: Progress
    jobs: int | None
    ran: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    _images: dict[Split, ImageSet] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.config.output

    def open(self) -> None:
        """Take the output folder, or refuse one that holds something else."""
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError("output: expected a folder, found a file. Choose another path.")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / _MARK).exists():
            raise OutputError("output: the folder is not empty and holds no run. Choose a new one or empty it.")
        if self.config.privacy is not None:  # what cannot be private is refused before hours are spent
            foresee_run(self.config, patients=1)
        self._signing_key()  # and so is a key that cannot sign
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(json.loads(self.config.model_dump_json()), sort_keys=False, allow_unicode=True)
        write_text(self.folder / _MARK, resolved)

    # -- stages ------------------------------------------------------------------------------------------------

    def stage(self, name: str, inputs: Mapping[str, Any] | None, action: Callable[[], None]) -> None:
        """Run a stage unless its result is there, finished with the same inputs by this version."""
        if inputs is None:
            return
        text = json.dumps({"version": __version__, **inputs}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.digests[name] = digest
        done = self.folder / "stages" / f"{name}.json"
        there = done.exists() and (self.folder / _RESULTS[name]).exists()
        if there and json.loads(done.read_text(encoding="utf-8"))["inputs"] == digest:
            self.progress.say(f"{name}: unchanged")
            return
        done.unlink(missing_ok=True)
        self.progress.say(f"{name} …")
        wall, cpu = time.perf_counter(), _cpu_seconds()
        action()
        cost = {
            "inputs": digest,
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(_cpu_seconds() - cpu, 2),
            "peak_rss_mb": peak_rss_mb(),
        }
        done.parent.mkdir(exist_ok=True)
        write_text(done, json.dumps(cost, indent=2) + "\n")
        self.ran.append(name)
        self.progress.say(
            f"{name}: done in {cost['seconds']} s ({cost['cpu_seconds']} CPU s, peak {cost['peak_rss_mb']} MB)"
        )

    def phantom_inputs(self) -> Mapping[str, Any] | None:
        source = self.config.source
        return source.model_dump() if isinstance(source, PhantomSection) else None

    def write_phantom(self) -> None:
        source = self.config.source
        assert isinstance(source, PhantomSection)
        out = self.folder / "phantom"
        shutil.rmtree(out, ignore_errors=True)
        config = PhantomConfig(
            patients=source.patients, size=source.size, seed=source.seed, difficulty=source.difficulty
        )
        write_phantom(out, config, progress=self.progress, jobs=self.jobs)

    def _source(self) -> tuple[Source, Path | None]:
        section, volumes = self.config.source, self.config.ingest.volumes
        if isinstance(section, PhantomSection):
            phantom = self.folder / "phantom"
            return open_source("folder", phantom / "dicom", volumes=volumes), phantom / "labels.csv"
        return section.open(volumes), section.labels

    def _content(self) -> str:
        """Digest of what the source holds."""
        section = self.config.source
        if isinstance(section, PhantomSection):
            return self.digests["phantom"]
        if isinstance(section, (DicomWebSection, DimseSection)):
            names = hashlib.sha256()
            for item in self._source()[0].items(_Everything()):
                names.update(f"{item.name}\n".encode())
            return names.hexdigest()
        medium = section.kind == "dicomdir" and section.path.is_file()
        return _listing(section.path.parent if medium else section.path)

    def ingest_inputs(self) -> Mapping[str, Any]:
        _, labels = self._source()
        return {
            "key": hashlib.sha256(b"key id" + self._key()).hexdigest(),
            "kind": self.config.source.kind,
            "source": self._content(),
            "labels": _listing(labels) if labels else "",
            "ingest": asdict(self.config.ingest),
            "seed": self.config.seed,
        }

    def ingest(self) -> None:
        source, labels = self._source()
        staged, cohort, last = (self.folder / name for name in (".cohort-next", "cohort", ".cohort-last"))
        if last.exists() and not cohort.exists():  # an interrupted exchange
            last.replace(cohort)
        for stale in (staged, last):
            shutil.rmtree(stale, ignore_errors=True)
        ingest(
            source,
            staged,
            key=self._key(),
            labels=labels,
            config=self.config.ingest,
            private_notes=self.folder / "quarantine.private.csv",
            progress=self.progress,
            jobs=self.jobs,
        )
        for kept in ledgers.files(cohort / ledgers.NAME):  # what was spent stays spent
            if kept.exists():
                shutil.copy2(kept, staged)
        if cohort.exists():
            cohort.replace(last)
        staged.replace(cohort)
        shutil.rmtree(last, ignore_errors=True)
        self._images.clear()

    def _key(self) -> bytes:
        """The cohort's key; a phantom hides nobody, so its key comes from the seed and the run repeats exactly."""
        if isinstance(self.config.source, PhantomSection):
            return hashlib.sha256(f"phantom/{self.config.seed}".encode()).digest()
        return load_or_create_key(self.folder / "cohort.key")

    def distill_inputs(self) -> Mapping[str, Any]:
        privacy = self.config.privacy
        of_privacy = {"epsilon", "delta"}
        if privacy and privacy.expected_runs > 1:
            of_privacy |= {"expected_runs", "candidates"}
        return {
            "ingest": self.digests["ingest"],
            "distill": self.config.distill.model_dump(),
            "seed": self.config.seed,
            **({"privacy": privacy.model_dump(include=of_privacy)} if privacy else {}),
        }

    def require_parts(self) -> None:
        """Refuse, before hours are spent, a cohort that the later stages could not use."""
        require_patients(**{s.value: self.images(s) for s in (Split.TRAIN, Split.HOLDOUT, Split.VALIDATION)})
        self.images(Split.TEST)
        fewest, ipc = int(self.images(Split.TRAIN).targets.sum(0).min()), self.config.distill.ipc
        needing = [arm for arm in self.config.evaluate.arms if arm in CHOSEN_FROM_REAL]
        if needing and fewest < ipc:
            raise DataError(
                f"The smallest class has {fewest} train images; arms of chosen real images need distill.ipc = "
                f"{ipc}. Ingest more images, lower distill.ipc, or leave them out of evaluate.arms: "
                f"{', '.join(needing)}."
            )

    def distill(self) -> None:
        self.require_parts()
        done = self._distil() if self.config.privacy is None else self._distil_privately()
        save_run_distilled(self.folder, done.distilled, done.snapshots)
        remember_cohort(self.folder, self.cohort())
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _distil(self) -> Distillation:
        section = self.config.distill
        return distill(
            OpenCurator(self.images(Split.TRAIN)),
            method=section.method,
            ipc=section.ipc,
            seed=derive_seed(self.config.seed, "distill"),
            settings=section.settings,
            validation=self.images(Split.VALIDATION),
            folder=self.folder / "checkpoints",
            compute=self.config.compute,
            looks=section.looks,
            patience=section.patience,
            observer=FormingSheet(self.folder / "forming"),
            progress=self.progress,
        )

    def _distil_privately(self) -> Distillation:
        """As configured, once: the same stage run again takes up the sealed answers and spends nothing."""
        privacy, cohort = self.config.privacy, self.cohort()
        assert privacy is not None
        prospect = foresee_run(self.config, patients=len(cohort.split(Split.TRAIN).patients), cohort=cohort)
        self.progress.say(f"distill: {prospect.recipe.method}, epsilon {prospect.budget.epsilon:g}")
        return distill_privately(
            self.images(Split.TRAIN),
            prospect,
            ledger=open_ledger(self.folder / "cohort", path=privacy.ledger, lifetime=privacy.lifetime),
            sealed=self.folder / "sealed" / self.digests["distill"][:12],
            validation=self.images(Split.VALIDATION) if prospect.plan.selects else None,
            folder=self.folder / "checkpoints",
            compute=self.config.compute,
            looks=self.config.distill.looks,
            observer=FormingSheet(self.folder / "forming"),
            progress=self.progress,
        )

    def audit_inputs(self) -> Mapping[str, Any]:
        return {"distill": self.digests["distill"], "audit": asdict(self.config.audit)}

    def audit(self) -> None:
        train, holdout, reference = map(self.images, (Split.TRAIN, Split.HOLDOUT, Split.VALIDATION))
        distilled = self.distilled()
        report = audit(
            distilled,
            train=train,
            holdout=holdout,
            reference=reference,
            attributes=attributes_of(self.cohort()),
            policy=self.config.audit,
            seed=derive_seed(self.config.seed, "audit"),
            folder=self.folder / "checkpoints",
            controls=self.folder / "controls",
            compute=self.config.compute,
            progress=self.progress,
        )
        write_audit(
            self.folder,
            report,
            Exposed.of(distilled),
            statement=distilled.privacy,
            train=train,
            holdout=holdout,
            reference=reference,
            version=__version__,
        )
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def evaluate_inputs(self) -> Mapping[str, Any]:
        return {"distill": self.digests["distill"], "evaluate": asdict(self.config.evaluate)}

    def evaluate(self) -> None:
        cohort = self.cohort()
        report = evaluate(
            self.distilled(),
            train=self.images(Split.TRAIN),
            validation=self.images(Split.VALIDATION),
            tests={split.value: self.images(split) for split in _JUDGED},
            attributes={split.value: cohort.split(split).attributes() for split in _JUDGED},
            config=self.config.evaluate,
            seed=derive_seed(self.config.seed, "evaluate"),
            compute=self.config.compute,
            progress=self.progress,
        )
        write_text(self.folder / "diagnosis.json", json.dumps(report.to_json(), indent=2) + "\n")

    def release_inputs(self) -> Mapping[str, Any]:
        key = self._signing_key()
        return {
            "audit": self.digests["audit"],
            "evaluate": self.digests["evaluate"],
            "release": json.loads(self.config.release.model_dump_json()),
            "signer": key.fingerprint if key else None,
        }

    def release(self) -> None:
        section = self.config.release
        report = load_audit(self.folder)
        earlier = self.folder / "release"
        if earlier.exists():  # it is of other results, whatever the gate says now
            shutil.rmtree(self.folder / "release-superseded", ignore_errors=True)
            earlier.replace(self.folder / "release-superseded")
        check_gate(report, accept=section.accept, forced_reason=section.force_with_reason)
        distilled, staged = self.distilled(), self.folder / ".release-next"
        shutil.rmtree(staged, ignore_errors=True)
        write_release(
            staged,
            distilled=distilled,
            audit=report,
            diagnosis=load_diagnosis(self.folder),
            cohort=cohort_summary(self.cohort()),
            snapshots=load_snapshots(self.folder),
            moments=load_moments(self.folder / "forming", distilled),
            commands=(
                "medistill run run.yaml",
                "# run.yaml, without the source of the images:",
                shareable(self.config),
            ),
            forced_reason=section.force_with_reason,
            licence=section.licence or None,
            signing_key=self._signing_key(),
            published=section.published,
        )
        staged.replace(self.folder / "release")
        shutil.rmtree(self.folder / "release-superseded", ignore_errors=True)

    def _signing_key(self) -> SigningKey | None:
        path = self.config.release.sign_with
        return load_signing_key(path) if path is not None else None

    # -- results -----------------------------------------------------------------------------------------------

    def cohort(self) -> Cohort:
        return load_cohort(self.folder / "cohort")

    def images(self, split: Split) -> ImageSet:
        if split not in self._images:
            self._images[split] = self.cohort().split(split).images(self.config.distill.size)
        return self._images[split]

    def distilled(self) -> DistilledSet:
        return load_distilled(self.folder / "distilled")

    def result(self) -> RunResult:
        release = self.folder / "release"
        return RunResult(
            release=release,
            report=release / "report.html",
            lines=three_lines(self.distilled(), load_audit(self.folder), load_diagnosis(self.folder)),
            ran=tuple(self.ran),
        )


def foresee_run(config: RunConfig, *, patients: int, cohort: Cohort | None = None) -> Prospect:
    """What a configuration's private distillation will ask, and with how much noise; no pixel is read.

    Args:
        config: With a section ``privacy``.
        patients: Patients to distil from; only the next power of ten is used, and only for ``delta: auto``.
        cohort: Gives classes and the kind of images; without it they follow from the configuration, and are taken
            to be two classes where it does not name them.

    Raises:
        PrivacyError: If there is no such section, or the method needs patients' images themselves.
    """
    if config.privacy is None:
        raise PrivacyError("The configuration has no section privacy; expected one with epsilon, for example 3.")
    section = config.distill
    if cohort is None:
        classes = config.ingest.classes or ("0", "1")
        task = (Task.multilabel if config.ingest.labels == "multilabel" else Task.single_label)(classes)
        axes = 3 if config.ingest.volumes == "cubes" else 2
        image_shape = (3 if config.ingest.colour == "rgb" else 1, *[section.size] * axes)
    else:
        task, image_shape = cohort.task, shape_of_images(cohort, section.size)
    return foresee(
        task,
        image_shape,
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        patients=patients,
        method=section.method,
        ipc=section.ipc,
        seed=derive_seed(config.seed, "distill"),
        settings=section.settings,
        expected_runs=config.privacy.expected_runs,
        candidates=[check_settings(section.method, each, private=True) for each in config.privacy.candidates],
    )


def shape_of_images(cohort: Cohort, size: int) -> tuple[int, ...]:
    """Shape of a cohort's images at a side length, without reading one."""
    channels, *sides = cohort.profile["shape"]
    return (channels, *[size] * len(sides))


def open_ledger(cohort: Path, *, path: Path | None = None, lifetime: float | None = None) -> Ledger:
    """The ledger of a cohort, beside its images unless another is named.

    Args:
        cohort: Folder of the cohort.
        path: Another ledger, where several cohorts hold the same patients.
        lifetime: Epsilon of all releases together, if this is the first one.

    Raises:
        PrivacyError: If it was changed, or made for another lifetime budget.
    """
    wanted = None if lifetime is None else replace(LIFETIME, epsilon=lifetime)
    return Ledger(path or cohort / ledgers.NAME, lifetime=wanted)


def save_run_distilled(folder: Path, distilled: DistilledSet, snapshots: Mapping[str, Tensor]) -> None:
    """Put a distilled set and its snapshots into a run folder, replacing an earlier one."""
    staged = folder / ".distilled-next"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        save_distilled(staged, distilled)
        content = save({name: images.contiguous() for name, images in snapshots.items()})
        (staged / "snapshots.safetensors").write_bytes(content)
        shutil.rmtree(folder / "distilled", ignore_errors=True)
        staged.replace(folder / "distilled")
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remember_cohort(folder: Path, cohort: Cohort) -> None:
    """Keep a digest of the train split, which stays inside, and how its images were made, which is published."""
    write_text(folder / _TRAINED_ON, _train_digest(cohort) + "\n")
    settings = cohort_settings(cohort.profile)
    write_text(folder / _MADE_FROM, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_profile(folder: Path) -> Mapping[str, Any] | None:
    """How the images were made that a run folder's set was distilled from; ``None`` where it was not kept."""
    path = folder / _MADE_FROM
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def require_cohort(folder: Path, cohort: Cohort) -> None:
    """Refuse to audit or evaluate a set against another cohort: its members would be taken for strangers.

    Raises:
        DataError: If the set of the run folder was distilled from other patients.
    """
    path = folder / _TRAINED_ON
    if path.exists() and path.read_text(encoding="utf-8").strip() != _train_digest(cohort):
        raise DataError(
            "This set was distilled from another cohort, or from another split of it. Name that cohort."
        )


def _train_digest(cohort: Cohort) -> str:
    uids = sorted(instance.uid for instance in cohort.split(Split.TRAIN).instances)
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()


def load_snapshots(folder: Path) -> Mapping[str, Tensor]:
    """Images after each distiller of the recipe, by distiller; empty where none were kept."""
    path = folder / "distilled" / "snapshots.safetensors"
    return dict(load_file(path)) if path.exists() else {}


def load_audit(folder: Path) -> AuditReport | None:
    """Audit of a run folder, or ``None`` where none was made."""
    path = folder / "audit.json"
    return AuditReport.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def load_diagnosis(folder: Path) -> DiagnosticReport | None:
    """Evaluation of a run folder, or ``None`` where none was made."""
    path = folder / "diagnosis.json"
    return DiagnosticReport.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def load_row(folder: Path) -> RunRow:
    """A run folder as a row of a comparison.

    Raises:
        DataError: If it holds no distilled set.
    """
    if not (folder / "distilled").is_dir():
        raise DataError(
            f"{folder.name} holds no distilled set; expected a run folder made by `medistill distill`."
        )
    mark = folder / _TRAINED_ON
    return run_row(
        folder.name,
        mark.read_text(encoding="utf-8").strip() if mark.exists() else "",
        load_distilled(folder / "distilled"),
        load_audit(folder),
        load_diagnosis(folder),
    )


def demo_config(out: Path, *, patients: int = 400) -> RunConfig:
    """The run behind ``medistill demo``; ``configs/phantom.yaml`` holds the same."""
    return parse_config(
        {
            "output": str(out),
            "source": {"kind": "phantom", "patients": patients, "size": 96, "difficulty": 0.3},
            "ingest": {"size": 64, "ocr": "never", "classes": ["no_gastritis", "gastritis", "outside"]},
            "distill": {
                "ipc": 5,
                "size": 32,
                "settings": {"distribution_matching": {"iterations": 500}, "kernel_ridge": {"iterations": 150}},
            },
            "evaluate": {"arms": ["real", "random", "distilled", "distilled_hard"], "seeds": 2, "real_epochs": 15},
            "release": {"accept": ["PASS", "NOT_ESTIMABLE"], "licence": "CC0-1.0"},
        },
        name="demo",
    )


def cohort_summary(cohort: Cohort) -> Mapping[str, Any]:
    """Counts of a cohort that may stand in a release: per split, quarantine code and modality."""
    return {
        "modality": dict(Counter(instance.modality for instance in cohort.instances)),
        "splits": cohort.counts(),
        "quarantine": cohort.profile["counts"]["quarantine"],
        "profile": dict(cohort.profile),
    }


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically.

    Raises:
        OutputError: If the disk is full or the folder cannot be written.
    """
    with output_errors(path):
        replace_durably(path, text.encode())


class _Everything:
    """Holds every name: nothing is to be retrieved."""

    def __contains__(self, name: object) -> bool:
        return True


def _listing(path: Path) -> str:
    """Digest of what a source holds: names, sizes and times, without reading the files."""
    digest = hashlib.sha256()
    files = sorted(Path(root) / name for root, _, names in os.walk(path) for name in names)
    for file in files or [path]:
        if file.exists():
            status = file.stat()
            digest.update(os.fsencode(file.relative_to(path)))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_rss_mb() -> int:
    """Largest resident memory of this process or of any one finished child so far, in MB."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))
