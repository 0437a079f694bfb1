"""Text read from an image with rapidocr (optional extra ``ocr``): offline, one thread, no log.

The models come inside rapidocr's wheel. The engine is loaded on first use, once per process; with it a process
grows by some 0.5 GB (1 GB while it reads a large image). What is read may name a patient: it is
neither shown nor logged.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medistill.errors import ConfigError, RejectedFile
from medistill.ingest.burned_in.detector import Box

#: Address space in MB that a process which reads text may need.
OCR_MEMORY_MB = 2560
#: Seconds that reading the text of one file may take; a file with many frames takes seconds for each.
OCR_SECONDS = 300.0
_MODELS = {"Det": "*_det_*.onnx", "Cls": "*_cls_*.onnx", "Rec": "*_rec_*.onnx"}
_LARGEST_SIDE = 1600  # larger images are read smaller: 2048 adds 1.8 GB of address space at its peak, 1600 1.5 GB
_LONGEST = 3  # sides; rapidocr enlarges the shorter side to 736 pixels, whatever the longer one becomes
_REMEDY = 'Run `pip install "medistill[ocr]"`, or do without OCR (`ocr: never`).'


@dataclass(frozen=True, kw_only=True)
class Word:
    """A piece of text, mostly a line.

    Args:
        box: Where it stands, upright and in pixels.
        text: What it says; patient data.
        confidence: Of the recognition, in ``[0, 1]``.
    """

    box: Box
    text: str = field(repr=False)
    confidence: float


@functools.cache
def available() -> bool:
    """Whether text can be read on this machine."""
    return all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


def read_text(grey: NDArray[np.float32]) -> tuple[Word, ...]:
    """Read all text of an image, upright or turned by multiples of 90 degrees.

    Args:
        grey: Grey levels at full resolution, shape ``(h, w)``, finite.

    Returns:
        What was recognised with a confidence of at least 0.5; empty where there is no text.

    Raises:
        ConfigError: If rapidocr is not installed, or cannot be loaded.
        RejectedFile: If rapidocr fails on this image.
    """
    engine = _engine()
    low, high = float(grey.min()), float(grey.max())
    if not high > low:
        return ()
    pixels = ((grey - low) * (255 / (high - low))).astype(np.uint8)
    least = max(pixels.shape) // _LONGEST
    pixels = np.pad(pixels, [(0, max(least - side, 0)) for side in pixels.shape])
    try:
        found = engine(np.repeat(pixels[:, :, None], 3, axis=2))
        if found.txts is None:
            return ()
        return tuple(
            Word(box=_bounds(corners, grey.shape), text=str(text), confidence=float(confidence))
            for corners, text, confidence in zip(found.boxes, found.txts, found.scores, strict=True)
        )
    except MemoryError:
        raise
    except Exception:  # its message could quote the image
        raise RejectedFile("BURNED_IN", "the text reader failed on this image") from None


def _bounds(corners: NDArray[np.floating[Any]], shape: tuple[int, ...]) -> Box:
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int) + 1
    return max(int(top), 0), max(int(left), 0), min(int(bottom), shape[0]), min(int(right), shape[1])


@functools.cache
def _engine() -> Any:
    """The recogniser; naming its models' files keeps it from looking for them on the network."""
    if not available():
        raise ConfigError(f"Reading text in images needs rapidocr and onnxruntime. {_REMEDY}")
    try:
        rapidocr = importlib.import_module("rapidocr")
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        importlib.import_module("cv2").setNumThreads(1)
        folder = Path(str(rapidocr.__file__)).parent / "models"
        models = {f"{step}.model_path": str(next(folder.glob(form))) for step, form in _MODELS.items()}
        return rapidocr.RapidOCR(
            params={
                **models,
                "Global.log_level": "critical",
                "Global.max_side_len": _LARGEST_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
    except (ImportError, OSError, StopIteration, ValueError):
        raise ConfigError(f"rapidocr is installed but cannot be loaded. {_REMEDY}") from None
