"""The best of a random number of runs: what it costs, against integrals and the published bound; what is drawn."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chisquare, norm
from torch import Tensor

from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.errors import PrivacyError
from medistill.privacy import Ledger, PrivateCurator
from medistill.privacy.accounting import Mechanism, Selected, analytic_delta, analytic_epsilon, epsilon_of
from medistill.privacy.calibration import calibrate
from medistill.privacy.selection import another_run, drawn, stretch
from tests.privacy.asking import BUDGET, cohort, curator, marks, pixels, silent

Floats = NDArray[np.float64]
DELTA = 1e-5


def once(noise_multiplier: float) -> Mechanism:
    return Mechanism(noise_multiplier=noise_multiplier)


def best_of(expected_runs: float, *noise: float) -> Selected:
    return Selected(mechanisms=tuple(map(once, noise)), expected_runs=expected_runs)


def bits(seed: str) -> Callable[[int], bytes]:
    """Bytes that look random and are the same each time."""
    counter = itertools.count()

    def entropy(count: int) -> bytes:
        return hashlib.shake_256(f"{seed}/{next(counter)}".encode()).digest(count)

    return entropy


# -- what it costs ----------------------------------------------------------------------------------------------


@given(st.floats(1.001, 100.0), st.floats(0.05, 100.0))
@example(100.0, 0.01)
@example(1.000001, 1e5)
def test_the_stretch_is_the_largest_ratio_of_all_events(expected_runs: float, noise: float) -> None:
    share, u = 1 / expected_runs, norm.cdf(np.linspace(-12, 12, 4001))
    other = norm.cdf(norm.ppf(u) + 1 / noise)
    ratios = np.log((share + (1 - share) * other) / (share + (1 - share) * u))
    assert stretch(expected_runs, noise) >= 2 * ratios.max() - 1e-13
    assert stretch(expected_runs, noise) == pytest.approx(2 * ratios.max(), rel=1e-3, abs=1e-13)


def chosen(x: Floats, moved: float, expected_runs: float) -> Floats:
    """Density of the best run's score, where the score of one run is a standard Gaussian about ``moved``."""
    share = 1 / expected_runs
    found: Floats = norm.pdf(x - moved) * share / (1 - (1 - share) * norm.cdf(x - moved)) ** 2
    return found


def beyond(epsilon: float, here: Floats, there: Floats, rest: float) -> float:
    """Sum of a hockey-stick of densities, beside a Gaussian that moves by ``rest``."""
    left = epsilon - np.log(here / there)
    if rest:
        beside = norm.cdf(rest / 2 - left / rest) - np.exp(left) * norm.cdf(-rest / 2 - left / rest)
    else:
        beside = np.maximum(0.0, 1 - np.exp(left))
    return float((here * beside).sum())


def true_delta(epsilon: float, expected_runs: float, score: float, rest: float) -> float:
    """Exact, both ways around: a score that moves by ``score``, and beside it an answer that moves by ``rest``."""
    x = np.linspace(-11, 11 + abs(score), 20_001)
    both = [chosen(x, moved, expected_runs) for moved in (0.0, score)]
    return max(beyond(epsilon, both[i], both[1 - i], rest) for i in range(2)) * float(x[1] - x[0])


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("expected_runs", [1.5, 3.0, 20.0])
@pytest.mark.parametrize("part", [-1.0, -0.7, -0.2, 0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_no_score_loses_more_than_is_accounted(epsilon: float, expected_runs: float, part: float) -> None:
    """``part`` of what a patient moves an answer by is seen by the score, to its better or its worse."""
    plan = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="all"),), expected_runs=expected_runs)
    found = calibrate(Budget(epsilon=epsilon, delta=DELTA), plan)
    moved = 1 / found.noise_multipliers[0]
    lost = true_delta(epsilon, expected_runs, part * moved, math.sqrt(1 - part**2) * moved)
    assert lost <= DELTA


def test_the_integral_is_that_of_one_gaussian_where_the_score_sees_nothing() -> None:
    assert true_delta(1.0, 3.0, 0.0, 0.5) == pytest.approx(analytic_delta(2.0, 1.0), rel=1e-6)


def test_some_score_loses_more_than_one_run_does() -> None:
    """Keeping the best is not free: with the noise of one run a score that sees everything breaks the claim."""
    noise = calibrate(
        Budget(epsilon=1.0, delta=DELTA), PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="all"),))
    ).noise_multipliers[0]
    assert true_delta(1.0, 5.0, -1 / noise, 0.0) > 1.2 * DELTA


@pytest.mark.parametrize(("first", "second"), [(-1.0, -1.0), (-1.0, 0.5), (0.7, 0.7)])
def test_two_selections_together_lose_no_more_than_is_accounted(first: float, second: float) -> None:
    """Scores that see a part of what a patient moves, integrated over both answers; the rest is in closed form."""
    noise, runs, x = (2.0, 3.0), (4.0, 2.0), np.linspace(-8.0, 8.0, 801)
    epsilon = epsilon_of((best_of(runs[0], noise[0]), best_of(runs[1], noise[1])), DELTA).epsilon
    densities, rest = [], 0.0
    for part, sigma, expected in zip((first, second), noise, runs, strict=True):
        rest += (1 - part**2) / sigma**2
        densities.append([chosen(x, moved, expected) for moved in (0.0, part / sigma)])
    joint = [np.outer(densities[0][i], densities[1][i]) for i in range(2)]
    lost = max(beyond(epsilon, joint[i], joint[1 - i], math.sqrt(rest)) for i in range(2)) * (x[1] - x[0]) ** 2
    assert 0 < lost <= DELTA


def published_noise(epsilon: float, expected_runs: float) -> float:
    """Least noise by theorem 2 of Papernot & Steinke 2022 (eta 1), and the usual conversion from Renyi."""
    orders = np.concatenate([np.linspace(1.01, 10, 400), np.linspace(10, 400, 800)])

    def excess(noise: float) -> float:
        renyi = orders / (2 * noise**2)
        more = (2 * (1 - 1 / orders) * renyi + 2 * math.log(expected_runs) / orders).min()
        whole = renyi + more + math.log(expected_runs) / (orders - 1)
        converted = whole + np.log1p(-1 / orders) - (math.log(DELTA) + np.log(orders)) / (orders - 1)
        return float(converted.min()) - epsilon

    return float(brentq(excess, 0.2, 40))


@pytest.mark.parametrize("expected_runs", [1.5, 3.0, 10.0])
@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_it_costs_less_noise_than_the_published_bound(epsilon: float, expected_runs: float) -> None:
    plan = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="all"),), expected_runs=expected_runs)
    ours = calibrate(Budget(epsilon=epsilon, delta=DELTA), plan).noise_multipliers[0]
    assert ours < published_noise(epsilon, expected_runs)


def test_the_figures_of_the_documentation() -> None:
    query = Query(kind=QueryKind.SUM, purpose="all")
    plain, selecting = (
        calibrate(Budget(epsilon=3.0, delta=DELTA), PrivacyPlan(queries=(query,), expected_runs=runs))
        for runs in (1.0, 3.0)
    )
    alone = plain.noise_multipliers[0]
    assert round(selecting.noise_multipliers[0] / alone, 2) == 1.24
    assert round(published_noise(3.0, 3.0) / alone, 2) == 1.69


@given(st.floats(0.1, 20.0), st.floats(1.01, 50.0), st.integers(1, 4))
def test_calibration_keeps_to_the_budget_and_wastes_nothing(epsilon: float, runs: float, count: int) -> None:
    queries = tuple(Query(kind=QueryKind.SUM, purpose="all", relative_noise=1.0 + i) for i in range(count))
    found = calibrate(Budget(epsilon=epsilon, delta=DELTA), PrivacyPlan(queries=queries, expected_runs=runs))
    assert 0.999 * epsilon <= found.bound.epsilon <= epsilon
    least = [noise / found.noise_multipliers[0] for noise in found.noise_multipliers]
    assert least == pytest.approx([1.0 + i for i in range(count)])


# -- beside others ----------------------------------------------------------------------------------------------


def test_selections_compose_by_products_of_runs_and_sums_of_stretches() -> None:
    whole = (best_of(3.0, 4.0, 12.0), once(5.0), best_of(2.0, 6.0))
    together = 1 / math.sqrt(1 / 16 + 1 / 144 + 1 / 25 + 1 / 36)
    one = 1 / math.sqrt(1 / 16 + 1 / 144)
    expected = analytic_epsilon(together, DELTA / 6) + stretch(3.0, one) + stretch(2.0, 6.0)
    assert epsilon_of(whole, DELTA).epsilon == pytest.approx(expected, rel=1e-12)
    assert epsilon_of(whole, DELTA).delta == DELTA


def test_a_selection_beside_sampled_queries_adds_to_every_accountant() -> None:
    sampled = Mechanism(noise_multiplier=1.5, sampling_rate=0.02, count=50)
    plain = epsilon_of((once(5.0), sampled), DELTA / 3, accountants=("pld",))
    found = epsilon_of((best_of(3.0, 5.0), sampled), DELTA, accountants=("pld",))
    assert found.answers == pytest.approx({k: v + stretch(3.0, 5.0) for k, v in plain.answers.items()})
    assert "pld" in found.answers


def test_more_selections_than_delta_can_bear_are_refused() -> None:
    with pytest.raises(PrivacyError, match="leave nothing of delta"):
        epsilon_of([best_of(100.0, 1000.0)] * 160, DELTA)


def test_noise_at_the_end_of_its_range_is_found() -> None:
    queries = tuple(
        Query(kind=QueryKind.SUM, purpose="all", relative_noise=relative) for relative in (1.0, 1000.0)
    )
    plan = PrivacyPlan(queries=queries, expected_runs=1.01)
    assert calibrate(Budget(epsilon=0.05, delta=DELTA), plan).noise_multipliers[1] <= 1e5


@pytest.mark.parametrize("runs", [0.0, 1.0, -3.0, 101.0, math.nan, math.inf, True])
def test_odd_numbers_of_runs_are_refused(runs: float) -> None:
    began = time.perf_counter()
    with pytest.raises(PrivacyError, match="runs"):
        best_of(runs, 2.0)
    if runs != 1.0 or runs is True:
        with pytest.raises(PrivacyError, match="runs"):
            PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="all"),), expected_runs=runs)
    assert time.perf_counter() - began < 1


def test_sampled_queries_are_refused() -> None:
    query = Query(kind=QueryKind.GRADIENT, purpose="steps", count=10, sampling_rate=0.1)
    with pytest.raises(PrivacyError, match="sampled"):
        calibrate(BUDGET, PrivacyPlan(queries=(query,), expected_runs=2.0))


# -- what is drawn ----------------------------------------------------------------------------------------------


def test_the_number_of_runs_is_geometric() -> None:
    entropy, lengths = bits("runs"), Counter[int]()
    for _ in range(4000):
        count = 1
        while another_run(3.0, entropy=entropy):
            count += 1
        lengths[min(count, 9)] += 1
    expected = [4000 / 3 * (2 / 3) ** (count - 1) for count in range(1, 9)]
    expected.append(4000 - sum(expected))
    assert chisquare([lengths[count] for count in range(1, 10)], expected).pvalue > 1e-3


def test_things_are_drawn_evenly() -> None:
    entropy = bits("things")
    counts = Counter(drawn(7, entropy=entropy) for _ in range(7000))
    assert set(counts) == set(range(7))
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_the_ends_of_the_random_numbers_are_in_range() -> None:
    assert drawn(3, entropy=silent) == 2
    assert drawn(3, entropy=bytes) == 0
    assert not another_run(100.0, entropy=bytes)


# -- the curator ------------------------------------------------------------------------------------------------

PLAN = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="moments"),), expected_runs=3.0)


def others() -> ImageSet:
    """Patients who are not among ``marks(16)``."""
    data = marks(16)
    return ImageSet(
        images=data.images, targets=data.targets, patients=tuple(f"q{i}" for i in range(16)), task=data.task
    )


def test_runs_are_drawn_once_before_the_first_answer_and_kept(tmp_path: Path) -> None:
    first = curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed")
    runs = first.runs(4)
    first.close()
    assert all(0 <= candidate < 4 and 0 <= seed < 2**31 for candidate, seed in runs)
    again = curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed")
    assert again.runs(4) == runs
    assert len(Ledger(tmp_path / "ledger.jsonl").reservations()) == 1
    again.sum(pixels, clip_norm=1.0)
    again.close()
    (tmp_path / "sealed" / "runs.json").unlink()
    with pytest.raises(PrivacyError, match="must not be drawn again"):
        curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed").runs(4)


@pytest.mark.parametrize("record", ["[[0]]", "[]", "[[1, 5]]", "[[-1, 5]]", "{", '"ab"'])
def test_a_damaged_record_of_runs_is_refused(record: str, tmp_path: Path) -> None:
    first = curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed")
    first.runs(1)
    (tmp_path / "sealed" / "runs.json").write_text(record)
    with pytest.raises(PrivacyError, match="damaged"):
        first.runs(1)


def of_three_runs(folder: Path, plan: PrivacyPlan = PLAN) -> PrivateCurator:
    """A curator of which three runs were drawn."""
    own = curator(marks(16), folder, plan=plan, store=folder / "sealed")
    if not (folder / "sealed" / "runs.json").exists():
        (folder / "sealed" / "runs.json").write_text("[[0, 1], [0, 2], [0, 3]]")
    return own


def test_every_run_has_answers_of_its_own_and_all_belong_to_one_reservation(tmp_path: Path) -> None:
    answers: list[Tensor] = []
    for repeat in range(2):
        first = of_three_runs(tmp_path)
        for number in range(3):
            own = first.run(number)
            answers += [own.sum(pixels, clip_norm=1.0), own.score(others(), pixels, clip_norm=1.0)]
            with pytest.raises(PrivacyError, match="nothing more"):
                own.sum(pixels, clip_norm=1.0)
            if number:
                own.close()
        first.close()
        assert len(answers) == 6 * (repeat + 1)
    assert all(torch.equal(answers[i], answers[i + 6]) for i in range(6))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(answers[:6], 2))
    (reservation,) = Ledger(tmp_path / "ledger.jsonl").reservations()
    assert sorted(reservation.sealed) == list(range(6))
    spent = Ledger(tmp_path / "ledger.jsonl").spent()
    assert spent is not None
    assert spent.epsilon == pytest.approx(BUDGET.epsilon, rel=1e-3)


@pytest.mark.parametrize("number", [-1, 3, 57])
def test_a_run_that_was_not_drawn_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no such run"):
        of_three_runs(tmp_path).run(number)
    with pytest.raises(PrivacyError, match="no such run"):
        curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "without a record").run(1)


def test_a_later_run_does_not_take_up_answers_of_another_release(tmp_path: Path) -> None:
    first = of_three_runs(tmp_path)
    later = first.run(1)
    later.sum(pixels, clip_norm=1.0)
    for one in (first, later):
        one.close()
    for path in (tmp_path / "sealed").iterdir():
        if path.is_file():
            path.unlink()
    again = of_three_runs(tmp_path)
    assert again.identity != first.identity
    with pytest.raises(PrivacyError, match="another release"):
        again.run(1)


def test_the_runs_are_not_drawn_again_once_an_answer_was_sealed(tmp_path: Path) -> None:
    own = of_three_runs(tmp_path)
    own.sum(pixels, clip_norm=1.0)
    own.resume(1)  # which deletes the answer
    own.close()
    (tmp_path / "sealed" / "runs.json").unlink()
    with pytest.raises(PrivacyError, match="must not be drawn again"):
        curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed").runs(1)


def test_a_score_has_the_noise_of_a_whole_run(tmp_path: Path) -> None:
    queries = (*PLAN.queries, Query(kind=QueryKind.SUM, purpose="more", count=2, relative_noise=2.0))
    own = of_three_runs(tmp_path, PrivacyPlan(queries=queries, expected_runs=3.0))
    single = [own.noise(position) for position in range(3)]
    assert own.noise(3) == pytest.approx(1 / math.sqrt(sum(1 / noise**2 for noise in single)))

    def nothing(images: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(len(images), 4000)

    found = own.run(1).score(others(), nothing, clip_norm=1.0)
    assert float(found.std()) == pytest.approx(own.noise(3), rel=0.05)


def test_a_score_is_of_others_and_of_plans_that_select(tmp_path: Path) -> None:
    own = curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed")
    with pytest.raises(PrivacyError, match="among those distilled from"):
        own.score(cohort(torch.eye(16)), pixels, clip_norm=1.0)
    (tmp_path / "plain").mkdir()
    plain = curator(marks(16), tmp_path / "plain", store=tmp_path / "plain" / "sealed")
    with pytest.raises(PrivacyError, match="best run is kept"):
        plain.score(others(), pixels, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="best run is kept"):
        plain.runs(2)
    assert not Ledger(tmp_path / "ledger.jsonl").reservations()[0].sealed


def test_the_statement_tells_of_the_selection(tmp_path: Path) -> None:
    own = curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed")
    *queries, selection = own.statement().event
    assert len(queries) == 1
    assert "3 on average" in selection
    assert f"{own.noise(1):.6g}" in selection


def test_a_plan_that_selects_survives_the_ledger(tmp_path: Path) -> None:
    curator(marks(16), tmp_path, plan=PLAN, store=tmp_path / "sealed").close()
    (found,) = Ledger(tmp_path / "ledger.jsonl").reservations()
    assert found.plan == PLAN
    assert found.mechanisms == (best_of(3.0, *found.noise_multipliers),)
    plain = PrivacyPlan(queries=PLAN.queries)
    assert "expected_runs" not in plain.to_json()
    assert PrivacyPlan.from_json(plain.to_json()) == plain
