"""Synthetic double-contrast gastric X-ray cohort, written as DICOM with an answer key.

Stands in for data that may not be shared: three classes (gastritis, no_gastritis, outside), several films per
patient whose anatomy persists from film to film, planted identifiers, both polarities, raw and compressed files.

Example:
    >>> PhantomConfig(patients=20).difficulty
    0.5
"""

from __future__ import annotations

from medistill.ingest.phantom.anatomy import Anatomy, Pose, draw_anatomy, draw_pose
from medistill.ingest.phantom.cohort import CLASSES, PhantomConfig, PhantomSummary, write_phantom
from medistill.ingest.phantom.film import render, stomach_region

__all__ = [
    "CLASSES",
    "Anatomy",
    "PhantomConfig",
    "PhantomSummary",
    "Pose",
    "draw_anatomy",
    "draw_pose",
    "render",
    "stomach_region",
    "write_phantom",
]
