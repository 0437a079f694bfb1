"""What is drawn at random of a made-up patient and of each film; :mod:`.film` renders it.

The body frame has its origin in the middle of the stomach, x to the right of the film, y downwards; 1 is half the
width of a film at zoom 1. Chronic gastritis is one latent severity of the patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline

FloatArray = npt.NDArray[np.float64]

CENTRELINE = ((0.44, -0.66), (0.43, -0.25), (0.32, 0.16), (0.04, 0.46), (-0.33, 0.44), (-0.60, 0.20))
RADII = (0.40, 0.43, 0.39, 0.33, 0.24, 0.13)
CENTRELINE_POINTS = 22


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What stays the same in all films of a patient.

    Args:
        severity: Visible degree of gastritis in ``(0, 1)``.
        centreline: Points ``(k, 2)`` along the middle of the stomach, fundus to pylorus.
        tangent: Unit tangents ``(k, 2)``.
        radius: Half-width of the stomach at each point ``(k,)``.
        folds: Number of folds across the stomach without disease.
        fold_phase: Offset of the folds in radians.
        wall, bend, twist, gaps, grain: Plane waves ``(n, 4)`` (x and y frequency, phase, amplitude) of the
            outline, the course of the folds, their tortuosity, their interruptions and the areae gastricae.
        spine: Offset, lean, half-width, vertebral height and phase of the spine.
        ribs: Spacing, phase, slope and curvature of the ribs.
        diaphragm: Height and dome of the diaphragm.
        bowel: Haustra ``(loops, n, 4)``: x, y, radius, and gas (negative) or contents (positive).
        pool: Share of the stomach filled by the barium pool.
        bubbles: Gas bubbles ``(n, 3)``: x, y, radius.
        girth: Half-width of the trunk.
    """

    severity: float
    centreline: FloatArray
    tangent: FloatArray
    radius: FloatArray
    folds: float
    fold_phase: float
    wall: FloatArray
    bend: FloatArray
    twist: FloatArray
    gaps: FloatArray
    grain: FloatArray
    spine: FloatArray
    ribs: FloatArray
    diaphragm: FloatArray
    bowel: FloatArray
    pool: float
    bubbles: FloatArray
    girth: float


@dataclass(frozen=True, kw_only=True)
class Pose:
    """What changes from film to film of a patient.

    Args:
        centre: Body point in the middle of the film.
        angle: Rotation of the film in radians.
        zoom: Magnification.
        tilt: Direction in which the barium runs, radians from straight down; supine lets it run to the fundus.
        inflation: Width of the stomach relative to the anatomy.
        dose: Photons per pixel behind average tissue.
        shading: Heel effect along x and y.
        level, contrast, gamma: Grey-scale target.
        noise: Seed of the quantum noise.
    """

    centre: tuple[float, float]
    angle: float
    zoom: float
    tilt: float
    inflation: float
    dose: float
    shading: tuple[float, float]
    level: float
    contrast: float
    gamma: float
    noise: int


def draw_anatomy(rng: np.random.Generator, *, gastritis: bool, difficulty: float) -> Anatomy:
    """Draw one patient.

    Args:
        rng: Generator of the patient.
        gastritis: Whether the patient has chronic gastritis.
        difficulty: Overlap of the classes in ``[0, 1]``: the latent severities are normal with unit variance,
            their means 5.2 apart at 0 and 0.6 apart at 1.
    """
    gap = 5.2 - 4.6 * difficulty
    latent = rng.normal() + (gap / 2 if gastritis else -gap / 2)
    points = np.asarray(CENTRELINE) + rng.normal(0.0, 0.075, (len(CENTRELINE), 2))
    points[:, 0] *= rng.uniform(0.85, 1.12)
    knots = np.arange(len(points))
    course = CubicSpline(knots, points)
    # Points lie closer together where the stomach is narrow.
    position = (len(points) - 1.0) * np.linspace(0.0, 1.0, CENTRELINE_POINTS) ** 0.75
    slope = course(position, 1)
    widths = np.asarray(RADII) * rng.normal(1.0, 0.07, len(RADII)) * rng.uniform(0.9, 1.1)
    bubbles = int(rng.integers(0, 6))
    return Anatomy(
        severity=float(1.0 / (1.0 + np.exp(-1.3 * latent))),
        centreline=course(position),
        tangent=slope / np.linalg.norm(slope, axis=1, keepdims=True),
        radius=np.interp(position, knots, widths),
        folds=rng.uniform(5.6, 7.0),
        fold_phase=rng.uniform(0.0, 2.0 * np.pi),
        wall=_draw_waves(rng, 8, frequency=5.0, amplitude=0.16),
        bend=_draw_waves(rng, 6, frequency=3.0, amplitude=0.9),
        twist=_draw_waves(rng, 10, frequency=10.0, amplitude=1.0),
        gaps=_draw_waves(rng, 8, frequency=8.0, amplitude=1.0),
        grain=_draw_waves(rng, 14, frequency=46.0, amplitude=1.0),
        spine=np.array(
            [
                rng.normal(-0.12, 0.1),
                rng.normal(0.0, 0.05),
                rng.uniform(0.19, 0.25),
                rng.uniform(0.42, 0.52),
                rng.uniform(0, 1),
            ]
        ),
        ribs=np.array(
            [rng.uniform(0.30, 0.40), rng.uniform(0, 1), rng.uniform(0.2, 0.45), rng.uniform(0.05, 0.15)]
        ),
        diaphragm=np.array([rng.normal(-1.18, 0.06), rng.uniform(0.10, 0.22)]),
        bowel=_draw_bowel(rng),
        pool=rng.uniform(0.25, 0.5),
        bubbles=np.column_stack(
            [rng.uniform(0.0, 0.7, bubbles), rng.uniform(-0.7, 0.4, bubbles), rng.uniform(0.018, 0.05, bubbles)]
        ),
        girth=rng.uniform(1.35, 1.75),
    )


def draw_pose(rng: np.random.Generator, *, outside: bool) -> Pose:
    """Draw one film; ``outside`` moves the field of view off the stomach."""
    x, y = rng.normal(0.0, 0.035, 2)
    if outside:
        x += rng.uniform(-0.35, 0.25)
        y += rng.choice([-1.95, 2.05]) + rng.uniform(-0.2, 0.2)
    supine = rng.random() < 0.7
    return Pose(
        centre=(float(x), float(y)),
        angle=float(rng.normal(0.0, 0.035)),
        zoom=float(rng.normal(1.0, 0.03)),
        tilt=float((2.75 if supine else 0.0) + rng.normal(0.0, 0.08)),
        inflation=float(rng.normal(1.0, 0.03)),
        dose=float(np.exp(rng.normal(np.log(4000.0), 0.4))),
        shading=(float(rng.normal(0.0, 0.12)), float(rng.normal(0.0, 0.12))),
        level=float(rng.normal(0.5, 0.03)),
        contrast=float(rng.normal(1.0, 0.08)),
        gamma=float(np.exp(rng.normal(0.0, 0.08))),
        noise=int(rng.integers(2**63)),
    )


def _draw_waves(rng: np.random.Generator, count: int, *, frequency: float, amplitude: float) -> FloatArray:
    """Isotropic random field of standard deviation ``amplitude`` around one spatial frequency."""
    direction = rng.uniform(0.0, 2.0 * np.pi, count)
    length = frequency * rng.uniform(0.6, 1.3, count)
    strength = np.full(count, amplitude * np.sqrt(2.0 / count))
    return np.column_stack(
        [length * np.cos(direction), length * np.sin(direction), rng.uniform(0, 2 * np.pi, count), strength]
    )


def _draw_bowel(rng: np.random.Generator) -> FloatArray:
    """Loops of nine haustra that wind through the abdomen below the stomach."""
    loops, haustra = 7, 9
    heading = rng.uniform(0.0, 2.0 * np.pi, (loops, 1)) + rng.normal(0.0, 0.45, (loops, haustra)).cumsum(axis=1)
    radius = rng.uniform(0.11, 0.21, (loops, 1)) * rng.uniform(0.85, 1.15, (loops, haustra))
    x = rng.uniform(-0.9, 0.9, (loops, 1)) + (1.15 * radius * np.cos(heading)).cumsum(axis=1)
    y = rng.uniform(1.5, 2.9, (loops, 1)) + (1.15 * radius * np.sin(heading)).cumsum(axis=1)
    filling = np.repeat(rng.choice([-0.6, -0.45, 0.35], (loops, 1)), haustra, axis=1)
    return np.stack([x, np.maximum(y, 1.2 + radius), radius, filling], axis=-1)
