"""How many iterations fit into a given CPU time, from two short runs."""

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
_TRIES, _GROWTH = 3, 4

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
    """Time two short runs in this process.

    The second run is made just long enough to differ clearly from the first; where it does not, a longer one
    takes its place.

    Args:
        run: Runs the distiller for a number of iterations.
        budget: CPU seconds that are to be met later; a tenth of them is the length of the second run.

    Returns:
        The cost, and the two runs it comes from.
    """
    watch, least = _StepWatch(FIRST_ITERATIONS), max(_LEAST_SECONDS, _SHARE_OF_BUDGET * budget)
    runs = [(FIRST_ITERATIONS, _timed(run, FIRST_ITERATIONS, watch))]
    more = math.ceil(least / (watch.seconds_a_step or runs[0][1] / FIRST_ITERATIONS))
    for _ in range(_TRIES):
        iterations = FIRST_ITERATIONS + max(1, more)
        runs.append((iterations, _timed(run, iterations, Progress())))
        if runs[-1][1] - runs[0][1] >= least / 2:
            break
        more *= _GROWTH
    return fit_cost(runs[0], runs[-1]), (runs[0], runs[-1])


def _timed(run: Callable[[int, Progress], Any], iterations: int, progress: Progress) -> float:
    began = time.process_time()
    run(iterations, progress)
    return time.process_time() - began


class _StepWatch(Progress):
    """Sees how long the last of a known number of steps took."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds_a_step = 0.0

    def track(
        self, items: Iterable[Item], description: str, *, total: int | None = None, completed: int = 0
    ) -> Iterator[Item]:
        """Time the steps of a loop that has the expected length."""
        before = 0.0
        for item in items:
            before = time.process_time()
            yield item
            if total == self.steps:
                self.seconds_a_step = time.process_time() - before
