"""How many iterations fit into a given CPU time, from short runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from medistill.errors import ConfigError
from medistill.progress import Progress

#: Iterations of the first run, and the part of the budget that the second one may add to it.
FIRST_ITERATIONS = 3
_SHARE_OF_BUDGET = 0.1
_LEAST_SECONDS = 0.5
_TRIES, _GROWTH = 4, 4
#: A line that says more than this times what later iterations took has seen the beginning only.
_AGREE = 1.5

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU seconds of a distiller as a straight line in its iterations.

    Args:
        fixed: What is spent whatever the number of iterations: class means, experts, a teacher.
        per_step: What each iteration adds.
    """

    fixed: float
    per_step: float

    def seconds(self, iterations: int) -> float:
        """CPU seconds that a run should take."""
        return self.fixed + self.per_step * iterations


def fit_cost(first: tuple[int, float], second: tuple[int, float]) -> Cost:
    r"""The straight line through two runs ``(iterations, seconds)``.

    .. math:: b = \frac{t_2 - t_1}{n_2 - n_1}, \qquad a = \max(0, t_1 - b n_1)

    Raises:
        ConfigError: If more iterations did not take longer, so that no budget can be met.
    """
    (n1, t1), (n2, t2) = sorted((first, second))
    if n1 == n2 or t2 <= t1:
        raise ConfigError(
            f"The cost of an iteration could not be told: {n1} took {t1:.2f} s and {n2} took {t2:.2f} s. "
            "Give 'iterations' in the settings of this method."
        )
    per_step = (t2 - t1) / (n2 - n1)
    return Cost(fixed=max(0.0, t1 - per_step * n1), per_step=per_step)


def share_budget(
    costs: Mapping[str, Cost], budget: float, shares: Mapping[str, float] | None = None
) -> Mapping[str, int]:
    """Iterations of every distiller of a recipe such that together they take the budget.

    The fixed costs are paid first; what is left is divided by the shares.

    Args:
        costs: Cost of each distiller.
        budget: CPU seconds in all.
        shares: Weight of each distiller; equal where not given.

    Raises:
        ConfigError: If the fixed costs leave no time for one iteration of each.
    """
    shares = shares or {}
    weights = {name: shares.get(name, 1.0) for name in costs}
    left = budget - sum(cost.fixed for cost in costs.values())
    total = sum(weights.values())
    found = {name: math.floor(left * weights[name] / total / cost.per_step) for name, cost in costs.items()}
    short = [name for name, iterations in found.items() if iterations < 1]
    if short:
        fixed = sum(cost.fixed for cost in costs.values())
        raise ConfigError(
            f"{budget:g} CPU seconds do not suffice: before the first iteration {fixed:.1f} s are spent, and one "
            f"iteration of {short[0]} takes {costs[short[0]].per_step:.2f} s. Raise budget_seconds or lower the "
            "settings that are paid once."
        )
    return found


def probe(run: Callable[[int, Progress], Any], *, budget: float) -> tuple[Cost, Sequence[tuple[int, float]]]:
    """Time short runs in this process, each longer than the one before, and take the line through the last two.

    A method may spend more on its first iterations than on later ones (a pool of networks is filled), so the
    length of a run follows from what the later half of the iterations of the one before took, and a pair of runs
    counts only if such iterations cost about what the line says.

    Args:
        run: Runs the distiller for a number of iterations.
        budget: CPU seconds that are to be met later; a tenth of them is what the last run adds.

    Returns:
        The cost, and the two runs it comes from.
    """
    least = max(_LEAST_SECONDS, _SHARE_OF_BUDGET * budget)
    seconds, late = _timed(run, FIRST_ITERATIONS)
    runs, late = [(FIRST_ITERATIONS, seconds)], late or seconds / FIRST_ITERATIONS
    for _ in range(_TRIES):
        iterations = runs[-1][0] + max(1, math.ceil(least / late))
        seconds, later = _timed(run, iterations)
        runs.append((iterations, seconds))
        (n1, t1), (n2, t2) = runs[-2:]
        fitted = (t2 - t1) / (n2 - n1)
        late = later or max(fitted, late / _GROWTH)
        if t2 - t1 >= least / 2 and fitted <= _AGREE * late:
            break
    return fit_cost(*runs[-2:]), runs[-2:]


def _timed(run: Callable[[int, Progress], Any], iterations: int) -> tuple[float, float]:
    """CPU seconds of a run, and of one of its later iterations; 0 where these are not seen."""
    watch, began = _StepWatch(iterations), time.process_time()
    run(iterations, watch)
    return time.process_time() - began, watch.seconds_a_step()


class _StepWatch(Progress):
    """Sees what the later half of a known number of steps took."""

    def __init__(self, steps: int) -> None:
        self._steps, self._seconds = steps, list[float]()

    def seconds_a_step(self) -> float:
        """Mean of the later half; 0 where no loop had the expected length."""
        later = self._seconds[len(self._seconds) // 2 :]
        return sum(later) / len(later) if later else 0.0

    def track(
        self, items: Iterable[Item], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Item]:
        """Time the steps of a loop that has the expected length."""
        for item in items:
            before = time.process_time()
            yield item
            if total == self._steps:
                self._seconds.append(time.process_time() - before)
