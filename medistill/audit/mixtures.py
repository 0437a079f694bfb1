"""Is a released image a mixture of two patients' images?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medistill.audit.attack import Floats
from medistill.audit.copy_alarm import limit_of_gaps
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

    def search(self, released: Tensor, pool: ImageSet, reference: Tensor) -> Mixtures:
        """Search the released images.

        Args:
            released: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
            pool: Images of all patients that could have been mixed, and of others.
            reference: Images of people outside the pool, shape ``(r, c, h, w)``.
        """
        outside = self._flat(reference)
        mean = outside.mean(0)
        of_pool = _unit(self._flat(pool.images) - mean)
        who, of_image = np.unique(np.asarray(pool.patients), return_inverse=True)
        usual = [self._best(image, of_pool, of_image) for image in _unit(outside[: self.usual] - mean)]
        found = [self._best(image, of_pool, of_image) for image in _unit(self._flat(released) - mean)]
        pairs, reached, gaps = (np.array(part) for part in zip(*found, strict=True))
        limit = limit_of_gaps(np.array([gap for _, _, gap in usual]), len(released))
        return Mixtures(
            patients=who[pairs],
            correlation=reached,
            gap=gaps,
            mixed=gaps > limit,
        )

    def _flat(self, images: Tensor) -> Floats:
        flat: Floats = averaged(images, plane=self.side, solid=self.volume_side).flatten(1).double().numpy()
        return flat

    def _best(
        self, image: Floats, pool: Floats, of_image: NDArray[np.intp]
    ) -> tuple[tuple[int, int], float, float]:
        """The patients of the best pair, its correlation, and its gap to the best pair of two other patients."""
        single = pool @ image
        firsts = np.argsort(-np.abs(single))[: self.firsts]
        between = pool[firsts] @ pool.T
        squared = single[firsts][:, None] ** 2 + single[None] ** 2
        squared -= 2 * single[firsts][:, None] * single[None] * between
        explained = np.clip(squared / np.maximum(1 - between**2, 1e-3), 0.0, 1.0)
        explained[of_image[firsts][:, None] == of_image[None]] = 0.0
        first, second = np.unravel_index(int(explained.argmax()), explained.shape)
        best = explained[first, second]
        pair = (int(of_image[firsts[first]]), int(of_image[second]))
        shared_first, shared_second = (np.isin(side, pair) for side in (of_image[firsts], of_image))
        explained[shared_first] = 0.0
        explained[:, shared_second] = 0.0
        best, other = (float(np.sqrt(value)) for value in (best, explained.max()))
        return pair, best, float(np.arctanh(min(best, _NEARLY_ONE)) - np.arctanh(min(other, _NEARLY_ONE)))


def _unit(rows: Floats) -> Floats:
    rows = rows - rows.mean(1, keepdims=True)
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
