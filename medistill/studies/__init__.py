"""Studies over many distillations: methods side by side, and learning from distilled memory."""

from medistill.studies.comparison import compare
from medistill.studies.contest import ComparisonConfig, estimate_seconds, plan_cells
from medistill.studies.continual import ContinualConfig, learn_continually
from medistill.studies.ranking import rank_agreement, train_and_keep
from medistill.studies.records import keep_record
from medistill.studies.sections import cohort_of, read_study

__all__ = [
    "ComparisonConfig",
    "ContinualConfig",
    "cohort_of",
    "compare",
    "estimate_seconds",
    "keep_record",
    "learn_continually",
    "plan_cells",
    "rank_agreement",
    "read_study",
    "train_and_keep",
]
