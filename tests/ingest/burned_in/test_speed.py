"""What looking costs: ``pytest -m benchmark tests/ingest/burned_in -s``."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medistill.ingest.burned_in import ocr, suspect_boxes
from medistill.ingest.burned_in.ocr import read_text
from tests.ingest.burned_in.lettering import FONTS, LINES, Ink, adults, children, draw, meets, radiograph

pytestmark = pytest.mark.benchmark


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Least CPU time of one call."""
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def _resident() -> int:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 2**20


@pytest.mark.parametrize(("side", "limit"), [(64, 0.005), (256, 0.006), (512, 0.016), (1024, 0.03), (4096, 0.3)])
def test_detector_time(side: int, limit: float) -> None:
    clean = np.kron(radiograph(0, side=min(side, 1024)), np.ones((max(side // 1024, 1),) * 2, np.float32))
    lettered = draw(clean, Ink(height=14), np.random.default_rng(0)) if side >= 256 else None
    noise = np.random.default_rng(0).random((side, side), dtype=np.float32)
    cases = {"clean": clean, "lettered": lettered[0] if lettered else clean, "noise": noise}
    seconds = {name: _seconds(lambda image=image: suspect_boxes(image), 15) for name, image in cases.items()}
    print(f"\ndetector {side}x{side}: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()))
    assert seconds["clean"] < limit


@pytest.mark.skipif(not ocr.available(), reason="rapidocr is not installed: add the extra ocr")
def test_ocr_time_and_memory() -> None:
    before = _resident()
    first = _seconds(lambda: read_text(radiograph(0)), 1)
    print(f"\nocr: first image {first:.1f} s, memory {before} -> {_resident()} MB")
    for side in (256, 1024, 2048):
        image = radiograph(0, side=side)
        print(f"ocr {side}x{side}: {_seconds(lambda image=image: read_text(image), 2):.2f} s, {_resident()} MB")
    assert _resident() - before < 1500


@pytest.mark.parametrize("films", [children, adults], ids=["paediatric chest films", "adult chest films"])
def test_detector_recall_by_contrast(shared_data: Path, films: Callable[..., object]) -> None:
    rng = np.random.default_rng(0)
    images = list(films(shared_data, 300))  # type: ignore[call-overload]
    print(f"\nalarms on films as they are: {np.mean([bool(suspect_boxes(image)) for image in images]):.3f}")
    for contrast in (0.1, 0.2, 0.3, 0.5, 0.8):
        for heights in ((8, 9, 10), (12, 14, 18), (24, 36)):
            found = []
            for number, image in enumerate(images):
                ink = Ink(
                    text=str(rng.choice(LINES)),
                    height=int(rng.choice(heights)),
                    contrast=contrast * float(rng.choice([-1, 1])),
                    font=FONTS[number % len(FONTS)],
                    angle=float(rng.choice([0, 0, 0, 90, 180, 270, 3, -3])),
                )
                if (drawn := draw(image, ink, rng)) is not None:
                    found.append(meets(suspect_boxes(drawn[0]), drawn[1]))
            print(f"contrast {contrast}, height {heights}: {np.mean(found):.2f} of {len(found)}")
            assert contrast < 0.5 or np.mean(found) > 0.9
