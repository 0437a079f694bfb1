"""Text burned into the pixels: a cheap detector for every image, OCR where it hits, and what follows from it.

:class:`~medistill.ingest.burned_in.screen.Screen` is the one entrance; the other modules can be used alone.
"""

from medistill.ingest.burned_in.detector import Box, suspect_boxes
from medistill.ingest.burned_in.ocr import OCR_MEMORY_MB, OCR_SECONDS, Word, read_text
from medistill.ingest.burned_in.screen import FLAGS, MARKERS, Outcome, Screen, TextPolicy, Verdict
from medistill.ingest.burned_in.ultrasound import outside_regions

__all__ = [
    "FLAGS",
    "MARKERS",
    "OCR_MEMORY_MB",
    "OCR_SECONDS",
    "Box",
    "Outcome",
    "Screen",
    "TextPolicy",
    "Verdict",
    "Word",
    "outside_regions",
    "read_text",
    "suspect_boxes",
]
