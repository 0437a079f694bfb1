"""Features that no patient decides: where an image is bright, and where it has edges of which direction.

An image's grey values are standardised by its own mean and spread. Its features are the grey values averaged on a
coarse grid, and the logarithm of the strength of oriented edges at several scales averaged on a grid (a scattering
transform of the first order, Bruna & Mallat 2013, with the logarithm of Anden & Mallat 2014: in a sharper film all
edges are stronger by one factor, which adds a constant), standardised and turned by principal components. Mean,
spread and components are those of *pink noise*, whose spectrum is that of natural images; no real image decides
them.

Linear classifiers on such features are what differential privacy costs least (Tramer & Boneh 2021).

References:
    Bruna & Mallat, PAMI 2013, arXiv:1203.1513. Anden & Mallat, IEEE TSP 2014, arXiv:1304.6763. Tramer & Boneh,
    ICLR 2021, arXiv:2011.11660.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.images import averaged

_PLANE_AXES = 2
#: Images are averaged to these sides first, volumes to the second.
_PLANE_SIDE, _SOLID_SIDE = 32, 16
_SCALES = 3
_WAVELENGTH = 4.0
#: Added to the strength of edges before the logarithm: flat parts of an image all have the same.
_FLAT = 0.05
_FIELDS = 1200
_BATCH = 64
_LARGEST = 1 << 22


class PublicFeatures:
    """A fixed function from images to unit vectors, differentiable in the images.

    Args:
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)``.
        dimension: Features in all; fewer where the image is small.
        compute: Device.
    """

    def __init__(self, image_shape: tuple[int, ...], dimension: int, compute: Compute) -> None:
        side = _PLANE_SIDE if len(image_shape) == _PLANE_AXES + 1 else _SOLID_SIDE
        shape = (image_shape[0], *(min(length, side) for length in image_shape[1:]))
        mean, spread, components = (compute.put(part) for part in _of_pink_noise(shape))
        self._mean, self._spread, self._components = mean, spread, components[:, :dimension]
        self._filters = compute.put(_filters(len(shape) - 1))

    @property
    def dimension(self) -> int:
        """Length of a feature vector."""
        return int(self._components.shape[1])

    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors, shape ``(n, dimension)``."""
        standard = (described(images, self._filters) - self._mean) / self._spread
        return F.normalize(standard @ self._components, dim=1)


@lru_cache(maxsize=8)
def _of_pink_noise(image_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, spread and principal components of what describes pink noise; the same on every device."""
    fields, filters = pink_noise(_FIELDS, image_shape, seed=0), _filters(len(image_shape) - 1)
    found = torch.cat([described(part, filters) for part in torch.split(fields, _BATCH)])
    spread = found.std(0) + 0.1 * found.std(0).mean()
    standard = ((found - found.mean(0)) / spread).double()
    components = torch.linalg.eigh(standard.T @ standard).eigenvectors.flip(1)
    return found.mean(0), spread, components.to(found)


def described(images: Tensor, filters: Tensor) -> Tensor:
    """Grey values and log strength of edges, averaged on grids, shape ``(n, d)``.

    Args:
        images: Shape ``(n, c, h, w)`` or ``(n, c, d, h, w)``.
        filters: Those of :func:`oriented_filters`.
    """
    small, plane = averaged(images, plane=_PLANE_SIDE, solid=_SOLID_SIDE), images.ndim == _PLANE_AXES + 2
    flat = small.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-3)
    standard = flat.view_as(small)
    coarse, fine = (7, 5) if plane else (4, 2)
    rows = [pooled(standard, coarse)]
    grey = standard.mean(1, keepdim=True)
    for scale in range(_SCALES):
        if scale:
            grey = F.avg_pool2d(grey, 2) if plane else F.avg_pool3d(grey, 2)
        rows.append(pooled((_edges(grey, filters) + _FLAT).log(), fine))
    return torch.cat(rows, dim=1)


def _edges(grey: Tensor, filters: Tensor) -> Tensor:
    axes, radius = grey.ndim - 2, filters.shape[-1] // 2
    padded = F.pad(grey, (radius,) * 2 * axes, mode="replicate")
    convolve = F.conv2d if axes == _PLANE_AXES else F.conv3d
    even, odd = convolve(padded, filters).chunk(2, dim=1)
    return (even.square() + odd.square() + 1e-4).sqrt()


def _filters(axes: int) -> Tensor:
    return oriented_filters(axes, radius=3 if axes == _PLANE_AXES else 2)


def pooled(maps: Tensor, grid: int) -> Tensor:
    """Averages of maps on a grid, shape ``(n, channels * grid ** axes)``."""
    pool = F.adaptive_avg_pool2d if maps.ndim == _PLANE_AXES + 2 else F.adaptive_avg_pool3d
    return pool(maps, grid).flatten(1)


def oriented_filters(axes: int, *, radius: int) -> Tensor:
    """Waves under a Gaussian, in cosine and then in sine phase, shape ``(2 * directions, 1, side, ...)``.

    Of planes eight directions, of volumes the axes and the diagonals of the faces.
    """
    if axes == _PLANE_AXES:
        angles = [math.pi * number / 8 for number in range(8)]
        directions = torch.tensor([[math.sin(angle), math.cos(angle)] for angle in angles])
    else:
        signs = [s for s in itertools.product((-1.0, 0.0, 1.0), repeat=3) if 1 <= sum(map(abs, s)) <= 2]
        half = [sign for sign in signs if sign > (0.0, 0.0, 0.0)]
        directions = F.normalize(torch.tensor(half), dim=1)
    points = torch.stack(torch.meshgrid([torch.arange(-radius, radius + 1.0)] * axes, indexing="ij"))
    envelope = torch.exp(-points.square().sum(0) / (2 * (radius / 2) ** 2))
    along = torch.einsum("da,a...->d...", directions, points) * 2 * math.pi / _WAVELENGTH
    waves = torch.cat([along.cos(), along.sin()]) * envelope
    inside = tuple(range(1, axes + 1))
    waves = waves - envelope * waves.sum(inside, keepdim=True) / envelope.sum()
    return (waves / waves.square().sum(inside, keepdim=True).sqrt())[:, None]


def pink_noise(
    count: int, image_shape: tuple[int, ...], *, seed: int, powers: tuple[float, float] = (1.0, 2.0)
) -> Tensor:
    """Random fields whose amplitude falls with frequency by a power between two, cut to ``[0, 1]``.

    Args:
        count: How many.
        image_shape: ``(c, h, w)`` or ``(c, d, h, w)``; the channels are alike.
        seed: Public seed.
        powers: Smallest and largest power; a larger one makes smoother fields.
    """
    generator, sides = torch.Generator().manual_seed(seed), image_shape[1:]
    axes = tuple(range(1, len(sides) + 1))
    low, high = powers
    power = low + (high - low) * torch.rand((count, *(1,) * len(sides)), generator=generator)
    fields = []
    several = max(1, _LARGEST // math.prod(2 * side for side in sides))
    for part in torch.split(power, several):  # twice the side, so that opposite edges differ
        white = torch.randn((len(part), *(2 * side for side in sides)), generator=generator)
        amplitude = _frequencies(white.shape[1:]) ** -part
        field = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) * amplitude, s=white.shape[1:], dim=axes)
        fields.append(field[(slice(None), *(slice(side) for side in sides))])
    field = torch.cat(fields)
    field = (field - field.mean(axes, keepdim=True)) / field.std(axes, keepdim=True)
    return (0.5 + 0.17 * field).clamp_(0.0, 1.0)[:, None].expand(-1, *image_shape).contiguous()


def _frequencies(sides: torch.Size) -> Tensor:
    along = [torch.fft.fftfreq(side) for side in sides[:-1]] + [torch.fft.rfftfreq(sides[-1])]
    grids = torch.meshgrid(along, indexing="ij")
    return torch.stack(grids).square().sum(0).sqrt().clamp_min(1 / min(sides))
