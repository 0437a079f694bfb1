"""The receiver's side: train a diagnostic model on a release."""

from medistill.diagnose.train import train_on_release

__all__ = ["train_on_release"]
