"""What follows from burned-in text: policies, markers, masking, sampling."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from medistill.errors import ConfigError, RejectedFile
from medistill.ingest.burned_in import FLAGS, Box, Outcome, Screen, TextPolicy, Verdict, Word, ocr, screen
from medistill.ingest.burned_in.ocr import read_text
from medistill.ingest.frames import decode_dicom
from medistill.ingest.intensity import Policy
from tests.ingest.burned_in.lettering import Grey, Ink, draw, meets, radiograph

needs_ocr = pytest.mark.skipif(not ocr.available(), reason="rapidocr is not installed: add the extra ocr")
REJECT, MASK, ALLOW = TextPolicy.REJECT, TextPolicy.MASK, TextPolicy.ALLOW
PHI = ("2_ORIGINAL.dcm", "GREYSCALE_IMAGE.dcm")


def lettered(text: str = "DOE^JANE 4711", height: int = 14, seed: int = 0, angle: float = 0) -> tuple[Grey, Box]:
    drawn = draw(radiograph(seed), Ink(text=text, height=height, angle=angle), np.random.default_rng(seed))
    assert drawn is not None
    return drawn


def legible(image: Grey) -> int:
    """Longest text that is read and is no marker; a black bar is read as the Chinese one, a single character."""
    return max((len(word.text) for word in read_text(image) if not Screen().is_marker(word.text)), default=0)


class Reader:
    """Stands in for OCR: reads given words wherever their place is not black."""

    def __init__(self, *words: tuple[Box, str]) -> None:
        self.words = words
        self.reads = 0

    def __call__(self, grey: Grey) -> tuple[Word, ...]:
        self.reads += 1
        return tuple(
            Word(box=box, text=text, confidence=0.9)
            for box, text in self.words
            if grey[box[0] : box[2], box[1] : box[3]].any()
        )


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    """OCR that reads nothing until told otherwise."""
    fake = Reader()
    monkeypatch.setattr(screen, "read_text", fake)
    monkeypatch.setattr(screen, "available", lambda: True)
    return fake


@pytest.fixture
def no_ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "available", lambda: False)


def _look(policy: TextPolicy, image: Grey, *, rate: float = 0.0, **how: bool) -> Verdict:
    verdict = Screen(policy=policy, sample_rate=rate).look(image, token="one", **how)
    assert set(verdict.flags) <= set(FLAGS)
    assert bool(verdict.detail) == (verdict.outcome is Outcome.REJECT)
    assert (verdict.outcome is Outcome.MASKED) == bool(verdict.boxes)
    return verdict


def test_allow_never_looks(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "suspect_boxes", None)
    verdict = _look(ALLOW, lettered()[0], declared=True, risky=True, rate=1.0)
    assert verdict == Verdict(outcome=Outcome.CLEAR, flags=("burned_in_allowed",))
    assert reader.reads == 0


@pytest.mark.parametrize(("how", "word"), [({"declared": True}, "declares"), ({"risky": True}, "of this kind")])
def test_reject_refuses_declared_and_risky_images_unseen(reader: Reader, how: dict[str, bool], word: str) -> None:
    verdict = _look(REJECT, radiograph(0), rate=1.0, **how)
    assert verdict.outcome is Outcome.REJECT
    assert word in verdict.detail
    assert reader.reads == 0
    with pytest.raises(RejectedFile) as caught:
        verdict.check()
    assert (caught.value.code, caught.value.detail) == ("BURNED_IN", verdict.detail)


def test_without_ocr_a_line_is_enough_to_refuse(no_ocr: None) -> None:
    assert _look(REJECT, lettered()[0]).detail == "looks like a line of text"
    clear = _look(REJECT, radiograph(0), rate=1.0)
    assert clear == Verdict(outcome=Outcome.CLEAR)
    clear.check()


def test_ocr_acquits_a_line_where_it_reads_nothing(reader: Reader) -> None:
    assert _look(REJECT, lettered()[0]).flags == ("line_acquitted",)
    assert reader.reads == 1


def test_ocr_acquits_markers_and_convicts_other_text(reader: Reader) -> None:
    image, place = lettered()
    reader.words = ((place, "AP erect"),)
    assert _look(REJECT, image).flags == ("line_acquitted", "marker")
    reader.words = ((place, "AP erect"), ((0, 0, 9, 9), "DOE"))
    verdict = _look(REJECT, image)
    assert verdict.outcome is Outcome.REJECT
    assert "DOE" not in repr(verdict)


def test_unsuspected_images_are_read_only_in_the_sample(reader: Reader) -> None:
    assert _look(REJECT, radiograph(0)).flags == ()
    assert reader.reads == 0
    reader.words = (((5, 5, 20, 60), "DOE"),)
    verdict = _look(REJECT, radiograph(0), rate=1.0)
    assert (verdict.outcome, verdict.flags) == (Outcome.REJECT, ("ocr_sampled",))
    assert _look(MASK, radiograph(0), rate=1.0).flags == ("ocr_sampled", "text_masked")


def test_the_sample_depends_on_the_token_only_and_has_the_wanted_size() -> None:
    tokens = [f"token {number}" for number in range(4000)]
    chosen = {rate: {t for t in tokens if Screen(sample_rate=rate).sampled(t)} for rate in (0, 0.01, 0.1, 0.5, 1)}
    for rate, some in chosen.items():
        assert abs(len(some) - rate * 4000) <= 4 * np.sqrt(4000 * rate * (1 - rate))
    assert all(less <= more for less, more in pairwise(chosen.values()))
    again = pickle.loads(pickle.dumps(Screen(sample_rate=0.1)))
    assert {token for token in tokens if again.sampled(token.encode())} == chosen[0.1]


@pytest.mark.parametrize(
    "text", ["L", "r", "PA", "A P", "AP-ERECT", "R.", "PORTABLE (SUPINE)", "7", "°", "--", "RMLO"]
)
def test_markers_may_stay(text: str) -> None:
    assert Screen().is_marker(text)


@pytest.mark.parametrize("text", ["DOE", "L DOE", "AP 2021", "J D", "12", "王伟", "李", "RL7", "L_R"])
def test_other_text_may_not_stay(text: str) -> None:
    assert Screen().is_marker(text) == (text == "李")


def test_markers_can_be_changed() -> None:
    assert Screen(markers=("gauche",)).is_marker("GAUCHE")
    assert not Screen(markers=("gauche",)).is_marker("PA")


@pytest.mark.parametrize(
    "values", [{"policy": "hide"}, {"sample_rate": 1.5}, {"sample_rate": float("nan")}, {"use_ocr": "yes"}]
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        Screen(**values)  # type: ignore[arg-type]


def test_wanted_ocr_that_is_absent_is_refused_at_once(no_ocr: None) -> None:
    with pytest.raises(ConfigError, match=r"medistill\[ocr\]"):
        Screen(use_ocr=True)
    assert not Screen(use_ocr="auto").reads


def test_mask_hides_what_is_read_and_keeps_markers(reader: Reader) -> None:
    image, place = lettered()
    reader.words = ((place, "DOE^JANE"), ((230, 2, 250, 16), "R"))
    verdict = _look(MASK, image)
    assert (verdict.outcome, verdict.flags) == (Outcome.MASKED, ("marker", "text_masked"))
    hidden = screen.masked(image, verdict.boxes)
    assert not hidden[place[0] : place[2], place[1] : place[3]].any()
    assert np.array_equal(hidden[230:250, 2:16], image[230:250, 2:16])
    assert image[place[0] : place[2], place[1] : place[3]].any()


def test_mask_without_ocr_hides_suspected_lines_and_refuses_likely_text(no_ocr: None) -> None:
    image, place = lettered()
    verdict = _look(MASK, image)
    assert meets(verdict.boxes, place)
    assert screen.suspect_boxes(screen.masked(image, verdict.boxes)) == ()
    for how in ({"declared": True}, {"risky": True}):
        assert "extra ocr" in _look(MASK, image, **how).detail


def test_mask_refuses_what_it_cannot_hide(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    image = radiograph(0)
    assert "none was found" in _look(MASK, image, declared=True).detail
    assert _look(MASK, image, risky=True).outcome is Outcome.CLEAR
    reader.words = (((0, 0, 250, 250), "REPORT"),)
    assert "covers too much" in _look(MASK, image, risky=True).detail
    stubborn = Word(box=(5, 5, 20, 60), text="DOE", confidence=0.9)
    monkeypatch.setattr(screen, "read_text", lambda grey: (stubborn,))
    assert "remains" in _look(MASK, image, risky=True).detail


def test_lines_of_risky_images_are_hidden_even_where_nothing_is_read(reader: Reader) -> None:
    image, place = lettered()
    assert _look(MASK, image).outcome is Outcome.CLEAR
    assert meets(_look(MASK, image, risky=True).boxes, place)


def test_what_lies_outside_the_regions_is_hidden_only_by_mask(reader: Reader) -> None:
    banner = (0, 0, 40, 256)
    looked = Screen(policy=MASK).look(radiograph(0), token="t", risky=True, outside=[banner])
    assert (looked.outcome, looked.boxes, looked.flags) == (Outcome.MASKED, (banner,), ("outside_masked",))
    assert Screen().look(radiograph(0), token="t", outside=[banner]).boxes == ()


@needs_ocr
def test_text_on_one_frame_only_is_found_on_that_frame() -> None:
    frames = [radiograph(seed) for seed in range(4)]
    frames[2] = lettered(seed=2)[0]
    outcomes = [Screen().look(frame, token=f"frame {number}").outcome for number, frame in enumerate(frames)]
    assert outcomes == [Outcome.CLEAR, Outcome.CLEAR, Outcome.REJECT, Outcome.CLEAR]


@needs_ocr
@pytest.mark.parametrize("angle", [0, *(pytest.param(turn, marks=pytest.mark.long) for turn in (90, 180, 270))])
def test_masked_lines_cannot_be_read_any_more(angle: float) -> None:
    image, place = lettered(angle=angle, seed=1)
    verdict = Screen(policy=MASK).look(image, token="t")
    hidden = screen.masked(image, verdict.boxes)
    assert not hidden[place[0] : place[2], place[1] : place[3]].any()
    assert legible(hidden) == 0
    assert (hidden == image).mean() >= 0.85


@needs_ocr
def test_read_markers_stay_in_the_picture() -> None:
    image = lettered("AP ERECT", height=16)[0]
    verdict = Screen(policy=MASK, sample_rate=1).look(image, token="t")
    assert verdict.outcome is Outcome.CLEAR
    assert "marker" in verdict.flags


def _film(data: Path, name: str) -> Grey:
    (decoded,) = decode_dicom(data / "dicom" / "phi" / name, Policy.VOI)
    return decoded.grey()


@pytest.mark.parametrize("name", PHI)
def test_burned_in_names_are_caught_by_the_detector_alone(data: Path, name: str) -> None:
    verdict = Screen(use_ocr=False).look(_film(data, name), token=name)
    assert (verdict.outcome, verdict.detail) == (Outcome.REJECT, "looks like a line of text")


@needs_ocr
@pytest.mark.parametrize("name", [PHI[0], pytest.param(PHI[1], marks=pytest.mark.long)])
def test_burned_in_names_are_masked_and_little_else(data: Path, name: str) -> None:
    image = _film(data, name)
    words = read_text(image)
    assert any(character.isdigit() for word in words for character in word.text)
    assert not all(Screen().is_marker(word.text) for word in words)  # what makes the policy reject refuse it
    verdict = Screen(policy=MASK).look(image, token=name)
    assert verdict.outcome is Outcome.MASKED
    assert legible(screen.masked(image, verdict.boxes)) == 0
    beside = np.ones(image.shape, bool)
    for top, left, bottom, right in (word.box for word in words):
        beside[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = False
    kept = np.ones(image.shape, bool)
    for top, left, bottom, right in verdict.boxes:
        kept[top:bottom, left:right] = False
    assert kept[beside].mean() >= 0.95
