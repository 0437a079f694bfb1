"""Frames of files, and the fast way to a square against the slow one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGLSLossless

from medistill.ingest import frames
from medistill.ingest.decode import silence
from medistill.ingest.frames import Decoded, decode_dicom
from medistill.ingest.geometry import Fit, fit_square
from medistill.ingest.intensity import Lut, Policy, Presentation, Window
from tests.ingest.conftest import make_dicom

MEBIBYTE = 1 << 20


def slow_square(decoded: Decoded, size: int, fit: Fit) -> np.ndarray:
    """Grey levels of every pixel first, then resizing."""
    return fit_square(decoded.grey(), size, fit)


def is_fast(decoded: Decoded) -> bool:
    return decoded._clip() is not None


windows = st.one_of(
    st.none(),
    st.builds(
        Window,
        center=st.integers(-500, 5000).map(float),
        width=st.integers(1, 5000).map(lambda half: 2.0 * half),
        function=st.sampled_from(["LINEAR", "LINEAR_EXACT"]),
    ),
    st.builds(
        Window,
        center=st.floats(-500, 5000),
        width=st.floats(1, 5000),
        function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    ),
)


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.sampled_from([8, 17, 32]),
    fit=st.sampled_from(list(Fit)),
    bits=st.sampled_from([8, 10, 12, 16]),
    signed=st.booleans(),
    window=windows,
    policy=st.sampled_from(list(Policy)),
    slope=st.sampled_from([1.0, 2.0, -1.0, 0.1]),
    intercept=st.sampled_from([0.0, -1024.0, 7.5]),
    inverted=st.booleans(),
    padding=st.sampled_from([None, (0.0, 0.0), (-3.0, 40.0), (4000.0, 5000.0)]),
    hidden=st.sampled_from([(), ((2, 3, 9, 30),)]),
    seed=st.integers(0, 10**6),
)
def test_fast_equals_slow(
    height: int,
    width: int,
    size: int,
    fit: Fit,
    bits: int,
    signed: bool,
    window: Window | None,
    policy: Policy,
    slope: float,
    intercept: float,
    inverted: bool,
    padding: tuple[float, float] | None,
    hidden: tuple[tuple[int, int, int, int], ...],
    seed: int,
) -> None:
    """At most one of 65535 levels apart, whichever way is taken."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rng = np.random.default_rng(seed)
    kind = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    decoded = Decoded(
        stored=rng.integers(low, high, (height, width), endpoint=True).astype(kind),
        presentation=Presentation(
            bits_stored=bits,
            signed=signed,
            slope=slope,
            intercept=intercept,
            window=window,
            inverted=inverted,
            padding=padding,
        ),
        policy=policy,
    ).masked(hidden)
    found, expected = decoded.pixels(size, fit).astype(int), slow_square(decoded, size, fit).astype(int)
    # float32 holds a stored value times 0.1 only to 24 bits; a narrow window magnifies that.
    reach = 1.0 if window is None or policy is not Policy.VOI else max(1.0, abs(window.center) / window.width)
    assert np.abs(found - expected).max() <= (1 if slope in {1.0, 2.0, -1.0} else 1 + 0.1 * reach)


@pytest.mark.parametrize(
    ("presentation", "policy", "fast"),
    [
        (Presentation(bits_stored=12), Policy.VOI, True),
        (Presentation(bits_stored=12, window=Window(center=600, width=1600)), Policy.VOI, True),
        (Presentation(bits_stored=12, window=Window(center=600, width=1601)), Policy.VOI, False),
        (Presentation(bits_stored=12, window=Window(center=600, width=1601)), Policy.NONE, True),
        (Presentation(bits_stored=12, window=Window(center=600, width=9, function="SIGMOID")), Policy.VOI, False),
        (Presentation(bits_stored=12, window=Window(center=600, width=1)), Policy.VOI, False),
        (Presentation(bits_stored=12, window=Window(center=-9000.3, width=200000.7)), Policy.VOI, True),
        (Presentation(bits_stored=12, inverted=True, padding=(0, 0)), Policy.VOI, True),
        (Presentation(bits_stored=12, intercept=-1024, window=Window(center=40, width=400)), Policy.VOI, True),
        (
            Presentation(bits_stored=12, voi_lut=Lut(first=0, values=np.arange(2, dtype=np.float32), bits=8)),
            Policy.VOI,
            False,
        ),
        (
            Presentation(bits_stored=12, modality_lut=Lut(first=0, values=np.arange(2, dtype=np.float32), bits=8)),
            Policy.NONE,
            False,
        ),
    ],
)
def test_when_the_fast_way_is_taken(presentation: Presentation, policy: Policy, fast: bool) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (80, 90)).astype(np.uint16)
    decoded = Decoded(stored=stored, presentation=presentation, policy=policy)
    assert is_fast(decoded) is fast
    difference = decoded.pixels(16, Fit.PAD).astype(int) - slow_square(decoded, 16, Fit.PAD)
    assert np.abs(difference).max() <= 1


def test_clipping_comes_before_averaging() -> None:
    """Two pixels far outside of the window average to grey, not to the window's end."""
    stored = np.tile(np.array([[0, 4000]], dtype=np.uint16), (32, 16))
    presentation = Presentation(bits_stored=12, window=Window(center=101, width=102, function="LINEAR_EXACT"))
    decoded = Decoded(stored=stored, presentation=presentation, policy=Policy.VOI)
    assert is_fast(decoded)
    assert np.abs(decoded.pixels(16, Fit.PAD).astype(int) - 32768).max() <= 1


@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_black_before_averaging(inverted: bool) -> None:
    stored = np.tile(np.array([[2000, 255]], dtype=np.uint16), (32, 16))
    presentation = Presentation(bits_stored=8, inverted=inverted, padding=(2000, 2000))
    decoded = Decoded(stored=stored, presentation=presentation, policy=Policy.VOI)
    expected = 0 if inverted else 32768
    assert np.abs(decoded.pixels(16, Fit.PAD).astype(int) - expected).max() <= 1


def test_eight_bit_levels_of_the_wanted_size_survive() -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    decoded = Decoded(stored=stored, presentation=Presentation(bits_stored=8), policy=Policy.VOI)
    np.testing.assert_array_equal(decoded.pixels(16, Fit.PAD), 257 * stored.astype(np.uint16))


@pytest.mark.parametrize(
    "presentation", [None, Presentation(bits_stored=8), Presentation(bits_stored=8, inverted=True)]
)
@pytest.mark.parametrize("size", [8, 40])
def test_masked_boxes_are_black(presentation: Presentation | None, size: int) -> None:
    stored: Any = np.full((40, 40), 200, dtype=np.uint8) if presentation else np.ones((40, 40), dtype=np.float32)
    decoded = Decoded(stored=stored, presentation=presentation, policy=Policy.VOI)
    masked = decoded.masked([(0, 0, 10, 20)]).masked([(30, 30, 99, 99)])
    assert masked.grey()[:10, :20].max() == masked.grey()[30:, 30:].max() == 0
    square = masked.pixels(size, Fit.PAD)
    scale = 40 // size
    assert square[: 10 // scale, : 20 // scale].max() == square[30 // scale :, 30 // scale :].max() == 0
    assert square[0, -1] == decoded.pixels(size, Fit.PAD)[0, -1] > 0
    assert (stored != 0).all()  # the original is untouched


def test_luminance_is_left_as_it_is_unless_stretched() -> None:
    grey = np.linspace(0.2, 0.6, 10000, dtype=np.float32).reshape(100, 100)
    plain = Decoded(stored=grey, presentation=None, policy=Policy.VOI)
    np.testing.assert_array_equal(plain.grey(), grey)
    stretched = Decoded(stored=grey, presentation=None, policy=Policy.PERCENTILE).grey()
    low, high = np.percentile(grey, (0.5, 99.5))
    np.testing.assert_allclose(stretched, np.clip((grey - low) / (high - low), 0, 1), atol=1e-6)


def test_nothing_of_a_patient_is_shown() -> None:
    decoded = Decoded(stored=np.ones((2, 2)), presentation=None, policy=Policy.VOI)
    assert "1." not in repr(decoded)
    assert pickle.loads(pickle.dumps(decoded)).frame == 0


# ------------------------------------------------------------------------------------------------ files


def test_frames_with_their_own_grey_levels(tmp_path: Path) -> None:
    pixels = np.arange(3 * 20, dtype=np.uint8).reshape(3, 4, 5)
    groups = []
    for number in range(3):
        window, item = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 20 * number + 10, 20, "LINEAR_EXACT"
        item.FrameVOILUTSequence = Sequence([window])
        groups.append(item)
    dataset = make_dicom(
        tmp_path / "1.dcm",
        pixels[0],
        NumberOfFrames=3,
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        PatientID="P7",
    )
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    with silence():
        found = list(decode_dicom(tmp_path / "1.dcm", Policy.VOI))
    for number, frame in enumerate(found):
        np.testing.assert_allclose(frame.grey(), (pixels[number] - 20.0 * number) / 20, atol=1e-6)
        assert frame.frame == number + 1
        assert frame.header.patient_id == "P7"


def test_frames_are_decoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    dataset = make_dicom(tmp_path / "1.dcm", pixels, NumberOfFrames=4)
    dataset.PixelData = encapsulate([imagecodecs.jpegls_encode(pixels)] * 4)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    calls = []
    original = frames.imagecodecs_plugin.imagecodecs.jpegls_decode
    monkeypatch.setattr(
        frames.imagecodecs_plugin.imagecodecs, "jpegls_decode", lambda source: calls.append(1) or original(source)
    )
    with silence():
        iterator = decode_dicom(tmp_path / "1.dcm", Policy.VOI)
        next(iterator)
        assert len(calls) == 1
        iterator.close()


_PEAK = """
import sys
from pathlib import Path
from medistill.ingest.decode import silence
from medistill.ingest.frames import decode_dicom
from medistill.ingest.geometry import Fit
from medistill.ingest.intensity import Policy

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def read(path):
    with silence():
        return sum(int(frame.pixels(64, Fit.PAD).any()) for frame in decode_dicom(Path(path), Policy.VOI))

read(sys.argv[1])
before = peak()
count = read(sys.argv[2])
print(count, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_long_file_is_that_of_one_frame(tmp_path: Path) -> None:
    pixels = np.ones((512, 512), dtype=np.uint16)
    for name, count in (("short", 2), ("long", 100)):
        dataset = make_dicom(tmp_path / f"{name}.dcm", pixels, NumberOfFrames=count)
        dataset.PixelData = pixels.tobytes() * count
        dataset["PixelData"].VR = "OW"
        dataset.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    size = (tmp_path / "long.dcm").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "short.dcm"), str(tmp_path / "long.dcm")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    count, extra = (int(word) for word in result.stdout.split())
    assert count == 100
    assert size > 50 * MEBIBYTE
    assert extra < 5 * 1024
