"""The receiver's side: train a diagnostic model on a release, apply it to DICOM files, hand it on."""

from medistill.diagnose.model import DiagnosticModel, load_model
from medistill.diagnose.predict import Predictions, predict_files
from medistill.diagnose.train import train_on_release

__all__ = ["DiagnosticModel", "Predictions", "load_model", "predict_files", "train_on_release"]
