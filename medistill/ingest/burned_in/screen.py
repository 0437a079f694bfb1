"""Whether an image may enter although text could be burned into it, and what has to be blacked out.

=========  ==================================================================================================
policy     what happens
=========  ==================================================================================================
``reject``  Images whose header declares text, and kinds of images that usually carry it, are refused unseen. Of
            the others the detector looks at all; where it suspects a line, and on a random sample, OCR decides.
            Without OCR a suspected line is enough.
``mask``    Everything that is not an allowed marker is blacked out and the image looked at again, until nothing is
            found or the image is refused. Declared and risky images need OCR.
``allow``   No image is looked at.
=========  ==================================================================================================

Markers (side, view, position) from a list of allowed words stay; so does a single character.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medistill.errors import ConfigError, RejectedFile
from medistill.ingest.burned_in.detector import Box, suspect_boxes
from medistill.ingest.burned_in.ocr import available, read_text

#: Words that may stay in an image.
MARKERS = tuple(
    "A AP AXIAL CC DECUBITUS ERECT EXP EXPIRATION F H I INSP INSPIRATION L LAT LATERAL LCC LEFT LL LMLO LT MLO "  # noqa: SIM905
    "MOBILE OBL OBLIQUE P PA PORT PORTABLE PRONE R RCC RIGHT RL RMLO RT S SEMI SITTING STANDING SUPINE "
    "UPRIGHT".split()
)
#: Everything that :attr:`Verdict.flags` can hold.
FLAGS = ("burned_in_allowed", "line_acquitted", "marker", "ocr_sampled", "outside_masked", "text_masked")

_ROUNDS = 3
_MOST_MASKED = 0.25
_LETTERS = 0.25  # what hangs below the line of a box around capitals; boxes of OCR hold it
_DECLARED = "the header declares burned-in text"
_RISKY = "images of this kind usually carry burned-in text"
_LINE = "looks like a line of text"
_TEXT = "text that is no allowed marker was read"
_NO_OCR = "masking declared or likely text needs the extra ocr"
_NOTHING = "the header declares burned-in text, but none was found to mask"
_TOO_MUCH = "text covers too much of the image"
_REMAINS = "text remains after masking"


class TextPolicy(StrEnum):
    """What is done about burned-in text, see the module docstring."""

    REJECT = "reject"
    MASK = "mask"
    ALLOW = "allow"


class Outcome(StrEnum):
    """What became of an image."""

    CLEAR = "clear"
    MASKED = "masked"
    REJECT = "reject"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of one look.

    Args:
        outcome: ``masked`` means: enters with ``boxes`` blacked out.
        boxes: What to black out, in pixels of the image looked at.
        flags: What was found or done, from :data:`FLAGS`.
        detail: Why the image is refused, a fixed sentence; empty otherwise.
    """

    outcome: Outcome
    boxes: tuple[Box, ...] = ()
    flags: tuple[str, ...] = ()
    detail: str = ""

    def check(self) -> None:
        """Do nothing unless the image is refused.

        Raises:
            RejectedFile: With code ``BURNED_IN`` if the image is refused.
        """
        if self.outcome is Outcome.REJECT:
            raise RejectedFile("BURNED_IN", self.detail)


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Looks for burned-in text in one image after the other; picklable.

    Args:
        policy: What is done about text.
        use_ocr: Whether text is read; ``"auto"`` reads where the extra ``ocr`` is installed.
        sample_rate: Share of images that are read although the detector suspects nothing.
        markers: Words that may stay, without regard to case.

    Raises:
        ConfigError: If a value is not possible, or OCR is wanted but not installed.
    """

    policy: TextPolicy = TextPolicy.REJECT
    use_ocr: bool | Literal["auto"] = "auto"
    sample_rate: float = 0.01
    markers: tuple[str, ...] = field(default=MARKERS, repr=False)

    def __post_init__(self) -> None:
        if self.policy not in tuple(TextPolicy):
            raise ConfigError("Expected the policy for burned-in text to be reject, mask or allow; found another.")
        if self.use_ocr not in (True, False, "auto"):
            raise ConfigError('Expected the use of OCR to be true, false or "auto"; found another value.')
        if not 0 <= self.sample_rate <= 1:
            raise ConfigError(f"Expected a sample rate between 0 and 1, got {self.sample_rate}.")
        if self.use_ocr is True and self.policy != TextPolicy.ALLOW and not available():
            raise ConfigError('OCR is wanted but not installed. Run `pip install "medistill[ocr]"`.')

    @property
    def reads(self) -> bool:
        """Whether text is read on this machine."""
        return available() if self.use_ocr == "auto" else self.use_ocr

    def look(
        self,
        grey: NDArray[np.float32],
        *,
        declared: bool = False,
        risky: bool = False,
        token: str | bytes,
        outside: Sequence[Box] = (),
    ) -> Verdict:
        """Look at one image.

        Args:
            grey: Grey levels at full resolution, shape ``(h, w)``, finite; every frame is an image.
            declared: Whether BurnedInAnnotation (0028,0301) is YES.
            risky: Whether the image is a secondary capture, an ultrasound image or a screen save.
            token: Keyed pseudonym of the image; decides whether it belongs to the sample, so that nobody without
                the key can tell which images were not read.
            outside: Boxes that hold no image (``outside_regions``); blacked out where the policy is ``mask``.

        Returns:
            What to do with the image.

        Raises:
            RejectedFile: If OCR fails on the image.
        """
        if self.policy == TextPolicy.ALLOW:
            return Verdict(outcome=Outcome.CLEAR, flags=("burned_in_allowed",))
        expected = declared or risky
        sampled = self.reads and self.sampled(token)
        flags = {"ocr_sampled"} if sampled else set()
        if self.policy == TextPolicy.REJECT:
            if expected:
                return _refused(_DECLARED if declared else _RISKY)
            found = self._find(grey, read=sampled)
            if found.text:
                return _refused(_TEXT if self.reads else _LINE, flags | found.flags)
            return Verdict(outcome=Outcome.CLEAR, flags=_sorted(flags | found.flags))
        if expected and not self.reads:
            return _refused(_NO_OCR)
        return self._mask(grey, declared=declared, expected=expected, flags=flags, outside=tuple(outside))

    def sampled(self, token: str | bytes) -> bool:
        """Whether an image belongs to the random sample that is read."""
        raw = token.encode() if isinstance(token, str) else token
        digest = hashlib.blake2b(raw, digest_size=8, person=b"ocr sample").digest()
        return int.from_bytes(digest, "big") < self.sample_rate * 2**64

    def is_marker(self, text: str) -> bool:
        """Whether text may stay: allowed words only, a single character, or no letter and digit at all."""
        words = re.findall(r"\w+", text.upper())
        allowed = {marker.upper() for marker in self.markers}
        return all(word in allowed for word in words) or (len(words) == 1 and len(words[0]) == 1)

    def _find(self, grey: NDArray[np.float32], *, read: bool, convict: bool = False) -> _Found:
        """Text that must not stay. With OCR a suspected line counts if ``convict``, else what is read counts."""
        suspects = suspect_boxes(grey)
        if not self.reads:
            return _Found(text=tuple(_grown(box, grey.shape, _LETTERS) for box in suspects))
        if not suspects and not read:
            return _Found()
        words = read_text(grey)
        markers = [word.box for word in words if self.is_marker(word.text)]
        text = [_grown(word.box, grey.shape, 0) for word in words if not self.is_marker(word.text)]
        lines = [_grown(box, grey.shape, _LETTERS) for box in suspects if _covered(box, markers) < 0.5]
        flags = {"marker"} if markers else set()
        if convict:
            text += lines
        elif suspects and not text:
            flags.add("line_acquitted")
        return _Found(text=tuple(text), flags=frozenset(flags))

    def _mask(
        self,
        grey: NDArray[np.float32],
        *,
        declared: bool,
        expected: bool,
        flags: set[str],
        outside: tuple[Box, ...],
    ) -> Verdict:
        """Black out and look again until nothing is found; the last look reads wherever OCR is there."""
        image = masked(grey, outside)
        hidden: tuple[Box, ...] = ()
        flags |= {"outside_masked"} if outside else set()
        found = self._find(image, read=expected or "ocr_sampled" in flags, convict=expected)
        flags |= found.flags
        for _ in range(_ROUNDS):
            if not found.text:
                break
            hidden += found.text
            image = masked(image, hidden)
            found = self._find(image, read=True, convict=expected)
        if found.text:
            return _refused(_REMAINS, flags)
        if declared and not hidden:
            return _refused(_NOTHING, flags)
        if _share(hidden, grey.shape) > _MOST_MASKED:
            return _refused(_TOO_MUCH, flags)
        boxes = outside + hidden
        flags |= {"text_masked"} if hidden else set()
        return Verdict(outcome=Outcome.MASKED if boxes else Outcome.CLEAR, boxes=boxes, flags=_sorted(flags))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Boxes to hide text that must not stay, and flags."""

    text: tuple[Box, ...] = ()
    flags: frozenset[str] = frozenset()


def masked(grey: NDArray[np.float32], boxes: Iterable[Box]) -> NDArray[np.float32]:
    """Copy of an image with boxes blacked out."""
    image = grey.copy()
    for top, left, bottom, right in boxes:
        image[top:bottom, left:right] = 0
    return image


def _refused(detail: str, flags: Iterable[str] = ()) -> Verdict:
    return Verdict(outcome=Outcome.REJECT, detail=detail, flags=_sorted(flags))


def _sorted(flags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(flags))


def _covered(box: Box, others: Sequence[Box]) -> float:
    """Part of a box that others cover, in ``[0, 1]``."""
    top, left, bottom, right = box
    moved = [(max(o[0] - top, 0), max(o[1] - left, 0), o[2] - top, o[3] - left) for o in others]
    return _share([o for o in moved if o[2] > 0 and o[3] > 0], (bottom - top, right - left))


def _grown(box: Box, shape: tuple[int, ...], part: float) -> Box:
    """A box with a margin of a part of its shorter side, at least 3 pixels."""
    top, left, bottom, right = box
    by = max(3, round(part * min(bottom - top, right - left)))
    return max(top - by, 0), max(left - by, 0), min(bottom + by, shape[0]), min(right + by, shape[1])


def _share(boxes: Sequence[Box], shape: tuple[int, ...]) -> float:
    covered = np.zeros(shape, bool)
    for top, left, bottom, right in boxes:
        covered[top:bottom, left:right] = True
    return float(covered.mean())
