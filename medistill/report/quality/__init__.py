"""What is in a cohort and what could go wrong with it: counts, pictures, grey levels, warnings.

The page, the contact sheet and the figures made here show patients' images and small counts of real patients. They
are for the people who hold the cohort and never part of a release. No pseudonym, original identifier or path is
ever shown.

Example::

    quality = inspect_cohort(Path("cohort"))
    write_quality(quality, Path("cohort"), Path("cohort-quality"))
"""

from medistill.report.quality.counting import inspect_cohort
from medistill.report.quality.page import write_quality
from medistill.report.quality.records import Quality
from medistill.report.quality.terminal import quality_lines

__all__ = ["Quality", "inspect_cohort", "quality_lines", "write_quality"]
