"""Studies over many distillations: methods side by side, and learning from distilled memory."""

from medistill.studies.comparison import compare
from medistill.studies.contest import ComparisonConfig, estimate_seconds, plan_cells
from medistill.studies.continual import ContinualConfig, learn_continually

__all__ = [
    "ComparisonConfig",
    "ContinualConfig",
    "compare",
    "estimate_seconds",
    "learn_continually",
    "plan_cells",
]
