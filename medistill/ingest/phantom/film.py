"""The double-contrast film of a made-up patient: a pure function of what was drawn.

Line integrals of attenuation are summed (Beer–Lambert): soft tissue, bone, gas, and barium as a thin coat on the
mucosa plus a pool that follows gravity. Chronic gastritis thickens the folds, makes them tortuous, and brings out
the areae gastricae. The grey scale of every film is matched to a class-neutral target, so brightness and histogram
say next to nothing about the class.

Example:
    >>> from medistill.ingest.phantom.anatomy import draw_anatomy, draw_pose
    >>> rng = np.random.default_rng(0)
    >>> anatomy = draw_anatomy(rng, gastritis=True, difficulty=0.5)
    >>> render(anatomy, draw_pose(rng, outside=False), 64).shape
    (64, 64)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from medistill.ingest.phantom.anatomy import Anatomy, FloatArray, Pose

FloatImage = npt.NDArray[np.float32]


def render(anatomy: Anatomy, pose: Pose, size: int) -> FloatImage:
    """Expose one film.

    Args:
        anatomy: The patient.
        pose: The film.
        size: Rows and columns.

    Returns:
        Grey values in ``[0, 1]``, shape ``(size, size)``; barium and bone are bright.
    """
    frame = _Frame.of(pose, size)
    coarse = _Frame.of(pose, max(size // 2, 16))
    attenuation = _enlarge(_trunk(anatomy, coarse), size)
    attenuation += _enlarge(_bowel(anatomy, _Frame.of(pose, max(size // 4, 16))), size)
    if _near_stomach(anatomy, coarse):
        attenuation += _stomach(anatomy, pose, frame)
    across = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    attenuation += np.float32(pose.shading[0]) * across + np.float32(pose.shading[1]) * across[:, None]
    noise = np.random.default_rng(pose.noise).standard_normal((size, size), dtype=np.float32)
    # A Poisson count of this size is normal; relative noise grows behind dense matter.
    attenuation += noise * np.exp(0.5 * (attenuation - attenuation.mean())) / np.float32(np.sqrt(pose.dose))
    return _develop(_blur(_blur(attenuation)), pose)


def stomach_region(anatomy: Anatomy, pose: Pose, size: int) -> npt.NDArray[np.bool_]:
    """Where the stomach is on the film that :func:`render` exposes, shape ``(size, size)``."""
    frame = _Frame.of(pose, size)
    if not _near_stomach(anatomy, _Frame.of(pose, max(size // 2, 16))):
        return np.zeros((size, size), dtype=np.bool_)
    _, _, depth = _stomach_frame(anatomy, pose, frame)
    region: npt.NDArray[np.bool_] = depth + frame.waves(anatomy.wall) > 0
    return region


@dataclass(frozen=True)
class _Frame:
    """Body coordinates of the pixels: ``origin + row * down + column * right``."""

    size: int
    origin: FloatArray
    down: FloatArray
    right: FloatArray

    @classmethod
    def of(cls, pose: Pose, size: int) -> _Frame:
        step = 2.0 / (size * pose.zoom)
        cosine, sine = np.cos(pose.angle), np.sin(pose.angle)
        right, down = step * np.array([cosine, sine]), step * np.array([-sine, cosine])
        return cls(size, np.asarray(pose.centre) - (size - 1) / 2 * (right + down), down, right)

    def coordinates(self) -> tuple[FloatImage, FloatImage]:
        index = np.arange(self.size)
        x, y = (
            (self.origin[axis] + self.down[axis] * index[:, None] + self.right[axis] * index).astype(np.float32)
            for axis in (0, 1)
        )
        return x, y

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Pixels around a body point."""
        step = float(np.hypot(*self.down))
        offset = np.array([x, y]) - self.origin
        row, column = float(offset @ self.down) / step**2, float(offset @ self.right) / step**2
        half = reach / step
        rows, columns = (
            slice(max(int(middle - half), 0), max(int(middle + half) + 2, 0)) for middle in (row, column)
        )
        return rows, columns

    def waves(self, waves: FloatArray) -> FloatImage:
        """Sum of plane waves; each is an outer product, since the frame is linear in row and column."""
        index = np.arange(self.size)
        rows = waves[:, :2] @ self.origin + waves[:, 2]
        rows = rows[:, None] + (waves[:, :2] @ self.down)[:, None] * index
        columns = (waves[:, :2] @ self.right)[:, None] * index
        left = np.concatenate([np.cos(rows), -np.sin(rows)]) * np.tile(waves[:, 3], 2)[:, None]
        top = np.concatenate([np.cos(columns), np.sin(columns)])
        field: FloatImage = np.einsum("wi,wj->ij", left.astype(np.float32), top.astype(np.float32))
        return field


def _step(value: FloatImage, width: float) -> FloatImage:
    """Smooth step from 0 to 1 around 0."""
    result: FloatImage = 0.5 + 0.5 * np.tanh(value / np.float32(width))
    return result


def _trunk(anatomy: Anatomy, frame: _Frame) -> FloatImage:
    """Soft tissue, spine, ribs and lung base."""
    x, y = frame.coordinates()
    body = 1.8 * np.sqrt(np.maximum(1.0 - (x / np.float32(anatomy.girth)) ** 2, 0.02))
    height, dome = anatomy.diaphragm
    lung = _step(np.float32(height) - np.float32(dome) * np.cos(2.2 * (np.abs(x) - 0.55)) - y, 0.05)
    attenuation = body * (1.0 - 0.62 * lung * _step(np.abs(x - np.float32(anatomy.spine[0])) - 0.30, 0.08))
    attenuation += 0.10 * frame.waves(anatomy.bend)
    attenuation += _spine(anatomy, x, y) + _ribs(anatomy, x, y)
    result: FloatImage = attenuation
    return result


def _bowel(anatomy: Anatomy, frame: _Frame) -> FloatImage:
    """Loops of bowel below the stomach, each a chain of haustra filled with gas or contents."""
    x, y = frame.coordinates()
    attenuation: FloatImage = np.zeros_like(x)
    if float(y.max()) < float((anatomy.bowel[..., 1] - anatomy.bowel[..., 2]).min()):
        return attenuation
    for loop in anatomy.bowel.astype(np.float32):
        columns, rows, radii = (loop[:, index, None, None] for index in range(3))
        depth = (1.0 - ((x - columns) ** 2 + (y - rows) ** 2) / radii**2).max(axis=0)
        inside = _step(depth, 0.12)
        attenuation += loop[0, 3] * inside * np.sqrt(np.maximum(depth, 0.05)) + 0.3 * inside * (1.0 - inside)
    return attenuation


def _spine(anatomy: Anatomy, x: FloatImage, y: FloatImage) -> FloatImage:
    offset, lean, width, height, phase = (np.float32(value) for value in anatomy.spine)
    across = (x - offset - lean * y) / width
    along = y / height + phase
    vertebra = _step(np.cos(2.0 * np.pi * along) + 0.72, 0.22)
    waist = across / (0.93 + 0.09 * np.cos(4.0 * np.pi * along))
    square = waist * waist
    body = np.exp(-((square * square) ** 2))
    rim = np.exp(-((np.abs(waist) - 0.93) ** 2) / 0.006) * 0.12
    process = np.exp(-((across / 0.22) ** 2)) * _step(np.cos(2.0 * np.pi * along + 0.9), 0.5)
    result: FloatImage = body * (0.20 + 0.30 * vertebra + 0.16 * process) + rim * vertebra
    return result


def _ribs(anatomy: Anatomy, x: FloatImage, y: FloatImage) -> FloatImage:
    spacing, phase, slope, curve = (np.float32(value) for value in anatomy.ribs)
    side = np.abs(x - np.float32(anatomy.spine[0]))
    along = (y - slope * side + curve * side**2 * 1.4) / spacing + phase
    distance = np.abs(along - np.round(along))
    rib = _step(0.13 - distance, 0.035)
    rim = np.exp(-((distance - 0.13) ** 2) / 0.0012)
    above = _step(0.5 * side - y - 0.6, 0.12) * _step(side - 0.25, 0.06)
    result: FloatImage = above * (0.13 * rib + 0.07 * rim)
    return result


def _near_stomach(anatomy: Anatomy, frame: _Frame) -> bool:
    middle = frame.origin + (frame.size - 1) / 2 * (frame.down + frame.right)
    half = frame.size / 2 * float(np.abs(frame.down).sum()) + float(anatomy.radius.max()) + 0.1
    return bool((np.abs(anatomy.centreline - middle).max(axis=1) < half).any())


def _stomach_frame(anatomy: Anatomy, pose: Pose, frame: _Frame) -> tuple[FloatImage, FloatImage, FloatImage]:
    """Coordinates inside the stomach on a quarter of the resolution, enlarged.

    Returns:
        Across (-1 to 1 from wall to wall), along (0 fundus to 1 pylorus), and depth (1 on the centreline, 0 on
        the wall, negative outside).
    """
    coarse = _Frame.of(pose, max(frame.size // 4, 16))
    x, y = coarse.coordinates()
    centre, tangent = anatomy.centreline.astype(np.float32), anatomy.tangent.astype(np.float32)
    radius = (anatomy.radius * pose.inflation).astype(np.float32)[:, None, None]
    right, down = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    distance = (right**2 + down**2) / radius**2
    nearest = distance.min(axis=0)
    weight = np.exp(-18.0 * (distance - nearest) / (0.3 + nearest))
    weight /= weight.sum(axis=0)
    offset = (down * tangent[:, 0, None, None] - right * tangent[:, 1, None, None]) / radius
    along = np.linspace(0.0, 1.0, len(centre), dtype=np.float32)[:, None, None]
    size = frame.size
    return (
        _enlarge((weight * offset).sum(axis=0), size),
        _enlarge((weight * along).sum(axis=0), size),
        _enlarge(1.0 - nearest, size),
    )


def _stomach(anatomy: Anatomy, pose: Pose, frame: _Frame) -> FloatImage:
    """Change of attenuation by gas, coat, folds, pool and bubbles."""
    across, along, depth = _stomach_frame(anatomy, pose, frame)
    depth += frame.waves(anatomy.wall)
    inside = _step(depth, 0.03)
    thickness = np.sqrt(np.maximum(depth, 0.02))
    severity = np.float32(anatomy.severity)

    # The coat is seen edge-on at the wall.
    coat = inside * 0.085 / thickness
    relief = _relief(anatomy, frame, across)
    amplitude = inside * _step(0.72 - along, 0.15) * np.float32(1.0 - 2.0 * (pose.inflation - 1.0))
    ridge = 1.0 - relief
    folds = amplitude * (0.30 * ridge + 0.75 * relief * ridge)
    grain = frame.waves(anatomy.grain)
    areae = inside * (0.02 + 0.13 * severity) * np.exp(-2.0 * grain**2)

    x, y = frame.coordinates()
    run = np.float32(np.sin(pose.tilt)) * x + np.float32(np.cos(pose.tilt)) * y
    level = np.float32(0.75 - anatomy.pool)
    surface = 0.02 if abs(pose.tilt) < 1.0 else 0.16
    pool = inside * _step(run - level, surface) * (0.35 + 0.9 * thickness)

    change: FloatImage = coat + folds + areae - 0.75 * inside * thickness + pool
    for column, row, radius in anatomy.bubbles.astype(np.float32):
        near = frame.window(column, row, 1.7 * radius)
        rim = ((x[near] - column) ** 2 + (y[near] - row) ** 2) / radius**2
        bubble = 0.35 * np.exp(-12.0 * (rim - 1.0) ** 2) - 0.15 * np.exp(-(rim**2))
        change[near] += inside[near] * bubble
    return change


def _relief(anatomy: Anatomy, frame: _Frame, across: FloatImage) -> FloatImage:
    """Fold height: 1 on the crest of a fold, 0 in the barium-filled groove between two."""
    severity = np.float32(anatomy.severity)
    count = np.float32(anatomy.folds) * (1.0 - 0.36 * severity)
    phase = np.float32(np.pi) * count * across + np.float32(anatomy.fold_phase)
    phase += frame.waves(anatomy.bend) + (0.15 + 1.25 * severity) * frame.waves(anatomy.twist)
    gaps = frame.waves(anatomy.gaps)
    width = -0.35 + 0.55 * severity + 0.45 * severity * gaps
    return _step(np.cos(phase) + width, 0.45)


@lru_cache(maxsize=8)
def _taps(small: int, large: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], FloatImage]:
    position = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0.0, small - 1.0)
    low = np.minimum(position.astype(np.intp), small - 2)
    return low, low + 1, (position - low).astype(np.float32)


def _enlarge(field: FloatImage, size: int) -> FloatImage:
    """Bilinear enlargement of a square field."""
    low, high, share = _taps(field.shape[0], size)
    rows = field[low] + (field[high] - field[low]) * share[:, None]
    left, right = rows.take(low, axis=1), rows.take(high, axis=1)
    right -= left
    right *= share
    right += left
    return right


def _blur(image: FloatImage) -> FloatImage:
    """Binomial blur of three pixels in each direction: the spread of screen and detector."""
    quarter, half = np.float32(0.25), np.float32(0.5)
    padded = np.pad(image, 1, mode="edge")
    rows: FloatImage = quarter * (padded[:-2] + padded[2:]) + half * padded[1:-1]
    result: FloatImage = quarter * (rows[:, :-2] + rows[:, 2:]) + half * rows[:, 1:-1]
    return result


def _develop(attenuation: FloatImage, pose: Pose) -> FloatImage:
    """Match the grey scale to a class-neutral target, as the processing of a reading station does."""
    probability = np.linspace(0.0, 1.0, 33)
    ordered = np.sort(attenuation[::3, ::3], axis=None)
    found = ordered[np.round(probability * (ordered.size - 1)).astype(np.intp)]
    # Logistic quantiles: most of the film is mid-grey, barium and gas fill the tails.
    inner = np.clip(probability, 0.01, 0.99)
    logistic = np.log(inner / (1.0 - inner)) / 9.2
    target = np.clip(pose.level + 0.95 * pose.contrast * logistic, 0.0, 1.0) ** pose.gamma
    return np.interp(attenuation, found, target).astype(np.float32)
