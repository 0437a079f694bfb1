"""Images of a hospital turned into a de-identified :class:`~medistill.core.cohort.Cohort`.

Example::

    key = load_or_create_key(Path("hospital.key"))
    cohort = ingest("scans/", Path("cohort"), key=key, labels=Path("labels.csv"))
"""

from __future__ import annotations

from medistill.ingest.build import IngestConfig, ingest
from medistill.ingest.cache import load_cohort
from medistill.ingest.identity import load_or_create_key
from medistill.ingest.patches import PatchGrid, central_regions, cut_patches, load_regions
from medistill.ingest.splits import SplitFractions
from medistill.ingest.wrap import WrapSummary, wrap_images

__all__ = [
    "IngestConfig",
    "PatchGrid",
    "SplitFractions",
    "WrapSummary",
    "central_regions",
    "cut_patches",
    "ingest",
    "load_cohort",
    "load_or_create_key",
    "load_regions",
    "wrap_images",
]
