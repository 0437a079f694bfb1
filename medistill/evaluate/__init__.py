"""What a release is worth: diagnostic performance against real data, with intervals over patients."""

from medistill.evaluate.patients import PatchSplit, evaluate_patients
from medistill.evaluate.runner import EvaluationConfig, evaluate
from medistill.report.patients import render_patients

__all__ = ["EvaluationConfig", "PatchSplit", "evaluate", "evaluate_patients", "render_patients"]
