"""Training networks on soft labels."""

from medistill.training.students import Student, train_students

__all__ = ["Student", "train_students"]
