"""medistill: medical images that may not be shared, turned into a small synthetic release that trains a model.

Example, on a synthetic cohort and without any patient (about three minutes on two cores)::

    from pathlib import Path

    import medistill

    config = medistill.load_config(Path("configs/phantom.yaml"), ["output=runs/first"])
    result = medistill.run(config, progress=medistill.TerminalProgress())
    for line in result.lines:
        print(line)
    medistill.train_on_release(result.release, Path("runs/first-model"))

The map: five verbs, each the function of the package that carries its name::

    from medistill.ingest import ingest             images of a hospital   -> Cohort
    from medistill.distill import distill           the train patients     -> DistilledSet
    from medistill.audit import audit               attacks with controls  -> AuditReport
    from medistill.evaluate import evaluate         real against distilled -> DiagnosticReport
    from medistill.release import write_release     all of it              -> a sealed folder

The receiver needs :func:`verify_release`, :func:`load_release` and :func:`train_on_release`. Here stand the nouns
that the verbs hand on, and what is used on either side of them. Names are imported when they are used first, so
``import medistill`` costs nothing. A :class:`PrivacyStatement` is a guarantee; an :class:`AuditReport` is a
measurement; neither stands for the other.
"""

from importlib import import_module

__version__ = "0.3.0"

# The types of these names stand in __init__.pyi: an import here, even one for type checkers only, would let every
# module that reads __version__ depend on all floors above it.
_HOMES = {
    "AuditReport": "medistill.core.reports",
    "Budget": "medistill.core.guarantee",
    "Cohort": "medistill.core.cohort",
    "ConfigError": "medistill.errors",
    "DiagnosticReport": "medistill.core.reports",
    "DistilledSet": "medistill.core.distilled",
    "Estimate": "medistill.core.reports",
    "ImageSet": "medistill.core.images",
    "Ledger": "medistill.privacy",
    "MedistillError": "medistill.errors",
    "OpenCurator": "medistill.privacy",
    "PhantomConfig": "medistill.ingest.phantom",
    "PrivacyStatement": "medistill.core.guarantee",
    "PrivateCurator": "medistill.privacy",
    "Progress": "medistill.progress",
    "Recipe": "medistill.core.distilled",
    "Schedule": "medistill.core.distilled",
    "Split": "medistill.core.cohort",
    "Task": "medistill.core.task",
    "TerminalProgress": "medistill.progress",
    "Verdict": "medistill.core.reports",
    "cohort_summary": "medistill.workflow",
    "contact_sheet": "medistill.report.contact_sheet",
    "load_cohort": "medistill.ingest",
    "load_config": "medistill.config",
    "load_model": "medistill.diagnose",
    "load_release": "medistill.release",
    "predict_files": "medistill.diagnose",
    "prepare_cpu": "medistill.cpu",
    "run": "medistill.workflow",
    "train_on_release": "medistill.diagnose",
    "verify_release": "medistill.release",
    "write_phantom": "medistill.ingest.phantom",
}

__all__ = [
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


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for first (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'medistill' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, for completion at a prompt."""
    return sorted({*globals(), *__all__})
