"""Reading text: offline, silent, and with a remedy where it is not installed."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from medistill.errors import ConfigError, RejectedFile
from medistill.ingest.burned_in import ocr, read_text
from tests.ingest.burned_in.lettering import Ink, draw, meets, radiograph


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Nothing is remembered from before, nor by what comes after."""
    available, engine = ocr.available, ocr._engine
    for remembered in (available, engine):
        remembered.cache_clear()
    yield
    for remembered in (available, engine):
        remembered.cache_clear()


needs_ocr = pytest.mark.skipif(not ocr.available(), reason="rapidocr is not installed: add the extra ocr")


@needs_ocr
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("angle", [0, *(pytest.param(turn, marks=pytest.mark.long) for turn in (90, 180, 270))])
def test_text_is_read_where_it_stands(
    angle: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    drawn = draw(radiograph(0), Ink(text="DOE^JANE 4711", height=14, angle=angle), np.random.default_rng(0))
    assert drawn is not None
    words = read_text(drawn[0])
    assert "4711" in "".join(word.text for word in words)
    assert all(meets((word.box,), drawn[1]) and word.confidence > 0.5 for word in words)
    assert "4711" not in repr(words)
    assert capfd.readouterr() == ("", "")


@needs_ocr
def test_long_strips_are_read_within_the_image() -> None:
    drawn = draw(radiograph(0)[100:130], Ink(text="DOE^JANE 4711", height=14), np.random.default_rng(0))
    assert drawn is not None
    words = read_text(np.hstack([drawn[0], np.full((30, 700), 0.1, np.float32)]))
    assert "4711" in "".join(word.text for word in words)
    assert all(word.box[2] <= 30 and meets((word.box,), drawn[1]) for word in words)


@needs_ocr
@pytest.mark.parametrize("side", [1, 3, 40])
def test_nothing_is_read_where_nothing_is_written(side: int) -> None:
    assert read_text(np.full((side, side), 0.3, np.float32)) == ()
    assert read_text(np.linspace(0, 1, side * side, dtype=np.float32).reshape(side, side)) == ()


@pytest.mark.usefixtures("_fresh")
def test_absent_rapidocr_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "medistill\[ocr\]"'):
        read_text(np.eye(32, dtype=np.float32))


@pytest.mark.usefixtures("_fresh")
def test_unloadable_rapidocr_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(ocr, "available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        read_text(np.eye(32, dtype=np.float32))
    assert caught.value.__cause__ is None


def test_a_failure_rejects_the_image_without_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("DOE^JANE")

    monkeypatch.setattr(ocr, "_engine", lambda: fail)
    with pytest.raises(RejectedFile) as caught:
        read_text(np.eye(32, dtype=np.float32))
    assert caught.value.code == "BURNED_IN"
    assert "DOE" not in str(caught.value)
    assert caught.value.__suppress_context__
