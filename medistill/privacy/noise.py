"""Secret randomness: Gaussian noise and sampling of patients, from the operating system.

No generator with a seed is behind it: whoever knew its state could take the noise off again. Random bits come from
the kernel and are used once. Tests may pass their own source of bytes; nothing else does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

#: Gives a number of random bytes.
Entropy = Callable[[int], bytes]
#: The operating system's entropy.
SYSTEM: Entropy = os.urandom
_PART = 1 << 20


def gaussian(shape: Sequence[int], deviation: float, *, entropy: Entropy = SYSTEM) -> Tensor:
    """Gaussian noise in double precision, by the inverse distribution function of 64 random bits for each value.

    One bit is the sign and 63 bits are a probability in ``(0, 1/2)``, so both tails are resolved to 9.2 standard
    deviations; less than 1e-19 of the mass lies beyond.

    Args:
        shape: Shape of the answer.
        deviation: Standard deviation.
        entropy: Source of random bytes.
    """
    count = int(np.prod(shape, dtype=np.int64))
    values = np.empty(count)
    for first in range(0, count, _PART):
        bits = _words(min(_PART, count - first), entropy)
        probability = ((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
        sign = np.where((bits & np.uint64(1)).astype(bool), 1.0, -1.0)
        values[first : first + len(bits)] = sign * ndtri(probability)
    return torch.from_numpy(values * deviation).reshape(tuple(shape))


def sampled(count: int, rate: float, *, entropy: Entropy = SYSTEM) -> Tensor:
    """Who takes part: each of ``count`` patients on their own with probability ``rate``; shape ``(count,)``.

    The probability is rounded down to a multiple of 2**-64, never up.

    Args:
        count: Patients.
        rate: In ``(0, 1]``.
        entropy: Source of random bytes.
    """
    if rate >= 1:
        return torch.ones(count, dtype=torch.bool)
    threshold = np.uint64(int(rate * 2.0**64))
    return torch.from_numpy(_words(count, entropy) < threshold)


def _words(count: int, entropy: Entropy) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(entropy(8 * count), dtype=np.uint64)
