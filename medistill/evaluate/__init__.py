"""What a release is worth: diagnostic performance against real data, with intervals over patients."""

from medistill.evaluate.runner import EvaluationConfig, evaluate

__all__ = ["EvaluationConfig", "evaluate"]
