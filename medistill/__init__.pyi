from medistill.config import load_config as load_config
from medistill.core.cohort import Cohort as Cohort
from medistill.core.cohort import Split as Split
from medistill.core.distilled import DistilledSet as DistilledSet
from medistill.core.distilled import Recipe as Recipe
from medistill.core.distilled import Schedule as Schedule
from medistill.core.guarantee import Budget as Budget
from medistill.core.guarantee import PrivacyStatement as PrivacyStatement
from medistill.core.images import ImageSet as ImageSet
from medistill.core.reports import AuditReport as AuditReport
from medistill.core.reports import DiagnosticReport as DiagnosticReport
from medistill.core.reports import Estimate as Estimate
from medistill.core.reports import Verdict as Verdict
from medistill.core.task import Task as Task
from medistill.cpu import prepare_cpu as prepare_cpu
from medistill.diagnose import load_model as load_model
from medistill.diagnose import predict_files as predict_files
from medistill.diagnose import train_on_release as train_on_release
from medistill.errors import ConfigError as ConfigError
from medistill.errors import MedistillError as MedistillError
from medistill.ingest import load_cohort as load_cohort
from medistill.ingest.phantom import PhantomConfig as PhantomConfig
from medistill.ingest.phantom import write_phantom as write_phantom
from medistill.privacy import Ledger as Ledger
from medistill.privacy import OpenCurator as OpenCurator
from medistill.privacy import PrivateCurator as PrivateCurator
from medistill.progress import Progress as Progress
from medistill.progress import TerminalProgress as TerminalProgress
from medistill.release import load_release as load_release
from medistill.release import verify_release as verify_release
from medistill.report.contact_sheet import contact_sheet as contact_sheet
from medistill.workflow import cohort_summary as cohort_summary
from medistill.workflow import run as run

__version__: str
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
