"""Is a released image a mixture of two patients' images?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medistill.audit.attack import Floats
from medistill.audit.copy_alarm import limit_of_gaps, unit_rows
from medistill.core.images import ImageSet, averaged

_NEARLY_ONE = 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """The best pair of patients for every released image.

    Args:
        patients: Its two patients, shape ``(m, 2)``.
        correlation: Multiple correlation of the image with the two, in ``[0, 1]``.
        gap: How far the best pair stands out from the best pair of two others, as a difference of Fisher's z.
        mixed: Whether that is further than for any image of people outside the pool, and than chance allows.
    """

    patients: NDArray[np.str_]
    correlation: Floats
    gap: Floats
    mixed: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class MixtureSearch:
    r"""Search every released image among all weighted sums of two patients' images.

    The mean of the reference is taken off every image. With :math:`r_1, r_2` the correlations of a released image
    with two others, and :math:`r_{12}` theirs, the best weights give

    .. math:: R^2 = \frac{r_1^2 + r_2^2 - 2 r_1 r_2 r_{12}}{1 - r_{12}^2}.

    The first of a pair is taken from the ``firsts`` nearest images, the second from the whole pool. What pairs of
    strangers reach is learned from the reference, as in :class:`~medistill.audit.copy_alarm.CopyAlarm`; how well a
    pair explains an image does not count by itself, since any two explain a smooth one.

    Args:
        side: Side length at which images are compared.
        volume_side: The same for volumes.
        firsts: Nearest images that are tried as the first of a pair.
        usual: Images of the reference that are searched in the same way, at most.

    References:
        Zhang, Cisse, Dauphin & Lopez-Paz 2018, arXiv:1710.09412 (mixtures of two images as training data).

    Privacy:
        Reads non-released data of the pool and the reference.
    """

    side: int = 32
    volume_side: int = 16
    firsts: int = 20
    usual: int = 200

    def within(self, pool: ImageSet, reference: Tensor) -> MixturesWithin:
        """Learn what pairs of strangers reach, to search for several releases.

        Args:
            pool: Images of all patients that could have been mixed, and of others.
            reference: Images of people outside the pool, shape ``(r, c, h, w)``.
        """
        return MixturesWithin(self, pool, reference)

    def flat(self, images: Tensor) -> Floats:
        """Images as rows, shape ``(n, d)``."""
        flat: Floats = averaged(images, plane=self.side, solid=self.volume_side).flatten(1).double().numpy()
        return flat


class MixturesWithin:
    """A pool of patients with what pairs of strangers reach in it.

    Args:
        settings: How images are compared.
        pool: Images of all patients that could have been mixed, and of others.
        reference: Images of people outside the pool, shape ``(r, c, h, w)``.
    """

    def __init__(self, settings: MixtureSearch, pool: ImageSet, reference: Tensor) -> None:
        self._settings = settings
        outside = settings.flat(reference)
        self._mean = outside.mean(0)
        self._pool = unit_rows(settings.flat(pool.images) - self._mean)
        self._names, self._of_image = np.unique(np.asarray(pool.patients), return_inverse=True)
        strangers = unit_rows(outside[: settings.usual] - self._mean)
        self._usual = np.array([self._best(image)[2] for image in strangers])

    def search(self, released: Tensor) -> Mixtures:
        """Search released images, shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``."""
        found = [self._best(image) for image in unit_rows(self._settings.flat(released) - self._mean)]
        pairs, reached, gaps = (np.array(part) for part in zip(*found, strict=True))
        limit = limit_of_gaps(self._usual, len(released))
        return Mixtures(patients=self._names[pairs], correlation=reached, gap=gaps, mixed=gaps > limit)

    def _best(self, image: Floats) -> tuple[tuple[int, int], float, float]:
        return best_pair(image, self._pool, self._of_image, firsts=self._settings.firsts)


def best_pair(
    image: Floats, pool: Floats, of_image: NDArray[np.intp], *, firsts: int
) -> tuple[tuple[int, int], float, float]:
    """The patients of the best pair, its correlation, and its gap to the best pair of two other patients.

    Args:
        image: A row of length 1 and mean 0, shape ``(d,)``.
        pool: Such rows, shape ``(n, d)``.
        of_image: Number of each image's patient, shape ``(n,)``.
        firsts: Nearest images that are tried as the first of a pair.
    """
    single = pool @ image
    nearest = np.argsort(-np.abs(single))[:firsts]
    between = pool[nearest] @ pool.T
    squared = single[nearest][:, None] ** 2 + single[None] ** 2
    squared -= 2 * single[nearest][:, None] * single[None] * between
    explained = np.clip(squared / np.maximum(1 - between**2, 1e-3), 0.0, 1.0)
    explained[of_image[nearest][:, None] == of_image[None]] = 0.0
    first, second = np.unravel_index(int(explained.argmax()), explained.shape)
    best = explained[first, second]
    pair = (int(of_image[nearest[first]]), int(of_image[second]))
    shared_first, shared_second = (np.isin(side, pair) for side in (of_image[nearest], of_image))
    explained[shared_first] = 0.0
    explained[:, shared_second] = 0.0
    best, other = (float(np.sqrt(value)) for value in (best, explained.max()))
    return pair, best, float(np.arctanh(min(best, _NEARLY_ONE)) - np.arctanh(min(other, _NEARLY_ONE)))
