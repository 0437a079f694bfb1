"""From a source to a cohort: read, join labels, find contradictions, divide by patient, write."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import medistill
from medistill.core.cohort import Cohort
from medistill.core.task import Task, TaskKind
from medistill.errors import ConfigError, OutputError, SourceError
from medistill.ingest.burned_in import OCR_MEMORY_MB, OCR_SECONDS, Screen, TextPolicy
from medistill.ingest.cache import Accepted, publish, working_folder, write_cohort
from medistill.ingest.geometry import Fit
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.intensity import Policy
from medistill.ingest.isolation import Limits, Outcome, isolated
from medistill.ingest.journal import PASSING, Journal
from medistill.ingest.labels import LabelRule, LabelTable, load_labels, make_task
from medistill.ingest.quarantine import REASON_CODES, Rejected
from medistill.ingest.reading import Content, Deferred, Found, Reader, Source, Work
from medistill.ingest.resolve import Resolver
from medistill.ingest.sources import open_source
from medistill.ingest.splits import SplitFractions
from medistill.parallel import check_engine
from medistill.progress import Progress

_LIBRARIES = ("numpy", "pydicom", "imagecodecs", "pillow")
_CHOICES: dict[str, tuple[str, ...]] = {
    "fit": tuple(Fit),
    "intensity": tuple(Policy),
    "burned_in": ("reject", "mask", "allow"),
    "heads": ("reject", "defaced"),
    "missing_patient": ("reject", "own"),
    "volumes": ("slices", "cubes"),
    "ocr": ("auto", "require", "never"),
    "colour": ("auto", "grey", "rgb"),
    "labels": ("single", "multilabel"),
}
_OCR: dict[str, bool | Literal["auto"]] = {"auto": "auto", "require": True, "never": False}


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How images enter a cohort.

    Args:
        size: Side length of the stored squares or cubes, 8 to 4096.
        volumes: ``slices`` takes every slice and frame as an image of its own, ``cubes`` every series (or NIfTI
            file) as one volume.
        fit: ``pad`` (aspect kept, black borders), ``crop`` (centre) or ``stretch``.
        intensity: ``voi`` (the header's window), ``percentile`` (of each image) or ``none`` (full range).
        colour: ``grey`` turns colour images into their luminance, ``rgb`` stores three channels of every image (of
            a grey one three times the same); ``auto`` takes ``rgb`` for an ``.npz`` file of colour images and
            ``grey`` for everything else, and the cohort says which it was.
        burned_in: What to do about text in pixels, declared by the header or found by looking: ``reject`` the
            image, ``mask`` the text, or ``allow`` it and do not look.
        ocr: ``auto`` reads suspected text where the extra ``ocr`` is installed, ``require`` refuses to work
            without it, ``never`` goes by shape alone.
        heads: ``reject`` CT and MR images of heads, from which a face could be restored, or take them because the
            source is ``defaced``.
        missing_patient: ``reject`` images without a patient, or treat each study (without a study, each folder;
            without a folder, each image) as its ``own`` patient; then the privacy unit is only as good as that.
        accept_partial: Go on without images that a server promised and did not send; otherwise ingestion stops and
            can be run again.
        limits: What reading one file may cost.
        fractions: Share of patients per split.
        seed: Another seed divides the patients differently.
        label_column: Column of the label table with the class.
        labels: ``single`` takes a label for one class; ``multilabel`` for any subset of the classes, joined by
            ``;`` or ``|``, for example ``effusion;mass``.
        no_class: With ``multilabel``, the label of an image that shows none of the classes, for example ``none``;
            empty text takes empty cells for it. Where not given, an image without a class has no label.
        classes: Order of the classes, ``(negative, positive)`` for two; sorted where not given.

    Raises:
        ConfigError: Listing every field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    size: int = 256
    volumes: str = "slices"
    fit: str = "pad"
    intensity: str = "voi"
    colour: str = "auto"
    burned_in: str = "reject"
    ocr: str = "auto"
    heads: str = "reject"
    missing_patient: str = "reject"
    accept_partial: bool = False
    limits: Limits = field(default_factory=Limits)
    fractions: SplitFractions = field(default_factory=SplitFractions)
    seed: int = 0
    label_column: str = "label"
    labels: str = "single"
    no_class: str | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"expected {name} to be one of {', '.join(legal)}, got {getattr(self, name)!r}"
            for name, legal in _CHOICES.items()
            if getattr(self, name) not in legal
        ]
        if not 8 <= self.size <= 4096:
            problems.append(f"expected size from 8 to 4096, got {self.size}")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) != len(self.classes)):
            problems.append("expected classes to be at least 2 different names")
        if self.no_class is not None and self.labels == "single":
            problems.append("expected no_class only with labels multilabel")
        if self.colour == "rgb" and self.volumes == "cubes":
            problems.append("expected colour grey for volumes cubes")
        if problems:
            raise ConfigError("Ingestion: " + "; ".join(problems) + ".")

    @property
    def label_rule(self) -> LabelRule:
        """How a label is read."""
        return LabelRule(multilabel=self.labels == "multilabel", no_class=self.no_class)


def ingest(
    source: Source | Path | str,
    out: Path,
    *,
    key: bytes,
    labels: Path | None = None,
    config: IngestConfig | None = None,
    progress: Progress | None = None,
    jobs: int | None = None,
    engine: str = "local",
    private_notes: Path | None = None,
) -> Cohort:
    """Turn a source into a de-identified cohort on disk.

    Identifiers are replaced under the key while a file is read, in a child process that may crash without harm.
    A file that cannot be used is quarantined with a reason code; the cohort accounts for every file by its place
    in the scan. Whatever stops an ingestion, running it again with the same settings goes on where it was.

    Args:
        source: A source, or the path of a folder, ``.zip`` or ``.npz`` file.
        out: Folder of the cohort; new or empty. It appears when the cohort is complete.
        key: 32 secret bytes, see :func:`medistill.ingest.load_or_create_key`.
        labels: CSV with a heading: one of ``SOPInstanceUID``, ``file``, ``index`` or ``PatientID``, a label
            column, and optionally ``split`` and ``patient_id``. Images given for ``test`` stay there; all
            other patients are drawn for the remaining splits.
        config: Settings; defaults where not given.
        progress: Where to show progress.
        jobs: Processes; all cores where not given.
        engine: ``local``, or ``ray`` for a cluster whose workers see the same files.
        private_notes: CSV that names the original path of each quarantined file, for the hospital only: readable
            by its owner, outside the cohort. No path is written anywhere else.

    Returns:
        The cohort, its pixels still on disk.

    Raises:
        ConfigError: If a setting cannot work.
        SourceError: If nothing usable is found, a server did not send everything, or there are too few patients to
            divide.
        LabelError: If the label table does not fit; lists every problem by line.
        OutputError: If ``out`` is not empty or cannot be written.
    """
    config, progress = config or IngestConfig(), progress or Progress()
    _check_notes(private_notes, Path(out))
    if isinstance(source, (str, Path)):
        source = open_source("auto", source, volumes=config.volumes)
    if engine != "local" and getattr(source, "local_only", False):
        raise ConfigError("This source keeps what it retrieves on this machine. Use engine 'local'.")
    check_engine(engine)
    if config.colour == "auto":
        config = replace(config, colour="rgb" if getattr(source, "in_colour", False) else "grey")
    pseudonymiser = Pseudonymiser(key)
    table = _load_table(source, labels, config, pseudonymiser)
    reader = _reader(source, config, pseudonymiser)
    with working_folder(Path(out)) as partial:
        sides, channels = 2 if config.volumes == "slices" else 3, 3 if config.colour == "rgb" else 1
        journal = Journal(partial, fingerprint=_fingerprint(reader), shape=(channels, *[config.size] * sides))
        try:
            scan = _Scan(
                source=source,
                journal=journal,
                pseudonymiser=pseudonymiser,
                keep_names=private_notes is not None,
                table=table,
            )
            scan.run(reader, config.limits, progress, jobs=jobs, engine=engine)
            scan.forget_vanished()
            resolver = Resolver(
                journal=journal, table=table, missing_patient=config.missing_patient, rule=config.label_rule
            )
            resolver.decide()
            _write_notes(private_notes, resolver)
            _check_usable(resolver, len(source), config)
            warning = table.close() if table else ""
            task = make_task(resolver.labels(), config.classes, multilabel=config.labels == "multilabel")
            resolver.divide(config.fractions, pseudonymiser, config.seed)
            _write_notes(private_notes, resolver)
            profile = _profile(source, config, task, resolver)
            _write(partial / "cohort", resolver, journal, profile)
            cohort = publish(partial, Path(out))
        finally:
            journal.close()
    _summarise(profile["counts"], task, config, warning, progress)
    return cohort


@dataclass(kw_only=True)
class _Scan:
    """One pass over a source into the journal.

    Args:
        source: What to read.
        journal: Where it goes.
        pseudonymiser: Replaces names of items.
        keep_names: Whether the names of items are kept in the working folder, for the private notes.
        table: Labels; text is not searched by OCR in images that have none.
    """

    source: Source
    journal: Journal
    pseudonymiser: Pseudonymiser
    keep_names: bool
    table: LabelTable | None
    deferred: int = 0
    _open: dict[int, _Entry] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """Whether an earlier run has read the item of this name."""
        return self.journal.digest(self._token(str(name))) is not None

    def run(self, reader: Reader, limits: Limits, progress: Progress, *, jobs: int | None, engine: str) -> None:
        """Read what is not known yet: first all items, then by OCR those where text was suspected.

        Only the second pass needs the memory of OCR models.
        """
        if self.journal.known:
            progress.say(f"Going on with an earlier run, in which {self.journal.known} files were read.")
        first = isolated(replace(reader, deferring=True), self._works(), jobs=jobs, limits=limits, engine=engine)
        for _ in progress.track(filter(self._record, first), "reading images", total=len(self.source)):
            pass
        if not self.deferred:
            return
        roomy = replace(
            limits,
            memory_mb=max(limits.memory_mb, OCR_MEMORY_MB),
            seconds=max(limits.seconds, OCR_SECONDS),
        )
        second = isolated(reader, self._works(), jobs=jobs, limits=roomy, engine=engine)
        for _ in progress.track(filter(self._record, second), "looking for text", total=self.deferred):
            pass

    def forget_vanished(self) -> None:
        """Drop what an earlier run has read and the source no longer has."""
        self.journal.drop_vanished()

    def _token(self, name: str) -> str:
        return self.pseudonymiser.token("item", name)

    def _works(self) -> Iterator[Work]:
        """Every item, those of an earlier run with the hash they had."""
        for item in self.source.items(self):
            token = self._token(item.name)
            home = self.journal.home(token)
            busy = any(entry.token == token for entry in self._open.values())
            if busy or home not in (None, item.ordinal):  # an archive with two members of one name
                token = self._token(f"{item.name} {item.ordinal}")
                home = self.journal.home(token)
            if home == item.ordinal:
                continue
            self._open[item.ordinal] = _Entry(token=token)
            if self.keep_names:
                self.journal.name(token, item.name)
            yield Work(item=item, expected=self.journal.digest(token) or b"")

    def _record(self, outcome: Outcome[Work, Found]) -> bool:
        """Write down what happened; returns whether it was the end of an item."""
        item, found = outcome.item.item, outcome.result
        entry = self._open[item.ordinal]
        if outcome.again:
            self.journal.forget(entry.token)
            self._open[item.ordinal] = _Entry(token=entry.token)
        elif isinstance(found, Content):
            entry.digest = found.digest
            entry.unchanged = bool(found.digest) and found.digest == outcome.item.expected
        elif isinstance(found, Deferred) and self._has_label(found):
            entry.deferred = True
            self.journal.forget(entry.token)
        elif isinstance(found, Deferred):  # another table may name it: read again with that one
            self._write(entry, Rejected(ordinal=item.ordinal, code="NO_LABEL"))
            entry.passing = True
        elif found is not None or outcome.failure:
            self._write(entry, found or Rejected(ordinal=item.ordinal, code=outcome.failure))
        elif not entry.written and item.payload is None:
            entry.unchanged = True
        if not outcome.ended:
            return False
        del self._open[item.ordinal]
        if entry.deferred:
            self.deferred += 1
        elif entry.unchanged and not entry.written:
            self.journal.keep(entry.token, item.ordinal)
        else:
            if not entry.written:  # a file without a single image
                self._write(entry, Rejected(ordinal=item.ordinal, code="NO_PIXELS"))
            self.journal.end(entry.token, item.ordinal, entry.digest, passing=entry.passing)
        return True

    def _has_label(self, found: Deferred) -> bool:
        return self.table is None or not self.table.has_labels or self.table.names(found.keys)

    def _write(self, entry: _Entry, found: Found) -> None:
        if not entry.written:
            self.journal.forget(entry.token)
        entry.written = True
        if isinstance(found, Rejected):
            entry.passing |= found.code in PASSING
            self.journal.reject(entry.token, found)
        elif isinstance(found, tuple):
            self.journal.add(entry.token, *found)


@dataclass(kw_only=True)
class _Entry:
    """An item that is being read."""

    token: str
    digest: bytes = b""
    unchanged: bool = False
    deferred: bool = False
    written: bool = False
    passing: bool = False


def _load_table(
    source: Source, labels: Path | None, config: IngestConfig, pseudonymiser: Pseudonymiser
) -> LabelTable | None:
    if labels is None:
        if not source.labelled:
            raise SourceError("This source has no labels of its own. Give a label table (CSV).")
        _check_joint(source, config)
        return None
    table = load_labels(
        Path(labels),
        kinds=source.keys,
        label_column=config.label_column,
        labels_required=not source.labelled,
        pseudonymiser=pseudonymiser,
        rule=config.label_rule,
    )
    if not table.has_labels:
        _check_joint(source, config)
    return table


def _check_joint(source: Source, config: IngestConfig) -> None:
    if getattr(source, "joint_labels", False) and config.labels == "single":
        raise SourceError(
            "The source says of each of several classes whether it holds. Set labels to multilabel, or give a "
            "label table with one class for each image."
        )


def _reader(source: Source, config: IngestConfig, pseudonymiser: Pseudonymiser) -> Reader:
    return Reader(
        decode=source.decode,
        keys=source.keys,
        pseudonymiser=pseudonymiser,
        size=config.size,
        fit=Fit(config.fit),
        policy=Policy(config.intensity),
        colour=config.colour == "rgb",
        screen=Screen(policy=TextPolicy(config.burned_in), use_ocr=_OCR[config.ocr]),
        defaced=config.heads == "defaced",
    )


def _fingerprint(reader: Reader) -> str:
    """What the reading of a file depends on besides the file."""
    names = ("keys", "size", "fit", "policy", "colour", "screen", "defaced")
    decode = getattr(reader.decode, "func", reader.decode)
    settings = {
        "key": reader.pseudonymiser.token("key", "fingerprint"),
        "decode": f"{decode.__module__}.{decode.__qualname__} {getattr(reader.decode, 'keywords', '')}",
        "ocr": reader.screen.reads,
        "reader": [repr(getattr(reader, name)) for name in names],
        "versions": _versions(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"medistill": medistill.__version__, **{name: version(name) for name in _LIBRARIES}}


def _check_usable(resolver: Resolver, total: int, config: IngestConfig) -> None:
    """Refuse to go on without images, or without some that a server promised."""
    codes = resolver.codes()
    if (missing := codes.get("NET_PARTIAL", 0)) and not config.accept_partial:
        raise SourceError(
            f"NET_PARTIAL: {missing} of {total} promised images did not arrive. What arrived is kept: run the "
            "same command again to fetch the rest, or set accept_partial to go on without them."
        )
    if resolver.usable():
        return
    remedy = ""
    if "ID_MISSING" in codes:
        remedy = " Give a label table with a patient_id column, or set missing_patient to 'own'."
    elif "NO_LABEL" in codes:
        remedy = " Check that the label table belongs to this source and that its key column fits."
    elif "HEAD_VOLUME" in codes:
        remedy = " If the images are defaced, set heads to 'defaced'."
    raise SourceError(f"None of {total} files can be used: {_codes_text(codes)}.{remedy}")


def _write(folder: Path, resolver: Resolver, journal: Journal, profile: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)

    def outcomes() -> Iterator[tuple[Accepted, NDArray[np.uint16]] | Rejected]:
        for outcome, place in resolver.outcomes():
            yield outcome if isinstance(outcome, Rejected) else (outcome, journal.pixels(place))

    write_cohort(folder, outcomes(), profile)


def _profile(source: Source, config: IngestConfig, task: Task, resolver: Resolver) -> dict[str, Any]:
    return {
        "task": task.to_json(),
        "source": type(source).__name__,
        "config": asdict(config),
        "counts": {"files": len(source), **resolver.counts(), "quarantine": resolver.codes()},
        "versions": _versions(),
    }


def _summarise(
    counts: Mapping[str, Any], task: Task, config: IngestConfig, warning: str, progress: Progress
) -> None:
    if warning:
        progress.say(f"Warning: {warning}.")
    quarantine = counts["quarantine"]
    progress.say(
        f"{counts['images']} images of {counts['patients']} patients; {sum(quarantine.values())} images and files "
        f"of {counts['files']} files in quarantine."
    )
    if task.kind is TaskKind.BINARY and not config.classes:
        progress.say(
            f"Positive class: {task.class_names[1]!r}, the second in alphabetical order. "
            "If that is wrong, give the classes as NEGATIVE,POSITIVE."
        )
    for code, count in quarantine.items():
        progress.say(f"  {count:6d} {code:18s} {REASON_CODES[code]}")


def _codes_text(codes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in codes.items())


def _check_notes(notes: Path | None, out: Path) -> None:
    if notes is not None and Path(notes).resolve().is_relative_to(out.resolve()):
        raise ConfigError("The private notes must lie outside the cohort: they name original files.")
    if notes is not None and not Path(notes).absolute().parent.is_dir():
        raise OutputError("The folder of the private notes does not exist. Name a file in a folder that does.")


def _write_notes(path: Path | None, resolver: Resolver) -> None:
    """Original path of every quarantined file, readable by the owner only."""
    if path is None:
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.chmod(path, 0o600)
            writer = csv.writer(file)
            writer.writerow(("ordinal", "frame", "code", "file"))
            writer.writerows(resolver.rejected_names())
    except OSError as error:
        raise OutputError("The private notes cannot be written. Name a file in a writable folder.") from error
